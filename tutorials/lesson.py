"""What the chapters share: their modes, the CSV, the numbers in their README, and the check of their claims.

    python tutorials/NN_name/run.py            # in full: metrics.csv, figure.png, the README's numbers
    python tutorials/NN_name/run.py --smoke    # seconds: the same code on a small scale, nothing kept
    python tutorials/NN_name/run.py --plot     # figure.png and the README's numbers, from metrics.csv
    python tutorials/NN_name/run.py --check    # metrics.csv against expected.json, README against that

expected.json is a list of claims. Each takes a number from the CSV, or the difference of two, and bounds it:

    {"claim": "naive top-k ruins the student", "take": "max accuracy where arm=topk step=150", "below": 0.2}
    {"claim": "the fix saves it", "take": "min accuracy where arm=sg_topk step=150",
     "minus": "max accuracy where arm=topk step=150", "above": 0.3}
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

TAKE = {"min": min, "max": max, "mean": statistics.fmean, "median": statistics.median, "only": lambda x: x[0]}


def write_csv(path, rows):
    """Rows (dicts of like keys) as CSV, floats with 6 significant digits."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path):
    """The same rows back; what reads as a number is one."""

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def select(rows, **where):
    """The rows whose columns have these values."""
    return [row for row in rows if all(row[k] == v for k, v in where.items())]


def take(rows, expression):
    """A number out of rows: 'max accuracy where arm=topk step=150'."""
    head, _, conditions = expression.partition(" where ")
    how, column = head.split()
    where = dict(condition.split("=") for condition in conditions.split())
    found = [row[column] for row in rows if all(str(row[k]) in (v, f"{v}.0") for k, v in where.items())]
    if not found or (how == "only" and len(found) > 1):
        raise ValueError(f"{expression!r}: {len(found)} rows")
    return TAKE[how](found)


def check(rows, claims):
    """Print each claim with its number -> whether all hold."""
    good = True
    for claim in claims:
        number = take(rows, claim["take"]) - (take(rows, claim["minus"]) if "minus" in claim else 0)
        bounds = {side: claim[side] for side in ("above", "below") if side in claim}
        holds = (
            bounds
            and number > bounds.get("above", -float("inf"))
            and number < bounds.get("below", float("inf"))
        )
        asked = ", ".join(f"{side} {bound:g}" for side, bound in bounds.items())
        print(f"{'ok  ' if holds else 'FAIL'} {claim['claim']}: {number:.4g} ({asked})")
        good = good and bool(holds)
    return good


def with_numbers(text, tables):
    """README text with each table (name -> lines) between its markers <!-- name --> and <!-- /name -->."""
    for name, lines in tables.items():
        head, rest = text.split(f"<!-- {name} -->\n", 1)
        _, tail = rest.split(f"<!-- /{name} -->", 1)
        text = f"{head}<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- /{name} -->{tail}"
    return text


def spread(values, digits=2):
    """mean (min to max), as the tables show it."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main(file, run, plot, tables):
    """run(smoke) -> rows; plot(rows, path of the PNG); tables(rows) -> {name: lines of Markdown}."""
    parser = argparse.ArgumentParser(usage=f"{Path(file).name} [--smoke | --plot | --check]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--smoke", action="store_true", help="seconds, small scale, nothing kept")
    mode.add_argument("--plot", action="store_true", help="figure and README numbers from metrics.csv")
    mode.add_argument("--check", action="store_true", help="metrics.csv against expected.json and README.md")
    args, folder, begin = parser.parse_args(), Path(file).resolve().parent, time.perf_counter()
    if args.smoke:
        with tempfile.TemporaryDirectory() as aside:
            rows = run(smoke=True)
            write_csv(Path(aside) / "metrics.csv", rows)
            rows = read_csv(Path(aside) / "metrics.csv")
            plot(rows, Path(aside) / "figure.png")
            tables(rows)
        print(f"smoke: {len(rows)} rows, {time.perf_counter() - begin:.0f} s")
        return
    if not (args.plot or args.check):
        write_csv(folder / "metrics.csv", run(smoke=False))
        print(f"{time.perf_counter() - begin:.0f} s")
    rows, readme = read_csv(folder / "metrics.csv"), folder / "README.md"
    text = readme.read_text()
    good = check(rows, json.loads((folder / "expected.json").read_text()))
    if args.check:
        if with_numbers(text, tables(rows)) != text:
            print("FAIL README.md does not have metrics.csv's numbers: run with --plot")
            good = False
    else:
        plot(rows, folder / "figure.png")
        readme.write_text(with_numbers(text, tables(rows)))
    if not good:
        sys.exit(1)
