"""Twenty bugs that raise no error, each against the correct code: in training, and in the gradient alone.

Parts of metrics.csv:
    real      SmolLM2-135M: the gradient of each bug against that of the correct code, on the same batch
    toy       60 steps of training with each bug; marks: a character for each token of text, see compare.py
    gradient  the toy's gradients, also in settings that hurt the bugs that are harmless in training
"""

import sys
from pathlib import Path
from statistics import fmean, geometric_mean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import smollm2  # noqa: E402
from bugs import ARMS, BUGS, REPORTS, RESAMPLED  # noqa: E402
from compare import SETTINGS, SMOL, gradients, train  # noqa: E402

COLOUR = dict(zip(("fatal", "costly", "harmless"), (lesson.COLOURS[i] for i in (1, 4, 0)), strict=True))
COLOUR["not a bug"] = "0.5"


def each(smoke, function, jobs, title):
    """lesson.in_parallel, but --smoke does not wait for other processes to start."""
    return [function(*job) for job in jobs] if smoke else lesson.in_parallel(function, jobs, title)


def toy_part(smoke):
    seeds = range(1 if smoke else 3)
    lesson.data(smoke, 4000)
    each(smoke, lesson.teacher, [(s, smoke) for s in seeds], "teachers")
    each(smoke, lesson.student, [(s, smoke) for s in seeds], "students")
    rows = each(smoke, train, [(arm, s, smoke) for s in seeds for arm in ARMS], "runs")
    accuracy = {(row["arm"], row["seed"]): row["accuracy"] for row in rows}
    right = [accuracy[ARMS[row["arm"]][0] or row["arm"], row["seed"]] for row in rows]
    return [{**row, "difference": row["accuracy"] - r} for row, r in zip(rows, right, strict=True)]


def compared(smoke, setting, hurt=()):
    """Gradients of all bugs in a setting, and of the harmless ones in the settings that hurt them."""
    groups = {}  # correct code: its arms
    for arm in (arm for arm, (right, *_) in ARMS.items() if right):
        groups.setdefault(ARMS[arm][0], []).append(arm)
    jobs = [(setting, {"reverse_kl": groups.pop("reverse_kl")}), (setting, groups)]
    jobs = [(setting, {"two_ends": ["forgotten_end"]})] if smoke and setting == "SmolLM2" else jobs
    jobs += [(place, {ARMS[arm][0]: [arm]}) for place in hurt for arm in hurt[place][1]]
    jobs = [(*job, s, smoke) for job in jobs for s in range(1 if smoke else 3)]
    return sum(each(smoke, gradients, jobs, "gradients"), [])


def gradient_part(smoke):
    each(smoke, lesson.teacher, [(s, smoke, "B") for s in range(1 if smoke else 3)], "other teachers")
    return compared(smoke, "toy", SETTINGS)


def real_part(smoke):
    if command := smollm2.missing_packages():
        print(f"this part needs more packages: {command}; without them: --only toy", file=sys.stderr)
        sys.exit(2)
    smollm2.build(SMOL)
    return compared(smoke, "SmolLM2")


def values(rows, arm, column, setting=""):
    """A column of an arm, one value per seed; setting: of gradients, else of the training runs."""
    found = [row[column] for row in lesson.select(rows, arm=arm, setting=setting)]
    return found or [float("nan")]  # --smoke leaves some out


def sizes(rows, arm, setting):
    """Geometric mean, least and largest ratio of the norms of two gradients over the seeds."""
    ratios = values(rows, arm, "ratio", setting)
    return geometric_mean(ratios) if min(ratios) > 0 else float("nan"), min(ratios), max(ratios)


def ranked(rows):
    """{arm: verdict on the toy}, by verdict and, within it, by the loss of accuracy."""
    start, found = fmean(values(rows, "start", "accuracy")), {}
    arms = [arm for arm, (right, *_) in ARMS.items() if right]
    for arm in sorted(arms, key=lambda arm: fmean(values(rows, arm, "difference"))):
        accuracy, lost = (fmean(values(rows, arm, column)) for column in ("accuracy", "difference"))
        verdict = "fatal" if accuracy < start + 0.05 else "costly" if lost < -0.03 else "harmless"
        found[arm] = verdict if arm in BUGS else "not a bug"
    return {arm: verdict for verdict in COLOUR for arm in found if found[arm] == verdict}


def turned(rows):
    """The bugs that are harmless on the toy, and those of them that turn the gradient of SmolLM2."""
    harmless = [arm for arm, verdict in ranked(rows).items() if verdict == "harmless"]
    means = {arm: fmean(values(rows, arm, "cosine", "SmolLM2")) for arm in harmless}
    return harmless, [arm for arm in harmless if means[arm] < 0.9 and arm not in RESAMPLED]


def plot(rows, path):
    verdicts, (harmless, turn) = ranked(rows), turned(rows)
    title = f"{len(turn)} of {len(harmless)} bugs that are harmless on the toy turn SmolLM2's gradient"
    figure, axes = lesson.panels(title, [["toy", "real"]], (10, 5.4))
    beside = axes["real"].get_yaxis_transform()  # x as a fraction of the panel's width
    for y, (arm, verdict) in enumerate(reversed(verdicts.items())):
        for panel, zero, where in (("toy", 0, ("difference",)), ("real", 1, ("cosine", "SmolLM2"))):
            points, style = values(rows, arm, *where), {"color": COLOUR[verdict]}
            axes[panel].plot([zero, fmean(points)], [y, y], lw=2, **style)
            axes[panel].plot(points, [y] * len(points), "o", ms=4, **style)
        size = f"{sizes(rows, arm, 'SmolLM2')[0]:.2g}"
        axes["real"].text(1.03, y, size, fontsize=10, va="center", transform=beside)
    for y, (verdict, colour) in enumerate(reversed(COLOUR.items())):
        at = {"transform": axes["toy"].get_yaxis_transform(), "fontsize": 12, "weight": "bold"}
        axes["toy"].text(0.02, 2 + 1.2 * y, verdict, color=colour, **at)
    names = [arm.replace("_", " ") for arm in reversed(verdicts)]
    for panel, labels in (("toy", names), ("real", [])):
        axes[panel].set_yticks(range(len(names)), labels)
        axes[panel].tick_params(labelsize=10)
    axes["toy"].set_xlabel("change of accuracy after 60 steps on the toy", fontsize=10)
    axes["real"].set_xlabel("cosine with the correct gradient, SmolLM2", fontsize=10)
    axes["real"].text(1.03, len(names) - 0.2, "norm\nratio", fontsize=10, transform=beside)
    lesson.save(figure, path)


def report(seen):
    """owner/name/issues/1 as a link, with the words after it; other words as they are."""
    path, _, words = seen.partition(" ")
    parts = path.split("/")
    link = f"[{parts[1]}#{parts[3]}](https://github.com/{path})" if len(parts) == 4 else path
    return f"{link} {words}".strip()


def tables(rows):
    def mean(arm, column, setting=""):
        return fmean(values(rows, arm, column, setting))

    verdicts = ranked(rows)
    bugs = ["bug, wrong, right, cost on the toy, in the log, cosine, seen in".split(", ")]
    hurt = [["bug", "setting, and why it hurts", "cosine", "norm ratio"]]
    for arm in (arm for arm in verdicts if arm in BUGS):
        correct, metric, *_ = ARMS[arm]
        wrong, right, seen = REPORTS[arm]
        old, new = mean(correct, metric), mean(arm, metric)
        # Nobody knows what a loss should be: it shows a bug only below zero.
        shows = "" if metric == "loss" and new > 0 else f"`{metric}` {old:.2g} → {new:.2g}"
        cost = f"{verdicts[arm]}, {round(mean(arm, 'difference'), 2) + 0:.2f}"  # + 0: no -0.00
        bugs.append(
            [f"`{arm}`", wrong, right, cost, shows, f"{mean(arm, 'cosine', 'SmolLM2'):.2f}", report(seen)]
        )
    for place, (what, arms) in SETTINGS.items():
        for arm in arms:
            cells = what if arm == arms[0] else "the same", lesson.spread(values(rows, arm, "cosine", place))
            spread = "{:.2g} ({:.2g} to {:.2g})".format(*sizes(rows, arm, place))
            hurt.append([f"`{arm}`", *cells, spread])
    shown = ["start", "reverse_kl", *(arm for arm in verdicts if verdicts[arm] == "fatal")][:5]
    text = ["```"]
    for row in (lesson.select(rows, part="toy", arm=arm, seed=0)[0] for arm in shown):
        text += [f"{row['arm']:15} {row['text']}", f"{'':15} {row['marks']}"]
    return {"text": [*text, "```"], "bugs": lesson.table(*bugs), "hurt": lesson.table(*hurt)}


if __name__ == "__main__":
    lesson.main(__file__, {"real": real_part, "toy": toy_part, "gradient": gradient_part}, plot, tables)
