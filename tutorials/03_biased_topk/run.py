"""Naive top-k, its stop-gradient fix, and where the fix still loses mass: one state, a real model, a toy map.

Parts of metrics.csv (self and map: first and last step only):
    state    one next-token distribution with S held fixed, after convergence; mass = p(S) / q(S)
    real     SmolLM2-135M-Instruct as its own teacher; words: its completion of request number `seed`
    damaged  the same model without five of its layers learns from the intact one
    self     the toy student as its own teacher
    map      the toy student and its better teacher: loss x k x learning rate
"""

import itertools
import sys
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import smollm2  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402

TOPK = ("topk", "sg_topk", "norm_topk", "tail_topk")
LOSSES = (*TOPK, "reverse_kl")
COLOUR = dict(zip(LOSSES, (lesson.COLOURS[i] for i in (1, 0, 3, 2, 6)), strict=True))
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


def toy_path(role, seed, smoke):
    """Path of a toy model. The student's accuracy is about one half, the teacher is nearly always right."""
    stop, seed = (0.45, seed) if role == "student" else (None, seed + 1_000_000)
    return lesson.toy_model("A", seed, 5 if smoke else 700, stop)


def words(path, *head):
    """Rows with the completions of the model in a folder, always sampled with the same random numbers."""
    tokenizer, model = opd.load_model(str(path), "student", torch.float32, torch.device("cpu"))
    prompts = [opd.encode_prompt(tokenizer, [{"role": "user", "content": x}], 128) for x in REQUESTS]
    found = opd.sample(model, prompts, 1, [tokenizer.eos_token_id], (7,), [0, 1], 32)
    for i, one in enumerate(found):
        text = " ".join(tokenizer.decode(one.completion, skip_special_tokens=True).split())
        yield row("words", *head[:3], i, head[3], text=text)


def arm(part, loss, k, lr, seed, steps, smoke):
    """One run of opd.py -> its rows."""
    smol = part in ("real", "damaged")
    roles = {"real": ("teacher", "teacher"), "self": ("student", "student")}.get(part, ("student", "teacher"))
    student, teacher = (str(SMOL / x) if smol else toy_path(x, seed, smoke) for x in roles)
    data = SMOL / "train.jsonl" if smol else lesson.kept_rows(f"A_{seed}_8000", toy.rows(8000, seed=seed))
    batch = 2 if smoke else 8 if smol else 32
    size = dict(batch_size=batch, micro_batch_size=batch, max_new_tokens=4 if smoke else 32)
    stage = max(1, steps // 2) if (part, loss, seed) == ("real", "topk", 0) else 0
    files = dict(student=student, teacher=teacher, data=str(data), save_every=stage, keep=9)
    run = dict(loss=loss, topk=k or 1, lr=lr, seed=seed, steps=steps)
    with lesson.distilled(opd, **files, **size, **run) as (history, final):
        kept = history if smol else (history[0], history[-1])
        rows = [row(part, loss, k, lr, seed, x["step"], **{n: x[METRICS[n]] for n in METRICS}) for x in kept]
        for one, path in zip(rows, () if smol else (student, final), strict=False):
            model = AutoModelForCausalLM.from_pretrained(path)
            right = toy.accuracy(model, toy.rows(32 if smoke else 512, True, seed=seed))
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
    models = [(role, s, smoke) for s in seeds for role in ("teacher", "student")]
    lesson.in_parallel(toy_path, models, "toy models")
    jobs = [("real", "topk", 20, 3e-5, s, 8) for s in seeds]
    damaged = ("sg_topk", "tail_topk", "reverse_kl")
    jobs += [("damaged", x, 20, 1e-4, s, 8) for x in damaged for s in seeds]
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
    maps = [name for name in LOSSES for _ in range(4 if name in TOPK else 2)]
    layout = [["real"] * 9 + ["damaged"] * 9] * 9 + [["words"] * 18] * 6 + [maps] * 8
    title = "Naive top-k: the loss falls while the true KL rises. sg_topk fixes this, but can lose top-k mass"
    figure, axes = lesson.panels(title, layout, (11, 8))
    lines = [("real", "topk", "reverse_kl", "topk: true KL", "-")]
    lines += [("real", "topk", "value", "topk: loss", "--"), ("real", "sg_topk", "reverse_kl", "", "-")]
    lines += [("damaged", x, "mass", x, "-") for x in LOSSES]
    for part, loss, column, label, style in lines:
        if ours := lesson.select(rows, part=part, loss=loss):
            lesson.curve(axes[part], ours, "step", column, COLOUR[loss], label, lw=2.5, ls=style)
    axes["real"].text(1, 0.015, "sg_topk: both 0", color=COLOUR["sg_topk"])
    heads = {"real": "SmolLM2 as its own teacher, k = 20"}
    heads["damaged"] = "SmolLM2 without five layers learns from the intact model, k = 20"
    for part, label in (("real", "nats per token"), ("damaged", "student's mass on its top 20")):
        axes[part].set(xlabel="step", ylabel=label, xlim=(0.5, 11), xticks=range(1, 9))
        axes[part].set_title(heads[part], fontsize=10, loc="left")
    text, shape = [f"Left run (topk), prompt: {REQUESTS[0]}"], {"subsequent_indent": " " * 9, "width": 132}
    for one in lesson.select(rows, part="words", seed=0):
        said = one["text"].encode("latin-1", "replace").decode("latin-1")  # the font has no other characters
        text.append(textwrap.fill(f"{one['step']:.0f} steps  {said}", **shape))
    text.append("\n\nToy student, better teacher: accuracy after 75 steps (about 0.5 before training)")
    plain = {"va": "top", "family": "monospace", "size": 8.5, "in_layout": False, "parse_math": False}
    axes["words"].text(0, 1, "\n".join(text), **plain)
    axes["words"].axis("off")
    for name in LOSSES:
        panel, ks = axes[name], KS if name in TOPK else (0,)
        cells = [[ends(rows, "accuracy", part="map", loss=name, k=k, lr=lr) for k in ks] for lr in LRS[::-1]]
        means = [[sum(x) / len(x) if x else float("nan") for x in line] for line in cells]
        panel.imshow(means, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for y, x in itertools.product(range(len(LRS)), range(len(ks))):
            shade, mean = "w" if means[y][x] < 0.6 else "k", f"{means[y][x]:.2f}".replace("nan", "zero\ngrad")
            panel.text(x, y, mean, ha="center", va="center", color=shade)
        panel.set_title(name.replace("reverse_kl", "full KL"), fontsize=10, loc="left", color=COLOUR[name])
        rates = [f"{x:g}" if name == "topk" else "" for x in LRS[::-1]]
        panel.set(xlabel="k", xticks=range(len(ks)), xticklabels=[k or "all" for k in ks])
        panel.set(yticks=range(len(LRS)), yticklabels=rates, ylabel="learning rate" if any(rates) else "")
    lesson.save(figure, path)


def tables(rows):
    def table(*lines):
        lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        return ["|" + "|".join(f" {x} " for x in line) + "|" for line in lines]

    def numbers(*columns, digits=2, **where):
        found = [ends(rows, column, **where) for column in columns]
        one = "{:." + str(digits) + "f}"
        return [lesson.spread(x, digits) if len(x) > 1 else one.format(*x) if x else "" for x in found]

    names, curves, stable = ("loss", "true reverse KL", "entropy", "mass on S"), [], []
    for part, loss, step in itertools.product(("real", "damaged"), LOSSES, (1, 2, 4, 8)):
        cells = numbers(*METRICS, digits=3, part=part, loss=loss, step=step)
        curves += [[part, f"`{loss}`", step, *cells]] if any(cells) else []
    for name, k in itertools.product(LOSSES, (0, *KS)):
        cells = [numbers("accuracy", part="map", loss=name, k=k, lr=lr)[0] for lr in LRS]
        stable += [[f"`{name}`", k or "all", *cells]] if any(cells) else []
    said = {x: lesson.select(rows, part="words", step=x) for x in (0, 4, 8)}
    said = {x: ["`" + r["text"].replace("`", "'").replace("|", "\\|") + "`" for r in said[x]] for x in said}
    rest = [[f"`{x}`", *numbers("mass", digits=3, part="state", loss=x)] for x in TOPK]
    own = [[f"`{x}`", *numbers("accuracy", *METRICS, part="self", loss=x)] for x in TOPK[:2]]
    return {
        "state": table(["loss", "p(S) / q(S) after convergence"], *rest),
        "curves": table(["part", "loss", "step", *names], *curves),
        "words": table(["steps", *REQUESTS], *([x, *said[x]] for x in said)),
        "map": table(["loss", "k", *(f"learning rate {x:g}" for x in LRS)], *stable),
        "self": table(["loss", "accuracy", *names], *own),
    }


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
