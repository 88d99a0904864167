"""What read_run.py finds in the logs of six failing runs, and in those of their healthy controls.

arms.py has the runs. metrics.csv has every second row of each log, and for each row the findings of
read_run.py in the log up to that row; the first and the last row also have a completion.
"""

import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import read_run  # noqa: E402
from arms import ARMS, CONTROLS, EXPECTED, METRICS, log, model  # noqa: E402

PAIRS = {arm: ARMS[arm][2] for arm in ARMS if arm not in CONTROLS}  # failing run: its control
FIXES = {
    "mass_leak": "the whole vocabulary, `tail_topk`, or a larger k",
    "no_direction": "a loss whose expected gradient depends on the teacher",
    "mismatch": "another teacher, or SFT on its samples first",
    "teacher_collapse": "check loss, sign and learning rate",
    "loops": "check the end tokens and stop ids of both models",
    "entropy_collapse": "check signs and temperatures",
    "pi_without_accuracy": "a rule as PI instead of the answer",
}
BY_LOSS = {"topk": 1, "tail_topk": 3, "k1": "0.45", "pg": 5, "style_A": 0, "style_B": 0}


def run(smoke):
    seeds = range(1 if smoke else 3)
    for names in (("opsd", "A", "B", "student"), ("end", "no_end")):
        lesson.in_parallel(model, [(name, seed, smoke) for name in names for seed in seeds], "models")
    jobs = [(arm, seed, smoke) for arm in ARMS for seed in seeds]
    return [row for rows in lesson.in_parallel(log, jobs, "runs") for row in rows]


def logs(rows, arm):
    """The logs of one arm, one per seed."""
    return [lesson.select(rows, arm=arm, seed=seed) for seed in sorted({row["seed"] for row in rows})]


def ends(log):
    """Means over the first and the last tenth of each column: {column: mean}, {column: mean}."""
    spans = read_run.spans({name: read_run.series(log, name) for name in METRICS}, len(log))
    return tuple({name: span[side] for name, span in spans.items()} for side in (0, 1))


def quantities(log):
    """{signature: (quantity, threshold, value)} of one log."""
    start, end = ends(log)
    gained = end["eval_accuracy"] - start["eval_accuracy"]
    possible = start.get("eval_with_pi_accuracy", 1) - start["eval_accuracy"]
    gap = [x["student_logp"] - x["teacher_logp"] for x in (start, end)]
    ratio = end["student_entropy"] / end["teacher_entropy"]
    return {
        "mass_leak": ("decrease of `student_mass`", "> 0.1", start["student_mass"] - end["student_mass"]),
        "no_direction": ("`reverse_kl`, end / start", "> 0.9", end["reverse_kl"] / start["reverse_kl"]),
        "mismatch": ("`student_logp` - `teacher_logp`, start", "> 2", gap[0]),
        "teacher_collapse": ("`student_logp` - `teacher_logp`, end", "> 2", gap[1]),
        "loops": ("increase of `repetition`", "> 0.1", end["repetition"] - start["repetition"]),
        "entropy_collapse": ("`student_entropy` / `teacher_entropy`, end", "< 0.25", ratio),
        "pi_without_accuracy": ("accuracy gain / possible gain", "< 0.1", gained / (possible or 1)),
    }


def threshold(panel, y, text, va):
    panel.axhline(y, color="k", ls=":", lw=1.2)
    panel.text(100, y, text, ha="right", va=va, fontsize=11)


def plot(rows, path):
    figure, panels = lesson.panels(
        "Failing runs cross the threshold of a signature; their controls stay far from it",
        [["mass", "gap"]],
        (10, 4.2),
    )
    rows = [dict(row) for row in rows if row["step"] > 0]
    for row in rows:
        row["gap"] = row["student_logp"] - row["teacher_logp"]
    for panel, column, arms in (
        (panels["mass"], "student_mass", ("topk", "tail_topk")),
        (panels["gap"], "gap", ("style_B", "style_A", "k1", "pg")),
    ):
        for arm in arms:
            colour, style = BY_LOSS[arm], "--" if arm in CONTROLS else "-"
            colour = colour if isinstance(colour, str) else lesson.COLOURS[colour]
            text = {"style_A": "teacher A", "style_B": "teacher B"}.get(arm, arm)
            lesson.curve(panel, lesson.select(rows, arm=arm), "step", column, colour, text, ls=style, lw=1.8)
        panel.set_xlabel("step", fontsize=11)
        panel.tick_params(labelsize=10)
    for text in [*panels["mass"].texts, *panels["gap"].texts]:
        text.set_fontsize(11)
    start = fmean(ends(log)[0]["student_mass"] for log in logs(rows, "topk"))
    threshold(panels["mass"], start - 0.1, "mass_leak: start - 0.1", "bottom")
    threshold(panels["gap"], 2, "mismatch (start),\nteacher_collapse (end)", "top")
    panels["mass"].set_title("mass on the student's most likely token", loc="left", fontsize=11)
    panels["gap"].set_title("log p(y) - log q(y), nats per token", loc="left", fontsize=11)
    lesson.save(figure, path)


def findings(rows, arm):
    """'`signature` (step of each seed)' for what is found at the end, the expected signatures first."""
    found = [read_run.diagnose(log)[0] for log in logs(rows, arm)]
    found = [{signature.__name__: step for signature, (step, _) in one.items()} for one in found]
    for name in sorted(EXPECTED, key=lambda name: arm not in EXPECTED[name]):
        if any(name in one for one in found):
            yield f"`{name}` ({', '.join(f'{one[name]:g}' if name in one else '-' for one in found)})"


def tables(rows):
    head = "run, control, what differs, accuracy at the end, of its control, found at the end (since step)"
    runs = [head.split(", ")]
    words = [["run", "mean KL, nats", "completion"]]
    for arm, control in PAIRS.items():
        accuracy = [[ends(log)[1]["eval_accuracy"] for log in logs(rows, x)] for x in (arm, control)]
        cells = [f"`{arm}`", f"`{control}`", ARMS[arm][3], *map(lesson.spread, accuracy)]
        runs.append([*cells, ", ".join(findings(rows, arm))])
        first, last = (logs(rows, arm)[0][i] for i in (0, -1))
        texts = [lesson.quoted(row["text"].partition("=")[2]) for row in (first, last)]
        words += [["before training", "", texts[0]]] if len(words) == 1 else []
        words.append([f"`{arm}`", f"{first['mean_kl']:.3f} -> {last['mean_kl']:.3f}", texts[1]])
    margins = [["finding", "quantity (main condition)", "threshold", "failing runs", "controls", "fix"]]
    for name, failing in EXPECTED.items():
        judged = [arm for arm in CONTROLS if name not in lacking(rows, arm)]
        groups = [[quantities(x)[name] for arm in y for x in logs(rows, arm)] for y in (failing, judged)]
        cells = [f"{min(group)[2]:.3g} to {max(group)[2]:.3g}" for group in groups]
        cells[0] += f" ({', '.join(f'`{arm}`' for arm in failing)})"
        margins.append([f"`{name}`", *groups[0][0][:2], *cells, FIXES[name]])
    found = read_run.diagnose(logs(rows, "k1")[0])[0].items()
    report = [f"FOUND since step {step:g}: {each.__doc__}: {numbers}" for each, (step, numbers) in found]
    cells = {name: lesson.table(*x) for name, x in {"runs": runs, "words": words, "margins": margins}.items()}
    return cells | {"report": ["```text", *report, "```"]}


def lacking(rows, arm):
    """The signatures that cannot be judged in the log of an arm."""
    return [signature.__name__ for signature in read_run.diagnose(logs(rows, arm)[0])[1]]


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
