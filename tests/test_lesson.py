"""tutorials/lesson.py: what the chapters share must not mislead them."""

import contextlib
import os
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tutorials"))

import lesson  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402


def test_a_cached_model_depends_on_code_and_values(tmp_path, monkeypatch):
    monkeypatch.setenv("LESSON_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return toy.make_model(0)

    def make_other():
        return make()

    first = lesson.kept("model", make, 0.3)
    assert lesson.kept("model", make, 0.3) == first and len(made) == 1
    assert lesson.kept("model", make, 0.4) != first and len(made) == 2
    assert lesson.kept("model", make_other, 0.3) != first and len(made) == 3


def test_rows_of_other_content_get_another_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LESSON_CACHE", str(tmp_path))
    assert lesson.kept_rows("a", [{"prompt": "1"}]) != lesson.kept_rows("a", [{"prompt": "2"}])


def test_answers_are_sampled_and_graded(tmp_path, monkeypatch):
    monkeypatch.setenv("LESSON_CACHE", str(tmp_path))
    path, rows = lesson.student(0, smoke=True), toy.rows(3)
    found = lesson.answered(path, rows, (1,), n=2)
    assert [x["row"] for x in found] == [0, 0, 1, 1, 2, 2]
    assert found == lesson.answered(path, rows, (1,), n=2)
    graded = []
    monkeypatch.setattr(opd, "is_correct", lambda *pair: graded.append(pair) or len(graded) % 2)
    again = lesson.answered(path, rows, (1,), n=2)
    assert graded == [(x["text"], rows[x["row"]]["answer"]) for x in found]
    assert len({row["answer"] for row in rows}) == 3 and [x["right"] for x in again] == [True, False] * 3
    _, model = lesson.load(path)
    logp = lesson.log_probs(model, [x["rollout"].prompt for x in found], [x["ids"] for x in found])
    ids, sampled = [i for x in found for i in x["ids"]], [x for one in found for x in one["rollout"].logp]
    assert logp[range(len(ids)), ids].tolist() == pytest.approx(sampled, abs=1e-4)


@pytest.mark.parametrize("last,whole", [(5, True), (2, False)])
def test_a_run_that_a_signal_stopped_is_an_error(last, whole):
    """opd.train saves and returns then; a chapter would cache the rows of half a run."""

    class Script:
        Args = opd.Args

        def train(args):
            return [{"step": 0}, {"step": last}]

    with contextlib.nullcontext() if whole else pytest.raises(RuntimeError, match="after step 2 of 5"):
        with lesson.distilled(Script, steps=5) as (log, final):
            assert whole and log[-1]["step"] == 5 and final.endswith("run/final")


def test_labels_at_one_place_are_moved_apart(tmp_path):
    figure, panels = lesson.panels("title", [["a"]])
    for text in ("one", "two", "three"):
        lesson.curve(panels["a"], [{"x": 0, "y": 0.0}, {"x": 1, "y": 1.0}], "x", "y", "k", text)
    lesson.save(figure, tmp_path / "figure.png")
    boxes = sorted((x.get_window_extent() for x in panels["a"].texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))


def test_only_one_part_is_run_and_the_others_are_kept(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("")
    (tmp_path / "expected.json").write_text('[{"claim": "c", "take": "only x where part=b", "above": 1}]')
    lesson.write_csv(tmp_path / "metrics.csv", [{"part": "a", "x": 1}, {"part": "b", "y": 1}])
    parts = {"a": lambda smoke: pytest.fail("not asked for"), "b": lambda smoke: [{"x": 2}]}
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "b"])
    lesson.main(str(tmp_path / "run.py"), parts, lambda rows, path: None, lambda rows: {})
    rows = [{"part": "a", "x": 1, "y": ""}, {"part": "b", "x": 2, "y": ""}]
    assert lesson.read_csv(tmp_path / "metrics.csv") == rows


def test_a_markdown_table():
    assert lesson.table(["a", "b"], [1, lesson.quoted("x\n|`y")]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | `x \\|'y` |",
    ]


def test_in_parallel_starts_two_processes_for_all_calls(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = {pid for _ in range(3) for pid in lesson.in_parallel(os.getpid, [()] * 4, "")}
    assert len(found) <= 2 and os.getpid() not in found
    jobs = [(torch.get_num_threads,), (pow, 2, 3), (abs, -1)]
    assert lesson.in_parallel(lesson.call, jobs, "") == [1, 8, 1]  # one thread; in the order of the jobs
