"""Biased top-k, its stop-gradient fix, and where the fix still loses mass.

Parts of metrics.csv. Row s of a run has the metrics of step s, measured on its batch before the update (value
is the loss), and the reverse KL on the held-out prompts after the update:

    real     SmolLM2-135M-Instruct as its own teacher: naive top-k against sg_topk
    damaged  the same model without five of its layers learns from the intact model: five losses, two rates
    toy      arm state: the logits of one next-token distribution, with S held fixed; mass = p(S) / q(S)
             arm self: the toy student as its own teacher; arm map: the toy student and its better teacher
"""

import itertools
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import real_model  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402

TOPK = ("topk", "sg_topk", "norm_topk", "tail_topk")
LOSSES = (*TOPK, "reverse_kl")
COLOUR = dict(zip(LOSSES, (lesson.COLOURS[i] for i in (1, 0, 2, 3, 6)), strict=True))
RATES = (3e-5, 1e-4)  # peak learning rates on the real model
SEEDS, TOY_STEPS = (0, 1, 2), 75
TOY_LR, KS = 1e-3, (1, 2, 4)


def run_real(smoke):
    jobs = [("real", "topk", 3e-5, seed, real_model.STEPS) for seed in SEEDS]
    jobs.append(("real", "sg_topk", 3e-5, 0, 2))  # its gradient is exactly 0: one seed shows that
    return real_model.run(jobs[:1] if smoke else jobs, smoke)


def run_damaged(smoke):
    arms = [(loss, RATES[0]) for loss in ("topk", "sg_topk", "norm_topk")] + [(x, RATES[1]) for x in LOSSES]
    jobs = [("damaged", *arm, seed, real_model.STEPS) for arm in arms for seed in SEEDS]
    return [] if smoke else real_model.run(jobs, smoke)  # the code is that of real


def one_state(seed, steps, k=8, vocab=64):
    """Minimise each loss over the logits of one state, from student = teacher; S is the teacher's top k."""
    generator = torch.Generator().manual_seed(seed)
    log_q = (2.5 * torch.randn(1, vocab, generator=generator)).double().log_softmax(-1)
    q, ids = log_q.topk(k)
    for name in TOPK:
        logits = log_q.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([logits], 0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            opd.LOSSES[name][1](None, logits, q, ids).sum().backward()
            optimizer.step()
        p = logits.detach().log_softmax(-1).gather(-1, ids)
        mass = (p.exp().sum() / q.exp().sum()).item()
        yield {"arm": "state", "loss": name, "k": k, "lr": 0.01, "seed": seed, "step": steps, "mass": mass}


def toy_run(arm, loss, k, seed, smoke):
    """One run of opd.py on the toy -> its first and its last row, with the exact accuracy on new problems."""
    student, steps, rows = lesson.student(seed, smoke), 2 if smoke else TOY_STEPS, []
    teacher = student if arm == "self" else lesson.teacher(seed, smoke)
    size = dict(batch_size=32, micro_batch_size=32, max_new_tokens=32, steps=steps, eval_every=0)
    data = lesson.kept_rows(f"A_{seed}_8000", toy.rows(8000, seed=seed))
    run = dict(data=data, loss=loss, topk=k or 1, lr=TOY_LR, seed=seed)
    with lesson.distilled(opd, student=student, teacher=teacher, **size, **run) as (history, final):
        for x, path in ((history[0], student), (history[-1], final)):
            head = {"arm": arm, "loss": loss, "k": k, "lr": TOY_LR, "seed": seed, "step": x["step"]}
            rows.append({**head, **{n: x[m] for n, m in real_model.METRICS.items()}})
            problems = toy.rows(32 if smoke else 512, held_out=True, seed=seed)
            rows[-1]["accuracy"] = toy.accuracy(lesson.load(path)[1], problems)
    return rows


def run_toy(smoke):
    seeds = SEEDS[:1] if smoke else SEEDS
    for make in (lesson.teacher, lesson.student):
        lesson.in_parallel(make, [(s, smoke) for s in seeds], f"toy {make.__name__}s")
    rows = [x for s in seeds for x in one_state(s, 20 if smoke else 3000)]
    jobs = [("self", loss, 4, s, smoke) for loss in TOPK[:2] for s in seeds]
    jobs += [("map", "reverse_kl", 0, s, smoke) for s in seeds]
    for loss, k in itertools.product(TOPK, KS):
        if (loss, k) != ("norm_topk", 1):  # no gradient at all
            jobs += [("map", loss, k, s, smoke) for s in seeds]
    return rows + sum(lesson.in_parallel(toy_run, jobs[:3] if smoke else jobs, "toy runs"), [])


def plot(rows, path):
    title = "With naive top-k, a falling loss does not mean a falling reverse KL"
    figure, axes = lesson.panels(title, [["real", "damaged"]], (10, 4.2))
    lines = [("topk", "reverse_kl", "topk: true KL", "-"), ("topk", "value", "topk: loss", "--")]
    for loss, column, label, style in [*lines, ("sg_topk", "reverse_kl", "sg_topk: both", "-")]:
        if ours := lesson.select(rows, part="real", loss=loss):
            lesson.curve(axes["real"], ours, "step", column, COLOUR[loss], label, lw=2.5, ls=style)
    axes["real"].set_title("SmolLM2 as its own teacher, k = 20", fontsize=11, loc="left")
    axes["real"].set(xlabel="step", ylabel="nats per token", xlim=(0.8, 6.6), xticks=range(1, 6))
    panel = axes["damaged"]
    for x, loss in enumerate(LOSSES):
        for lr, shift, fill in ((3e-5, -0.15, "none"), (1e-4, 0.15, COLOUR[loss])):
            runs = lesson.select(rows, part="damaged", loss=loss, lr=lr, step=real_model.STEPS)
            style = {"s": 60, "c": fill, "edgecolors": COLOUR[loss], "linewidths": 1.5}
            panel.scatter([x + shift] * len(runs), [r["change"] for r in runs], **style)
    panel.axhline(0, color="0.5", lw=1)
    panel.set_title("Damaged student, rate 3e-5 (open), 1e-4 (filled)", fontsize=11, loc="left")
    panel.set(ylabel="change of held-out reverse KL, nats", xlim=(-0.5, 4.5))
    panel.set_xticks(range(len(LOSSES)), LOSSES)
    for one in axes.values():
        one.tick_params(labelsize=10)
        for text in (one.xaxis.label, one.yaxis.label, *one.texts):
            text.set_fontsize(10)
    lesson.save(figure, path)


def cells(rows, *columns, digits=2, **where):
    """Mean (min to max) of each column over the selected rows; empty where no row has it."""
    ours = lesson.select(rows, **where)
    found = [[r[column] for r in ours if r[column] != ""] for column in columns]
    return [lesson.spread(x, digits) if x else "" for x in found]


def rate(lr):
    return f"{lr:.0e}".replace("-0", "-")


def tables(rows):
    steps, last = real_model.STEPS, max(r["step"] for r in rows if r["arm"] == "map")
    words = lesson.select(rows, part="real", loss="topk", seed=0)
    words = [r for r in words if r["step"] in (0, steps)]
    tokens = json.loads(next(r["tokens"] for r in rows if r["tokens"]))[:12]
    damaged, stable = [], []
    for loss in LOSSES:
        of = {"part": "damaged", "loss": loss}
        line = [cells(rows, "change", lr=lr, step=steps, **of)[0] for lr in RATES]
        for column, step in (("value", 1), ("value", steps), ("mass", steps)):
            line += cells(rows, column, lr=RATES[-1], step=step, **of)
        damaged.append([f"`{loss}`", *line])
        of = {"arm": "map", "loss": loss, "step": last}  # the full KL has the rows k = 0
        line = [cells(rows, "accuracy", k=k if loss in TOPK else 0, **of)[0] for k in KS]
        stable.append([f"`{loss}`", *line])
    changes = [f"change at {rate(lr)}" for lr in RATES]
    at_end = [f"{name}, step {steps}" for name in ("loss", "mass on S")]
    return {
        "words": real_model.completions(words),
        "tokens": [", ".join(f"{lesson.quoted(x)} {kl:.2f}" for x, kl in tokens)],
        "damaged": lesson.table(["loss", *changes, "loss, step 1", *at_end], *damaged),
        "map": lesson.table(["loss", *(f"k = {k}" for k in KS)], *stable),
    }


if __name__ == "__main__":
    lesson.main(__file__, {"real": run_real, "damaged": run_damaged, "toy": run_toy}, plot, tables)
