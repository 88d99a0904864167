"""The real models of chapters 4 and 5: a damaged SmolLM2, the intact model, and one that writes capitals.

The mismatched teacher is the intact model after TUNING["steps"] steps of cross-entropy on its own
completions, rewritten in capital letters: another format, which a program can check.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import diagnose
import lesson
import smollm2
import torch
from transformers import AutoTokenizer

import opd

NEW, LIMIT, HELD_OUT = 20, 56, 8  # tokens of a completion, tokens of a prompt, held-out prompts
TUNING = {"steps": 16, "batch": 8, "completions": 64, "lr": 1e-4, "new": 24}
STEPS = 8
RUN = {"loss": "reverse_kl", "lr": 1e-4, "warmup_steps": 2, "batch_size": 4, "eval_every": 0}


def pair():
    """Paths of smollm2.py's student, teacher (the intact model), train and eval prompts, built once."""
    folder = lesson.ROOT / ".cache" / "smollm2"
    command = None if (folder / "eval.jsonl").exists() else smollm2.missing_packages()
    if command:
        print(f"part real needs more packages: {command}; --only toy needs none", file=sys.stderr)
        sys.exit(2)
    with contextlib.redirect_stdout(io.StringIO()):
        return {name: str(path) for name, path in smollm2.build(folder).items()}


def prompts(split, n=None):
    """The first n rows of "train" or "eval" whose prompt has at most LIMIT tokens."""
    tokenizer = AutoTokenizer.from_pretrained(pair()["student"])
    with open(pair()[split], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if len(opd.encode_prompt(tokenizer, row["prompt"])) <= LIMIT][:n]


def data(smoke):
    """The prompts for opd.Args."""
    names, counts = ("data", "eval_data"), (4, 2) if smoke else (None, HELD_OUT)
    files = [
        lesson.kept_rows(f"{x}_{n}", prompts(x, n)) for x, n in zip(("train", "eval"), counts, strict=True)
    ]
    return dict(zip(names, files, strict=True))


def fine_tune(steps, batch, completions, lr, new):
    """Cross-entropy on the intact model's completions, rewritten in capitals -> model, tokenizer."""
    rows = prompts("train", completions)
    own = lesson.answered(pair()["teacher"], rows, (0,), max_new_tokens=new)
    tokenizer, model = lesson.load(pair()["teacher"])
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        some = [own[(step * batch + i) % completions] for i in range(batch)]
        ids = [tokenizer(x["text"].upper()).input_ids[:new] for x in some]
        ids = [y + x["ids"][-1:] if x["rollout"].ended else y for y, x in zip(ids, some, strict=True)]
        hidden = opd.completion_hidden(model, [x["rollout"].prompt for x in some], ids)  # [N,D]
        tokens = torch.tensor([y for completion in ids for y in completion])  # [N]
        loss = torch.nn.functional.cross_entropy(opd.project(model, hidden), tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, tokenizer


def teacher(smoke):
    """Path of the fine-tuned model, trained once."""

    def write(path):
        for part in fine_tune(**tuning):
            part.save_pretrained(path)

    tiny = {"steps": 1, "batch": 1, "completions": 1, "new": 2}
    tuning = {**TUNING, **tiny} if smoke else TUNING
    return lesson.cached("smollm2_upper_case", write, (fine_tune, prompts, tuning, LIMIT))


def run(name, at, smoke, sft_steps=0, steps=STEPS):
    """Rows of one run of opd.py with the teacher "capitals" or "intact"; kept, as both chapters need some."""
    settings = {**RUN, "max_new_tokens": NEW, "seed": at["seed"], "sft_steps": sft_steps, "steps": steps}
    if smoke:
        settings |= {"sft_steps": min(sft_steps, 1), "steps": 1, "batch_size": 1, "max_new_tokens": 3}
    settings |= {"student": pair()["student"], **data(smoke)}
    settings["teacher"] = teacher(smoke) if name == "capitals" else pair()["teacher"]

    def write(path):
        with lesson.distilled(opd, **settings) as (log, final):
            path.write_text(json.dumps(diagnose.evaluations(log, final, {}, sft_steps + 1)))

    key = {x: Path(y).name if isinstance(y, str) else y for x, y in settings.items()}
    path = lesson.cached(f"smollm2_{name}_run.json", write, (diagnose.evaluations, key))
    return [{**at, **row} for row in json.loads(Path(path).read_text())]
