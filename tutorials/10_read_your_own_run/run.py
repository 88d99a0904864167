"""Ten toy runs, three healthy and seven failing, and what read_run.py finds in the log of each.

Every failing run differs from a healthy one in the loss, the teacher, the PI or one wrong line. The CSV has
the rows of the logs, and for each row the findings in the log up to that row.
"""

import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import read_run  # noqa: E402
import toy  # noqa: E402

import losses  # noqa: E402
import opd  # noqa: E402
import opsd  # noqa: E402

ARMS = {  # script, what is different, the same in words, the signature that is expected
    "healthy": (opd, {}, "`opd.py`, unchanged", None),
    "pg": (opd, {"loss": "pg"}, "`--loss pg`", None),
    "rule": (opsd, {"pi": "system"}, "`opsd.py`, unchanged", None),
    "topk": (
        opsd,
        {"pi": "none", "loss": "topk", "topk": 1},
        "`--pi none --loss topk --topk 1`",
        "mass_leak",
    ),
    "topk_lr": (
        opd,
        {"loss": "topk", "topk": 2, "lr": 1e-3},
        "`--loss topk --topk 2 --lr 1e-3`",
        "mass_leak",
    ),
    "k1": (opd, {"loss": "k1"}, "`--loss k1`", "no_direction"),
    "style": (opd, {"teacher": "B"}, "a teacher of style B", "mismatch"),
    "sign": (opd, {"loss": "pg"}, "`--loss pg`, wrong sign of the advantage", "entropy_collapse"),
    "no_end": (opd, {"teacher": "no_end"}, "a teacher without an end token", "loops"),
    "answer": (opsd, {"pi": "answer"}, "`opsd.py --pi answer`", "pi_without_accuracy"),
}
METRICS = (
    "loss reverse_kl student_mass student_logp teacher_logp student_entropy teacher_entropy completion_len "
    "repetition truncated eval_accuracy eval_with_pi_accuracy pi_gap grad_norm"
).split()
NAMES = [signature.__name__ for signature in read_run.SIGNATURES]


def never_ends(rng):
    """A training example for a teacher without an end token: it repeats the sum."""
    a, b = toy.problem(rng)
    return toy.prompt(a, b), toy.chain(a, b).removesuffix("$") + f"#{a + b}" * 6


def model(name, seed, smoke):
    """Path of a model of this seed: the student, one of three teachers, or the model for opsd.py."""
    steps, teacher = (5 if smoke else 700), seed + 1_000_000
    few, many = steps * 4 // 7, steps * 10 // 7
    if name == "no_end":
        return lesson.kept(f"no_end_{teacher}_{few}", lambda: toy.pretrain(never_ends, teacher, few))
    if name == "told":
        return lesson.kept(f"told_{seed}_{many}", lambda: toy.pretrain(toy.told, seed, many))
    return lesson.toy_model(*{"student": ("A", seed, steps, 0.45)}.get(name, (name, teacher, steps)))


def log(arm, seed, smoke):
    """One run -> every second row of its log, as rows of the CSV."""
    script, changes, _, _ = ARMS[arm]
    steps = 4 if smoke else 100
    args = dict(seed=seed, steps=steps, batch_size=32, max_new_tokens=48, lr=3e-4, eval_every=20) | changes
    few = 16 if smoke else 128
    args["data"] = lesson.kept_rows(f"read_run_train_5000_{seed}", toy.rows(5000, seed=seed))
    args["eval_data"] = lesson.kept_rows(f"read_run_eval_{few}_{seed}", toy.rows(few, True, seed=seed))
    if script is opsd:
        args.update(student=model("told", seed, smoke), pi_template=toy.PI_TEMPLATES[args["pi"]])
    else:
        args["teacher"] = model(args.get("teacher", "A"), seed, smoke)
        args["student"] = model("student", seed, smoke)
    advantage = losses.reverse_kl_advantage  # log q - log p
    wrong = (lambda *x: -advantage(*x)) if arm == "sign" else advantage  # log p - log q
    patch = mock.patch.object(losses, "reverse_kl_advantage", wrong)
    with patch, lesson.distilled(script, **args) as (rows, _):
        rows = [row for row in rows if row["step"] % 2 == 0]
    rows = [{k: float(f"{row[k]:.4g}") for k in ("step", *METRICS) if k in row} for row in rows]
    columns = {name: read_run.series(rows, name) for name in METRICS}
    for n, row in enumerate(rows, 1):
        found = {signature.__name__ for signature in read_run.judge(columns, n)[0]}
        row.update({name: int(name in found) for name in NAMES}, findings=len(found))
    every = ("step", *METRICS, *NAMES, "findings")
    return [{"arm": arm, "seed": seed, **{name: row.get(name, "") for name in every}} for row in rows]


def run(smoke):
    seeds = [0] if smoke else [0, 1, 2]
    upstream = [(name, seed, smoke) for name in ("told", "no_end", "A", "B", "student") for seed in seeds]
    lesson.in_parallel(model, upstream, "models")
    jobs = [(arm, seed, smoke) for arm in ARMS for seed in seeds]
    return [row for rows in lesson.in_parallel(log, jobs, "runs") for row in rows]


def logs(rows, arm):
    return [lesson.select(rows, arm=arm, seed=seed) for seed in sorted({row["seed"] for row in rows})]


def diagnoses(rows, arm):
    """[{signature: first step of the finding}, ...], one per seed."""
    found = [read_run.diagnose(log)[0] for log in logs(rows, arm)]
    return [{signature.__name__: step for signature, (step, _) in one.items()} for one in found]


PANELS = {  # title: column, failing arm, its label
    "student's mass on the top k": ("student_mass", "topk", "topk, k = 1"),
    "reverse KL, nats per token": ("reverse_kl", "k1", "k1"),
    "teacher's log-prob, nats per token": ("teacher_logp", "style", "teacher of style B"),
    "student's / teacher's entropy": ("ratio", "sign", "wrong sign"),
    "repetition, share of repeated 4-grams": ("repetition", "no_end", "no end token"),
    "pi_gap, nats per token": ("pi_gap", "answer", "--pi answer"),
}


def plot(rows, path):
    names = list(PANELS)
    title = "Six failures (orange), each in the metric that reveals it, and a healthy run (blue)"
    figure, panels = lesson.panels(title, [names[:3], names[3:]], (11, 5.6))
    for name, (column, sick, label) in PANELS.items():
        panel, (script, _, _, expected) = panels[name], ARMS[sick]
        for arm, colour in (("rule" if script is opsd else "healthy", 0), (sick, 1)):
            ours = [dict(row) for row in lesson.select(rows, arm=arm)]
            for row in ours[:0] if column in METRICS else ours:
                row[column] = row["student_entropy"] / row["teacher_entropy"] if row["step"] else ""
            lesson.curve(panel, ours, "step", column, lesson.COLOURS[colour], label if colour else "")
        since = max((found.get(expected, 0) for found in diagnoses(rows, sick)), default=0)
        panel.axvline(since, color="0.5", lw=0.8, ls=":")
        panel.margins(y=0.12)
        note = {"transform": panel.get_xaxis_transform(), "color": "0.4", "fontsize": 8, "va": "top"}
        panel.text(since + 1, 1, "found", **note)
        panel.set_title(name, loc="left")
        panel.set_xlabel("step")
    lesson.save(figure, path)


def margins(log):
    """{signature: (quantity, threshold, value)} of one log."""
    ends = read_run.spans({name: read_run.series(log, name) for name in METRICS}, len(log)).items()
    s, e = ({name: span[side] for name, span in ends} for side in (0, 1))
    gained, room = (
        e["eval_accuracy"] - s["eval_accuracy"],
        s.get("eval_with_pi_accuracy", 1) - s["eval_accuracy"],
    )
    gap = [x["student_logp"] - x["teacher_logp"] for x in (s, e)]
    ratio = e["student_entropy"] / e["teacher_entropy"]
    return {
        "mass_leak": ("decrease of `student_mass`", "> 0.1", s["student_mass"] - e["student_mass"]),
        "no_direction": ("`reverse_kl`, end / start", "> 0.9", e["reverse_kl"] / s["reverse_kl"]),
        "mismatch": ("`student_logp` - `teacher_logp`, start", "> 2", gap[0]),
        "teacher_collapse": ("`student_logp` - `teacher_logp`, end", "> 2", gap[1]),
        "loops": ("increase of `repetition`", "> 0.1", e["repetition"] - s["repetition"]),
        "entropy_collapse": ("`student_entropy` / `teacher_entropy`, end", "< 0.25", ratio),
        "pi_without_accuracy": ("accuracy gain / possible gain", "< 0.1", gained / (room or 1)),
    }


def tables(rows):
    arms = ["| run | what is different | accuracy | found (since step, per seed) |", "|---|---|---|---|"]
    for arm, (_, _, words, expected) in ARMS.items():
        ends = [lesson.select(rows, arm=arm, step=at) for at in (0, max(row["step"] for row in rows))]
        accuracy = " -> ".join(lesson.spread([row["eval_accuracy"] for row in some]) for some in ends)
        found, cells = diagnoses(rows, arm), []
        for name in sorted(NAMES, key=lambda name: name != expected):
            steps = ", ".join(f"{one[name]:g}" if name in one else "-" for one in found)
            cells += [f"`{name}` ({steps})"] if any(name in one for one in found) else []
        arms.append(f"| {arm} | {words} | {accuracy} | {', '.join(cells) or 'nothing'} |")
    looks = ["| signature | quantity | healthy runs | threshold | failing runs |", "|---|---|---|---|---|"]
    numbers = {arm: [margins(log) for log in logs(rows, arm)] for arm in ARMS}
    for name in NAMES:
        healthy = ["rule"] if name == "pi_without_accuracy" else ["healthy", "pg", "rule"]
        sick = [arm for arm in ARMS if ARMS[arm][3] == name] or ["k1", "sign"]
        found = [[one[name] for arm in some for one in numbers[arm]] for some in (healthy, sick)]
        ends = [f"{min(some)[2]:.3g} to {max(some)[2]:.3g}" for some in found]
        what, threshold, _ = found[0][0]
        looks.append(f"| `{name}` | {what} | {ends[0]} | {threshold} | {ends[1]} ({', '.join(sick)}) |")
    return {"arms": arms, "margins": looks}


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
