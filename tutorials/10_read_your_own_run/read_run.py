"""Diagnose a run from its log, or look at its rollouts token by token.

    python read_run.py runs/opd                                           # plots, findings, chapters to read
    python read_run.py log.csv --columns loss=train/loss reverse_kl=kl    # another program's .jsonl or .csv
    python read_run.py --rollouts STUDENT TEACHER prompts.jsonl           # log q - log p per token, as HTML

A finding is a hint, with its numbers and the chapters to read, and not a verdict. A run without findings is
not necessarily healthy.
"""

import argparse
import csv
import difflib
import inspect
import io
import json
import math
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import torch  # noqa: E402

import opd  # noqa: E402
from opd import UserError  # noqa: E402

PANELS = {
    "loss and KL, nats per token": "loss reverse_kl forward_kl",
    "probability on the top k": "student_mass teacher_mass overlap",
    "log-prob of the sampled tokens, nats": "student_logp teacher_logp",
    "entropy, nats per token": "student_entropy teacher_entropy",
    "completion length, tokens": "completion_len",
    "repetition and truncation, share": "repetition truncated",
    "accuracy": "eval_accuracy eval_with_pi_accuracy",
    "pi_gap, nats per token": "pi_gap",
    "gradient norm, before clipping": "grad_norm",
}
COLUMNS = ["step", *" ".join(PANELS.values()).split()]


class Span(NamedTuple):
    start: float  # mean over the first tenth of a column's values, at least one
    end: float  # mean over the last tenth
    n: int  # how many values there are


ANY = Span(1, 1, 1)  # default for an optional column


# A signature maps the columns that it needs (optional ones have a default) to whether it is found.


def mass_leak(student_mass: Span, loss: Span, reverse_kl=ANY):
    """A truncated loss ignores mass outside its k tokens. Not found if the exact KL halves."""
    falls = loss.end < loss.start and reverse_kl.end > reverse_kl.start / 2
    hidden = loss.end < reverse_kl.end / 2 and reverse_kl.end > reverse_kl.start  # see README, Limits
    return student_mass.end < student_mass.start - 0.1 and (falls or hidden)


def no_direction(loss: Span, reverse_kl: Span, grad_norm: Span, pi_gap=None):
    """Updates without effect. Not found for a KL below 0.05, nor with PI, where the KL may have a floor."""
    stands = loss.end > loss.start - abs(loss.start) / 10 and reverse_kl.end > reverse_kl.start * 0.9
    at_work = loss.n > 1 and reverse_kl.end > 0.05 and grad_norm.end > grad_norm.start / 2
    return stands and at_work and pi_gap is None


def mismatch(student_logp: Span, teacher_logp: Span, pi_gap=None):
    """2 nats: the geometric mean of q(y) / p(y) is below 1/7, before training can have changed much."""
    return student_logp.start - teacher_logp.start > 2 and pi_gap is None


def teacher_collapse(student_logp: Span, teacher_logp: Span, pi_gap=None):
    """The same gap, but caused by the run."""
    before, after = student_logp.start - teacher_logp.start, student_logp.end - teacher_logp.end
    return before <= 2 < after and teacher_logp.end < teacher_logp.start - 1 and pi_gap is None


def loops(completion_len: Span, repetition: Span):
    """Length alone may be better reasoning, and repetition alone a table; both together are a loop."""
    return completion_len.end > 1.3 * completion_len.start and repetition.end > repetition.start + 0.1


def entropy_collapse(student_entropy: Span, teacher_entropy: Span):
    """Relative to the teacher's entropy: with a confident teacher it falls in healthy runs too."""
    falls = student_entropy.end < student_entropy.start / 2 and teacher_entropy.end > 0.01
    return falls and student_entropy.end < teacher_entropy.end / 4


def pi_without_accuracy(pi_gap: Span, eval_accuracy: Span, eval_with_pi_accuracy=ANY):
    """Less than a tenth of the possible gain in accuracy; not found if the possible gain is below 0.05."""
    way, gained = eval_with_pi_accuracy.start - eval_accuracy.start, eval_accuracy.end - eval_accuracy.start
    matters = max(abs(pi_gap.start), abs(pi_gap.end)) > 0.1
    return matters and eval_accuracy.n > 1 and way > 0.05 and gained < way / 10


SIGNATURES = {  # message, chapters to read
    mass_leak: ("the student's mass on the top k falls, and the loss does not show it", "03_biased_topk"),
    no_direction: (
        "loss and KL do not fall, although the gradient stays large",
        "09_silent_bugs 02_many_faces_of_kl",
    ),
    mismatch: (
        "the teacher's log-prob is far below the student's from the start",
        "04_teacher_mismatch 05_sft_stabilised_student",
    ),
    teacher_collapse: (
        "the teacher's log-prob falls far below the student's",
        "03_biased_topk 04_teacher_mismatch",
    ),
    loops: ("completions become longer and repetitive", "09_silent_bugs"),
    entropy_collapse: ("the student's entropy falls far below the teacher's", "09_silent_bugs"),
    pi_without_accuracy: (
        "the PI has an effect (pi_gap), but accuracy without it does not rise",
        "06_instance_specific_pi 07_shared_rule 08_one_policy_many_teachers",
    ),
}


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
    """Judge the first n rows -> {signature found: its numbers}, {signature not judged: missing columns}."""
    found, missing, known = {}, {}, spans(columns, n)
    for signature in SIGNATURES:
        wanted = inspect.signature(signature).parameters
        seen = {name: known[name] for name in wanted if name in known}
        absent = [name for name, p in wanted.items() if p.default is p.empty and name not in known]
        if absent:
            missing[signature] = absent
        elif signature(**seen):
            found[signature] = ", ".join(f"{k} {v.start:.3g} -> {v.end:.3g}" for k, v in seen.items())
    return found, missing


def diagnose(rows):
    """-> {signature: (first step of the finding, numbers)}, ordered by step, and judge's missing columns."""
    columns, since = {name: series(rows, name) for name in COLUMNS[1:]}, {}
    ends = [-(-len(rows) * tenth // 10) for tenth in range(1, 11)]  # row counts of the ten judgements
    stages = [judge(columns, n)[0] for n in ends]
    for signature in stages[-1]:
        first = max((i + 1 for i in range(10) if signature not in stages[i]), default=0)
        step = number(rows[ends[first] - 1].get("step"))
        since[signature] = (ends[first] - 1 if step is None else step, stages[-1][signature])
    return dict(sorted(since.items(), key=lambda item: item[1][0])), judge(columns, len(rows))[1]


def read(path, pairs=()):
    """Rows of a log, with its columns renamed as in pairs: OURS=THEIRS."""
    file, rows = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path), []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a run's folder, .jsonl or .csv") from error
    lines = [] if file.suffix == ".csv" else text.splitlines()
    for i, line in enumerate(lines):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            if rows and i + 1 == len(lines):
                continue  # incomplete: the run is writing it, or was killed
            raise UserError(f"{file}, line {i + 1}: not JSON ({error}); remove that line") from error
    rows = rows if lines else list(csv.DictReader(io.StringIO(text)))
    if not rows or not all(isinstance(row, dict) for row in rows):
        what = "not one JSON object per line" if rows else "no rows"
        raise UserError(f"{file}: {what}; give the log of a run that has finished a step")
    theirs = list(dict.fromkeys(str(name) for row in rows for name in row))
    for pair in pairs:
        ours, _, name = pair.partition("=")
        if ours not in COLUMNS:
            raise UserError(f"--columns {pair}: write OURS=THEIRS, where OURS is one of {' '.join(COLUMNS)}")
        if name not in theirs:
            near = ", ".join(difflib.get_close_matches(name, theirs, 5, 0))
            raise UserError(f"--columns {pair}: no column {name!r} in {file}; the nearest are {near}")
        rows = [{**row, ours: row.get(name)} for row in rows]
    if not any(series(rows, name) for name in COLUMNS[1:]):
        has, remedy = ", ".join(theirs[:9]), f"name one, e.g. --columns loss={theirs[-1]}"
        raise UserError(f"{file}: no numbers in any known column; it has {has}; {remedy}")
    return rows


def report(rows, name):
    """Print the findings -> a figure with a panel for each group of columns that has numbers."""
    found, missing = diagnose(rows)
    print(f"{name}: {len(rows)} rows; numbers are means over the first and the last tenth")
    for signature, (step, numbers) in found.items():
        what, chapters = SIGNATURES[signature]
        print(f"FOUND since step {step:g}: {what}: {numbers}")
        print("      read " + ", ".join(f"tutorials/{chapter}" for chapter in chapters.split()))
    for column in COLUMNS:
        broken = [i for i, row in enumerate(rows) if isinstance(x := row.get(column), float) and x - x != 0]
        if broken:
            print(f"ignored: {column} is not finite in {len(broken)} rows, the first is row {broken[0]}")
    if not found:
        print(f"none of the {len(SIGNATURES) - len(missing)} signatures that could be judged was found")
    for signature, columns in missing.items():
        print(f"not judged (missing: {', '.join(columns)}): {SIGNATURES[signature][0]}")
    cells = [cell for cell, names in PANELS.items() if any(series(rows, x) for x in names.split())]
    layout = [[*cells[i : i + 3], *"..."][:3] for i in range(0, len(cells), 3)]
    title = f"{name[-50:]}: {', '.join(s.__name__ for s in found) or 'no signature found'}"
    figure, panels = lesson.panels(title.replace("$", r"\$"), layout, (11, 0.6 + 2.2 * len(layout)))
    for cell in cells:
        for column, colour in zip(PANELS[cell].split(), lesson.COLOURS, strict=False):
            if points := series(rows, column):
                _, x, y = zip(*points, strict=True)
                panels[cell].plot(x, y, ".-" if len(x) < 30 else "-", color=colour, label=column)
        panels[cell].set(title=cell, xlabel="step")
        panels[cell].legend(frameon=False, fontsize=8)
    return figure


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Rollouts</title><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { background: Canvas; color: CanvasText; max-width: 58rem; margin: 1rem auto 15rem; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 2rem 0 .3rem }
pre { font: 14px/1.9 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }
.prompt { border-left: 3px solid; padding-left: .6rem; line-height: 1.4 }
.t { border-bottom: 1px dotted; margin-right: 1px; padding: 2px 0; unicode-bidi: isolate }
.t:hover, .t:focus { outline: 2px solid }
.tip { display: none; position: fixed; inset: auto 0 0; padding: .6rem max(1rem, 50vw - 29rem);
  line-height: 1.4; background: Canvas; border-top: 2px solid; max-height: 14rem; overflow: auto }
.t:focus > .tip, .t:hover > .tip { display: block } .t:hover > .tip { z-index: 1 }
.tip > span { display: inline-block; vertical-align: top; min-width: 14rem; margin: .5rem 2rem 0 0 }
</style></head><body>
"""


def tint(gap):
    """Orange: the teacher's probability is lower than the student's; blue: higher. Colour-blind safe."""
    strength = 0.75 * min(abs(gap) / 4, 1)  # full at a factor of e^4 = 55; 0.75 keeps the text legible
    return f'class="t" style="background: rgba({"213, 94, 0" if gap < 0 else "0, 114, 178"}, {strength:.2f})"'


@torch.no_grad()
def score(model, rollout, k=5):
    """Log-probs of the completion's tokens [T], and of the top k candidates [T,k] with their ids [T,k]."""
    hidden, parts = opd.completion_hidden(model, [rollout.prompt], [rollout.completion]), []
    for h, y in zip(hidden.split(512), torch.tensor(rollout.completion).split(512), strict=True):
        logp = opd.project(model, h).log_softmax(-1).cpu()  # [n,V]
        parts.append((logp.gather(-1, y[:, None])[:, 0], *logp.topk(min(k, logp.shape[1]))))
    return [torch.cat(x).tolist() for x in zip(*parts, strict=True)]


def rollout_html(where, rollout, tokenizer, student, teacher):
    """Heading, prompt, and a span for each token with both models' probabilities at its position."""

    def text(i, token):  # decoded in context; if that is empty, its raw name
        before = (rollout.prompt + rollout.completion[:i])[-4:]
        piece = tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
        return piece if piece and "\ufffd" not in piece else str(tokenizer.convert_ids_to_tokens(token))

    def quoted(i, token):
        return json.dumps(text(i, token), ensure_ascii=False)

    def candidates(i, who, logps, ids):
        lines = [f"{math.exp(x):<8.3g} {quoted(i, v)}" for x, v in zip(logps, ids, strict=True)]
        return f"<span><b>{who}'s top {len(ids)}</b>\n" + escape("\n".join(lines)) + "</span>"

    (p, p_best, p_ids), (q, q_best, q_ids) = score(student, rollout), score(teacher, rollout)
    spans, size = [], len(rollout.completion)
    for i, token in enumerate(rollout.completion):
        said = f"position {i + 1} of {size}, {quoted(i, token)}: student {math.exp(p[i]):.3g}, "
        said += f"teacher {math.exp(q[i]):.3g}, log q(y) - log p(y) = {q[i] - p[i]:+.2f}"
        both = candidates(i, "student", p_best[i], p_ids[i]) + candidates(i, "teacher", q_best[i], q_ids[i])
        piece, tip = escape(text(i, token)).replace("\n", "↵\n"), f"{escape(said)}\n{both}"
        spans.append(f'<span {tint(q[i] - p[i])} tabindex="0">{piece}<span class="tip">{tip}</span></span>')
    how = f"{size} tokens, {'ended' if rollout.ended else 'truncated'}"
    head = f"{where}: {how}, mean log q - log p = {(sum(q) - sum(p)) / size:+.3f} nats"
    prompt = escape(tokenizer.decode(rollout.prompt))
    return f'<h2>{escape(head)}</h2>\n<pre class="prompt">{prompt}</pre>\n<pre>{"".join(spans)}</pre>\n'


def rollouts_page(student, teacher, data, n, **limits):
    """-> the page: the student's completions of the first n prompts, sampled as in an evaluation."""
    nowhere = f"{tempfile.gettempdir()}/read_run"  # nothing is written there
    args = opd.Args(student, teacher, data, out=nowhere, topk=1, dtype="float32", **limits)
    args, device = opd.set_up(args)
    path = opd.resolve_paths(args, "opd", device)
    ours, theirs, tokenizer, stop_ids = opd.load_pair(path["student"], path["teacher"], args, device)
    rows = opd.load_rows(path["data"], "rollouts", ["prompt"])
    which = range(min(n, len(rows)))
    where = [f"{path['data']}, row {i}" for i in which]
    with opd.blame(f"--rollouts {path['data']}", "a prompt cannot be encoded", "correct the row"):
        prompts = [opd.encode_prompt(tokenizer, rows[i]["prompt"], args.max_prompt_tokens) for i in which]
    samples = opd.sample(ours, prompts, 1, stop_ids, (~args.seed, 0), which, args.max_new_tokens)
    legend = " ".join(f"<span {tint(gap)}> {gap:+d} </span>" for gap in (-4, -2, 0, 2, 4))
    about = (
        f"<h1>{len(samples)} rollouts, token by token</h1>\n<p>Student p: {escape(student)}. Teacher q: "
        f"{escape(teacher)}. Colour: log q(y) - log p(y) in nats, {legend}, of the token y that the student "
        "sampled. Hover over a token, or step with Tab, to see both models' probabilities below.</p>\n"
    )
    each = (rollout_html(at, r, tokenizer, ours, theirs) for at, r in zip(where, samples, strict=True))
    return f"{PAGE}{about}{''.join(each)}</body></html>\n"


def main(argv=None):
    """Errors that the user can fix are reported in one line, with exit code 2."""

    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("log", nargs="?", help="folder of a run, or its metrics as .jsonl or .csv")
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=" ".join(COLUMNS))
    parser.add_argument(
        "--rollouts", nargs=3, metavar=("STUDENT", "TEACHER", "DATA"), help="as the flags of opd.py"
    )
    parser.add_argument("--out", help="file to write: report.png, or rollouts.html")
    parser.add_argument("--n", type=int, default=8, help="rollouts: number of prompts, from the first")
    for flag, default in {"max_new_tokens": 64, "max_prompt_tokens": 256, "seed": 0}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help="rollouts: as in opd.py")
    try:
        args = parser.parse_args(argv)
        if bool(args.log) == bool(args.rollouts) or args.n < 1:
            refuse("give either a log, or --rollouts STUDENT TEACHER DATA with --n of at least 1")
        out = Path(args.out or ("rollouts.html" if args.rollouts else "report.png"))
        if out.is_dir() or not out.parent.is_dir():
            refuse(f"--out {out}: not a file in a folder that exists")
        if args.rollouts:
            limits = {name: getattr(args, name) for name in ("max_new_tokens", "max_prompt_tokens", "seed")}
            page = rollouts_page(*args.rollouts, args.n, **limits)
        else:
            figure = report(read(args.log, args.columns), args.log)
        try:
            out.write_text(page, "utf-8", "replace") if args.rollouts else lesson.save(figure, out)
        except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
            refuse(f"--out {out}: cannot be written ({error})")
        print(f"wrote {out}")
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
