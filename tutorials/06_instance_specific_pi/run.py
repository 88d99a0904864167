"""OPSD with instance-specific PI: what a student learns from a teacher that reads the answer to each prompt.

toy   2 x 2: the PI holds the answer or not, and the teacher writes the chain of thought or not. One base
      model per seed, trained to react to each PI, is the initial student and the frozen teacher of each arm.
real  SmolLM2-135M-Instruct, whose teacher reads the prompt's own answer, at two learning rates, that of
      another prompt (the control of the smaller rate), or a rule (that of the larger).

Otherwise the arms (arms.py) differ in the PI, the column `privileged` of the data, and in nothing else.
Two more arms of the toy replace the loss by `pg`, with the advantage of a token (gamma 0) or of all that
follow too (gamma 1).
"""

import json
import sys

import arms
import smollm2
from arms import RATES, REAL, TOY, lesson, mean  # arms puts the folders of lesson.py and opsd.py on the path


def toy_part(smoke):
    seeds = range(1 if smoke else 3)
    lesson.in_parallel(arms.base, [(seed, smoke) for seed in seeds], "toy bases")
    jobs = [(arm, seed, smoke) for arm in TOY for seed in seeds]
    return sum(lesson.in_parallel(arms.toy_arm, jobs, "toy"), [])


def real_part(smoke):
    if command := smollm2.missing_packages():
        print(f"this part needs more packages: {command}\n--only toy runs the other part", file=sys.stderr)
        sys.exit(2)
    smollm2.build(arms.SMOL)
    seeds = range(1 if smoke else 3)
    runs = [(arm, lr, seed) for arm in REAL for lr in RATES[arm] for seed in seeds][: 1 if smoke else None]
    jobs = [(arms.real_after, *run, smoke) for run in runs] + [(arms.real_before, s, smoke) for s in seeds]
    found, rows = lesson.in_parallel(lesson.call, jobs, "real model"), []
    for (arm, lr, seed), new in zip(runs, found[: len(runs)], strict=True):
        old, at = found[len(runs) + seed][arm], {"arm": arm, "lr": lr, "seed": seed}
        new["closed"] = 1 - new["kl_completion"] / old["kl_completion"]
        rows += [{**at, **old}, {**at, **new}]
    return rows


def ends(rows, part, arm, lr=""):
    """The rows of an arm before and after training."""
    ours = lesson.select(rows, part=part, arm=arm, lr=lr)
    return [lesson.select(ours, step=step) for step in (0, max(x["step"] for x in ours))]


def plot(rows, path):
    title = "On the toy, fitting a teacher that copies the answer raises the KL of whole completions"
    real = lesson.select(rows, part="real")
    figure, axes = lesson.panels(title, [["toy", "real"]] if real else [["toy"]], (10, 4.2))
    _, red, green, purple, _, sky, black = lesson.COLOURS
    panel, last = axes["toy"], max(x["step"] for x in lesson.select(rows, part="toy"))
    lines = {"answer": (black, "reverse_kl"), "pg_gamma_1": (sky, "pg, gamma = 1")}
    lines |= {"written": (green, "reverse_kl, and the\nteacher still reasons")}
    for arm, (colour, label) in lines.items():
        first, end = (mean(x["accuracy"] for x in found) for found in ends(rows, "toy", arm))
        label, ours = f"{label}\naccuracy {first:.2f} → {end:.2f}", lesson.select(rows, part="toy", arm=arm)
        lesson.curve(panel, ours, "step", "kl_completion", colour, label, lw=2)
    ours = lesson.select(rows, part="toy", arm="answer")
    lesson.curve(panel, ours, "step", "kl", black, "reverse_kl, KL per token", ls="--")
    panel.set(xlabel="step", ylabel="KL to the teacher, nats per completion", ylim=(-2, None))
    panel.set_xlim(0, (1.7 if real else 1.3) * last)
    panel.set_xticks(range(0, int(last) + 1, 20))
    panel.set_title("toy, the teacher reads the answer", fontsize=11, loc="left")
    for text in panel.texts:
        text.set_fontsize(10)
    if real:
        panel = axes["real"]
        for x, (arm, colour) in enumerate(zip(REAL, (red, purple, green), strict=True)):
            for lr, shift, fill in ((1e-4, 0.15, colour), (2e-5, -0.15, "none")):
                ys = [100 * row["closed"] for row in lesson.select(real, arm=arm, lr=lr) if row["step"]]
                panel.scatter([x + shift] * len(ys), ys, s=70, c=fill, edgecolors=colour, linewidths=1.5)
        panel.axhline(0, color="0.5", lw=1)
        panel.set_xticks(range(3), ["the prompt's\nanswer", "another prompt's\nanswer", "one rule\nfor all"])
        panel.set(ylabel="share of the KL closed, %", xlim=(-0.5, 2.5))
        panel.set_title("SmolLM2-135M, lr 2e-5 (open), 1e-4 (filled)", fontsize=11, loc="left")
    lesson.save(figure, path)


def tokens(row, i=0):
    """The tokens of a row's i-th completion, and below them the KL of each: two lines of a code block."""
    text, kl = json.loads(row["text"])[i]
    kl = [f"{x:.1f}" for x in kl]
    width = [max(len(a), len(b)) for a, b in zip(text, kl, strict=True)]
    return [" ".join(x.rjust(w) for x, w in zip(line, width, strict=True)) for line in (text, kl)]


def marked(row, i):
    """A row's i-th completion in a table cell; tokens with a KL of a nat or more are followed by it."""
    words = [f"{t}[{x:.1f}]" if x >= 1 else t for t, x in zip(*json.loads(row["text"])[i], strict=True)]
    return lesson.quoted("".join(words).replace("<|im_end|>", "(end)").replace("\ufffd", ""))


def tables(rows):
    def cell(found, column):
        return lesson.spread([x[column] for x in found])

    def change(pair, column):
        return " → ".join(cell(found, column) for found in pair)

    toy, block = [["arm", "PI", "the teacher writes", "accuracy", "KL per completion"]], ["```text"]
    chains = {arm: "the chain" if arm in ("system", "written") else "the sum alone" for arm in TOY}
    for arm in sorted(TOY, key=chains.get):  # by what the teacher writes
        pair, pi = ends(rows, "toy", arm), lesson.quoted(TOY[arm].format(answer=1023, other=840))
        toy.append([f"`{arm}`", pi, chains[arm], cell(pair[1], "accuracy"), change(pair, "kl_completion")])
    for arm, when in (("answer", 0), ("answer", 1), ("pg_gamma_1", 1)):
        text, numbers = tokens(ends(rows, "toy", arm)[when][0])
        block += [f"{arm + (', after' if when else ', before'):18} {text}", f"{'    KL':18} {numbers}"]
    real = [["PI", "training", "KL per completion", "share closed", "one completion"]]
    for arm, lr in [(x, lr) for x in REAL for lr in RATES[x]]:
        if lesson.select(rows, part="real", arm=arm, lr=lr):
            old, new = ends(rows, "real", arm, lr)
            i = min(4, len(json.loads(old[0]["text"])) - 1)
            if lr == RATES[arm][0]:  # before training, both rates have the same model
                real.append([f"`{arm}`", "none", cell(old, "kl_completion"), "", marked(old[0], i)])
            closed = cell(new, "closed")
            rate = f"lr {lr:.0e}".replace("e-0", "e-")
            real.append(["", rate, cell(new, "kl_completion"), closed, marked(new[0], i)])
    found = {"toy": toy, "real": real}
    return {name: lesson.table(*x) for name, x in found.items()} | {"tokens": [*block, "```"]}


if __name__ == "__main__":
    lesson.main(__file__, {"toy": toy_part, "real": real_part}, plot, tables)
