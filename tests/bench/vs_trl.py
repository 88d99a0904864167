"""Time and memory of opd.py against TRL's DistillationTrainer, on the same training step of the same models.

    python tutorials/smollm2.py --out smollm2     # once
    python tests/bench/vs_trl.py smollm2 --prompts 8 --samples 1 --new_tokens 64 --steps 5
    python tests/bench/vs_trl.py smollm2 --prompts 8 --samples 1 --new_tokens 64 --steps 5 --no_end
    python tests/bench/vs_trl.py smollm2 --prompts 12 --samples 1 --new_tokens 192 --steps 5  # mixed lengths
    python tests/bench/vs_trl.py smollm2 --prompts 16 --samples 4 --apart --chunk_tokens 128  # 24 GB
    python tests/bench/vs_trl.py smollm2 --prompts 16 --samples 4 --new_tokens 256 --device cuda

Both run full-vocabulary reverse KL with AdamW, at temperature 1, without recomputation: on a CPU in float32,
on a GPU under bfloat16 autocast, where the peak memory is the GPU's. All rows are scored in one forward
pass, or --micro_batch_size rows at a time (in TRL: that many per device, with gradient accumulation). Each
side is a process of its own, and the two take turns step by step, so that a slow minute of the machine
affects both. The results are medians after one step of warm-up. Completion lengths differ by chance, so
compare the seconds per 1,000 completion tokens; with --no_end no completion ends before the limit, and both
sides do exactly the same work. --loss selects another of our losses; --rival compares it with a second one
instead of with TRL.

On a CPU, the floor is a calculated lower bound: the multiply-adds of the forward and backward passes at the
best matrix rate that this machine reaches now (each prompt is prefilled once, however many samples it has),
and for each decoding step one pass of all weights through memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flags import models, positive

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def wait():
    """Wait until the parent says go; return the time at which it did."""
    if not sys.stdin.readline().strip():
        sys.exit()
    return time.perf_counter()


def report(begin, **row):
    import torch

    row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    row = {"seconds": time.perf_counter() - begin, **row}
    print("ROW " + json.dumps(row), flush=True)


def ours(args):
    import opd

    begin, prompt_tokens, batch_of, record, sample = [0.0], [0], opd.batch_of, opd.record, opd.sample

    def turn(*a):
        begin[0] = wait()
        return batch_of(*a)

    def told(history, row, *a):
        parts = {name: row[name] for name in ("sample_s", "teacher_s", "student_s")}
        counts = {"tokens": row["tokens"], "prompt_tokens": prompt_tokens[0]}
        report(begin[0], **counts, loss=row["loss"], **parts)
        record(history, row, *a)

    def counted(model, prompts, n, stop_ids, *a):
        prompt_tokens[0] = sum(map(len, prompts)) * n
        return sample(model, prompts, n, [] if args.no_end else stop_ids, *a)

    opd.batch_of, opd.record, opd.sample = turn, told, counted
    with tempfile.TemporaryDirectory() as out:
        options = {"batch_size": args.prompts, "samples_per_prompt": args.samples}
        options["micro_batch_size"] = args.micro_batch_size
        paths = {"student": f"{args.folder}/student", "teacher": f"{args.folder}/teacher"}
        paths |= {"data": f"{args.folder}/train.jsonl", "out": f"{out}/run"}
        limits = {
            "chunk_tokens": args.chunk_tokens,
            "max_new_tokens": args.new_tokens,
            "max_prompt_tokens": 128,
            "steps": 10**5,
        }
        options["device"] = args.device
        opd.train(opd.Args(**paths, **options, **limits, loss=args.loss, lr=1e-5, warmup_steps=0))


def trl(args):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(f"{args.folder}/{x}") for x in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(f"{args.folder}/student")
    data = datasets.load_dataset("json", data_files=f"{args.folder}/train.jsonl", split="train")
    prompts = [row["prompt"] for row in data for _ in range(args.samples)]
    seen, begin = {}, [0.0]

    class Turns(TrainerCallback):
        def on_step_begin(self, *a, **k):
            begin[0] = wait()

        def on_step_end(self, *a, **k):
            report(begin[0], **seen)

    class Trainer(DistillationTrainer):
        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            batch = super()._generate_and_score_completions(inputs)
            seen.update(tokens=batch["completion_mask"].sum().item(), sample_s=time.perf_counter() - start)
            return batch

    with tempfile.TemporaryDirectory() as out:
        config = DistillationConfig(
            output_dir=out, beta=1.0, temperature=1.0, max_completion_length=args.new_tokens,
            per_device_train_batch_size=args.micro_batch_size,
            gradient_accumulation_steps=args.prompts * args.samples // args.micro_batch_size,
            use_cpu=args.device == "cpu", bf16=args.device == "cuda", gradient_checkpointing=False,
            learning_rate=1e-5, max_steps=10**5,
            lr_scheduler_type="constant", warmup_steps=0,
            weight_decay=0.0, adam_beta2=0.98, max_grad_norm=1.0, shuffle_dataset=False, save_strategy="no",
            report_to=[], logging_strategy="no", top_p=1.0, top_k=0, disable_tqdm=True,
            generation_kwargs={"min_new_tokens": args.new_tokens} if args.no_end else None,
        )  # fmt: skip
        data = datasets.Dataset.from_dict({"prompt": prompts})
        Trainer(
            model=student, teacher_model=teacher, args=config, train_dataset=data, processing_class=tokenizer,
            callbacks=[Turns()],
        ).train()  # fmt: skip


class Side:
    """A child process that takes one step each time it is asked to."""

    def __init__(self, name):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.name, self.process = name, subprocess.Popen(command, text=True, **pipes)

    def step(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ROW "):
                return json.loads(line[4:])
        sys.exit(f"{self.name} ended early: run it alone with --side {self.name} to see the error")


def floor(args, tokens, prompt_tokens):
    """Lower bound of the seconds of a step: its arithmetic at the best rates that this machine reaches."""
    import torch
    from transformers import AutoConfig

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    spent = []
    for _ in range(40):
        start = time.perf_counter()
        a @ b
        spent.append(time.perf_counter() - start)
    rate = 2048**3 / min(spent)  # multiply-adds per second
    x = torch.ones(2**27)  # 0.5 GB; ones, since pages of zeros would all map to one page in the cache
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        x.sum()
        spent.append(time.perf_counter() - start)
    bandwidth = x.numel() * 4 / min(spent)
    sizes = []
    for name in ("student", "teacher"):
        c = AutoConfig.from_pretrained(f"{args.folder}/{name}")
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        layer = c.hidden_size * (heads * c.hidden_size // c.num_attention_heads + c.hidden_size)
        layer += 3 * c.hidden_size * c.intermediate_size
        sizes.append((layer * c.num_hidden_layers, c.vocab_size * c.hidden_size))
    (body, head), (teacher_body, teacher_head) = sizes
    read = tokens + prompt_tokens / args.samples  # tokens of a scoring pass: no padding, each prompt once
    once = (body + head) * 4 * args.new_tokens / bandwidth  # one pass of all weights per decoding step
    return {
        "rate_gmadds": rate / 1e9,
        "bandwidth_gb": bandwidth / 1e9,
        "sample_s": body * prompt_tokens / args.samples / rate + max(once, (body + head) * tokens / rate),
        "teacher_s": (teacher_body * read + teacher_head * tokens) / rate,
        "student_s": 3 * (body * read + head * tokens) / rate,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=models, help="folder built by tutorials/smollm2.py")
    parser.add_argument("--prompts", type=positive, default=8)
    parser.add_argument("--samples", type=positive, default=1)
    parser.add_argument("--new_tokens", type=positive, default=64)
    parser.add_argument(
        "--micro_batch_size", type=positive, help="rows per scoring forward pass (default: all)"
    )
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--no_end", action="store_true", help="no completion ends before --new_tokens")
    parser.add_argument(
        "--chunk_tokens", type=positive, default=512, help="of opd.py: fewer need less memory, more time"
    )
    parser.add_argument("--loss", default="reverse_kl", help="the loss of opd.py")
    parser.add_argument(
        "--rival", default="trl", help="what to compare with: trl, or the name of another loss of opd.py"
    )
    parser.add_argument("--apart", action="store_true", help="run one after the other, not interleaved")
    parser.add_argument("--alone", action="store_true", help="run opd.py only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--side", help="for child processes: which side to run")
    args = parser.parse_args()
    batch = args.prompts * args.samples
    args.micro_batch_size = args.micro_batch_size or batch
    if batch % args.micro_batch_size:
        parser.error(f"--micro_batch_size {args.micro_batch_size}: must divide the {batch} rows")
    if args.side == "trl":
        return trl(args)
    import torch

    import opd

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: not available here; use cpu")
    for flag, more in (("loss", []), ("rival", ["trl"]), ("side", ["ours", "trl"])):
        value, known = getattr(args, flag), [*more, *opd.LOSSES]
        if value is not None and value not in known:
            parser.error(f"--{flag} {value}: unknown; choose one of {' '.join(known)}")
    if args.side in opd.LOSSES:  # the rival
        args.loss = args.side
    if args.side:
        return ours(args)
    names = ["ours"] if args.alone else ["ours", args.rival]
    rows = {name: [] for name in names}
    for group in [[name] for name in names] if args.apart else [names]:
        sides = [Side(name) for name in group]
        for step in range(args.steps + 1):
            for side in sides:
                row = side.step()
                print(step, side.name, {k: round(v, 3) for k, v in row.items()}, flush=True)
                rows[side.name] += [row] * (step > 0)
        for side in sides:
            side.process.stdin.close()  # the child ends and removes its files
            side.process.wait()
    print(
        f"\n{args.prompts} prompts x {args.samples} x {args.new_tokens} tokens, medians of {args.steps} steps"
    )
    print("| | s / 1,000 tokens | tokens per step | s per step | sampling | teacher | student | peak GB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        mid = {k: statistics.median(r[k] for r in rows[name]) for k in rows[name][0]}
        peak = rows[name][-1]["peak_gb"]  # peak of the process so far
        per_token = statistics.median(1000 * r["seconds"] / r["tokens"] for r in rows[name])
        rest = [
            f"{mid[k]:.3g}" if k in mid else "" for k in ("seconds", "sample_s", "teacher_s", "student_s")
        ]
        print(f"| {name} | {per_token:.3g} | {mid['tokens']:.0f} | {' | '.join(rest)} | {peak:.1f} |")
    if not args.alone:
        cost = {name: [r["seconds"] / r["tokens"] for r in rows[name]] for name in names}
        pairs = sorted(a / b for a, b in zip(cost["ours"], cost[args.rival], strict=True))
        ratio = statistics.median(cost["ours"]) / statistics.median(cost[args.rival])
        print(f"ratio: {ratio:.2f} of these medians; step by step {pairs[0]:.2f} to {pairs[-1]:.2f}")
    if args.device == "cuda":
        return
    tokens = statistics.median(r["tokens"] for r in rows["ours"])
    low = floor(args, tokens, statistics.median(r["prompt_tokens"] for r in rows["ours"]))
    names = ("sample_s", "teacher_s", "student_s")
    mid = [statistics.median(r[k] for r in rows["ours"]) for k in names]
    for name, parts in (
        ("floor", [low[k] for k in names]),
        ("ours / floor", [x / low[k] for x, k in zip(mid, names, strict=True)]),
    ):
        whole = sum(low[k] for k in names) if name == "floor" else sum(mid) / sum(low[k] for k in names)
        print(f"| {name} | | {tokens:.0f} | {' | '.join(f'{x:.1f}' for x in (whole, *parts))} | |")
    print(f"floor: {low['rate_gmadds']:.0f} G multiply-adds/s, {low['bandwidth_gb']:.0f} GB/s")


if __name__ == "__main__":
    main()
