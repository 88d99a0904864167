"""tutorials/read_run.py: its signatures on made-up and on real-model logs, odd logs, its figure.
tutorials/view_rollouts.py: its page."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from html import unescape

import pytest
import torch
from conftest import CHARACTERS, CHAT, ROOT, make_model, make_tokenizer, save, write_rows

TUTORIALS = ROOT / "tutorials"
sys.path.insert(0, str(TUTORIALS))

import lesson  # noqa: E402
import read_run  # noqa: E402
import view_rollouts  # noqa: E402

EVIL = "<script>document.title='pwned'</script>"
CHROME = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
HEALTHY = {  # first and last value of each column; in between a straight line
    **{"loss": (0.5, 0.1), "reverse_kl": (0.5, 0.1), "grad_norm": (6, 1), "completion_len": (24, 30)},
    **{"student_mass": (0.95, 0.97), "student_logp": (-0.4, -0.2), "teacher_logp": (-0.9, -0.3)},
    **{"student_entropy": (0.4, 0.2), "teacher_entropy": (0.2, 0.2), "repetition": (0.02, 0.03)},
}
PI = {"pi_gap": (-1, -0.1), "eval_accuracy": (0.5, 0.9), "eval_with_pi_accuracy": (0.98, 0.98)}
WITH_PI = {**HEALTHY, **PI}
IDLE = {**WITH_PI, "eval_accuracy": (0.5, 0.52)}  # 0.02 of the 0.48 to the ceiling: less than a tenth


def log(n=50, **columns):
    lines = {name: torch.linspace(*ends, n).tolist() for name, ends in columns.items()}
    return [{"step": i + 1, **{name: line[i] for name, line in lines.items()}} for i in range(n)]


def names(rows):
    return [signature.__name__ for signature in read_run.diagnose(rows)[0]]


CASES = [  # the finding; a log; what is different in it: one that shows it, then those that nearly do
    ("", HEALTHY, {}),
    ("", WITH_PI, {}),
    ("mass_leak", HEALTHY, dict(student_mass=(0.95, 0.75), reverse_kl=(0.5, 0.4))),
    ("mass_leak", HEALTHY, dict(student_mass=(0.95, 0.75), reverse_kl=(0.5, 2), loss=(0.5, 0.6))),
    ("", HEALTHY, dict(student_mass=(0.95, 0.75))),  # the exact KL falls to a fifth: it was right to go
    ("", HEALTHY, dict(student_mass=(0.95, 0.88), reverse_kl=(0.5, 0.4))),  # 0.07: as a healthy one wobbles
    (
        "",
        HEALTHY,
        dict(student_mass=(0.95, 0.75), reverse_kl=(0.5, 0.4), loss=(0.5, 0.6)),
    ),  # the loss sees it
    ("no_direction", HEALTHY, dict(loss=(0.5, 0.5), reverse_kl=(0.5, 0.6), grad_norm=(1, 1))),
    ("", HEALTHY, dict(loss=(0.5, 0.5), reverse_kl=(0.5, 0.4), grad_norm=(1, 1))),  # the KL falls by a fifth
    ("", HEALTHY, dict(loss=(0.01, 0.01), reverse_kl=(0.01, 0.01), grad_norm=(1, 1))),  # it has arrived
    ("", HEALTHY, dict(loss=(0.5, 0.5), reverse_kl=(0.5, 0.5))),  # the gradient shrinks: it settles
    ("mismatch", HEALTHY, dict(teacher_logp=(-11, -4))),
    ("", HEALTHY, dict(teacher_logp=(-2.2, -0.3))),  # 1.8 nats: a pruned model starts at 1.2, and heals
    ("", WITH_PI, dict(teacher_logp=(-11, -4))),  # with PI that is what the PI does
    ("teacher_collapse", HEALTHY, dict(teacher_logp=(-0.9, -4))),
    ("", HEALTHY, dict(teacher_logp=(-0.9, -4), student_logp=(-0.4, -3))),  # the student is as unsure itself
    ("loops", HEALTHY, dict(completion_len=(24, 48), repetition=(0.02, 0.4))),
    ("", HEALTHY, dict(completion_len=(24, 48))),
    ("", HEALTHY, dict(repetition=(0.02, 0.4))),
    ("entropy_collapse", HEALTHY, dict(student_entropy=(0.4, 0.02))),
    ("", HEALTHY, dict(student_entropy=(0.4, 0.001), teacher_entropy=(0.005, 0.005))),  # its teacher is sure
    ("", HEALTHY, dict(student_entropy=(0.03, 0.02))),  # low, but it has not fallen by half
    ("pi_without_accuracy", IDLE, {}),
    ("pi_without_accuracy", IDLE, dict(pi_gap=(-3, -0.01))),  # the gap closes, for nothing
    ("", IDLE, dict(pi_gap=(0, 0.02))),  # --pi none: nothing is told, nothing can be learnt
    ("", IDLE, dict(eval_with_pi_accuracy=(0.53, 0.53))),  # at the ceiling already
]


@pytest.mark.parametrize("found,base,changes", CASES)
def test_signatures_and_their_near_misses(found, base, changes):
    assert names(log(**{**base, **changes})) == ([found] if found else [])


def test_findings_come_in_the_order_in_which_they_begin():
    rows = log(**{**HEALTHY, "teacher_logp": (-0.9, -4), "student_entropy": (0.4, 0)})
    for row in rows[:40]:
        row["student_entropy"] = 0.4
    steps = {signature.__name__: step for signature, (step, _) in read_run.diagnose(rows)[0].items()}
    assert list(steps) == ["teacher_collapse", "entropy_collapse"]
    assert 15 < steps["teacher_collapse"] <= 40 < steps["entropy_collapse"] <= 50


def test_holes_nans_and_a_single_row():
    rows = log(**{**HEALTHY, "teacher_logp": (-11, -4)})
    odd = [float("nan"), None, "n/a", float("inf"), 10**400]
    holes = [{"step": 0, "eval_accuracy": 0.5}, *({**row, "loss": odd[row["step"] % 5]} for row in rows)]
    assert names(holes) == ["mismatch"]
    assert read_run.diagnose(holes)[1][read_run.mass_leak] == ["loss"]
    assert names(rows[:1]) == ["mismatch"] and names(log(**HEALTHY)[:1]) == []


def test_the_table_in_the_docstring_is_that_of_the_functions():
    rows = re.findall(r"^    (\w+) \*? *((?:\[?\w+\]? )+) .*?  (\d[\d ]*)$", read_run.__doc__, re.MULTILINE)
    assert [name for name, _, _ in rows] == [signature.__name__ for signature in read_run.SIGNATURES]
    for (_, needs, numbers), (signature, chapters) in zip(rows, read_run.SIGNATURES.items(), strict=True):
        wanted = inspect.signature(signature).parameters.items()
        assert needs.split() == [name if p.default is p.empty else f"[{name}]" for name, p in wanted]
        assert numbers.split() == [str(int(chapter[:2])) for chapter in chapters.split()]


def shell(capsys, *words, main=read_run.main):
    """main() with these words -> exit code, the lines on stdout, the lines on stderr."""
    try:
        code = main([str(word) for word in words]) or 0
    except SystemExit as stop:
        code = stop.code
    return code, *(text.splitlines() for text in capsys.readouterr())


def test_report_of_a_run_and_of_another_programs_log(tmp_path, capsys):
    rows = log(**{**HEALTHY, "teacher_logp": (-11, -4)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 51, "lo')  # the last line is being written
    code, out, err = shell(capsys, tmp_path, "--png", tmp_path / "report.png")
    assert code == 0 and not err and (tmp_path / "report.png").stat().st_size > 10_000
    assert out[1].startswith("FOUND since step 5: the teacher's log-prob is far below")
    assert any("tutorials/04_teacher_mismatch, tutorials/05_sft_stabilised_student" in line for line in out)
    assert any("not judged (missing: pi_gap" in line for line in out)
    chapters = " ".join(read_run.SIGNATURES.values()).split()
    assert all((TUTORIALS / chapter).is_dir() for chapter in chapters)
    lines = [f"{row['step']},{row['student_logp']},{row['teacher_logp']}," for row in rows]
    (tmp_path / "log.csv").write_text("\n".join(["_step,train/p,train/q,note", *lines]))
    pairs = ["step=_step", "student_logp=train/p", "teacher_logp=train/q"]
    code, out, _ = shell(capsys, tmp_path / "log.csv", "--png", tmp_path / "a.png", "--columns", *pairs)
    assert code == 0 and out[1].startswith("FOUND since step 5: the teacher's log-prob is far below")


def test_the_figure_is_written_beside_the_first_log(tmp_path, capsys, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "metrics.jsonl", log(n=5, **HEALTHY))
    a, b = tmp_path / "a", tmp_path / "b"
    assert shell(capsys, a, "--png", "none")[1][-1].startswith("not judged") and not list(a.glob("*.png"))
    for words, file in (((a,), "read_run.png"), ((a, b / "metrics.jsonl"), "read_run_and_metrics.png")):
        code, out, err = shell(capsys, *words)
        assert code == 0 and not err and out[-1] == f"wrote {a / file}" and (a / file).stat().st_size > 10_000
    assert sum(line.startswith("none of the 6 signatures") for line in out) == 2  # a report of each run
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    code, out, err = shell(capsys, a)
    assert code == 0 and out[1].startswith("none of") and len(err) == 1 and "pip install" in err[0]


def figure_of(*runs):
    """-> the figure of read_run for these logs, {title: panel}."""
    figure = read_run.draw(runs, ["one", "two"][: len(runs)])
    figure.canvas.draw()
    return figure, {panel.get_title("left"): panel for panel in figure.axes}


def labels(panels):
    return {text.get_text() for panel in panels.values() for text in panel.texts}


def test_panels_of_what_is_logged_and_thresholds_of_what_can_be_judged():
    thirds = {f"eval_reverse_kl{x}": (0.3, 0.1) for x in ("", "_first", "_middle", "_last")}
    both = {"below: mass_leak", "above: loops", "below: entropy_collapse"}
    no_pi = {"above: no_direction", "below: mismatch", "below: teacher_collapse"}
    for columns, n_panels, shown in (
        ({"loss": (1, 0)}, 1, set()),
        (HEALTHY, 7, both | no_pi),
        ({**HEALTHY, **thirds}, 8, both | no_pi),
        (WITH_PI, 9, both | {"below: pi_without_accuracy"}),
    ):
        _, panels = figure_of(log(**columns))
        assert len(panels) == n_panels and set(panels) <= set(read_run.PANELS)
        assert {text for text in labels(panels) if ": " in text} == shown
    unjudged = read_run.diagnose(log(**WITH_PI))[1]  # with PI, although no column is missing
    assert unjudged == {read_run.no_direction: [], read_run.mismatch: [], read_run.teacher_collapse: []}
    _, panels = figure_of(log(**{**HEALTHY, "student_mass": (0.9, 0.9)}))
    threshold = panels["probability of the top k tokens"].lines[1]
    assert threshold.get_ydata() == pytest.approx([0.8, 0.8]) and threshold.get_linestyle() == "--"


def test_text_of_the_figure_is_legible_and_labels_do_not_overlap():
    """At a width of 800 pixels every letter is at least 9 pixels high, for one run and for two."""
    thirds = {f"eval_reverse_kl{x}": (0.3, 0.1) for x in ("", "_first", "_middle", "_last")}
    rows = log(**{**WITH_PI, **thirds, "teacher_mass": (0.9, 0.9), "truncated": (0, 0)})
    for runs in ((rows,), (rows, rows[:20])):
        figure, panels = figure_of(*runs)
        texts = [text for panel in figure.axes for text in (*panel.texts, panel._left_title, panel.title)]
        texts += [*figure.texts, *(x for panel in figure.axes for x in panel.get_xticklabels())]
        width = figure.get_size_inches()[0] * 72
        assert min(text.get_fontsize() for text in texts) * 800 / width >= 9
        for panel in panels.values():
            heights = sorted(x.get_window_extent().y0 for x in panel.texts if x.get_position()[0] > 1)
            size = 0.09 * panel.get_window_extent().height
            assert all(b - a > size for a, b in zip(heights, heights[1:], strict=False))
        a, b = ({x.get_text() for x in panel.texts} for panel in list(panels.values())[:2])
        assert len(runs) == 1 or ({"A loss", "B loss"} <= a and {"A student", "B teacher"} <= b)


REAL = {"loss": "value", "student_entropy": "entropy", "student_mass": "mass"}  # names in chapter 3's CSV


def real_log(tmp_path, rows, **pairs):
    """Rows of a chapter's CSV, read by read_run as the log of another program."""
    lesson.write_csv(tmp_path / "log.csv", rows)
    return read_run.read(tmp_path / "log.csv", [f"{ours}={theirs}" for ours, theirs in pairs.items()])


def chapter_3(loss, part, lr, seed):
    """Rows of one real-model run after its first step; step 0 is an evaluation only."""
    rows = lesson.read_csv(TUTORIALS / "03_biased_topk/metrics.csv")
    return [x for x in lesson.select(rows, part=part, loss=loss, lr=lr, seed=seed) if x["step"] > 0]


@pytest.mark.parametrize(
    "loss,part,lr,found",
    [  # in each seed, the steps (of 5; of 2 in the last line) at which mass_leak is found
        ("topk", "real", 3e-5, ([2, 3, 4, 5], [4, 5], [4, 5])),
        ("topk", "damaged", 1e-4, ([3, 4, 5], [4, 5], [4, 5])),
        ("topk", "damaged", 3e-5, ([3, 4, 5], [4, 5], [])),  # missed in seed 2: its mass falls by 0.09
        ("sg_topk", "damaged", 1e-4, ([3], [4, 5], [])),
        ("tail_topk", "damaged", 1e-4, ([3], [], [])),  # a false alarm that is gone at the end
        ("norm_topk", "damaged", 1e-4, ([], [], [])),
        ("reverse_kl", "damaged", 1e-4, ([], [], [])),
        ("sg_topk", "real", 3e-5, ([],)),
    ],
)
def test_chapter_3_real_model_logs(loss, part, lr, found, tmp_path):
    """SmolLM2. The thresholds, chosen on the toy, were not changed for these logs or those of chapter 7."""
    for seed, steps in enumerate(found):
        run = real_log(tmp_path, chapter_3(loss, part, lr, seed), **REAL)
        assert len(run) == (2 if (part, loss) == ("real", "sg_topk") else 5)
        missing = read_run.diagnose(run)[1]  # the CSV has what one signature of the seven needs
        assert [s for s in read_run.SIGNATURES if s not in missing] == [read_run.mass_leak]
        assert [names(run[:n]) for n in range(1, len(run) + 1)] == [
            ["mass_leak"] * (n in steps) for n in range(1, len(run) + 1)
        ]


def test_chapter_3_margins():
    """Decreases of student_mass with the loss that pushes mass out of S and with others; threshold 0.1."""
    pushed = [("topk", "real", 3e-5), ("topk", "damaged", 1e-4)]
    healthy = [(loss, "damaged", 1e-4) for loss in ("reverse_kl", "norm_topk", "tail_topk")]
    healthy.append(("norm_topk", "damaged", 3e-5))
    drops = [[], []]
    for which, runs in enumerate((pushed, healthy)):
        for run in runs:
            for seed in range(3):
                log = chapter_3(*run, seed)
                drops[which].append(log[0]["mass"] - log[-1]["mass"])
    assert [len(x) for x in drops] == [6, 12]
    assert min(drops[0]) == pytest.approx(0.220, abs=1e-3) and max(drops[1]) == pytest.approx(0.078, abs=1e-3)


@pytest.mark.parametrize("rule", ["french", "pirate"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chapter_7_real_model_logs(rule, seed, tmp_path):
    """SmolLM2. Its CSV has the KL to the prompted teacher and the share of answers that follow the rule."""
    rows = lesson.read_csv(TUTORIALS / "07_shared_rule/metrics.csv")
    rows = lesson.select(rows, part="real", rule=rule, seed=seed)
    before, prompted, after = (
        lesson.select(rows, arm=arm, who=who)[0]
        for arm, who in (("none", "before"), ("none", "prompted"), ("OPSD", "after"))
    )
    log = [{"step": x["step"], "kl": x["kl"], "score": x["score"]} for x in (before, after)]
    # As it is, no signature can be judged.
    plain = real_log(tmp_path, log, eval_reverse_kl="kl")
    assert list(read_run.diagnose(plain)[1]) == list(read_run.SIGNATURES) and not names(plain)
    # -KL is the expectation of pi_gap, and the share stands for accuracy: all six runs work, none is found.
    log = [{**row, "prompted": prompted["score"]} for row in log]
    pairs = {"pi_gap": "kl", "eval_accuracy": "score", "eval_with_pi_accuracy": "prompted"}
    assert names(real_log(tmp_path, log, **pairs)) == []
    # A student that follows the rule no more often than before, at the same KL, is found.
    log[-1]["score"] = before["score"]
    assert names(real_log(tmp_path, log, **pairs)) == ["pi_without_accuracy"]


BAD = [  # what the log holds, further flags, words of the one line that is to come
    ("", "", "no rows; give the log of a run"),
    ("step 1 loss 2\n", "", "line 1: not JSON"),
    ('{"loss": 1}\n{"lo\n{"loss": 1}\n', "", "line 2: not JSON"),
    ("[1, 2]\n", "", "not one JSON object per line"),
    ('{"train/loss": 1}\n', "", "it has train/loss; name one, e.g. --columns loss=train/loss"),
    ('{"train/loss": 1}\n', "--columns loss=train/los", "the nearest are train/loss"),
    ('{"train/loss": 1}\n', "--columns los=train/loss", "OURS is one of step loss"),
    ('{"loss": 1}\n', "--png no/x.png", "no/x.png: not a file in a folder"),
    ('{"loss": 1}\n', "--png x.nonsense", "x.nonsense"),
    ('{"loss": 1}\n', "--colums loss=a", "--colums"),
    ('{"loss": 1}\n', "a b", "unrecognized arguments: b"),  # two logs at most
    ('{"loss": 1}\n', "no.jsonl", "no.jsonl: cannot be read"),  # the second
    ('{"loss": 1}\n', "--rollouts a b c", "--rollouts"),  # view_rollouts.py now
    (None, "", "log.jsonl: cannot be read"),
]
BAD_PAGE = [
    ("", "required: STUDENT, TEACHER, DATA"),
    ("a b c --n 0", "--n of at least 1"),
    ("a b c --out no/x.html", "no/x.html: not a file in a folder"),
    ("STUDENT no/model DATA", "--teacher no/model"),
    ("STUDENT STUDENT no.jsonl", "--data no.jsonl"),
]


@pytest.mark.parametrize("text,flags,words", BAD)
def test_bad_input_is_one_line_and_exit_code_2(text, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    code, _, err = shell(capsys, "log.jsonl", *flags.split())
    assert code == 2 and len(err) == 1 and words in err[0]


@pytest.mark.parametrize("flags,words", BAD_PAGE)
def test_bad_input_of_the_page_is_one_line_and_exit_code_2(flags, words, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags.replace("STUDENT", tiny["student"]).replace("DATA", tiny["data"]).split()
    code, _, err = shell(capsys, *flags, main=view_rollouts.main)
    assert code == 2 and len(err) == 1 and words in err[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page whose prompts and sampled tokens hold HTML -> its path, student, teacher, tokenizer."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = make_tokenizer([*CHARACTERS, *"<'/().&", EVIL, "\n\n"], CHAT)
    models = [make_model(seed, len(tokenizer), scale=2.0) for seed in (0, 1)]
    paths = [save(folder / str(i), model, tokenizer) for i, model in enumerate(models)]
    prompts = [[{"role": "user", "content": EVIL}], f"raw {EVIL} &amp;", "1+1="]
    data = write_rows(folder / "data.jsonl", [{"prompt": prompt} for prompt in prompts])
    view_rollouts.main([*paths, data, "--out", str(folder / "page.html"), "--max_new_tokens", "60"])
    return folder / "page.html", *models, tokenizer


@torch.no_grad()
def test_page_is_escaped_stands_alone_and_has_the_models_numbers(page):
    path, student, teacher, tokenizer = page
    text = path.read_text()
    assert "<script" not in text and not re.search(r"https?:|src=|url\(|@import|<link|<img", text)
    assert "user: &lt;script&gt;" in text and "raw &lt;script&gt;" in text and " &amp;amp;<" in text
    assert "&quot;&lt;script&gt;document" in text  # as a token
    said = r"position \d+ of \d+, (.*?): student (\S+), teacher (\S+), log q\(y\) - log p\(y\) = (\S+)"
    said = re.findall(said, text.split("<h2>")[-1])  # of the last prompt
    ids = tokenizer("1+1=").input_ids + [tokenizer.vocab[json.loads(unescape(x[0]))] for x in said]
    p, q = (model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (student, teacher))
    assert len(said) > 1
    for i, (_, *shown) in enumerate(said):
        ours, theirs = p[i + 3, ids[i + 4]], q[i + 3, ids[i + 4]]  # the prompt has 4 tokens
        numbers = [ours.exp().item(), theirs.exp().item(), (theirs - ours).item()]
        assert torch.allclose(torch.tensor([*map(float, shown)]), torch.tensor(numbers), atol=6e-3)


@pytest.mark.skipif(not CHROME, reason="no Chrome or Chromium on PATH")
def test_page_in_a_browser(page, tmp_path):
    """Nothing in the page runs. In a copy that lets a script in, focus on a token shows its panel alone."""

    def dom(file):
        command = [CHROME, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", "--dump-dom"]
        return subprocess.run([*command, file.as_uri()], capture_output=True, timeout=120).stdout.decode()

    text, seen = page[0].read_text(), dom(page[0])
    assert "<title>Rollouts</title>" in seen and seen.count('tabindex="0"') == text.count('tabindex="0"') > 10
    tips = "[...document.querySelectorAll('.tip')].filter(e => e.checkVisibility()).map(e => e.innerText)"
    script = f"let a = {tips}; document.querySelectorAll('[tabindex]')[2].focus(); let b = {tips};"
    script = f"<script>{script} document.title = a.length + ' then ' + b.join('|')</script></body>"
    (tmp_path / "copy.html").write_text(re.sub("<meta http-equiv.*", "", text).replace("</body>", script))
    for _ in range(5):  # now and then the browser's window has no focus yet when the script asks for it
        title = re.search(r"<title>(.*?)</title>", dom(tmp_path / "copy.html"), re.DOTALL)[1]
        if title != "0 then ":
            break
    assert title.startswith("0 then position 3 of ") and title.count("top 5") == 2 * title.count("position")
