"""Argument types shared by the benchmarks: argparse reports a bad value in one line, with exit code 2."""

import argparse
from pathlib import Path


def positive(text):
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def models(text):
    """The folder that tutorials/smollm2.py built."""
    for name in ("student/config.json", "teacher/config.json", "train.jsonl"):
        if not (Path(text) / name).is_file():
            raise argparse.ArgumentTypeError(
                f"no {name} in {text}: build it with tutorials/smollm2.py --out {text}"
            )
    return text
