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
from exact import DRIFT, GAMMAS, KS, K  # noqa: E402

import losses  # noqa: E402
import opd  # noqa: E402

SHOWN = "reverse_kl pg k2 norm_topk sg_topk tail_topk topk jsd k3 forward_kl".split()
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
    title = "The cosine of the first gradient does not show where training ends"
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


def atlas_line(rows, loss, gap):
    here, equal = (of(rows, "atlas", loss=loss, k=K, gap=x) for x in (gap, "equal"))
    norm, noise, at_equal = mean(here, "norm"), mean(here, "noise"), mean(equal, "norm")
    cosines = (
        [spread(here, "cos_reverse"), spread(here, "cos_forward")] if norm > 1e-5 else ["no gradient"] * 2
    )
    bias = f"{mean(here, 'bias'):+.3f}".replace("-0.000", "+0.000")
    noise = ("only noise" if norm < 1e-5 else f"{noise / norm:.1f}") if noise else "0"
    ratio = f"{norm / mean(here, 'norm_reverse'):.2f}"
    return [f"`{loss}`", bias, *cosines, ratio, noise, f"{at_equal:.3f}" if at_equal > 1e-5 else "0"]


def tables(rows):
    head = ["cos with grad of reverse KL", "cos with grad of forward KL", "norm / reverse", "noise / grad"]
    head = ["loss", "bias of value", *head, "grad norm at p = q"]
    sets = {"atlas": ("medium", (*opd.LOSSES, "pg_baseline")), "large": ("large", (*SHOWN, "pg_baseline"))}
    lines = {at: [head, *(atlas_line(rows, x, gap) for x in names)] for at, (gap, names) in sets.items()}
    lines["by_k"] = [["gap", "loss", *(f"k={k}" for k in KS)]]
    for gap, loss in [(gap, loss) for gap in ("medium", "large") for loss in DRIFT[1:]]:
        cells = [f"{mean(of(rows, 'atlas', loss=loss, k=k, gap=gap), 'cos_reverse'):.3f}" for k in KS]
        lines["by_k"].append([gap, f"`{loss}`", *cells])
    gaps = ("small", "medium", "large")
    lines["gamma"] = [["gamma", *(f"{gap} gap" for gap in gaps)]]
    for g in GAMMAS:
        cells = [spread(of(rows, "gamma", gamma=g, gap=gap), "cos_reverse", 3) for gap in gaps]
        lines["gamma"].append([f"{g:g}", *cells])
    heads = {"kl": "reverse KL", "mass": "mass on S", "cos_reverse": "cosine"}
    looks = ("kl", 50), ("kl", 100), ("kl", 200), ("mass", 50), ("cos_reverse", 0), ("cos_reverse", 50)
    lines["drift"] = [["optimizer", "k", "loss", *(f"{heads[y]}, step {step}" for y, step in looks)]]
    for how, k, loss in [(*run, loss) for run in exact.RUNS for loss in DRIFT]:
        found = of(rows, "drift", optimizer=how, k=k, loss=loss)
        cells = [spread(lesson.select(found, step=step), y) for y, step in looks]
        lines["drift"].append([how, k, f"`{loss}`", *cells])
    lines["training"] = [["loss", "held-out reverse KL", "accuracy at step 100", "mean gradient norm"]]
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
