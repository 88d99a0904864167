"""README.md says what the code says: its tables are made from docstrings, help texts and files.

python tests/test_readme.py     # writes them anew
"""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import losses  # noqa: E402
import opd  # noqa: E402
import opsd  # noqa: E402

README = ROOT / "README.md"


def docstring(function):
    """-> first line, {"value": ..., "grad": ..., "teacher sends": ..., "ref": ...}, each on one line."""
    first, *rest = inspect.getdoc(function).splitlines()
    entries, key = {}, None
    for line in rest:
        found = re.match(r"(value|grad|teacher sends|ref): (.*)", line)
        if found:
            key, entries[found[1]] = found[1], found[2]
        elif line.startswith("    ") and key:
            entries[key] += " " + line.strip()
        else:
            key = None
    return first, entries


def function_of(name):
    """The function of losses.py behind a --loss."""
    return getattr(
        losses, re.search(r"losses\.(\w+)", inspect.getsource(opd.LOSSES[name][1]).split(f'"{name}"')[1])[1]
    )


def loss_table():
    lines = ["| `--loss` | the teacher sends | expected gradient |", "|---|---|---|"]
    rows = {}  # what is sent, gradient -> the losses that share both
    for name in opd.LOSSES:
        first, entry = docstring(function_of(name))
        short = {key: re.split(r"(?<=[^.])[.;] ", text)[0].rstrip(".") for key, text in entry.items()}
        mark = " **biased**" if ", BIASED" in first else ""
        cells = re.sub(r" \(.*\)$", "", short["teacher sends"]), short["grad"]
        rows.setdefault(cells, []).append(f"`{name}`{mark}")
    for cells, names in rows.items():
        row = " | ".join(cell.replace("|", "\\|") for cell in (", ".join(names), *cells))
        lines.append(f"| {row} |")
    return lines


def file_map():
    what = {
        "losses.py": "every divergence and estimator; imports torch only",
        "opd.py": "on-policy distillation, the whole loop",
        "opsd.py": "self-distillation with privileged information; imports opd.py",
    }
    rows = [(name, len((ROOT / name).read_text().splitlines()), text) for name, text in what.items()]
    return [
        "| file | lines | |",
        "|---|---|---|",
        *(f"| `{name}` | {n} | {text} |" for name, n, text in rows),
    ]


TABLES = {"losses": loss_table, "files": file_map}


def replaced(text, name, lines):
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, tail = text.index(start) + len(start), text.index(end)
    return text[:head] + "\n".join(lines) + "\n" + text[tail:]


@pytest.mark.parametrize("name", TABLES)
def test_table_says_what_the_code_says(name):
    text = README.read_text()
    assert replaced(text, name, TABLES[name]()) == text, "run: python tests/test_readme.py"


def test_every_metric_is_in_the_glossary(tiny, tmp_path):
    from conftest import SMALL

    args = {
        **SMALL,
        "steps": 1,
        "student": tiny["student"],
        "data": tiny["data"],
        "eval_data": tiny["eval_data"],
    }
    rows = opd.train(opd.Args(teacher=tiny["teacher"], out=str(tmp_path / "opd"), **args))
    rows += opsd.train(opsd.Args(pi="solution", teacher_mode="ema", out=str(tmp_path / "opsd"), **args))
    glossary = (ROOT / "tutorials/reference.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    for name in sorted({name for row in rows for name in row}):
        assert f"`{name}`" in glossary, name


@pytest.mark.parametrize("name", ["README.md", "tutorials/reference.md", "tests/bench/README.md"])
def test_files_and_flags_that_a_page_names_exist(name):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert ((ROOT / name).parent / link).exists(), link
    known = {*opd.Args.__dataclass_fields__, *opsd.Args.__dataclass_fields__}
    for line in re.findall(r"(?:torchrun|python)[^\n`]*op(?:s?)d\.py((?:\\\n|[^\n`])*)", text):
        for flag in re.findall(r"--(\w+)", line):
            assert flag in known, flag


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 220 and len(text.encode()) <= 16_000


def test_help_fits_80_columns_and_groups_the_flags():
    for args_class in (opd.Args, opsd.Args):
        text = opd.make_parser(args_class).format_help()
        assert max(map(len, text.splitlines())) <= 80
        for group in (
            "models and data",
            "loss",
            "sampling",
            "optimisation",
            "memory",
            "evaluation and saving",
        ):
            assert f"\n{group}:\n" in text


def test_copied_losses_run_as_the_readme_says():
    block = README.read_text().split("## Copy a loss")[1].split("```python\n")[1].split("```")[0]
    pasted = "\n".join(inspect.getsource(f) for f in (losses.sg_topk_reverse_kl, losses.topk_support))
    logits = torch.randn(2, 3, 30, requires_grad=True)
    given = {"student_logits": logits, "teacher_logits": torch.randn(2, 3, 30)}
    names = {**given, "completion_mask": torch.ones(2, 3), "total_completion_tokens": 6}
    exec(block.replace("# paste", pasted + "\n# paste"), names)
    names["loss"].backward()
    assert names["per_token"].shape == (2, 3) and logits.grad.isfinite().all()


def test_the_numbers_of_the_french_rule_are_chapter_7s():
    chapter, readme = (ROOT / name for name in ("tutorials/07_shared_rule/README.md", "README.md"))
    lines = [line.split(" | ") for line in chapter.read_text().splitlines() if line.startswith("| french |")]
    share = {line[1]: line[2] for line in reversed(lines)}  # the first table of the chapter has the shares
    before, after, prompted = (share[x] for x in ("before", "OPSD", "prompted"))
    text = " ".join(readme.read_text().split())
    words = f"rises from {before[:4]} to {after[:-1]}, three seeds); with the prompt it was {prompted[:4]}."
    assert words in text


if __name__ == "__main__":
    contents = README.read_text()
    for table, make in TABLES.items():
        contents = replaced(contents, table, make())
    README.write_text(contents)
