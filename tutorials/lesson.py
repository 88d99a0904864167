"""Code shared by the chapters: run modes, CSV files, README tables, figures and the check of the claims.

    python tutorials/NN_name/run.py            # full run: metrics.csv, figure.png, the README's tables
    python tutorials/NN_name/run.py --smoke    # the same code on a small scale, in seconds; keeps nothing
    python tutorials/NN_name/run.py --plot     # redraws figure.png and the README's tables from metrics.csv
    python tutorials/NN_name/run.py --check    # checks metrics.csv against expected.json and the README

expected.json is a list of claims. Each takes a number from the CSV, or the difference of two, and bounds it:

    {"claim": "naive top-k ruins the student", "take": "max accuracy where arm=topk step=150", "below": 0.2}
    {"claim": "the fix prevents that", "take": "min accuracy where arm=sg_topk step=150",
     "minus": "max accuracy where arm=topk step=150", "above": 0.3}
"""

import argparse
import contextlib
import csv
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


def kept(name, make):
    """Path of a cached model: make() -> model runs once, and the result is saved with toy's tokenizer.

    The name must contain everything that the model depends on: style, seed, steps.
    """
    import toy

    path = cache() / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        toy.put_in_place(path, lambda aside: toy.save_model(make(), aside))
    return str(path)


def kept_rows(name, rows):
    """Path of a cached .jsonl file with these rows; the name must contain everything they depend on."""
    import toy

    path = cache() / f"{name}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        toy.put_in_place(path, lambda aside: toy.save_rows(rows, aside))
    return str(path)


def toy_model(style, seed, steps=700, stop=None):
    """Path of a toy model trained on chains of style A, M or B; stop: the accuracy at which training ends.

    toy_model("A", seed, stop=0.45) is opd.py's toy student, toy_model("A", seed + 1_000_000) its teacher.
    """
    import toy

    write = toy.styles(**{style: 1})
    name = f"{style}_{seed}_{steps}" + (f"_{stop}" if stop else "")
    return kept(name, lambda: toy.pretrain(write, seed, steps, stop))


@contextlib.contextmanager
def distilled(script, **args):
    """Run opd.train or opsd.train (script: the module) in a temporary folder -> metrics, final model's path.

    Output and progress bars are suppressed. The folder is removed when the with block ends.
    """
    with tempfile.TemporaryDirectory() as aside:
        args = {"device": "cpu", **args, "out": f"{aside}/run"}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield script.train(script.Args(**args)), f"{aside}/run/final"


def one_thread():
    """Initialise a worker: toy models gain nothing from a second thread, and it would change the results."""
    import torch

    torch.set_num_threads(1)


def in_parallel(function, jobs, title, workers=2):
    """[function(*job) for job in jobs] in single-threaded processes; function must be at module level."""
    jobs, mode = list(jobs), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mode, one_thread) as pool:
        waiting = [pool.submit(function, *job) for job in jobs]
        return [done.result() for done in tqdm(waiting, desc=title, unit="run")]


# ----------------------------------------------------------------------------------- rows, numbers, claims


def write_csv(path, rows):
    """Write rows (dicts with the same keys) as CSV, floats with 6 significant digits."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
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

    The label is written at the line's right end, in its colour. Rows without a number in y are ignored.
    """
    rows = [row for row in rows if isinstance(row[y], (int, float))]
    xs = sorted({row[x] for row in rows})
    groups = [[row[y] for row in rows if row[x] == at] for at in xs]
    means = [statistics.fmean(group) for group in groups]
    panel.plot(xs, means, color=colour, **style)
    panel.fill_between(xs, list(map(min, groups)), list(map(max, groups)), color=colour, alpha=0.2, lw=0)
    if label:
        at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "color": colour}
        panel.annotate(label, (xs[-1], means[-1]), **at)


def save(figure, path):
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------- main


def main(file, run, plot, tables):
    """run(smoke) -> rows; plot(rows, path of the PNG); tables(rows) -> {name: lines of Markdown}."""
    parser = argparse.ArgumentParser(usage=f"{Path(file).name} [--smoke | --plot | --check]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--smoke", action="store_true", help="run on a small scale, in seconds; keep nothing")
    mode.add_argument("--plot", action="store_true", help="redraw figure and README tables from metrics.csv")
    mode.add_argument("--check", action="store_true", help="compare metrics.csv with claims and README")
    args, folder, begin = parser.parse_args(), Path(file).resolve().parent, time.perf_counter()
    if args.smoke:
        with tempfile.TemporaryDirectory() as aside:
            os.environ["LESSON_CACHE"] = f"{aside}/cache"  # worker processes inherit it
            rows = run(smoke=True)
            write_csv(Path(aside) / "metrics.csv", rows)
            rows = read_csv(Path(aside) / "metrics.csv")
            plot(rows, Path(aside) / "figure.png")
            tables(rows)
        print(f"smoke: {len(rows)} rows, {time.perf_counter() - begin:.0f} s")
        return
    if not (args.plot or args.check):
        write_csv(folder / "metrics.csv", run(smoke=False))
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
