"""The runs of this chapter: six failures, and healthy controls that differ in one argument or one line.

Both runs of a pair have the same student, prompts, number of steps and learning rate.
"""

import json
from pathlib import Path
from unittest import mock

import lesson
import read_run
import toy

import losses
import opd
import opsd

ARMS = {  # script, arguments; of a failing run also its control, and what differs
    "tail_topk": (opd, dict(loss="tail_topk", topk=1, lr=1e-3)),
    "topk": (opd, dict(loss="topk", topk=1, lr=1e-3), "tail_topk", "`--loss`, with `--topk 1` in both"),
    "pg": (opd, dict(loss="pg")),
    "k1": (opd, dict(loss="k1"), "pg", "`--loss`"),
    "sign": (opd, dict(loss="pg"), "pg", "one line: the advantage has the wrong sign"),
    "style_A": (opd, dict(teacher="A")),
    "style_B": (opd, dict(teacher="B"), "style_A", "the teacher writes its chain in another order"),
    "end": (opd, dict(teacher="end")),
    "no_end": (opd, dict(teacher="no_end"), "end", "no end token in the teacher's last 150 training steps"),
    "rule": (opsd, dict(pi="system")),
    "answer": (opsd, dict(pi="answer"), "rule", "`opsd.py --pi answer`, not `--pi system`"),
}
EXPECTED = {  # signature: the failing runs that it is made for
    "mass_leak": ["topk"],
    "no_direction": ["k1"],
    "mismatch": ["style_B"],
    "teacher_collapse": ["k1", "sign"],
    "loops": ["no_end"],
    "entropy_collapse": ["sign"],
    "pi_without_accuracy": ["answer"],
}
CONTROLS = [arm for arm in ARMS if len(ARMS[arm]) == 2]
METRICS = (
    "loss reverse_kl student_mass student_logp teacher_logp student_entropy teacher_entropy completion_len "
    "repetition eval_accuracy eval_with_pi_accuracy pi_gap grad_norm"
).split()


def no_end(rng):
    """A training example for a teacher: the chain, then the sum again and again, and no end token."""
    a, b = toy.problem(rng)
    return toy.prompt(a, b), toy.chain(a, b).removesuffix("$") + f"#{a + b}" * 6


def model(name, seed, smoke):
    """Path of a model of this seed: the student, one of four teachers, or the model for opsd.py."""
    steps = 10 if smoke else 1000
    if name == "student":
        return lesson.student(seed, smoke)
    if name in ("A", "B"):
        return lesson.teacher(seed, smoke, name)
    if name == "opsd":
        return lesson.kept(f"opsd_{seed}_{steps}", lambda: toy.pretrain(toy.told, seed, steps))
    # Two teachers that are trained on from style A, with and without an end token.
    _, start = lesson.load(lesson.teacher(seed, smoke))
    write, steps = {"end": toy.styles(A=1), "no_end": no_end}[name], steps * 3 // 20
    return lesson.kept(
        f"{name}_{seed}_{steps}", lambda: toy.pretrain(write, seed, steps, model=start), no_end
    )


def log(arm, seed, smoke):
    """One run -> every second row of its log, the first and the last with a completion."""
    script, changes = ARMS[arm][:2]
    names = "steps", "batch_size", "eval_every", "max_new_tokens"
    args = dict(zip(names, (4, 4, 2, 16) if smoke else (100, 32, 20, 48), strict=True), seed=seed, lr=3e-4)
    args |= lesson.data(smoke, held_out=128) | changes
    if script is opsd:
        args |= dict(student=model("opsd", seed, smoke), pi_template=toy.PI_TEMPLATES[args["pi"]])
    else:
        args |= {x: model(args.get(x, y), seed, smoke) for x, y in (("student", "student"), ("teacher", "A"))}
    advantage = losses.reverse_kl_advantage  # log q - log p
    wrong = (lambda *x: -advantage(*x)) if arm == "sign" else advantage  # log p - log q
    patch = mock.patch.object(losses, "reverse_kl_advantage", wrong)
    with patch, lesson.distilled(script, **args) as (rows, final):
        samples = [json.loads(line) for line in (Path(final).parent / "samples.jsonl").open()]
    rows = [row for row in rows if row["step"] % 2 == 0]
    rows = [{k: float(f"{row[k]:.4g}") for k in ("step", *METRICS) if k in row} for row in rows]
    columns = {name: read_run.series(rows, name) for name in METRICS}
    for n, row in enumerate(rows, 1):
        found = {signature.__name__ for signature in read_run.judge(columns, n)[0]}
        row |= {name: int(name in found) for name in EXPECTED} | {"findings": len(found)}
    samples = [one for one in samples if one["row"] == 0]  # of the first held-out problem, at each evaluation
    for row, one in ((rows[0], samples[0]), (rows[-1], samples[-1])):
        row |= {"text": one["prompt"] + one["completion"], "mean_kl": one["mean_kl"]}
    return [{"arm": arm, "seed": seed, **row} for row in rows]
