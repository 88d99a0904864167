"""tutorials/10_read_your_own_run/read_run.py: its signatures, what it makes of odd logs, its page."""

import importlib.util
import json
import re
import shutil
import subprocess
from html import unescape

import pytest
import torch
from conftest import CHARACTERS, CHAT, ROOT, make_model, make_tokenizer, save, write_rows

HERE = ROOT / "tutorials/10_read_your_own_run"
spec = importlib.util.spec_from_file_location("read_run", HERE / "read_run.py")
read_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(read_run)

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


def shell(capsys, *words):
    """main() with these words -> exit code, the lines on stdout, the lines on stderr."""
    try:
        code = read_run.main([str(word) for word in words]) or 0
    except SystemExit as stop:
        code = stop.code
    return code, *(text.splitlines() for text in capsys.readouterr())


def test_report_of_a_run_and_of_another_programs_log(tmp_path, capsys):
    rows = log(**{**HEALTHY, "teacher_logp": (-11, -4)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 51, "lo')  # the last line is being written
    code, out, err = shell(capsys, tmp_path, "--out", tmp_path / "report.png")
    assert code == 0 and not err and (tmp_path / "report.png").stat().st_size > 10_000
    assert out[1].startswith("FOUND since step 5: the teacher's log-prob is far below")
    assert any("tutorials/04_teacher_mismatch, tutorials/05_sft_stabilised_student" in line for line in out)
    assert any("not judged (missing: pi_gap" in line for line in out)
    chapters = " ".join(chapters for _, chapters in read_run.SIGNATURES.values()).split()
    assert all((HERE.parent / chapter).is_dir() for chapter in chapters)
    lines = [f"{row['step']},{row['student_logp']},{row['teacher_logp']}," for row in rows]
    (tmp_path / "log.csv").write_text("\n".join(["_step,train/p,train/q,note", *lines]))
    pairs = ["step=_step", "student_logp=train/p", "teacher_logp=train/q"]
    code, out, _ = shell(capsys, tmp_path / "log.csv", "--out", tmp_path / "a.png", "--columns", *pairs)
    assert code == 0 and out[1].startswith("FOUND since step 5: the teacher's log-prob is far below")


BAD = [  # what the log holds, further flags, words of the one line that is to come
    ("", "", "no rows; give the log of a run"),
    ("step 1 loss 2\n", "", "line 1: not JSON"),
    ('{"loss": 1}\n{"lo\n{"loss": 1}\n', "", "line 2: not JSON"),
    ("[1, 2]\n", "", "not one JSON object per line"),
    ('{"train/loss": 1}\n', "", "it has train/loss; name one, e.g. --columns loss=train/loss"),
    ('{"train/loss": 1}\n', "--columns loss=train/los", "the nearest are train/loss"),
    ('{"train/loss": 1}\n', "--columns los=train/loss", "OURS is one of step loss"),
    ('{"loss": 1}\n', "--out no/x.png", "no/x.png: not a file in a folder"),
    ('{"loss": 1}\n', "--out x.nonsense", "x.nonsense"),
    ('{"loss": 1}\n', "--colums loss=a", "--colums"),
    ('{"loss": 1}\n', "--rollouts a b c", "either a log, or --rollouts"),
    (None, "", "log.jsonl: cannot be read"),
    (None, "--n 0 --rollouts a b c", "--n of at least 1"),
    (None, "--rollouts STUDENT no/model DATA", "--teacher no/model"),
    (None, "--rollouts STUDENT STUDENT no.jsonl", "--rollouts no.jsonl"),
]


@pytest.mark.parametrize("text,flags,words", BAD)
def test_bad_input_is_one_line_and_exit_code_2(text, flags, words, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    flags = flags.replace("STUDENT", tiny["student"]).replace("DATA", tiny["data"]).split()
    code, _, err = shell(capsys, *(["log.jsonl"] if text is not None or not flags else []), *flags)
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
    read_run.main(["--rollouts", *paths, data, "--out", str(folder / "page.html"), "--max_new_tokens", "60"])
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
