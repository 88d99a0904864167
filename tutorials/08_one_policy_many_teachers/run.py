"""OPSD with m latent rules: one policy, many teachers, and the floor of its KL at every position.

tasks.py has the toy and the real model; floor.py computes KLs and floors on the student's own completions.

In metrics.csv, `at` says what a row describes: a step of the log (run_kl), all positions of the student's
completions, or one token of the first. floor is -log Z, information is the floor of the forward KL.
"""

import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import smollm2  # noqa: E402
from floor import measure  # noqa: E402
from tasks import SMOL, base, real_task, toy_task  # noqa: E402

import opsd  # noqa: E402

MS, LRS, REAL_LR = (1, 2, 4, 10), (1e-3, 3e-4), 5e-5
ARMS = {  # r is drawn for each example, by default
    "reverse": dict(loss="reverse_kl"),
    "forward": dict(loss="forward_kl"),
    "off_policy": dict(loss="forward_kl", lmbda=0.0),  # the same on completions of the teacher
    "shown": dict(loss="reverse_kl"),  # r is drawn, and the student's prompt names it
    "hashed": dict(loss="reverse_kl"),  # r is a hash of the prompt
}


def one_run(task, arm, m, lr, seed, smoke):
    """CSV rows of a student, trained with opsd.py and measured on new prompts; arm "before": not trained."""
    model, train, new, args = task(arm, m, seed, smoke)
    at, n = {"arm": arm, "m": m, "lr": lr, "seed": seed}, 4 if task is toy_task else 2  # n samples a prompt
    sizes = (n, args["max_new_tokens"], (7,))  # and the key of the random numbers
    if arm not in ARMS:
        return [{**at, **row} for row in measure(model, model, new, *sizes)]
    args |= dict(student=model, data=lesson.kept_rows(f"rules_{arm}_{m}", train), pi="system", eval_every=0)
    with lesson.distilled(opsd, **args, **ARMS[arm], lr=lr, seed=seed) as (log, final):
        rows, kl = measure(final, model, new, *sizes), [step["reverse_kl"] for step in log]
    rows[0]["run_kl"] = fmean(kl[-50:])
    rows += [{"at": k, "run_kl": fmean(kl[k - 10 : k])} for k in range(10, len(kl) + 1, 10)]
    return [{**at, **row} for row in rows]


def run_toy(smoke):
    seeds = range(1 if smoke else 3)
    lesson.in_parallel(base, [(seed, smoke) for seed in seeds], "bases")
    jobs = [("reverse", m, LRS[0]) for m in MS] + [("reverse", 2, LRS[1])]
    jobs += [("forward", m, LRS[0]) for m in (2, 4)]
    jobs += [(arm, 4, LRS[0]) for arm in ("before", "off_policy", "shown", "hashed")]
    jobs = [(toy_task, *job, seed, smoke) for job in jobs for seed in seeds]
    return sum(lesson.in_parallel(one_run, jobs, "toy"), [])


def run_real(smoke):
    if command := smollm2.missing_packages():
        print(f"part real needs more packages: {command}; --only toy does without", file=sys.stderr)
        sys.exit(2)
    smollm2.build(SMOL)
    ms, seeds = ((2,), (0,)) if smoke else ((1, 2, 3), (0, 1, 2))
    jobs = [("reverse", m, seed) for m in ms for seed in seeds]
    jobs += [("before", m, 0) for m in ms]
    jobs = [(real_task, arm, m, REAL_LR, seed, smoke) for arm, m, seed in jobs]
    return sum(lesson.in_parallel(one_run, jobs, "real"), [])


def of(rows, part, arm, at="all", **where):
    return lesson.select(rows, part=part, arm=arm, at=at, **where)


def plot(rows, path):
    title = "On the toy, the reverse KL stops at the floor set by the teachers' disagreement"
    figure, panels = lesson.panels(title, [["curves", "floors"]], (10, 4.2))
    left, right, (black, orange, floors) = (
        panels["curves"],
        panels["floors"],
        (lesson.COLOURS[i] for i in (6, 4, 3)),
    )
    for m in (1, 2, 10):
        for lr, colour in zip(LRS, (black, "0.6"), strict=True):
            steps = lesson.select(rows, part="toy", arm="reverse", m=m, lr=lr, reverse="")
            lesson.curve(left, steps, "at", "run_kl", colour, f"m = {m}" * (lr == LRS[0]), lw=1.2)
        floor = fmean(row["floor"] for row in of(rows, "toy", "reverse", m=m))
        left.plot([0, 300], [floor, floor], color=floors, ls="--")
    left.set(xlabel="step", ylabel="reverse KL (nats per token)", ylim=(-0.04, 1.05), xlim=(0, 350))
    left.set_title("toy; learning rate: black 1e-3, grey 3e-4; dashed: floors", fontsize=11, loc="left")
    right.axline((0, 0), slope=1, color=floors, ls="--", label="KL = floor")
    for part, arm, kl, floor, style in (
        ("toy", "before", "reverse", "floor", dict(marker="o", color=black, mfc="none")),
        ("toy", "reverse", "reverse", "floor", dict(marker="o", color=black, label="toy, reverse KL")),
        ("toy", "forward", "forward", "information", dict(marker="s", color=orange, label="toy, forward KL")),
        ("real", "before", "reverse", "floor", dict(marker="^", color=black, mfc="none")),
        ("real", "reverse", "reverse", "floor", dict(marker="^", color=black, label="SmolLM2, reverse KL")),
    ):
        found = of(rows, part, arm)
        if found:
            right.plot([row[floor] for row in found], [row[kl] for row in found], ls="", ms=6, **style)
    right.set(xlabel="floor (nats per token)", ylabel="KL to the teachers (nats per token)")
    right.set_title("new completions; open markers: before training", fontsize=11, loc="left")
    right.legend(frameon=False, fontsize=10, loc="lower right")
    lesson.save(figure, path)


def tables(rows):
    def line(part, arm, *names, **where):
        found = of(rows, part, arm, **where)
        return [lesson.spread([r[name] for r in found], 3).replace("-0.000", "0.000") for name in names]

    names = {"both digits agree": "coherent", "KL to the geometric mean": "to_geometric"}
    names |= {"KL to the arithmetic mean": "to_arithmetic"}
    students = [["student", "completions", *names]]
    for arm in ("before", "reverse", "forward", "off_policy"):
        text = of(rows, "toy", arm, m=4, lr=LRS[0], seed=0)[0]["text"]
        cells = line("toy", arm, *names.values(), m=4, lr=LRS[0])
        students.append([f"`{arm}`", lesson.quoted(text), *cells])
    function = [
        ["the rule is", "floor", "`reverse_kl`, first 10 steps", "last 50 steps", "KL on new prompts"]
    ]
    for arm, words in (("reverse", "drawn"), ("shown", "drawn, shown"), ("hashed", "a hash of the prompt")):
        floor, *others = line("toy", arm, "floor", "run_kl", "reverse", m=4, lr=LRS[0])
        function.append([words, floor, *line("toy", arm, "run_kl", m=4, lr=LRS[0], at=10.0), *others])
    names = {"KL to the teachers": "reverse", "floor": "floor", "KL to the geometric mean": "to_geometric"}
    real = [["m", *names]]
    for m in sorted({int(r["m"]) for r in lesson.select(rows, part="real")}):
        before, after = (line("real", arm, *names.values(), m=m) for arm in ("before", "reverse"))
        pairs = zip(before, after, strict=True)  # before training: one model for all seeds, no spread
        real.append([m, *(f"{x.split(' ')[0]} → {y}" for x, y in pairs)])
    one = lesson.select(rows, part="toy", arm="reverse", m=4, lr=LRS[0], seed=0)
    one = [r for r in one if str(r["at"]).startswith("token")]
    tokens = [["token", *(f"`{r['text'][1:-1]}`" for r in one)]]
    tokens += [[x, *(f"{r[y]:.2f}" for r in one)] for x, y in (("KL", "reverse"), ("floor", "floor"))]
    found = dict(students=students, tokens=tokens, function=function, real=real)
    return {name: lesson.table(*lines) if lines[1:] and lines[0][1:] else [] for name, lines in found.items()}


if __name__ == "__main__":
    lesson.main(__file__, {"real": run_real, "toy": run_toy}, plot, tables)
