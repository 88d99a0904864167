"""Every loss of opd.py on next-token distributions small enough to enumerate, and four of them on the toy.

atlas     the exact expected gradient of each loss beside the gradients of the two KLs   (exact.py)
gamma     the same for policy gradient on whole sequences                                (exact.py)
drift     the truncated losses train the student logits of the atlas                     (exact.py)
training  policy gradient and the full reverse KL train the toy student
"""

import contextlib
import sys
from pathlib import Path
from statistics import fmean

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parents[1])]

import exact  # noqa: E402
import lesson  # noqa: E402
import toy  # noqa: E402
from exact import DRIFT, K  # noqa: E402

import losses  # noqa: E402
import opd  # noqa: E402

SHOWN = "reverse_kl pg k2 norm_topk sg_topk tail_topk topk jsd k3 forward_kl".split()
REVERSE, FORWARD = "that of the reverse KL", "sum_v (p - q) grad log p, that of the **forward** KL"
SAMPLED = {  # loss -> its formula, its gradient, the expectation of the gradient
    "k1": ("`k1` = d", "grad log p(y)", "sum_v grad p_v = 0: the teacher is not in it"),
    "k2": ("`k2` = d^2 / 2", "d grad log p(y)", REVERSE),
    "k3": ("`k3` = e^-d - 1 + d", "(1 - q/p) grad log p(y)", FORWARD),
    "pg": ("`pg` = sg[d] log p(y)", "d grad log p(y)", REVERSE),
    "pg_baseline": ("`pg` with a baseline", "(d - KL) grad log p(y)", REVERSE),
}
COLOURS = dict(reverse_kl=6, topk=1, sg_topk=0, norm_topk=2, tail_topk=3, forward_kl=4, pg=5)
ARMS = {  # three losses that use one sampled token, and the full loss for comparison
    "untrained": {},
    "pg": dict(loss="pg"),
    "pg_baseline": dict(loss="pg", pg_baseline="kl"),
    "pg_clip_reward": dict(loss="pg", pg_clip_reward=2.0),
    "reverse_kl": dict(loss="reverse_kl"),
}


def train(arm, seed, smoke):
    """One run of opd.py on the toy pair; and a completion, with the KL of each of its tokens."""
    student, teacher = lesson.student(seed, smoke), lesson.teacher(seed, smoke)
    args = dict(student=student, teacher=teacher, seed=seed, lr=3e-4, max_new_tokens=32, **lesson.data(smoke))
    args |= dict(
        zip(("steps", "batch_size", "eval_every"), (2, 4, 1) if smoke else (100, 32, 25), strict=True)
    )
    run = lesson.distilled(opd, **args, **ARMS[arm]) if ARMS[arm] else contextlib.nullcontext(([], student))
    row, problems = {"loss": arm, "seed": seed}, toy.rows(16, held_out=True)
    with run as (log, path):  # the first problem that the untrained student gets wrong
        before, after = (lesson.answered(x, problems, (seed,)) for x in (student, path))
        one = after[next((x["row"] for x in before if not x["right"]), 0)]
        models = [lesson.load(x)[1] for x in (path, teacher)]
        kl = losses.reverse_kl(*(lesson.log_probs(x, [one["rollout"].prompt], [one["ids"]]) for x in models))
    row |= {"text": problems[one["row"]]["prompt"] + one["text"], "right": int(one["right"])}
    row["tenths"] = "KL " + "".join(f"{min(9, round(10 * x))}" for x in kl.tolist()).replace("0", ".")
    row["completion_kl"] = kl.mean().item()
    if evaluations := [x for x in log if "eval_len" in x]:
        row["kl"] = fmean(x["eval_reverse_kl"] for x in evaluations[1:])
        row["norm"] = fmean(x["grad_norm"] for x in log[1:])
        row["before"], row["accuracy"] = (x["eval_accuracy"] for x in (evaluations[0], evaluations[-1]))
    return row


def make(model, seed, smoke):
    return model(seed, smoke)


def training(smoke):
    seeds = range(1 if smoke else 3)
    models = [(model, seed, smoke) for model in (lesson.teacher, lesson.student) for seed in seeds]
    lesson.in_parallel(make, models, "models")
    return lesson.in_parallel(train, [(arm, seed, smoke) for arm in ARMS for seed in seeds], "runs")


def of(rows, part, **where):
    return lesson.select(lesson.select(rows, part=part), **where)


def mean(rows, column):
    return fmean(row[column] for row in rows)


def spread(rows, column, digits=2):
    return lesson.spread([row[column] for row in rows], digits)


def plot(rows, path):
    title = "The cosine of the first gradient does not predict the KL after 200 steps"
    figure, panels = lesson.panels(title, [["left", "right"]], (10, 4.2))
    left, right = panels["left"], panels["right"]
    for y, loss in enumerate(reversed(SHOWN)):
        colour = lesson.COLOURS[COLOURS[loss]] if loss in COLOURS else "0.5"
        found = of(rows, "atlas", loss=loss, k=K, gap="large")
        x, forward = mean(found, "cos_reverse"), mean(found, "cos_forward")
        left.scatter(x, y, 60, colour, clip_on=False)
        left.scatter(forward, y, 60, "none", edgecolors=colour, clip_on=False)
        left.text(x + 0.02, y, f"{x:.2f}" if "topk" in loss else "", color=colour, va="center")
    left.set_yticks(range(len(SHOWN)), reversed(SHOWN))
    left.set_title(
        "First gradient: cosine with that of the\nreverse KL (●) and the forward KL (○)", loc="left"
    )
    for loss in DRIFT:
        ours = of(rows, "drift", loss=loss, optimizer="AdamW", k=K)
        lesson.curve(right, ours, "step", "kl", lesson.COLOURS[COLOURS[loss]], loss)
    right.set_title("Reverse KL in training,\nnats per token", loc="left")
    right.set_xlabel(f"AdamW step (k = {K})", fontsize=10)
    right.set_ylim(0)
    for panel in panels.values():
        panel.tick_params(labelsize=10)
        for text in panel.texts:
            text.set_fontsize(10)
    lesson.save(figure, path)


def tables(rows):
    head = ["loss", "gradient", "expected gradient, y ~ p", "bias of value", "cosine", "noise"]
    lines = {"sampled": [head]}
    for name, formulas in SAMPLED.items():
        found = of(rows, "atlas", loss=name, gap="large")
        bias = f"{mean(found, 'bias'):+.2f}".replace("-0.00", "+0.00") if name[0] == "k" else ""
        norm, noise = mean(found, "norm"), mean(found, "noise")
        measured = (
            [spread(found, "cos_reverse"), f"{noise / norm:.1f}"] if norm > 1e-5 else ["none", "only noise"]
        )
        lines["sampled"].append([*formulas, bias, *measured])
    names = {"kl": "reverse KL", "mass": "mass on S"}
    looks = [("AdamW", 8, *look) for look in (("mass", 50), ("kl", 100), ("kl", 200))]
    looks += [("AdamW", 2, "kl", 200), ("GD", 8, "mass", 50), ("GD", 8, "kl", 100)]
    lines["drift"] = [["loss", *(f"{how}, k = {k}: {names[y]}, step {at}" for how, k, y, at in looks)]]
    for loss in DRIFT:
        found = [of(rows, "drift", loss=loss, optimizer=how, k=k, step=at) for how, k, _, at in looks]
        cells = [spread(some, look[2]) for some, look in zip(found, looks, strict=True)]
        lines["drift"].append([f"`{loss}`", *cells])
    head = ["loss", "held-out reverse KL, mean of steps 25, 50, 75, 100", "accuracy at step 100"]
    lines["training"] = [[*head, "mean gradient norm"]]
    for arm in list(ARMS)[1:]:
        found = of(rows, "training", loss=arm)
        cells = [spread(found, "kl", 3), spread(found, "accuracy"), spread(found, "norm", 1)]
        lines["training"].append([f"`{arm}`", *cells])
    words = []
    for arm in ("untrained", "pg", "reverse_kl"):
        one = of(rows, "training", loss=arm, seed=0)[0]
        verdict = f"{'right' if one['right'] else 'wrong'}, mean KL {one['completion_kl']:.3f}"
        words += [f"{arm:10} {one['text']}$  {verdict}", " " * (one["text"].index("=") + 9) + one["tenths"]]
    return {**{name: lesson.table(*x) for name, x in lines.items()}, "words": ["```", *words, "```"]}


if __name__ == "__main__":
    parts = {"atlas": exact.atlas, "gamma": exact.gamma, "drift": exact.drift, "training": training}
    lesson.main(__file__, parts, plot, tables)
