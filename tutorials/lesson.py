"""Code shared by the chapters: run modes, CSV files, README tables, figures and the check of the claims.

    python tutorials/NN_name/run.py            # full run: metrics.csv, figure.png, the README's tables
    python tutorials/NN_name/run.py --smoke    # the same code on a small scale, in seconds; keeps nothing
    python tutorials/NN_name/run.py --plot     # redraws figure.png and the README's tables from metrics.csv
    python tutorials/NN_name/run.py --check    # checks metrics.csv against expected.json and the README
    python tutorials/NN_name/run.py --only PART    # runs one part, where a chapter has several

expected.json is a list of claims. Each takes a number from the CSV, or the difference of two, and bounds it:

    {"claim": "naive top-k ruins the student", "take": "max accuracy where arm=topk step=150", "below": 0.2}
    {"claim": "the fix prevents that", "take": "min accuracy where arm=sg_topk step=150",
     "minus": "max accuracy where arm=topk step=150", "above": 0.3}
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
# The colour-blind-safe palette of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TAKE = {"min": min, "max": max, "mean": statistics.fmean, "median": statistics.median, "only": lambda x: x[0]}


# --------------------------------------------------------------------------------------- models and runs


def cache():
    """Folder for the models and data that chapters share; with --smoke, a temporary folder."""
    return Path(os.environ.get("LESSON_CACHE") or ROOT / ".cache" / "lessons")


def cached(name, write, depends_on):
    """Path in the cache that write(path) made once, for this name, toy.py and these functions and values."""
    import toy

    code = [inspect.getsource(x) if callable(x) else repr(x) for x in (toy.pretrain, *depends_on)]
    stem, dot, kind = name.partition(".")
    state = "".join([Path(toy.__file__).read_text(), *code])
    path = cache() / f"{stem}_{hashlib.sha256(state.encode()).hexdigest()[:8]}{dot}{kind}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        toy.put_in_place(path, write)
    return str(path)


def kept(name, make, *depends_on):
    """Path of a cached toy model: make() -> model runs once.

    Give the functions and values that the model depends on, beside toy.py and what the name says: when one
    of them is changed, as in an exercise, the model is trained anew.
    """
    import toy

    return cached(name, lambda aside: toy.save_model(make(), aside), (make, *depends_on))


def kept_rows(name, rows):
    """Path of a cached .jsonl file with these rows."""
    import toy

    return cached(f"{name}.jsonl", lambda aside: toy.save_rows(rows, aside), [rows])


def toy_model(style, seed, steps=700, stop=None):
    """Path of a toy model trained on chains of style A, M or B; stop: the accuracy at which training ends."""
    import toy

    write = toy.styles(**{style: 1})
    name = f"{style}_{seed}_{steps}" + (f"_{stop}" if stop else "")
    return kept(name, lambda: toy.pretrain(write, seed, steps, stop))


def student(seed, smoke=False):
    """Path of opd.py's toy student: style A, stopped when about half of its samples are right."""
    return toy_model("A", seed, 10 if smoke else 700, 0.45)


def teacher(seed, smoke=False, style="A"):
    """Path of the toy teacher of that seed: right in nearly every sample, in its own style."""
    return toy_model(style, seed + 1_000_000, 10 if smoke else 700)


def data(smoke=False, train=20_000, held_out=256):
    """The toy's problems for Args: {"data": path, "eval_data": path}; fewer with --smoke."""
    import toy

    train, held_out = (64, 16) if smoke else (train, held_out)
    names = (f"train_{train}", f"held_out_{held_out}")
    paths = [kept_rows(names[0], toy.rows(train)), kept_rows(names[1], toy.rows(held_out, held_out=True))]
    return dict(zip(("data", "eval_data"), paths, strict=True))


def load(path):
    """Tokenizer and model of a folder, float32 on the CPU, as opd.py loads them."""
    import torch

    import opd

    return opd.load_model(str(path), "student", torch.float32, torch.device("cpu"))


def answered(path, rows, key, n=1, max_new_tokens=32, temperature=1.0):
    """Sample n completions of each row's prompt and grade them -> one dict for each, in order.

    rows: dicts with prompt and, for right, answer. Each dict has row (its index), text, right (True or
    False), ids and rollout. Models that get the same key draw with the same random numbers.
    """
    import opd

    tokenizer, model = load(path)
    prompts = [opd.encode_prompt(tokenizer, row["prompt"], 10_000) for row in rows]
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    rollouts = opd.sample(model, prompts, n, stops, key, range(len(rows)), max_new_tokens, temperature)
    found = []
    for i, rollout in enumerate(rollouts):
        text = tokenizer.decode(rollout.completion, skip_special_tokens=True)
        answer = rows[i // n].get("answer")
        right = answer is not None and bool(opd.is_correct(text, answer))
        one = {"row": i // n, "text": text, "right": right}
        found.append({**one, "ids": rollout.completion, "rollout": rollout})
    return found


def log_probs(model, prompts, completions):
    """Next-token log-probabilities [N,V] at every position of the completions (token ids), packed."""
    import torch

    import opd

    with torch.no_grad():
        return opd.project(model, opd.completion_hidden(model, prompts, completions)).log_softmax(-1)


@contextlib.contextmanager
def distilled(script, **args):
    """Run opd.train or opsd.train (script: the module) in a temporary folder -> metrics, final model's path.

    Output and progress bars are suppressed. The folder is removed when the with block ends.
    """
    with tempfile.TemporaryDirectory() as aside:
        args = script.Args(**{"device": "cpu", **args, "out": f"{aside}/run"})
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            log = script.train(args)
            if log[-1]["step"] < args.steps:  # it ends normally at a signal; half a run must not be cached
                raise RuntimeError(f"the run was stopped after step {log[-1]['step']} of {args.steps}")
            yield log, f"{aside}/run/final"


def one_thread():
    """Initialise a worker: toy models gain nothing from a second thread, and it would change the results."""
    import torch

    torch.set_num_threads(1)


def call(function, *args):
    """The function of in_parallel for jobs that begin with their own."""
    return function(*args)


@functools.cache
def processes(workers):
    """The pool of all calls with so many workers: each process takes seconds to start and to import torch."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), one_thread)


def in_parallel(function, jobs, title, workers=2):
    """[function(*job) for job in jobs] in single-threaded processes; function must be at module level."""
    waiting = [processes(workers).submit(function, *job) for job in jobs]
    return [done.result() for done in tqdm(waiting, desc=title, unit="run")]


# ----------------------------------------------------------------------------------- rows, numbers, claims


def write_csv(path, rows):
    """Write rows (dicts) as CSV, floats with 6 significant digits; what a row lacks is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path):
    """Read the rows back; values that parse as numbers become floats."""

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def select(rows, **where):
    """Return the rows whose columns have these values."""
    return [row for row in rows if all(row[k] == v for k, v in where.items())]


def take(rows, expression):
    """One number from the rows: 'max accuracy where arm=topk step=150'."""
    head, _, conditions = expression.partition(" where ")
    how, column = head.split()
    where = dict(condition.split("=") for condition in conditions.split())
    found = [row[column] for row in rows if all(str(row[k]) in (v, f"{v}.0") for k, v in where.items())]
    found = [value for value in found if value != ""]  # rows of other kinds leave this column empty
    if not found or (how == "only" and len(found) > 1):
        raise ValueError(f"{expression!r}: {len(found)} rows")
    return TAKE[how](found)


def check(rows, claims):
    """Print each claim with its number -> True if all hold."""
    good = True
    for claim in claims:
        number = take(rows, claim["take"]) - (take(rows, claim["minus"]) if "minus" in claim else 0)
        bounds = {side: claim[side] for side in ("above", "below") if side in claim}
        holds = (
            bounds
            and number > bounds.get("above", -float("inf"))
            and number < bounds.get("below", float("inf"))
        )
        asked = ", ".join(f"{side} {bound:g}" for side, bound in bounds.items())
        print(f"{'ok  ' if holds else 'FAIL'} {claim['claim']}: {number:.4g} ({asked})")
        good = good and bool(holds)
    return good


def with_numbers(text, tables):
    """README text with each table (name -> lines) between its markers <!-- name --> and <!-- /name -->."""
    for name, lines in tables.items():
        head, rest = text.split(f"<!-- {name} -->\n", 1)
        _, tail = rest.split(f"<!-- /{name} -->", 1)
        text = f"{head}<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- /{name} -->{tail}"
    return text


def table(*lines):
    """Lines of a Markdown table from its rows of cells; the first is the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def quoted(text):
    """A completion on one line of a Markdown table, as code."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"


def spread(values, digits=2):
    """Format values as the tables do: mean (min to max)."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# ------------------------------------------------------------------------------------------------ figures


def panels(title, layout, size=(10, 4)):
    """A figure with a title and named panels -> (figure, {name: axes})."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplot_mosaic(layout, figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    return figure, axes


def curve(panel, rows, x, y, colour, label=None, **style):
    """Plot the mean of y over the rows with equal x (the seeds), and a band from their minimum to maximum.

    The label is written at the line's right end, in its colour; save moves labels apart that would overlap.
    Rows without a number in y are ignored.
    """
    rows = [row for row in rows if isinstance(row[y], (int, float))]
    xs = sorted({row[x] for row in rows})
    groups = [[row[y] for row in rows if row[x] == at] for at in xs]
    means = [statistics.fmean(group) for group in groups]
    panel.plot(xs, means, color=colour, **style)
    panel.fill_between(xs, list(map(min, groups)), list(map(max, groups)), color=colour, alpha=0.2, lw=0)
    if label:
        name(panel, xs[-1], means[-1], label, colour)


def name(panel, x, y, text, colour):
    """Write a label to the right of a point; save moves labels of a panel apart that would overlap."""
    at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "color": colour}
    panel.annotate(text, (x, y), **at, gid="label")


def move_labels_apart(figure):
    """Shift the labels of each panel up or down until none overlaps its neighbours."""
    figure.canvas.draw()  # the layout, and with it the labels' places in pixels, is known from here on
    for panel in figure.axes:
        labels = [x for x in panel.texts if x.get_gid() == "label"]
        boxes = [x.get_window_extent() for x in labels]
        order = sorted(range(len(labels)), key=lambda i: boxes[i].y0 + boxes[i].y1)
        middle = {i: (boxes[i].y0 + boxes[i].y1) / 2 for i in order}
        for _ in range(200):
            for low, high in zip(order, order[1:], strict=False):
                need = (boxes[low].height + boxes[high].height) / 2 - (middle[high] - middle[low])
                if need > 0 and boxes[low].x0 < boxes[high].x1 and boxes[high].x0 < boxes[low].x1:
                    middle[low], middle[high] = middle[low] - need / 2, middle[high] + need / 2
        for i in order:
            shift = (middle[i] - (boxes[i].y0 + boxes[i].y1) / 2) * 72 / figure.dpi
            labels[i].xyann = (labels[i].xyann[0], labels[i].xyann[1] + shift)


def save(figure, path):
    import matplotlib.pyplot as plt

    move_labels_apart(figure)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(file, run, plot, tables):
    """run(smoke) -> rows; plot(rows, path of the PNG); tables(rows) -> {name: lines of Markdown}.

    run may be a dict instead, {part: its run}; each row then gets a column part, and --only PART is a mode.
    """
    runs = run if isinstance(run, dict) else {None: run}
    parser = argparse.ArgumentParser(usage=f"{Path(file).name} [--smoke | --plot | --check | --only PART]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--smoke", action="store_true", help="run on a small scale, in seconds; keep nothing")
    mode.add_argument("--plot", action="store_true", help="redraw figure and README tables from metrics.csv")
    mode.add_argument("--check", action="store_true", help="compare metrics.csv with claims and README")
    if None not in runs:
        mode.add_argument("--only", choices=list(runs), help="run one part, keep the other parts' rows")
    args, folder, begin = parser.parse_args(), Path(file).resolve().parent, time.perf_counter()
    only = getattr(args, "only", None)

    def everything(smoke):
        rows, before = [], read_csv(folder / "metrics.csv") if only else []
        for part, run_part in runs.items():
            new = run_part(smoke) if only in (None, part) else select(before, part=part)
            rows += [{"part": part, **row} for row in new] if part else new
        return rows

    if args.smoke:
        with tempfile.TemporaryDirectory() as aside:
            os.environ["LESSON_CACHE"] = f"{aside}/cache"  # worker processes inherit it
            rows = everything(smoke=True)
            write_csv(Path(aside) / "metrics.csv", rows)
            rows = read_csv(Path(aside) / "metrics.csv")
            plot(rows, Path(aside) / "figure.png")
            tables(rows)
        print(f"smoke: {len(rows)} rows, {time.perf_counter() - begin:.0f} s")
        return
    if not (args.plot or args.check):
        write_csv(folder / "metrics.csv", everything(smoke=False))
        print(f"{time.perf_counter() - begin:.0f} s")
    rows, readme = read_csv(folder / "metrics.csv"), folder / "README.md"
    text = readme.read_text()
    good = check(rows, json.loads((folder / "expected.json").read_text()))
    if args.check:
        if with_numbers(text, tables(rows)) != text:
            print("FAIL the tables in README.md differ from metrics.csv: run with --plot")
            good = False
    else:
        plot(rows, folder / "figure.png")
        readme.write_text(with_numbers(text, tables(rows)))
    if not good:
        sys.exit(1)
