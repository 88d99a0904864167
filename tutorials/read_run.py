"""Diagnose a run from its log: search it for seven signatures of failure, and plot it.

    python tutorials/read_run.py runs/opd         # prints the findings, writes runs/opd/read_run.png
    python tutorials/read_run.py runs/a runs/b    # both runs in the same panels: runs/a/read_run_and_b.png
    python tutorials/read_run.py log.csv --columns loss=train/loss reverse_kl=train/kl  # of another program

A log is a run's folder with its metrics.jsonl, a .jsonl or a .csv. A finding is a hint, and not a verdict.

    signature            needs [uses if it is logged]                  found if (exact: see below)    chapters
    mass_leak            student_mass loss [reverse_kl]                falls > 0.1, and the loss hides it    3
    no_direction *       loss reverse_kl grad_norm                     end > 90 % of start, norm > 50 %    9 2
    mismatch *           student_logp teacher_logp                     > 2 nats apart at the start         4 5
    teacher_collapse *   student_logp teacher_logp                     > 2 nats apart at the end only      3 4
    loops                completion_len repetition                     rise by > 30 % and by > 0.1           9
    entropy_collapse     student_entropy teacher_entropy               < 50 % of start, < 25 % of teacher    9
    pi_without_accuracy  pi_gap eval_accuracy [eval_with_pi_accuracy]  gap > 0.1, gain < 10 % of room    6 7 8
Start and end: means over the first and the last tenth of the values. *: not judged if pi_gap is logged.
"""

import argparse
import csv
import difflib
import inspect
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import lesson


class Span(NamedTuple):
    start: float  # mean over the first tenth of a column's values, at least one
    end: float  # mean over the last tenth
    n: int  # how many values there are


ANY = Span(1, 1, 1)  # default for an optional column
PANELS = {  # title: metric=label of its line
    "loss and exact reverse KL, nats per token": "loss=loss, reverse_kl=KL",
    "entropy, nats per token": "student_entropy=student, teacher_entropy=teacher",
    "probability of the top k tokens": "student_mass=student, teacher_mass=teacher",
    "log-prob of sampled tokens, nats": "student_logp=student, teacher_logp=teacher",
    "completion length, tokens": "completion_len=length",
    "truncated; repeated 4-grams (shares)": "truncated=truncated, repetition=repeated",
    "held-out accuracy": "eval_accuracy=student, eval_with_pi_accuracy=with PI",
    "held-out reverse KL, nats per token": "eval_reverse_kl=all, eval_reverse_kl_first=first third, "
    "eval_reverse_kl_middle=middle, eval_reverse_kl_last=last third",
    "gradient norm before clipping": "grad_norm=norm",
    "pi_gap, nats per token": "pi_gap=pi_gap",
}
PANELS = {title: dict(pair.split("=") for pair in pairs.split(", ")) for title, pairs in PANELS.items()}
COLUMNS = ["step", *(name for names in PANELS.values() for name in names)]


def line(metric, value, side, at):
    """A condition that the figure can show: the value is above or below a line at this height."""
    return (value > at if side == "above" else value < at), metric, side, at


# A signature maps the spans of its columns to conditions; it is found if all of them hold.
def mass_leak(student_mass: Span, loss: Span, reverse_kl=ANY):
    """the student's mass on the top k falls, and the loss does not show it"""
    falls = loss.end < loss.start and reverse_kl.end > reverse_kl.start / 2
    hidden = loss.end < reverse_kl.end / 2 and reverse_kl.end > reverse_kl.start  # see chapter 10, mechanism
    return line("student_mass", student_mass.end, "below", student_mass.start - 0.1), falls or hidden


def no_direction(loss: Span, reverse_kl: Span, grad_norm: Span):
    """loss and KL do not fall, although the gradient stays large"""
    still = line("loss", loss.end, "above", loss.start - abs(loss.start) / 10)
    kl = line("reverse_kl", reverse_kl.end, "above", max(reverse_kl.start * 0.9, 0.05))  # below 0.05: done
    return loss.n > 1, still, kl, line("grad_norm", grad_norm.end, "above", grad_norm.start / 2)


def mismatch(student_logp: Span, teacher_logp: Span):
    """the teacher's log-prob is far below the student's from the start"""
    # 2 nats: the geometric mean of q(y) / p(y) is below 1/7, before training can have changed much.
    return (line("teacher_logp", teacher_logp.start, "below", student_logp.start - 2),)


def teacher_collapse(student_logp: Span, teacher_logp: Span):
    """the teacher's log-prob falls far below the student's"""
    no_mismatch = student_logp.start - teacher_logp.start <= 2
    limit = min(student_logp.end - 2, teacher_logp.start - 1)
    return no_mismatch, line("teacher_logp", teacher_logp.end, "below", limit)


def loops(completion_len: Span, repetition: Span):
    """completions become longer and repetitive"""
    # Length alone may be better reasoning, and repetition alone a table.
    longer = line("completion_len", completion_len.end, "above", 1.3 * completion_len.start)
    return longer, line("repetition", repetition.end, "above", repetition.start + 0.1)


def entropy_collapse(student_entropy: Span, teacher_entropy: Span):
    """the student's entropy falls far below the teacher's"""
    # With a confident teacher the student's entropy falls in healthy runs too.
    limit = min(student_entropy.start / 2, teacher_entropy.end / 4)
    return line("student_entropy", student_entropy.end, "below", limit), teacher_entropy.end > 0.01


def pi_without_accuracy(pi_gap: Span, eval_accuracy: Span, eval_with_pi_accuracy=ANY):
    """the PI has an effect (pi_gap), but accuracy without it does not rise"""
    possible = eval_with_pi_accuracy.start - eval_accuracy.start  # gain
    matters = line("pi_gap", -max(abs(pi_gap.start), abs(pi_gap.end)), "below", -0.1)
    gains = line("eval_accuracy", eval_accuracy.end, "below", eval_accuracy.start + possible / 10)
    return matters, eval_accuracy.n > 1, possible > 0.05, gains


SIGNATURES = {  # chapters to read
    mass_leak: "03_biased_topk",
    no_direction: "09_silent_bugs 02_many_faces_of_kl",
    mismatch: "04_teacher_mismatch 05_sft_stabilised_student",
    teacher_collapse: "03_biased_topk 04_teacher_mismatch",
    loops: "09_silent_bugs",
    entropy_collapse: "09_silent_bugs",
    pi_without_accuracy: "06_instance_specific_pi 07_shared_rule 08_one_policy_many_teachers",
}


def refuse(message):
    """A mistake that the user can fix: one line, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def number(value):
    """A finite float, or None for NaN, an infinite value, an empty cell or a word."""
    try:
        return value if math.isfinite(value := float(value)) else None
    except (TypeError, ValueError, OverflowError):
        return None


def series(rows, column):
    """[(row, step, value), ...] of the rows that have a finite number in this column."""
    points = ((i, number(row.get("step")), number(row.get(column))) for i, row in enumerate(rows))
    return [(i, i if step is None else step, value) for i, step, value in points if value is not None]


def spans(columns, n):
    """{column: Span} of the first n rows; columns: {name: series}."""
    values = {name: [value for i, _, value in points if i < n] for name, points in columns.items()}
    few = {name: max(1, len(x) // 10) for name, x in values.items()}
    ends = {name: (sum(x[: few[name]]), sum(x[-few[name] :])) for name, x in values.items() if x}
    return {name: Span(a / few[name], b / few[name], len(values[name])) for name, (a, b) in ends.items()}


def judge(columns, n):
    """First n rows -> {signature found: numbers}, {not judged: missing columns}, [(signature, line), ...]."""
    found, missing, lines, known = {}, {}, [], spans(columns, n)
    for signature in SIGNATURES:
        wanted = inspect.signature(signature).parameters
        seen = {name: known[name] for name in wanted if name in known}
        absent = [name for name, p in wanted.items() if p.default is p.empty and name not in known]
        if absent or ("pi_gap" in known and signature in (no_direction, mismatch, teacher_collapse)):
            missing[signature] = absent
            continue
        conditions = signature(**seen)
        lines += [(signature, x) for x in conditions if isinstance(x, tuple)]
        if all(x[0] if isinstance(x, tuple) else x for x in conditions):
            found[signature] = ", ".join(f"{k} {v.start:.3g} -> {v.end:.3g}" for k, v in seen.items())
    return found, missing, lines


def diagnose(rows):
    """-> {signature: (first step of the finding, numbers)}, ordered by step, and judge's missing columns."""
    columns, since = {name: series(rows, name) for name in COLUMNS[1:]}, {}
    ends = [-(-len(rows) * tenth // 10) for tenth in range(1, 11)]  # row counts of the ten judgements
    stages, missing = [judge(columns, n)[0] for n in ends], judge(columns, len(rows))[1]
    for signature, numbers in stages[-1].items():
        first = max((i + 1 for i in range(10) if signature not in stages[i]), default=0)
        step = number(rows[ends[first] - 1].get("step"))
        since[signature] = (ends[first] - 1 if step is None else step, numbers)
    return dict(sorted(since.items(), key=lambda item: item[1][0])), missing


def read(path, pairs=()):
    """Rows of a log, with its columns renamed as in pairs: OURS=THEIRS."""
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
        rows = list(csv.DictReader(lines)) if file.suffix == ".csv" else []
    except (OSError, ValueError, csv.Error) as error:
        refuse(f"{file}: cannot be read ({error}); give a run's folder, .jsonl or .csv")
    for i, text in enumerate(lines if file.suffix != ".csv" else ()):
        try:
            rows += [json.loads(text)] if text.strip() else []
        except (ValueError, RecursionError) as error:
            if not rows or i + 1 < len(lines):  # else incomplete: the run is writing it, or was killed
                refuse(f"{file}, line {i + 1}: not JSON ({error}); remove that line")
    if not rows or not all(isinstance(row, dict) for row in rows):
        what = "not one JSON object per line" if rows else "no rows"
        refuse(f"{file}: {what}; give the log of a run that has finished a step")
    theirs = list(dict.fromkeys(str(name) for row in rows for name in row))
    for pair in pairs:
        ours, _, name = pair.partition("=")
        if ours not in COLUMNS:
            refuse(f"--columns {pair}: write OURS=THEIRS, where OURS is one of {' '.join(COLUMNS)}")
        if name not in theirs:
            near = ", ".join(difflib.get_close_matches(name, theirs, 5, 0))
            refuse(f"--columns {pair}: no column {name!r} in {file}; the nearest are {near}")
        rows = [{**row, ours: row.get(name)} for row in rows]
    if not any(series(rows, name) for name in COLUMNS[1:]):
        has, remedy = ", ".join(theirs[:9]), f"name one, e.g. --columns loss={theirs[-1]}"
        refuse(f"{file}: no numbers in any known column; it has {has}; {remedy}")
    return rows


def report(rows, name):
    """Print the findings -> a line with their names, for the figure."""
    found, missing = diagnose(rows)
    print(f"{name}: {len(rows)} rows; numbers are means over the first and the last tenth")
    for signature, (step, numbers) in found.items():
        print(f"FOUND since step {step:g}: {signature.__doc__}: {numbers}")
        print("      read " + ", ".join(f"tutorials/{chapter}" for chapter in SIGNATURES[signature].split()))
    for column in COLUMNS:
        if broken := [i for i, row in enumerate(rows) if isinstance(x := row.get(column), float) and x - x]:
            print(f"ignored: {column} is not finite in {len(broken)} rows, the first is row {broken[0]}")
    if not found:
        print(f"none of the {len(SIGNATURES) - len(missing)} signatures that could be judged was found")
    for signature, columns in missing.items():
        why = f"missing: {', '.join(columns)}" if columns else "PI, which may be the cause, is in use"
        print(f"not judged ({why}): {signature.__doc__}")
    findings = ", ".join(f"{s.__name__} (since step {step:g})" for s, (step, _) in found.items())
    return f"{name[-50:]}: {findings or 'no signature found'}"


def write_labels(panel, x, labels, **style):
    """Labels [(y, text, colour, weight), ...] at one x (share of the width), moved up where they overlap."""
    (low, high), at, gap = panel.get_ylim(), -1, 0.12  # at, gap: shares of the panel's height
    for i, (y, text, colour, weight) in enumerate(sorted(labels)):
        at = max(at + gap, min((y - low) / (high - low), 0.96 - gap * (len(labels) - 1 - i)))
        panel.text(x, at + 0.02, text, color=colour, weight=weight, transform=panel.transAxes, **style)


def draw(runs, heads):
    """A figure of one run, or of two in the same panels; runs: rows of each; heads: a line about each."""
    one, runs = len(runs) == 1, [{name: series(rows, name) for name in COLUMNS[1:]} for rows in runs]
    cells = [x for x in PANELS if any(run[name] for run in runs for name in PANELS[x])]
    layout = [[*cells[i : i + 3], *"..."][:3] for i in range(0, len(cells), 3)]
    figure, panels = lesson.panels("", layout, (9, 1 + 1.9 * len(layout)))
    from matplotlib.patheffects import withStroke

    heads = heads if one else [f"A (blue), {heads[0]}", f"B (orange), {heads[1]}"]
    figure.suptitle("\n".join(heads).replace("$", r"\$"), fontsize=10, x=0.01, ha="left", wrap=True)
    figure.supxlabel("step; dashed: thresholds for the mean of the last tenth (mismatch: first)", fontsize=9)
    for cell in cells:
        panel, ends, notes = panels[cell], [], {}
        for run, tint, letter in zip(runs, ["k"] if one else lesson.COLOURS, "AB", strict=False):
            found, _, lines = judge(run, sys.maxsize)
            looks = [(x, "-") for x in lesson.COLOURS] if one else [(tint, x) for x in ("-", ":", "-.", "--")]
            for (name, label), (colour, style) in zip(PANELS[cell].items(), looks, strict=False):
                if run[name]:
                    _, x, y = zip(*run[name], strict=True)
                    panel.plot(x, y, color=colour, ls=style, marker="." if len(x) < 30 else "")
                    ends.append((y[-1], label if one else f"{letter} {label}", colour, "normal"))
            for signature, (_, metric, side, at) in lines:
                if metric in PANELS[cell]:
                    panel.axhline(at, color=tint, lw=0.8, ls=(0, (6, 4)))
                    look = (tint, "bold") if signature in found else ("0.35", "normal")
                    if signature in found or signature not in notes:  # one label for both runs
                        notes[signature] = (at, f"{side}: {signature.__name__}", *look)
        panel.set_title(cell, fontsize=9, loc="left")
        panel.margins(x=0.02, y=0.15)
        write_labels(panel, 1.02, ends, va="center")
        halo = [withStroke(linewidth=2.5, foreground="w")]
        write_labels(panel, 0.02, notes.values(), va="bottom", size=8, path_effects=halo)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = lambda message: refuse(f"{message}; see --help")
    parser.add_argument("log", help="a run's folder, or its metrics as .jsonl or .csv")
    parser.add_argument("other", nargs="?", help="a second run, to compare")
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=" ".join(COLUMNS))
    parser.add_argument("--png", help="figure to write, or none; default: read_run.png beside the log")
    args = parser.parse_args(argv)
    logs = [Path(log) for log in (args.log, args.other) if log]
    runs = [read(log, args.columns) for log in logs]
    name = "_and_".join(["read_run", *(log.resolve().stem for log in logs[1:])]) + ".png"
    png = Path(args.png or (logs[0] if logs[0].is_dir() else logs[0].parent) / name)
    if png.is_dir() or not png.parent.is_dir():
        parser.error(f"--png {png}: not a file in a folder that exists")
    heads = [report(rows, str(log)) for rows, log in zip(runs, logs, strict=True)]
    try:
        if args.png != "none":
            lesson.save(draw(runs, heads), png)
            print(f"wrote {png}")
    except ModuleNotFoundError:
        print('no figure: it needs matplotlib; pip install -e ".[dev]"', file=sys.stderr)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        parser.error(f"--png {png}: cannot be written ({error})")


if __name__ == "__main__":
    main()
