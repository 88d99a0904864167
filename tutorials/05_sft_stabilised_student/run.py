"""How much SFT on the teacher's samples does a student need before on-policy distillation works?

OPD only, SFT only, and SFT then OPD, from a teacher of another style, by step and by compute.
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402

SEEDS, STEPS, BATCH = (0, 1, 2), 200, 32  # STEPS: for OPD only; the other arms use the same compute
# Cost of a token in forward passes: to sample it, to score it with the teacher, to train (backward = 2).
SAMPLE, SCORE, TRAIN = 1, 1, 3
SFT_COST, OPD_COST = SAMPLE + TRAIN, SAMPLE + SCORE + TRAIN  # SFT does not need the teacher's scores
LR = 1e-3
ONLY = STEPS * OPD_COST // SFT_COST  # SFT steps for the same compute
AMOUNTS = (0, 25, 50, 100, 150, ONLY)


def student(seed, smoke):
    return lesson.toy_model("A", seed, 10) if smoke else lesson.toy_model("A", seed, stop=0.45)


def teacher(seed, smoke):
    return lesson.toy_model("B", seed + 1_000_000, *([10] if smoke else []))


def made(function, seed, smoke):
    return function(seed, smoke)


def data(smoke):
    """Paths of the training and held-out problems."""
    n = 16 if smoke else 256
    train = lesson.kept_rows("addition_train_20000_0", toy.rows(20_000))
    return {"data": train, "eval_data": lesson.kept_rows(f"addition_eval_{n}_0", toy.rows(n, held_out=True))}


def arm(sft, seed, smoke):
    """Rows of one run of opd.py: sft steps on the teacher's samples, then OPD with the remaining compute."""
    steps = STEPS + sft - round(sft * SFT_COST / OPD_COST)
    run = {"student": student(seed, smoke), "teacher": teacher(seed, smoke), **data(smoke), "seed": seed}
    run |= {"steps": 3, "eval_every": 1} if smoke else {"steps": steps, "eval_every": 25}
    run |= {"loss": "reverse_kl", "lr": LR, "batch_size": BATCH, "max_new_tokens": 32}
    with lesson.distilled(opd, sft_steps=min(sft, 2) if smoke else sft, **run) as (history, _):
        rows, passes = [], 0
        for row in history:
            on_policy = row["step"] > sft
            if row["step"]:
                positions = row["tokens"] + BATCH * len(toy.prompt(100, 100))
                passes += positions * (OPD_COST if on_policy else SFT_COST)
            if "eval_accuracy" in row or row["step"] == sft + 1:
                logp = row.get("teacher_logp", "") if on_policy else ""
                accuracy = row.get("eval_accuracy", "")
                at = {"sft": sft, "seed": seed, "step": row["step"], "million_passes": passes / 1e6}
                rows.append({**at, "accuracy": accuracy, "teacher_logp": logp})
        return rows


def run(smoke):
    seeds, amounts = (SEEDS[:1], (0, 2, ONLY)) if smoke else (SEEDS, AMOUNTS)
    data(smoke)
    upstream = [(function, seed, smoke) for function in (teacher, student) for seed in seeds]
    lesson.in_parallel(made, upstream, "models")
    jobs = [(sft, seed, smoke) for sft in amounts for seed in seeds]
    return sum(lesson.in_parallel(arm, jobs, "students"), [])


def at(rows, column, sft, step=None):
    """The values of a column at a step, one per seed; None: at the last step, at equal compute."""
    ours = [row for row in lesson.select(rows, sft=sft) if row[column] != ""]
    step = max(row["step"] for row in ours) if step is None else step
    return [row[column] for row in ours if row["step"] == step]


def plot(rows, path):
    title = "OPD from a teacher of another style works after SFT; at equal compute SFT alone is as accurate"
    figure, panels = lesson.panels(title, [["curves", "amount", "logp"]], (12, 4.4))
    *amounts, most = sorted({row["sft"] for row in rows})
    colours = dict(zip(amounts, (lesson.COLOURS[i] for i in (6, 3, 4, 5, 2, 0)), strict=False))
    for amount in (*amounts, most):
        colour, ours = colours.get(amount, lesson.COLOURS[1]), lesson.select(rows, sft=amount)
        for row in ours:  # seeds differ by a few tokens: use one x for all
            row["at"] = statistics.fmean(r["million_passes"] for r in ours if r["step"] == row["step"])
        label = {0: "OPD only", most: "SFT only"}.get(amount, f"SFT {amount:g}")
        label = {100: f"\n\n{label}", 150: f"{label}\n\n"}.get(amount, label)  # the labels would overlap
        lesson.curve(panels["curves"], ours, "at", "accuracy", colour, label)
        if amount < most:
            pairs = at(rows, "teacher_logp", amount, amount + 1), at(rows, "accuracy", amount)
            panels["logp"].scatter(*pairs, color=colour, label=f"{amount:g}")
    ends = [
        {"sft": a, "end": x, "alone": y}
        for a in amounts
        for x, y in zip(at(rows, "accuracy", a), at(rows, "accuracy", most, a), strict=True)
    ]
    lesson.curve(
        panels["amount"], ends, "sft", "end", lesson.COLOURS[0], "\n\n\n\n\nSFT,\nthen\nOPD", marker="o", ms=3
    )
    lesson.curve(panels["amount"], ends, "sft", "alone", "0.5", "at the\nswitch", marker="o", ms=3)
    panels["amount"].axhline(statistics.fmean(at(rows, "accuracy", most)), color=lesson.COLOURS[1], ls="--")
    panels["logp"].legend(title="SFT steps", frameon=False, fontsize=8)
    accuracy = "accuracy at T = 1"
    axes = {
        "curves": ("Accuracy by compute", "forward passes of one token, millions", accuracy),
        "amount": ("At equal compute (dashed: SFT only)", "SFT steps", accuracy),
        "logp": ("By log-prob at the switch", "teacher's log-prob, nats per token", "final accuracy"),
    }
    for name, (heading, x, y) in axes.items():
        panels[name].set_title(heading, fontsize=10, loc="left")
        panels[name].set(xlabel=x, ylabel=y)
    lesson.save(figure, path)


def tables(rows):
    *amounts, most = sorted({row["sft"] for row in rows})
    head = ["schedule", "teacher's log-prob of the student's completions at the switch", "accuracy there"]
    head += [f"accuracy after {STEPS} steps", "accuracy at equal compute"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for amount in (*amounts, most):
        logp = lesson.spread(at(rows, "teacher_logp", amount, amount + 1), 1) if amount < most else ""
        steps = min(STEPS, max(row["step"] for row in rows))
        cells = [
            at(rows, "accuracy", most, amount if amount < most else None),
            at(rows, "accuracy", amount, steps),
            at(rows, "accuracy", amount),
        ]
        name = {0: "OPD only", most: "SFT only"}.get(amount, f"{amount:g} SFT steps")
        lines.append("| " + " | ".join([name, logp, *map(lesson.spread, cells)]) + " |")
    return {"amount": lines}


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
