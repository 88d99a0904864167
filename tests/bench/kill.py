"""SIGKILL at random moments, also during a save; after --resume the result is that of an undisturbed run.

    python tests/bench/kill.py --kills 20 --seed 0      # a few minutes

The models are tiny and random, and a checkpoint is written after every step, so that some of the kills fall
into a save. After the kills of a run, --resume finds the newest whole checkpoint and completes the run. The
final weights must equal those of an undisturbed run bit for bit, and metrics.jsonl must hold every step once.
Some runs are killed twice.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from flags import positive

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from conftest import PROMPTS, SMALL, make_model, make_tokenizer, save, write_rows  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import opd  # noqa: E402

STEPS = 12


def start(paths, out, resume):
    """A child process that trains. It is forked, since importing torch would take longer than the run."""
    child = os.fork()
    if child:
        return child
    with open(f"{out}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    options = {**SMALL, **paths, "steps": STEPS, "save_every": 1, "keep": 3}
    opd.train(opd.Args(**options, out=str(out), resume=resume))
    os._exit(0)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, in_saving, done = random.Random(args.seed), 0, 0
    torch.set_num_threads(1)  # a forked process has only one
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = {
            "student": save(folder / "student", make_model(0), make_tokenizer()),
            "teacher": save(folder / "teacher", make_model(1, width=48), make_tokenizer()),
            "data": write_rows(folder / "train.jsonl", [{"prompt": p} for p in PROMPTS]),
        }
        begin = time.perf_counter()
        assert end(start(paths, folder / "whole", False)) == 0, (folder / "whole.log").read_text()
        seconds = time.perf_counter() - begin
        wanted = load_file(folder / "whole" / "final" / "model.safetensors")
        run = 0
        while done < args.kills:
            run += 1
            out, resume = folder / f"run{run}", False
            for _ in range(rng.choice((1, 1, 2))):  # a resumed run can be killed again
                child = start(paths, out, resume)
                time.sleep(rng.uniform(0.1, 0.95) * seconds)
                os.kill(child, signal.SIGKILL)
                killed = end(child) == -signal.SIGKILL  # otherwise it had already finished
                done, resume = done + killed, True
                in_saving += killed and bool(list(out.glob(".*.tmp")))
            code = end(start(paths, out, True))
            assert code == 0, (folder / f"run{run}.log").read_text()
            got = load_file(out / "final" / "model.safetensors")
            assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted), run
            steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            assert steps == list(range(1, STEPS + 1)), steps
            print(f"run {run}: {done} kills so far, {in_saving} during a save; same result", flush=True)
    print(f"seed {args.seed}: {done} kills in {run} runs, {in_saving} during a save; all results the same")


if __name__ == "__main__":
    main()
