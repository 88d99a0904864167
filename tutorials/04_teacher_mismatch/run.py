"""Which teachers help a student, and which ruin it: their own accuracy does not tell.

Part toy: four teachers of an addition student. A writes in the student's style, RL is the student itself
after GRPO (grpo.py), M writes one digit per column differently, B writes in another style. Part real: a
damaged SmolLM2 learns from the intact model, or from one fine-tuned to write capitals (upper_case.py).
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials"), str(Path(__file__).parent)]

import diagnose  # noqa: E402
import grpo  # noqa: E402
import lesson  # noqa: E402
import toy  # noqa: E402
import upper_case  # noqa: E402

import opd  # noqa: E402

SEEDS, STEPS, PROBLEMS = (0, 1, 2), 150, 256
RUN = {"loss": "reverse_kl", "lr": 3e-4, "batch_size": 32, "max_new_tokens": 32, "save_every": 50, "keep": 3}
TEACHERS = {"A": "the student's style", "RL": "the student after GRPO"}
TEACHERS |= {"M": "one digit per column has another meaning", "B": "another style"}
REAL_TEACHERS = {"capitals": "fine-tuned to capital letters", "intact": "the intact model"}
COLOURS = dict(zip(TEACHERS, (lesson.COLOURS[i] for i in (2, 0, 4, 1)), strict=True))


def teacher(name, seed, smoke):
    """Path of a teacher of the toy student, trained if it is not cached."""
    return grpo.teacher(seed, smoke) if name == "RL" else lesson.teacher(seed, smoke, name)


def toy_arm(name, seed, smoke):
    """Rows of one run on the toy, the arms differ in --teacher only; and what can be measured before it."""
    paths = {"student": lesson.student(seed, smoke), "teacher": teacher(name, seed, smoke)}
    settings = {"steps": 2, "eval_every": 1} if smoke else {"steps": STEPS, "eval_every": 25}
    settings |= {**RUN, **lesson.data(smoke)}
    at = {"teacher": name, "seed": seed}
    problems = toy.rows(2 if smoke else PROBLEMS, held_out=True)
    positions = range(0, diagnose.LENGTH, 12 if smoke else 1)
    found = diagnose.rows(*paths.values(), problems, (seed, 1), seed == SEEDS[0], positions)
    rows = [{**at, **row} for row in found]
    with lesson.distilled(opd, **paths, **settings, seed=seed) as (log, final):
        rows += diagnose.evaluations(log, final, at)
        saved = {t: f"{final}/../step_{t:06}" for t in (50, 150) if t <= settings["steps"]}
        for t, path in {0: paths["student"], **saved}.items():
            rows.append({**at, "kind": "carries", "at": t, **diagnose.carries(path, problems, (seed, 2))})
    return rows


def real_arm(name, seed, smoke):
    """Rows of one run on SmolLM2; again the arms differ in --teacher only."""
    return upper_case.run(name, {"teacher": name, "seed": seed}, smoke)


def run_toy(smoke):
    names, seeds = (("RL", "B"), SEEDS[:1]) if smoke else (("RL", "B", "M", "A"), SEEDS)
    jobs = [(name, seed, smoke) for name in names for seed in seeds]
    lesson.data(smoke)
    # The longest jobs first. Only the RL jobs build students, which are their initial models.
    lesson.in_parallel(teacher, jobs, "teachers")
    return sum(lesson.in_parallel(toy_arm, jobs, "students"), [])


def run_real(smoke):
    upper_case.pair()
    jobs = [(name, seed, smoke) for seed in SEEDS[: 1 if smoke else None] for name in REAL_TEACHERS]
    return sum(lesson.in_parallel(real_arm, jobs, "SmolLM2"), [])


def plot(rows, path):
    title = "Three teachers solve 99 % of the problems: one lifts its student to 96 %, two ruin theirs"
    figure, panels = lesson.panels(title, [["curve", "one_token"]], (10, 4.4))
    start = statistics.fmean(measured(rows, "accuracy", "B", "student"))
    panels["one_token"].axhline(start, color="0.4", lw=1, ls="--")
    axes = {
        "curve": ("Student, by teacher (teacher's accuracy)", "step"),
        "one_token": ("Before training: teacher writes one token", "position of that token (dashed: none)"),
    }
    for kind, (heading, x) in axes.items():
        panels[kind].set_title(heading, fontsize=12, loc="left")
        panels[kind].set_xlabel(x, fontsize=11)
        panels[kind].set_ylabel("accuracy at T = 1", fontsize=11)
        panels[kind].set_ylim(-0.03, 1.03)
        panels[kind].tick_params(labelsize=11)
        for x in [x for x in COLOURS if measured(rows, "accuracy", x, "own")]:
            own = statistics.fmean(measured(rows, "accuracy", x, "own"))
            label = f"{x} ({own:.2f})" if kind == "curve" else x
            ours = lesson.select(rows, teacher=x, kind=kind)
            lesson.curve(panels[kind], ours, "at", "accuracy", COLOURS[x], label)
        for label in panels[kind].texts:
            label.set_fontsize(11)
    lesson.save(figure, path)


def measured(rows, column, teacher, kind, **where):
    """One number for each seed."""
    return [row[column] for row in lesson.select(rows, teacher=teacher, kind=kind, **where)]


def tables(rows):
    def each(teachers, columns):  # columns: head -> (column, kind) or (column, kind, at)
        def cell(x, column, kind, *at):
            found = measured(rows, column, x, kind, **dict(zip(("at",), at, strict=False)))
            return lesson.spread(found).replace("-0.00", "0.00") if found else ""  # a smoke run lacks some

        lines = [[f"{x}: {name}", *(cell(x, *c) for c in columns.values())] for x, name in teachers.items()]
        return lesson.table(["teacher", *columns], *lines)

    result = {"its accuracy": ("accuracy", "own"), "gap": ("gap", "student")}
    result |= {f"student, step {t}": ("accuracy", "curve", t) for t in (50, STEPS)}
    real = {"gap": ("gap", "run"), "held-out KL": ("kl", "curve", 0)}
    real |= {"after training": ("kl", "curve", upper_case.STEPS), "share closed": ("closed", "run")}
    real |= {f"capitals, step {t}": ("capitals", "curve", t) for t in (0, upper_case.STEPS)}
    # One held-out problem: the student's completion before training, and after it with its mean KL.
    texts = lesson.select(rows, part="toy", kind="text", row=2, seed=SEEDS[0])
    after = [x for name in "AMB" for x in texts if x["at"] and x["teacher"] == name]
    head = [lesson.quoted(x["prompt"]) for x in texts[:1]]
    head += ["before training", *(f"after {x['teacher']}" for x in after)]
    said = [lesson.quoted(str(x["text"])) for x in texts[:1]]
    said += [f"{lesson.quoted(str(x['text']))} ({x['kl']:.2f})" for x in after]
    # One column for each token of a wrong completion; "top" has the teacher's three most likely ones.
    a, b = (lesson.select(rows, kind="token", teacher=x) for x in "AB")
    tokens = [["student's token", *(x["text"] for x in b)]]
    tokens += [[f"KL to {name}", *(f"{x['kl']:.2f}" for x in y)] for name, y in (("A", a), ("B", b))]
    top = [" ".join(y.split()[0] for y in x["top"].split(", ")).replace("|", "\\|") for x in b]
    tokens += [["B's three most likely tokens", *top]]
    return {
        "result": each(TEACHERS, result),
        "texts": lesson.table(head, ["completion", *said]),
        "tokens": lesson.table(*tokens),
        "real": each(REAL_TEACHERS, real),
    }


if __name__ == "__main__":
    lesson.main(__file__, {"real": run_real, "toy": run_toy}, plot, tables)
