"""Seeing what a run does: samples.jsonl, --show_samples, --dry_run, KL by position; and prompts as users have
them: --chat_template_kwargs, --teacher_template, special tokens in the text."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CHARACTERS,
    CHAT,
    PROMPTS,
    SMALL,
    flags,
    make_model,
    make_tokenizer,
    run_script,
    save,
    write_rows,
)
from pytest import approx
from transformers import AutoTokenizer, LlamaForCausalLM

import losses
import opd
import opsd

THINK = CHAT.replace("assistant: ", "assistant: {% if enable_thinking is defined %}think {% endif %}")
OTHER = "{% for m in messages %}#{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(out, tiny, **kwargs):
    return opd.train(opd.Args(**{**SMALL, **tiny, "out": str(out), **kwargs}))


# --------------------------------------------------------------------------------------------------- samples


def test_every_evaluation_leaves_the_same_prompts_as_text(tiny, tmp_path):
    rows = train(tmp_path, tiny, steps=4, eval_every=2)
    samples = lines(tmp_path / "samples.jsonl")
    assert [(s["step"], s["row"]) for s in samples] == [(step, i) for step in (0, 2, 4) for i in range(4)]
    for some in (samples[:4], samples[4:8], samples[8:]):
        assert [s["prompt"] for s in some] == PROMPTS[:4]
        assert [s["answer"] for s in some] == ["46", "11", "300", "14"]
    assert all(s["right"] == opd.is_correct(s["completion"].replace("$", ""), s["answer"]) for s in samples)
    assert all("teacher_prompt" not in s for s in samples)
    assert [row["step"] for row in rows if "eval_len" in row] == [0, 2, 4]


def test_samples_are_the_evaluations_rollouts_with_their_exact_kl(tiny, tmp_path):
    row = train(tmp_path, tiny, steps=1, eval_every=1, lr=1e-30)[0]
    student, teacher = (LlamaForCausalLM.from_pretrained(tiny[name]) for name in ("student", "teacher"))
    tokenizer, kls, thirds = AutoTokenizer.from_pretrained(tiny["student"]), [], ([], [], [])
    for sample in lines(tmp_path / "samples.jsonl")[:4]:
        prompt, ids = (tokenizer(sample[name]).input_ids for name in ("prompt", "completion"))
        with torch.no_grad():
            logits = [
                m(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                for m in (student, teacher)
            ]
        kl = losses.reverse_kl(*logits).tolist()
        assert sample["mean_kl"] == approx(sum(kl) / len(kl), rel=1e-3)
        assert sample["max_kl"] == approx(max(kl), rel=1e-3)
        kls += kl
        at = 0
        for k in range(3):  # as even as can be, the first parts longer by one
            size = len(kl) // 3 + (k < len(kl) % 3)
            thirds[k].extend(kl[at : at + size])
            at += size
    assert row["eval_reverse_kl"] == approx(sum(kls) / len(kls), rel=1e-3)
    for name, part in zip(("first", "middle", "last"), thirds, strict=True):
        assert row[f"eval_reverse_kl_{name}"] == approx(sum(part) / len(part), rel=1e-3)


def test_samples_cost_no_sampling_beyond_the_evaluation(tiny, tmp_path, monkeypatch):
    calls, sample = [], opd.sample
    monkeypatch.setattr(opd, "sample", lambda *x: calls.append(len(x[1])) or sample(*x))
    train(tmp_path, tiny, steps=2, eval_every=2)
    assert calls == [4, 4, 4, 4]  # an evaluation of 4 prompts, two steps of 4, an evaluation


def test_without_held_out_prompts_the_first_training_prompts_are_shown(tiny, tmp_path):
    paths = {name: path for name, path in tiny.items() if name != "eval_data"}
    rows = train(tmp_path, paths, steps=2, eval_every=2)
    samples = lines(tmp_path / "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [(step, p) for step in (0, 2) for p in PROMPTS[:8]]
    assert not any(name.startswith("eval_") for row in rows for name in row)  # they are not held out


def test_a_sample_says_what_the_teacher_read(tiny, tmp_path):
    args = {**SMALL, **tiny, "steps": 1, "eval_every": 1, "max_prompt_tokens": 64, "topk": 3}
    del args["teacher"]
    template = "{prompt}|{solution}"
    opsd.train(opsd.Args(**args, pi="solution", pi_template=template, out=str(tmp_path)))
    first = lines(tmp_path / "samples.jsonl")[0]
    assert first["prompt"] == "^12+34=" and first["teacher_prompt"] == "^12+34=|a;b"


@pytest.mark.parametrize("several", [1, 3])
def test_one_sample_a_prompt_however_many_completions(tiny, tmp_path, several):
    train(tmp_path, tiny, steps=1, eval_every=1, eval_samples=several)
    assert [s["row"] for s in lines(tmp_path / "samples.jsonl")] == [0, 1, 2, 3] * 2


def test_no_step_stands_twice_after_a_resume(tiny, tmp_path):
    train(tmp_path / "whole", tiny, steps=4, eval_every=1)
    train(tmp_path / "halves", tiny, steps=3, eval_every=1, save_every=2, keep=5)
    (tmp_path / "halves" / "step_000003" / "trainer.pt").unlink()  # the checkpoint of step 2 is the newest
    train(tmp_path / "halves", tiny, steps=4, eval_every=1, save_every=2, keep=5, resume=True)
    assert lines(tmp_path / "halves" / "samples.jsonl") == lines(tmp_path / "whole" / "samples.jsonl")


def test_line_separators_in_a_sample_do_not_stop_a_resume(tiny, tmp_path):
    """U+2028 and U+0085 stand unescaped in the file, and only "\\n" ends its lines."""
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"prompt": PROMPTS[0], "answer": "4\u20285\x85"}])
    train(tmp_path / "run", tiny, eval_data=held_out, steps=1, eval_every=1)
    train(tmp_path / "run", tiny, eval_data=held_out, steps=2, eval_every=1, resume=True)
    text = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in text.split("\n")[:-1]] == [0, 1, 2]


def test_two_ranks_leave_the_same_samples(tiny, tmp_path):
    train(tmp_path / "one", tiny, steps=1, eval_every=1)
    options = {**SMALL, **tiny, "steps": 1, "eval_every": 1, "out": tmp_path / "two"}
    done = run_script("opd.py", ranks=2, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (lines(tmp_path / name / "samples.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == {**b, "mean_kl": approx(b["mean_kl"], rel=1e-3), "max_kl": approx(b["max_kl"], rel=1e-3)}


def test_show_samples_prints_that_many(tiny, tmp_path, capsys):
    train(tmp_path, tiny, steps=1, eval_every=1, show_samples=2)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert shown == [s for s in lines(tmp_path / "samples.jsonl") if s["row"] < 2]


# --------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_shows_what_both_read_and_writes_nothing(tiny, tmp_path, capsys):
    assert train(tmp_path / "out", tiny, dry_run=True) == []
    text = capsys.readouterr().out
    for who in ("student", "teacher"):
        assert f"row 0, the {who} reads 7 tokens:\n^12+34=\n" in text
        assert f"row 1, the {who} reads 5 tokens:\n^5+6=\n" in text
    assert "row 0, answer: '46'" in text and "stop tokens: 1 '$'" in text
    student, teacher = (
        LlamaForCausalLM.from_pretrained(tiny[name]).num_parameters() for name in ("student", "teacher")
    )
    assert f"parameters: student {student:,}, teacher {teacher:,}" in text and "GB per rank" in text
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_bytes_of_each_of_the_teachers_weights(capsys):
    """Its body may be bfloat16, but its head is float32: 2 + 4 GB here, and 16 bytes per student weight."""
    sizes = [torch.empty(10**9, dtype=kind, device="meta") for kind in (torch.bfloat16, torch.float32)]
    reader = SimpleNamespace(chat_template=None, decode=str)
    teacher = SimpleNamespace(num_parameters=lambda: 2 * 10**9, parameters=lambda: sizes, tokenizer=reader)
    student = SimpleNamespace(num_parameters=lambda: 10**9, vocab_in_use=0)
    opd.describe(student, teacher, [], reader, [0], opd.Args())
    assert "gradients, moments 16.00, teacher's weights 6.00" in capsys.readouterr().out
    opd.describe(student, teacher, [], reader, [0], opd.Args(dtype="bfloat16"))
    assert "gradients, moments 18.00" in capsys.readouterr().out  # autocast's copies: 2 bytes


def test_a_dry_run_shows_training_prompts(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "^7+7="}] * 4)
    train(tmp_path / "out", {**tiny, "data": data}, dry_run=True)
    assert "row 0, the student reads 5 tokens:\n^7+7=\n" in capsys.readouterr().out


def test_a_dry_run_of_opsd_shows_the_pi(tiny, tmp_path, capsys):
    args = {**SMALL, **tiny, "max_prompt_tokens": 64, "dry_run": True, "out": str(tmp_path / "out")}
    del args["teacher"]
    opsd.train(opsd.Args(**args, pi="solution", pi_template="{solution}|{prompt}"))
    assert "row 0, the teacher reads 11 tokens:\na;b|^12+34=" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- templates


@pytest.fixture
def chats(tmp_path):
    """chats(student_template, teacher_template) -> flags of a run on two models of one vocabulary."""

    def chats(student_template, teacher_template, content="12", teacher_eos="$"):
        rows = [{"prompt": [{"role": "user", "content": content}], "answer": ""}]
        own = make_tokenizer(chat_template=teacher_template)
        own.eos_token = teacher_eos
        return {
            "student": save(
                tmp_path / "student", make_model(0), make_tokenizer(chat_template=student_template)
            ),
            "teacher": save(tmp_path / "teacher", make_model(1, width=48), own),
            "data": write_rows(tmp_path / "rows.jsonl", rows),
            "eval_data": write_rows(tmp_path / "eval.jsonl", rows),
        }

    return chats


@pytest.fixture
def scored(monkeypatch):
    """What each model read in scoring: lists of (hidden size, prompt, completion)."""
    calls, hidden = [], opd.completion_hidden

    def recorded(model, prompts, completions):
        calls.extend((model.config.hidden_size, p, y) for p, y in zip(prompts, completions, strict=True))
        return hidden(model, prompts, completions)

    monkeypatch.setattr(opd, "completion_hidden", recorded)
    load_pair = opd.load_pair
    monkeypatch.setattr(opd, "load_pair", lambda *x: (load_pair(*x), calls.clear())[0])
    return calls


@pytest.mark.parametrize("which, teacher_reads", [("student", "user: 12\nassistant: "), ("own", "#12;>")])
def test_the_teacher_reads_the_students_template_or_its_own(chats, scored, tmp_path, which, teacher_reads):
    paths = chats(CHAT, OTHER, teacher_eos="%")
    rows = train(tmp_path / "out", paths, steps=2, batch_size=2, max_prompt_tokens=64, teacher_template=which)
    tokenizer = make_tokenizer()
    ours = [(p, y) for size, p, y in scored if size == 32]
    theirs = [(p, y) for size, p, y in scored if size == 48]
    assert {tokenizer.decode(p) for p, _ in ours} == {"user: 12\nassistant: "}
    assert {tokenizer.decode(p) for p, _ in theirs} == {teacher_reads}
    assert sorted(y for _, y in ours) == sorted(y for _, y in theirs)  # the very ids
    # The first token after the prompt is scored by the state of each model's own last prompt token.
    student, teacher = (LlamaForCausalLM.from_pretrained(paths[name]) for name in ("student", "teacher"))
    with torch.no_grad():
        p, q = (
            m(input_ids=torch.tensor([ids])).logits[0, -1:]
            for m, ids in ((student, ours[0][0]), (teacher, theirs[0][0]))
        )
    assert losses.reverse_kl(p, q).item() > 0.01
    assert rows[1]["reverse_kl"] > 0
    # Both end tokens stop a completion.
    args = opd.set_up(opd.Args(**{**SMALL, **paths, "max_prompt_tokens": 64, "out": str(tmp_path / "no")}))[0]
    ends = opd.load_pair(paths["student"], paths["teacher"], args, torch.device("cpu"))[3]
    assert ends == [CHARACTERS.index("$"), CHARACTERS.index("%")]


def test_equal_templates_make_no_difference(chats, tmp_path):
    paths = chats(CHAT, CHAT)
    rows = [
        train(tmp_path / which, paths, steps=2, batch_size=2, max_prompt_tokens=64, teacher_template=which)[
            1:
        ]
        for which in ("student", "own")
    ]
    names = ("loss", "reverse_kl", "grad_norm", "tokens")
    assert [[row[name] for name in names] for row in rows[0]] == [
        [row[name] for name in names] for row in rows[1]
    ]


@pytest.mark.parametrize(
    "kwargs, reads", [({}, "assistant: "), ({"enable_thinking": True}, "assistant: think ")]
)
def test_chat_template_kwargs_reach_both_templates(chats, scored, tmp_path, kwargs, reads):
    paths = chats(THINK, THINK)
    options = dict(steps=1, batch_size=1, max_prompt_tokens=64, chat_template_kwargs=json.dumps(kwargs))
    for which in ("student", "own"):
        train(tmp_path / which, paths, **options, teacher_template=which)
    assert {make_tokenizer().decode(p) for _, p, _ in scored} == {f"user: 12\n{reads}"}


def refused(monkeypatch, capsys, script=opd, **kwargs):
    monkeypatch.setattr(sys, "argv", ["opd.py", *flags(**kwargs)])
    with pytest.raises(SystemExit) as stopped:
        opd.main(script.Args, script.train)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


@pytest.mark.parametrize("text", ["{", "[1]", "3", '"enable_thinking"', "enable_thinking=false"])
def test_kwargs_that_are_no_json_object_are_one_line(tiny, tmp_path, monkeypatch, capsys, text):
    options = {**SMALL, **tiny, "out": tmp_path / "out", "chat_template_kwargs": text}
    line = refused(monkeypatch, capsys, **options)
    assert (
        f"--chat_template_kwargs {text}: not a JSON object" in line and '{"enable_thinking": false}' in line
    )
    assert not (tmp_path / "out").exists()


def test_control_characters_in_a_message_are_shown_escaped(tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a\x1b[31m\nb.jsonl"
    line = refused(monkeypatch, capsys, **{**SMALL, **tiny, "data": path, "out": tmp_path / "out"})
    assert "a\\x1b[31m\\nb.jsonl" in line and "\x1b" not in line


def test_special_tokens_in_the_text_of_a_chat_are_counted_and_named(chats, scored, tmp_path, capsys):
    """A prompt that holds the end token: both models still score the very same completion ids."""
    paths = chats(CHAT, OTHER, content="1$2")
    train(tmp_path / "out", paths, steps=1, batch_size=1, max_prompt_tokens=64, teacher_template="own")
    errors = capsys.readouterr().err
    assert f"--data {paths['data']}: 1 of the first 1 rows hold special tokens as text, row 0 first" in errors
    assert [y for size, _, y in scored if size == 32] == [y for size, _, y in scored if size == 48]


def test_special_tokens_in_a_raw_prompt_are_the_users_own_business(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "^1$2="}])
    train(tmp_path / "out", {**tiny, "data": data}, steps=1, batch_size=1)
    assert "special tokens" not in capsys.readouterr().err


def test_a_template_without_a_system_role_names_the_other_mode(tmp_path, monkeypatch, capsys):
    """As Gemma's."""
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role!') }}{% endif %}"
    student = save(tmp_path / "student", make_model(0), make_tokenizer(chat_template=refuses + CHAT))
    rows = [{"prompt": [{"role": "user", "content": "12"}], "answer": "", "privileged": "be short"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = {**SMALL, "student": student, "data": data, "max_prompt_tokens": 64, "out": tmp_path / "out"}
    line = refused(monkeypatch, capsys, opsd, **options, pi="system")
    assert (
        f"--data {data}, row 0: --pi system: the chat template refuses a system message (No system role!)"
        in line
    )
    assert "--pi instruction" in line
    opsd.train(opsd.Args(**{**options, "out": str(tmp_path / "out"), "steps": 1}, pi="instruction"))
