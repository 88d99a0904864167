"""The runs on SmolLM2-135M-Instruct: as its own teacher, and as the teacher of a copy without five layers."""

import json
import sys
from pathlib import Path

import lesson
import smollm2

import opd

SMOL, K, STEPS = lesson.ROOT / ".cache" / "smollm2", 20, 5
REQUESTS = ("Write a short thank-you note to a friend who helped me move.", "What is a good breakfast?")
METRICS = {"value": "loss", "reverse_kl": "reverse_kl", "entropy": "student_entropy", "mass": "student_mass"}


def prompts(smoke):
    """Short questions keep the steps short. The held-out prompts: the two requests and six questions."""
    found = {}
    for name in ("train", "eval"):
        rows = map(json.loads, (SMOL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        found[name] = [row for row in rows if len(row["prompt"][0]["content"]) <= 100]
    asked = [{"prompt": [{"role": "user", "content": x}], "answer": ""} for x in REQUESTS]
    asked += [] if smoke else found["eval"][:6]
    data = lesson.kept_rows("smollm2_train", found["train"])
    return {"data": data, "eval_data": lesson.kept_rows("smollm2_held_out", asked)}


def by_token(student, teacher, seed, length):
    """[[token, reverse KL at its position], ...] of the first request's completion in opd.py's evaluation.

    The tokens that make up one character, such as an emoji, are joined and their KL is added.
    """
    request = {"prompt": [{"role": "user", "content": REQUESTS[0]}]}
    one = lesson.answered(student, [request], (~seed, 0), max_new_tokens=length)[0]["rollout"]
    (tokenizer, p), (_, q) = lesson.load(student), lesson.load(teacher)
    log_p, log_q = (lesson.log_probs(model, [one.prompt], [one.completion]) for model in (p, q))
    kls = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    found, ids, total = [], [], 0
    for token, kl in zip(one.completion, kls, strict=True):
        ids, total = [*ids, token], total + kl
        if "\ufffd" not in (text := tokenizer.decode(ids)) or len(ids) == 4:
            found.append([text.strip() or "\\n", round(total, 2)])
            ids, total = [], 0
    return found


def train(part, loss, lr, seed, steps, smoke):
    """One run of opd.py -> the rows of its log, with the completions of the two requests."""
    student, teacher = SMOL / ("teacher" if part == "real" else "student"), SMOL / "teacher"
    batch, length, steps = (2, 3, 1) if smoke else (4, 20, steps)
    files = dict(student=str(student), teacher=str(teacher), **prompts(smoke))
    size = dict(batch_size=batch, micro_batch_size=8, max_new_tokens=length, steps=steps, warmup_steps=1)
    run = dict(loss=loss, topk=K, lr=lr, seed=seed, eval_every=2 if part == "real" else steps)
    with lesson.distilled(opd, **files, **size, **run) as (history, final):
        names = METRICS | {"held_out_kl": "eval_reverse_kl"}
        head = {"loss": loss, "k": K, "lr": lr, "seed": seed}
        rows = [{**head, "step": x["step"], **{n: x.get(m, "") for n, m in names.items()}} for x in history]
        samples = (Path(final).parent / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        for sample in map(json.loads, samples):
            row, which = next(x for x in rows if x["step"] == sample["step"]), sample["row"]
            if which < len(REQUESTS):
                row |= {f"text_{which}": sample["completion"], f"kl_{which}": sample["mean_kl"]}
        if (part, loss, seed) == ("real", "topk", 0):
            rows[-1]["tokens"] = json.dumps(by_token(final, teacher, seed, length))
    rows[-1]["change"] = rows[-1]["held_out_kl"] - rows[0]["held_out_kl"]
    return rows


def run(jobs, smoke):
    if command := smollm2.missing_packages():
        print(f"this part needs more packages: {command}", file=sys.stderr)
        sys.exit(2)
    smollm2.build(SMOL)
    prompts(smoke)
    return sum(lesson.in_parallel(train, [(*job, smoke) for job in jobs], "SmolLM2"), [])


def completions(rows):
    """Lines of a table: the completions of the two requests with mean reverse KL; any: before training."""
    lines = []
    for row in rows:
        if row["text_0"] != "":
            loss = f"`{row['loss']}`" if row["step"] else "any"
            said = (f"{lesson.quoted(str(row[f'text_{i}']))} ({row[f'kl_{i}']:.2f})" for i in (0, 1))
            lines.append([loss, f"{row['step']:.0f}", *said])
    return lesson.table(["loss", "steps", *REQUESTS], *lines)
