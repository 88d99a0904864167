"""Naive top-k, its stop-gradient fix, and where the fix still loses mass: one state, a real model, a toy map.

Parts of metrics.csv (self and map: first and last step only):
    state    one next-token distribution with S held fixed, after convergence; mass = p(S) / q(S)
    real     SmolLM2-135M-Instruct as its own teacher; words: its completion of request number `seed`
    damaged  the same model without five of its layers learns from the intact one
    self     the toy student as its own teacher; map: with its better teacher, loss x k x learning rate
"""

import itertools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import smollm2  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402

TOPK = ("topk", "sg_topk", "norm_topk", "tail_topk")
LOSSES = (*TOPK, "reverse_kl")
COLOUR = dict(zip(LOSSES, (lesson.COLOURS[i] for i in (1, 0, 2, 3, 6)), strict=True))
TITLE = "Naive top-k: the loss falls while the true reverse KL rises"
SEEDS, KS, LRS = (0, 1, 2), (1, 2, 4), (3e-4, 1e-3)
SMOL = lesson.ROOT / ".cache" / "smollm2"
REQUESTS = ("Write a short thank-you note to a friend who helped me move.", "What is a good breakfast?")
METRICS = {"value": "loss", "reverse_kl": "reverse_kl", "entropy": "student_entropy", "mass": "student_mass"}
COLUMNS = (*"part loss k lr seed step".split(), *METRICS, "accuracy", "text")


def row(*head, **measured):
    measured = {name: round(x, 4) if isinstance(x, float) else x for name, x in measured.items()}
    return {**dict.fromkeys(COLUMNS, ""), **dict(zip(COLUMNS, head, strict=False)), **measured}


def one_state(seed, steps, k=8, vocab=64):
    """Gradient descent on the logits of one state from student = teacher; S is fixed, the teacher's top k."""
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
        yield row("state", name, k, 0.01, seed, steps, mass=(p.exp().sum() / q.exp().sum()).item())


def words(path, *head):
    """Rows with the completions of the model in a folder, always sampled with the same random numbers."""
    asked = [{"prompt": [{"role": "user", "content": x}]} for x in REQUESTS]
    for i, one in enumerate(lesson.answered(path, asked, (7,))):
        yield row("words", *head[:3], i, head[3], text=" ".join(one["text"].split()))


def arm(part, loss, k, lr, seed, steps, smoke):
    """One run of opd.py -> its rows."""
    smol = part in ("real", "damaged")
    roles = {"real": ("teacher", "teacher"), "self": ("student", "student")}.get(part, ("student", "teacher"))
    student, teacher = (str(SMOL / x) if smol else getattr(lesson, x)(seed, smoke) for x in roles)
    data = SMOL / "train.jsonl" if smol else lesson.kept_rows(f"A_{seed}_8000", toy.rows(8000, seed=seed))
    batch = 2 if smoke else 8 if smol else 32
    size = dict(batch_size=batch, micro_batch_size=batch, max_new_tokens=4 if smoke else 32)
    stage = (steps + 1) // 2 if (part, loss, seed) == ("real", "topk", 0) else 0
    files = dict(student=student, teacher=teacher, data=str(data), save_every=stage, keep=9)
    run = dict(loss=loss, topk=k or 1, lr=lr, seed=seed, steps=steps)
    with lesson.distilled(opd, **files, **size, **run) as (history, final):
        kept = history if smol else (history[0], history[-1])
        rows = [row(part, loss, k, lr, seed, x["step"], **{n: x[METRICS[n]] for n in METRICS}) for x in kept]
        for one, path in zip(rows, () if smol else (student, final), strict=False):
            right = toy.accuracy(lesson.load(path)[1], toy.rows(32 if smoke else 512, True, seed=seed))
            one["accuracy"] = round(right, 4)
        for step in sorted({0, stage, steps}) if stage else ():
            path = Path(final).parent / f"step_{step:06d}" if step else student
            rows += words(path, loss, k, lr, step)
    return rows


def run(smoke):
    if command := smollm2.missing_packages():
        print(f"this chapter needs more packages: {command}", file=sys.stderr)
        sys.exit(2)
    smollm2.build(SMOL)
    seeds = SEEDS[:1] if smoke else SEEDS
    rows = [x for s in seeds for x in one_state(s, 20 if smoke else 3000)]
    for make in (lesson.teacher, lesson.student):
        lesson.in_parallel(make, [(s, smoke) for s in seeds], "toy models")
    jobs = [("real", "topk", 20, 3e-5, s, 8) for s in seeds]
    jobs += [("damaged", x, 20, 1e-4, s, 8) for x in ("sg_topk", "tail_topk", "reverse_kl") for s in seeds]
    jobs += [("real", "sg_topk", 20, 3e-5, s, 2) for s in seeds]
    jobs += [("self", x, 4, 1e-3, s, 75) for x in TOPK[:2] for s in seeds]
    jobs += [("map", "reverse_kl", 0, lr, s, 75) for lr in LRS for s in seeds]
    for x, k, lr in itertools.product(TOPK, KS, LRS):
        if (x, k) != ("norm_topk", 1):  # no gradient at all
            jobs += [("map", x, k, lr, s, 75) for s in seeds]
    jobs = [(*job[:5], 1) for job in (jobs[0], jobs[-1])] if smoke else jobs
    return rows + sum(lesson.in_parallel(arm, [(*job, smoke) for job in jobs], "runs"), [])


def ends(rows, column, **where):
    """The values of a column at the last step of each selected run."""
    ours = lesson.select(rows, **where)
    return [r[column] for r in ours if r["step"] == max(x["step"] for x in ours)]


def plot(rows, path):
    figure, axes = lesson.panels(TITLE, [["real", "damaged"]], (10, 4.2))
    lines = [("real", "topk", "reverse_kl", "topk: true KL", "-")]
    lines += [("real", "topk", "value", "topk: loss", "--"), ("real", "sg_topk", "reverse_kl", "", "-")]
    lines += [("damaged", x, "mass", x, "-") for x in LOSSES]
    for part, loss, column, label, style in lines:
        if ours := lesson.select(rows, part=part, loss=loss):
            lesson.curve(axes[part], ours, "step", column, COLOUR[loss], label, lw=2.5, ls=style)
    axes["real"].text(1, 0.02, "sg_topk: both 0", color=COLOUR["sg_topk"])
    heads = {"real": ("SmolLM2 as its own teacher, k = 20", "nats per token")}
    heads["damaged"] = "damaged student, intact teacher, k = 20", "student's mass on its top 20 tokens"
    for panel, (head, label) in ((axes[part], heads[part]) for part in heads):
        panel.set_title(head, fontsize=11, loc="left")
        panel.set(xlabel="step", ylabel=label, xlim=(0.8, 11), xticks=range(1, 9))
        panel.tick_params(labelsize=10)
        for text in (panel.xaxis.label, panel.yaxis.label, *panel.texts):
            text.set_fontsize(10)
    lesson.save(figure, path)


def tables(rows):
    def numbers(*columns, digits=2, **where):
        found = [ends(rows, column, **where) for column in columns]
        return [lesson.spread(x, digits) if x else "" for x in found]

    names, curves, stable = ("loss", "true reverse KL", "entropy", "mass on S"), [], []
    for part, loss, step in itertools.product(("real", "damaged"), LOSSES, (1, 2, 4, 8)):
        cells = numbers(*METRICS, digits=3, part=part, loss=loss, step=step)
        curves += [[part, f"`{loss}`", step, *cells]] if any(cells) else []
    for name, k in itertools.product(LOSSES, (0, *KS)):
        cells = [numbers("accuracy", part="map", loss=name, k=k, lr=lr)[0] for lr in LRS]
        stable += [[f"`{name}`", k or "all", *cells]] if any(cells) else []
    said = {x: lesson.select(rows, part="words", step=x) for x in (0, 4, 8)}
    rest = [[f"`{x}`", *numbers("mass", digits=3, part="state", loss=x)] for x in TOPK]
    own = [[f"`{x}`", *numbers("accuracy", *METRICS, part="self", loss=x)] for x in TOPK[:2]]
    words = [[x, *(lesson.quoted(r["text"]) for r in said[x])] for x in said]
    return {
        "state": lesson.table(["loss", "p(S) / q(S) after convergence"], *rest),
        "curves": lesson.table(["part", "loss", "step", *names], *curves),
        "words": lesson.table(["steps", *REQUESTS], *words),
        "map": lesson.table(["loss", "k", *(f"learning rate {x:g}" for x in LRS)], *stable),
        "self": lesson.table(["loss", "accuracy", *names], *own),
    }


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
