"""What does OPD add to SFT on the teacher's samples: whole distributions, or the student's own prefixes?

Five arms train the same student for the same number of steps and differ in what they learn from. Accuracy is
exact, and the errors after an error are measured on wrong chains that are the same for all students.
"""

import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import measure  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402

SEEDS, STEPS, EVERY, LONGER = 5, 100, 25, 125  # LONGER steps of SFT cost as much as STEPS of OPD
ARMS = {
    "SFT": {"sft_steps": LONGER},  # the teacher's prefixes, at each the token that the teacher sampled
    "off-policy-forward": {"loss": "forward_kl", "lmbda": 0.0},  # the same prefixes, the whole distribution
    "off-policy": {"loss": "reverse_kl", "lmbda": 0.0},  # the other direction of the KL
    "OPD-forward": {"loss": "forward_kl"},  # the student's own prefixes
    "OPD": {"loss": "reverse_kl"},
}
# Forward passes per trained token, for models of equal size: to sample it, to score it with the teacher (not
# in SFT), and to train on it (a backward pass counts as two).
COST = {arm: 1 + (arm != "SFT") + 3 for arm in ARMS}
COLOUR = {arm: lesson.COLOURS[6 if arm in ("OPD", "off-policy") else 4] for arm in ARMS}  # SFT: forward KL
TITLE = "OPD is ahead of SFT here through the reverse KL, not through own prefixes"
CHANGES = {  # one at a time: label, from this arm (at equal steps, or at equal compute), to that arm
    "distribution": ("all tokens for\nsampled tokens", "SFT", "steps", "off-policy-forward"),
    "direction": ("reverse for forward KL,\nteacher's prefixes", "off-policy-forward", "steps", "off-policy"),
    "direction-own": ("reverse for forward KL,\nown prefixes", "OPD-forward", "steps", "OPD"),
    "own-forward": ("own for teacher's prefixes,\nforward KL", "off-policy-forward", "steps", "OPD-forward"),
    "own": ("own for teacher's prefixes,\nreverse KL", "off-policy", "steps", "OPD"),
    "steps": ("OPD for SFT,\nequal steps", "SFT", "steps", "OPD"),
    "compute": ("OPD for SFT,\nequal compute", "SFT", "compute", "OPD"),
}


def models(seed, smoke):
    return {"student": lesson.student(seed, smoke), "teacher": lesson.teacher(seed, smoke)}


def one(arm, seed, smoke):
    """Rows of one arm; of "before", the student that all arms start from, and of its teacher."""
    paths = models(seed, smoke)
    start, teacher = (lesson.load(path)[1] for path in paths.values())
    problems = toy.rows(20 if smoke else 2000, held_out=True)
    case = measure.forced_errors(start, teacher, problems[:500], seed)
    steps, longer, every = (2, 3, 1) if smoke else (STEPS, LONGER, EVERY)

    def measured(name, model, step, tokens, budget):
        row = {
            "arm": name,
            "seed": seed,
            "step": step,
            "budget": budget,
            "passes": tokens * COST.get(name, 0),
        }
        row["accuracy"] = toy.accuracy(model, problems)
        return row | (measure.after_errors(model, teacher, *case) if budget else {})

    if arm == "before":
        return [measured("before", start, 0, 0, "steps"), measured("teacher", teacher, 0, 0, "steps")]
    run = {**paths, **lesson.data(smoke), "batch_size": 32, "max_new_tokens": 32, "lr": 3e-4, "seed": seed}
    run |= {"steps": longer if arm == "SFT" else steps, "save_every": every, "keep": 9, "eval_every": 0}
    rows = []
    with lesson.distilled(opd, **run | ARMS[arm] | ({"sft_steps": longer} if arm == "SFT" else {})) as done:
        history, final = done
        for step in range(every, run["steps"] + 1, every):
            model = lesson.load(Path(final).parent / f"step_{step:06d}")[1]
            tokens = sum(row.get("tokens", 0) for row in history if row["step"] <= step)
            rows.append(measured(arm, model, step, tokens, {steps: "steps", longer: "compute"}.get(step, "")))
    kls = [row["reverse_kl"] for row in history[-every:]]
    rows[-1] |= {"train_kl": sum(kls) / len(kls), "eval_kl": history[-1]["eval_reverse_kl"]}
    return rows + (
        measure.rollout(start, model, teacher, problems[:100], seed) if (arm, seed) == ("OPD", 0) else []
    )


def run(smoke):
    seeds = range(1 if smoke else SEEDS)
    lesson.in_parallel(models, [(seed, smoke) for seed in seeds], "models")
    lesson.data(smoke)
    jobs = [(arm, seed, smoke) for seed in seeds for arm in ("before", *ARMS)]
    rows = [row for rows in lesson.in_parallel(one, jobs, "runs") for row in rows]
    return rows + measure.changes(rows, CHANGES)


def plot(rows, path):
    figure, panels = lesson.panels(TITLE, [["gain", "error"]], (10, 4.2))
    left, right = panels["gain"], panels["error"]
    left.axvline(0, color="0.7", lw=1)
    for y, (name, (_, _, _, new)) in enumerate(reversed(CHANGES.items())):
        gains = [100 * row["accuracy_gain"] for row in lesson.select(rows, change=name)]
        left.plot(gains, [y] * len(gains), "o", color=COLOUR[new], ms=6, alpha=0.7)
    left.set_yticks(range(len(CHANGES)), [label for label, *_ in reversed(CHANGES.values())])
    left.set_xlabel("change of accuracy, percentage points", fontsize=11)
    left.set_title("one change at a time; a dot: one seed", loc="left", fontsize=11)
    shown = ("before", "SFT", "off-policy", "OPD", "teacher")
    for x, arm in enumerate(shown):
        for row in lesson.select(rows, arm=arm, budget="steps"):
            ends = [row["error_right"], row["error_after"]]
            right.plot([x - 0.2, x + 0.2], ends, color=COLOUR.get(arm, "0.5"), marker="o", ms=4, lw=1.2)
    right.set_xticks(range(len(shown)), shown)
    right.set_ylabel("error per token", fontsize=11)
    right.set_title("from right prefixes to after a forced error", loc="left", fontsize=11)
    for text in (*left.get_yticklabels(), *left.get_xticklabels(), *right.get_yticklabels()):
        text.set_fontsize(10)
    right.tick_params(axis="x", labelsize=11)
    lesson.save(figure, path)


def tables(rows):
    def cells(found, digits):
        return [lesson.spread([row[name] for row in found], n) for name, n in digits.items()]

    gains = [["change", "from: accuracy", "to: accuracy", "change of accuracy", "change of excess"]]
    for name, (label, old, budget, new) in CHANGES.items():
        ends = [lesson.select(rows, arm=old, budget=budget), lesson.select(rows, arm=new, budget="steps")]
        means = [f"{sum(row['accuracy'] for row in end) / len(end):.3f}" for end in ends]
        old = f"{old}, {LONGER} steps" if budget == "compute" else old
        found = lesson.select(rows, arm="change", change=name)
        line = [label.replace("\n", " "), f"{old}: {means[0]}", f"{new}: {means[1]}"]
        gains.append([*line, *cells(found, {"accuracy_gain": 3, "excess_gain": 4})])
    tokens = lesson.select(rows, arm="rollout")
    before, after = (tokens[0][name].replace(";", "; ").split() for name in ("before", "after"))
    prompt = lesson.quoted(tokens[0]["prompt"])
    rollout, begin = [[f"{prompt} before", "after", "KL of the first rollout, before", "after"]], 0
    for field, then in zip_longest(before, after, fillvalue=""):
        part, begin = tokens[begin : begin + len(field)], begin + len(field)
        kl = [" ".join(f"{row[name]:.2f}" for row in part) for name in ("kl_before", "kl_trained")]
        rollout.append([lesson.quoted(field), lesson.quoted(then), *kl])
    return {"gains": lesson.table(*gains), "rollout": lesson.table(*rollout)}


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
