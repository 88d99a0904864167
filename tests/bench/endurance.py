"""Memory and open files do not grow over a long run, and a million prompts cost little time and memory.

python tests/bench/endurance.py --steps 2000        # peak memory and open files at step 200 and at the end
python tests/bench/endurance.py --rows 1000000      # seconds until the first step, and peak memory
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flags import positive

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import PROMPTS, make_model, make_tokenizer, save, write_rows  # noqa: E402

SMALL = {"batch_size": 8, "max_prompt_tokens": 32, "max_new_tokens": 16, "device": "cpu", "lr": 1e-4}


def models(folder):
    return {
        "student": save(folder / "student", make_model(0), make_tokenizer()),
        "teacher": save(folder / "teacher", make_model(1, width=48), make_tokenizer()),
    }


def soak(steps, folder):
    import opd

    paths = {**models(folder), "data": write_rows(folder / "train.jsonl", [{"prompt": p} for p in PROMPTS])}
    counted, record = {}, opd.record

    def count(history, row, *inputs):
        record(history, row, *inputs)
        counted[row["step"]] = len(os.listdir("/proc/self/fd"))

    opd.record = count
    begin = time.perf_counter()
    rows = opd.train(
        opd.Args(**SMALL, **paths, steps=steps, eval_every=0, save_every=100, out=str(folder / "run"))
    )
    early, late = rows[min(200, steps) - 1], rows[-1]
    print(f"{steps} steps in {time.perf_counter() - begin:.0f} s, a checkpoint every 100 steps")
    for row in (early, late):
        print(
            f"step {row['step']}: peak memory {row['peak_mem_gb']:.4f} GB, {counted[row['step']]} files open"
        )
    growth = late["peak_mem_gb"] / early["peak_mem_gb"] - 1
    print(f"growth {100 * growth:.2f} %")
    return growth < 0.02 and counted[late["step"]] <= counted[early["step"]]


def scale(n, folder):
    with open(folder / "train.jsonl", "w") as file:
        for i in range(n):
            file.write(json.dumps({"prompt": f"^{i % 1000}+{i // 1000}=", "solution": "ab" * 50}) + "\n")
    print(f"{n} rows, {(folder / 'train.jsonl').stat().st_size / 1e6:.0f} MB")
    flags = {**SMALL, **models(folder), "data": folder / "train.jsonl", "steps": 2, "eval_every": 0}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    good = True
    for which in ("first", "second"):
        out, environment = folder / which, {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
        begin = time.perf_counter()
        command = [sys.executable, str(ROOT / "opd.py"), *words, "--out", str(out)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        log = out / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n")) and process.poll() is None:
            time.sleep(0.05)
        seconds = time.perf_counter() - begin
        process.wait()
        peak = json.loads(log.read_text().splitlines()[-1])["peak_mem_gb"]
        print(f"{which} time: {seconds:.1f} s until step 1 is logged, imports included; peak {peak:.2f} GB")
        good = good and peak < 2
    return good


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--steps", type=positive)
    what.add_argument("--rows", type=positive)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = soak(args.steps, Path(folder)) if args.steps else scale(args.rows, Path(folder))
    sys.exit(not good)


if __name__ == "__main__":
    main()
