"""One rank and two on this machine with the same global batch: seconds per step, and those of summing the
gradients, with all calls in flight at once, as opd.py does it, and one after the other.

    python tests/bench/scaling.py smollm2               # the folder built by tutorials/smollm2.py

It also prints an estimate of the memory of each GPU of an 8-GPU node, for a student of 1.7 B and a teacher of
8.2 B parameters. The estimate is arithmetic, not a measurement.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flags import models, positive

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def rank():
    """opd.py with a timer around every all-reduce; rank 0 prints one line per step."""
    import opd

    spent, begin, batch_of, record = [0.0], [0.0], opd.batch_of, opd.record
    together = opd.all_reduce

    def timed(*tensors):
        start = time.perf_counter()
        if os.environ["SCALING_RANK"] == "one by one":
            for tensor in tensors:
                together(tensor)
        else:
            together(*tensors)
        spent[0] += (time.perf_counter() - start) * (len(tensors) > 1)
        return tensors[0]

    def started(*inputs):
        begin[0], spent[0] = time.perf_counter(), 0.0
        return batch_of(*inputs)

    def told(history, row, out):
        record(history, row, out)
        if opd.ranks()[0] == 0:
            total = time.perf_counter() - begin[0]
            print("ROW " + json.dumps({"s": total, "sum_s": spent[0], "tokens": row["tokens"]}))

    opd.all_reduce, opd.batch_of, opd.record = timed, started, told
    opd.main()


def measure(args, ranks, how):
    with tempfile.TemporaryDirectory() as out:
        flags = {name: f"{args.folder}/{name}" for name in ("student", "teacher")}
        flags |= {"data": f"{args.folder}/train.jsonl", "out": f"{out}/run", "loss": "reverse_kl", "lr": 1e-5}
        flags |= {"batch_size": args.batch_size, "micro_batch_size": args.batch_size, "steps": args.steps + 1}
        flags |= {"max_prompt_tokens": 128, "max_new_tokens": args.new_tokens, "device": "cpu"}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        threads = str(max(1, os.cpu_count() // ranks))
        environment = {**os.environ, "SCALING_RANK": how, "OMP_NUM_THREADS": threads}
        command = [*launch, str(ranks), __file__, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")][1:]
    if done.returncode or not rows:
        sys.exit(done.stderr[-2000:])
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def estimate(student, teacher):
    """{part: GB per GPU}, from the numbers of parameters in billions."""
    return {
        "student's weights, float32": 4 * student,
        "gradients, float32": 4 * student,
        "AdamW, two moments, float32": 8 * student,
        "bfloat16 copies within a forward pass": 2 * student,
        "teacher, bfloat16": 2 * teacher,
        "second copy of the teacher's vocabulary projection, float32": 4 * 152_000 * 4096 / 1e9,
        "activations with --gradient_checkpointing, 4 rows x 5,120 tokens": 4 * 5120 * 2048 * 28 * 2 / 1e9,
        "KV cache of sampling, 8 rows x 5,120 tokens": 8 * 5120 * 28 * 2 * 8 * 128 * 2 / 1e9,
        "a chunk's logits, 512 x 152k, eight float32 tensors": 512 * 152_000 * 4 * 8 / 1e9,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=models, help="folder built by tutorials/smollm2.py")
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--new_tokens", type=positive, default=32)
    parser.add_argument("--steps", type=positive, default=5)
    args = parser.parse_args()
    print("| ranks | gradients | s per step | s summing gradients |\n|---|---|---|---|", flush=True)
    for ranks, how in ((1, "together"), (2, "together"), (2, "one by one")):
        row = measure(args, ranks, how)
        print(f"| {ranks} | {how} | {row['s']:.1f} | {row['sum_s']:.2f} |", flush=True)
    print("\nEstimated GB per GPU; student 1.7 B (28 layers, width 2,048, 8 KV heads of 128), teacher 8.2 B:")
    parts = estimate(1.7, 8.2)
    for name, size in parts.items():
        print(f"| {name} | {size:.1f} |")
    print(f"| sum | {sum(parts.values()):.0f} |")


if __name__ == "__main__":
    rank() if os.environ.get("SCALING_RANK") else main()
