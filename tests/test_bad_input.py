"""A bad input ends in ONE line that names the flag, the value and the remedy; exit code 2, nothing written.

Nearly all cases call opd.main() in this process. The last part runs the script as a user would.
"""

import json
import logging
import os
import re
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from conftest import (
    CHARACTERS,
    CHAT,
    ROOT,
    SMALL,
    VOCAB,
    flags,
    make_model,
    make_tokenizer,
    run_script,
    save,
    write_rows,
)
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

import opd

HUB_NAME = "some-org/no-such-thing"


def contents(path):
    """What lies at a path: None, a file's bytes, or {name: contents} of a folder."""
    if not path.exists():
        return None
    return {p.name: contents(p) for p in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.fixture
def call(tiny, tmp_path, monkeypatch, capsys):
    """call(*words, **flags) -> exit code, lines on stderr of a one-step run on the tiny models."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for library in ("datasets", "huggingface_hub", "transformers"):
        for handler in logging.getLogger(library).handlers:  # they hold the stderr of the time of import
            if type(handler) is logging.StreamHandler:  # not pytest's own
                monkeypatch.setattr(handler, "stream", sys.stderr)
    small = {**tiny, **SMALL, "steps": 1, "out": tmp_path / "out"}
    del small["eval_data"]

    def call(*words, **given):
        monkeypatch.setattr(sys, "argv", ["opd.py", *flags(**{**small, **given}), *words])
        code = 0
        try:
            opd.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err.replace("\r", "\n").splitlines()

    return call


@pytest.fixture
def refused(call, tmp_path):
    """refused(*needed, **flags): the run ends as promised above; the first flag is the one at fault."""

    def refused(*needed, words=(), **given):
        out = Path(given.get("out", tmp_path / "out"))
        before = contents(out)
        code, lines = call(*words, **given)
        assert code == 2 and len(lines) == 1 and lines[0].startswith("opd.py: error: "), (code, lines)
        culprit = [f"--{flag} {value}" for flag, value in given.items()][: 0 if words else 1]
        for word in [*needed, *culprit]:
            assert word in lines[0]
        assert contents(out) == before
        return lines[0]

    return refused


# ------------------------------------------------------------------------------------------------------ flags

BAD_VALUES = [  # flags, the one at fault first -> what the line must say
    (dict(topk=0), "must be in [1,inf)"),
    (dict(topk=VOCAB + 1), f"1..{VOCAB}"),
    (dict(beta=0), "must be in (0,1)"),
    (dict(beta=1), "must be in (0,1)"),
    (dict(beta="nan"), "must be in (0,1)"),
    (dict(alpha=0), "must be in (0,1)"),
    (dict(alpha=1), "must be in (0,1)"),
    (dict(alpha="nan"), "must be in (0,1)"),
    (dict(top_p=0), "must be in (0,1]"),
    (dict(top_p=1.5), "must be in (0,1]"),
    (dict(top_p="nan"), "must be in (0,1]"),
    (dict(temperature=0), "must be in [1e-6,inf)"),
    (dict(temperature=-1), "must be in [1e-6,inf)"),
    (dict(temperature="nan"), "must be in [1e-6,inf)"),
    (dict(temperature="inf"), "must be in [1e-6,inf)"),
    (dict(temperature="1e-300"), "must be in [1e-6,inf)"),  # logits divided by it are no numbers any more
    (dict(loss_temperature=0), "must be in [1e-6,inf)"),
    (dict(loss_temperature="1e-300"), "must be in [1e-6,inf)"),
    (dict(lmbda=-0.1), "must be in [0,1]"),
    (dict(lmbda=1.1), "must be in [0,1]"),
    (dict(lmbda="nan"), "must be in [0,1]"),
    (dict(gamma=-0.1), "must be in [0,1]"),
    (dict(gamma=1.1), "must be in [0,1]"),
    (dict(gamma="nan"), "must be in [0,1]"),
    (dict(lr=0), "must be in (0,1e36)"),
    (dict(lr=-0.1), "must be in (0,1e36)"),
    (dict(lr="nan"), "must be in (0,1e36)"),
    (dict(lr="inf"), "must be in (0,1e36)"),
    (dict(ratio_clip=0), "must be in (0,inf)"),
    (dict(max_grad_norm=0), "must be in (0,inf]"),
    (dict(max_grad_norm="nan"), "must be in (0,inf]"),
    (dict(steps=0), "must be in [1,1e6)"),
    (dict(batch_size=0), "must be in [1,inf)"),
    (dict(samples_per_prompt=0), "must be in [1,inf)"),
    (dict(micro_batch_size=0), "must be in [1,inf)"),
    (dict(max_prompt_tokens=0), "must be in [1,inf)"),
    (dict(max_new_tokens=0), "must be in [1,inf)"),
    (dict(updates_per_rollout=0), "must be in [1,inf)"),
    (dict(chunk_tokens=0), "must be in [1,inf)"),
    (dict(eval_samples=0), "must be in [1,inf)"),
    (dict(keep=0), "must be in [1,inf)"),
    (dict(seed=-1), "must be in [0,4e18]"),
    (dict(seed=2**62), "must be in [0,4e18]"),
    (dict(warmup_steps=-1), "must be in [0,inf)"),
    (dict(weight_decay=-1), "must be in [0,inf)"),
    (dict(weight_decay="nan"), "must be in [0,inf)"),
    (dict(weight_decay="inf"), "must be in [0,inf)"),
    (dict(eval_every=-1), "must be in [0,inf)"),
    (dict(save_every=-1), "must be in [0,inf)"),
    (dict(loss="kl"), " ".join(opd.LOSSES)),
    (dict(topk_source="both"), "student teacher union intersection"),
    (dict(lr_schedule="wsd"), "constant linear cosine"),
    (dict(dtype="float16"), "auto float32 bfloat16"),
    (dict(device="tpu"), "unknown; choose one of auto cpu cuda"),
    (dict(top_p=0.9, loss="k1"), "untruncated samples; use 1"),
    (dict(top_p=0.9, loss="pg"), "untruncated samples; use 1"),
    (dict(loss_temperature=1.0, temperature=0.7, loss="k2"), "untruncated samples; use 0.7"),
    (dict(loss_temperature=1.0, temperature=0.7, loss="pg"), "untruncated samples; use 0.7"),
    (dict(lmbda=0.5, loss="k3"), "the student's own fresh, untruncated samples; use 1"),
    (dict(lmbda=0.5, loss="pg"), "the student's own fresh, untruncated samples; use 1"),
    (dict(updates_per_rollout=2, loss="k1"), "fresh, untruncated samples; use 1"),
    (dict(updates_per_rollout=2, loss="k2"), "fresh, untruncated samples; use 1"),
    (dict(updates_per_rollout=2, loss="k3"), "fresh, untruncated samples; use 1"),
    *[(dict(kl_weight=x), "must be in [0,1]") for x in (-0.1, 1.1, "nan")],
    *[(dict(mu=x), "must be in (0,1)") for x in (0, 1, "nan")],
    *[(dict(tau=x), "must be in [0,inf)") for x in (-1, "inf", "nan")],
    *[(dict(eta=x), "must be in [0,inf)") for x in (-1, "inf", "nan")],
    *[(dict(pg_clip_reward=x), "must be in (0,inf)") for x in (0, -1, "inf", "nan")],
    *[(dict(show_samples=x), "must be in [0,8]") for x in (-1, 9)],
    (dict(pg_baseline="mean"), "unknown; choose one of none kl"),
    (dict(teacher_template="mine"), "unknown; choose one of student own"),
    (dict(sft_steps=5, steps=4), "--steps 4"),
    (dict(max_new_tokens=1020), "--max_prompt_tokens 16: the student has 1024 positions"),
]


@pytest.mark.parametrize("given, needed", BAD_VALUES, ids=[" ".join(flags(**x)) for x, _ in BAD_VALUES])
def test_value(given, needed, refused):
    refused(needed, **given)


@pytest.mark.parametrize(
    "words, needed",
    [
        (["--steps", "1.5"], "--steps: invalid int value: '1.5'; see --help"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'; see --help"),
        (["--resume", "perhaps"], "--resume"),
        (["--loss"], "--loss: expected one argument; see --help"),
        (["--no_such_flag", "3"], "--no_such_flag: no such flag; see --help"),
        (["--batch", "3"], "--batch: no such flag; see --help"),  # flags are not abbreviated
        (["prompts.jsonl"], "prompts.jsonl: no such flag; see --help"),
    ],
)
def test_words(words, needed, refused):
    refused(needed, words=words)


def test_cuda_where_there_is_none(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("cpu or auto", device="cuda")


def test_batch_that_the_ranks_cannot_share(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused("multiple of the 3 ranks", batch_size=4)


def test_help_explains_every_flag_and_lists_every_loss(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["opd.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        opd.main()
    assert stop.value.code == 0
    shown = re.sub(r"\s", "", capsys.readouterr().out)  # lines are broken anywhere, after hyphens too
    for f in fields(opd.Args):
        assert f"--{f.name}" in shown and f.metadata["help"]
        assert re.sub(r"\s", "", f.metadata["help"]) in shown, f.name
    assert shown.endswith("losses:" + "".join(opd.LOSSES))


# ------------------------------------------------------------------------------------------------------- data

GOOD = '{"prompt": "^1+1="}\n'
BAD_FILES = {  # name -> text (None: no such file), what the line must say
    "absent.jsonl": (None, "no such file"),
    "absent.parquet": (None, "no such file"),
    "absent": (None, "give a .jsonl, .json or .parquet file"),
    "prompts.txt": ("^1+1=\n", "give a .jsonl, .json or .parquet file"),
    "other_column.jsonl": ('{"question": "^1+1="}\n', "no column 'prompt', only question; add or rename it"),
    "empty.jsonl": ("", "at least one row"),
    "blank.jsonl": ("\n", "at least one row"),
    "empty.json": ("[]", "at least one row"),
    "torn.jsonl": (GOOD + '{"prompt": ', "JSON"),
    "torn.json": (f"[{GOOD}", "cannot be read"),
    "torn.parquet": ("not parquet", "Parquet"),
    "latin_1.jsonl": ('{"prompt": "\xe9"}\n', "some text is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_data_file(name, refused, tmp_path):
    text, needed = BAD_FILES[name]
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    refused(needed, data=tmp_path / name)


def test_data_folder(tiny, refused, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "^1+1="}])
    datasets.DatasetDict({"heldout": rows}).save_to_disk(tmp_path / "no_split")
    rows.select([]).save_to_disk(tmp_path / "no_rows")
    refused("datasets.save_to_disk", data=tiny["student"])
    refused("no split train, only heldout; add one", data=tmp_path / "no_split")
    refused("at least one row", data=tmp_path / "no_rows")


MESSAGE = {"role": "user", "content": "^1+1="}
BAD_PROMPTS = {  # case -> prompts, the last one bad; what the line must say
    "empty string": (["^1+1=", ""], "row 1: the prompt is empty; remove the row"),
    "no message": ([[MESSAGE], []], "row 1: the prompt is empty; remove the row"),
    "message without text": ([[MESSAGE], [{**MESSAGE, "content": ""}]], "row 1: the prompt is empty"),
    "message without content": ([[MESSAGE], [{"role": "user"}]], "row 1: the prompt is empty"),
    "message without role": ([[{"content": "^1+1="}]], "row 0: the prompt cannot be encoded ("),
    "message that is a string": ([["^1+1="]], "row 0: the prompt cannot be encoded ("),
    "number": ([3], "row 0: a prompt must be a string or a list of chat messages, not 3"),
    "null": (["^1+1=", None], "row 1: a prompt must be a string or a list of chat messages, not None"),
    "long": (["^1+1=", "^" * 41], "row 1: the prompt has 41 tokens; raise --max_prompt_tokens 40 or remove"),
    "long chat": ([[MESSAGE] * 3], "row 0: the prompt has 47 tokens; raise --max_prompt_tokens 40 or remove"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_prompt(case, tiny, refused, tmp_path):
    prompts, needed = BAD_PROMPTS[case]
    chat = save(tmp_path / "chat", make_model(0), make_tokenizer(chat_template=CHAT))
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": p} for p in prompts])
    refused(needed, data=data, student=chat, max_prompt_tokens=40)


def test_chat_messages_need_a_template_that_takes_them(refused, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": [MESSAGE]}])
    refused("row 0: chat messages, but the tokenizer has no chat template; give strings", data=data)
    picky = make_tokenizer(chat_template="{{ raise_exception('no such role here') }}")
    student = save(tmp_path / "picky", make_model(0), picky)
    refused("row 0", "no such role here", data=data, student=student)


def test_prompt_of_no_tokens(refused, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # drops all blanks
    student = save(tmp_path / "student", make_model(0), tokenizer)
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "  "}])
    refused("row 0: the prompt is empty; remove the row", data=data, student=student)


def test_eval_data(refused, tmp_path):
    refused("no such file", eval_data=tmp_path / "absent.jsonl")
    refused("no column 'answer'", eval_data=write_rows(tmp_path / "a.jsonl", [{"prompt": "^1+1="}]))
    empty = write_rows(tmp_path / "b.jsonl", [{"prompt": "", "answer": "2"}])
    refused("row 0: the prompt is empty; remove the row", eval_data=empty)
    latin = tmp_path / "latin_1.jsonl"
    latin.write_text('{"prompt": "\xe9", "answer": ""}\n', encoding="latin-1")
    refused(f"--eval_data {latin}: some text is not UTF-8", eval_data=latin)


def test_zero_is_an_answer_and_null_is_none(call, tmp_path):
    for answer, asked in ((0, True), ("0", True), (None, False), ("", False)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        data = write_rows(tmp_path / "eval.jsonl", [{"prompt": "^1+1=", "answer": answer}])
        assert call(eval_data=data)[0] == 0
        first = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[0])
        assert ("eval_accuracy" in first) == asked, answer


# ----------------------------------------------------------------------------------------------------- models


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def only_pickled_weights(folder):
    torch.save(make_model(1, width=48).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def poison(folder, value, token=None):
    """Put a value into an MLP's weights, or into the embedding of one token only."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0].mlp.up_proj if token is None else model.model.embed_tokens
    with torch.no_grad():
        layer.weight[token or 0, 0] = value
    model.save_pretrained(folder)


BAD_MODELS = {  # what is done to a good model folder, what the line must say
    "no folder": (shutil.rmtree, "give a folder with config, safetensors and tokenizer"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "torn config": (lambda d: cut(d / "config.json"), "JSON"),
    "config of another kind": (lambda d: (d / "config.json").write_text("[]"), "config"),
    "config with a wrong type": (lambda d: edit(d / "config.json", hidden_size="big"), "hidden_size"),
    "unknown model type": (lambda d: edit(d / "config.json", model_type="abacus"), "abacus"),
    "not a causal model": (lambda d: edit(d / "config.json", model_type="t5"), "AutoModelForCausalLM"),
    "only pickled weights": (only_pickled_weights, "safetensors"),
    "torn weights": (lambda d: cut(d / "model.safetensors"), "header"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "header"),
    "weights of another shape": (lambda d: edit(d / "config.json", hidden_size=64), "cannot be loaded"),
    "a layer without weights": (lambda d: edit(d / "config.json", num_hidden_layers=3), "missing"),
    "no tokenizer": (lambda d: [f.unlink() for f in d.glob("tokenizer*")], "tokenizer"),
    "torn tokenizer": (lambda d: cut(d / "tokenizer.json"), "tokenizer"),
    "nan in the weights": (lambda d: poison(d, torch.nan), "not finite"),
    "inf in the weights": (lambda d: poison(d, torch.inf), "not finite"),
}


@pytest.mark.parametrize("flag", ["student", "teacher"])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_model(case, flag, tiny, refused, tmp_path):
    spoil, needed = BAD_MODELS[case]
    spoil(Path(shutil.copytree(tiny[flag], tmp_path / "model")))
    refused(needed, **{flag: tmp_path / "model"})


def test_model_that_looks_ahead(refused, tmp_path):
    size = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    torch.manual_seed(0)
    bert = BertLMHeadModel(BertConfig(**size, num_attention_heads=4))
    refused("causal", student=save(tmp_path / "bert", bert, make_tokenizer()))


def test_hub_name_while_offline(refused):
    refused("a hub name that can be reached", student=HUB_NAME)
    refused("a hub name that can be reached", teacher=HUB_NAME)
    refused("a hub name that can be reached", data=HUB_NAME)


def test_tokenizers_that_differ(tiny, refused, tmp_path):
    swapped = list(CHARACTERS)
    swapped[5], swapped[6] = swapped[6], swapped[5]
    here = f"in --student {tiny['student']}"
    teacher = save(tmp_path / "swapped", make_model(1), make_tokenizer(swapped))
    refused(f"token 5 is '2' here, '1' {here}", "one family", teacher=teacher)
    teacher = save(tmp_path / "more", make_model(1, vocab=VOCAB + 1), make_tokenizer([*CHARACTERS, "!"]))
    refused(f"token {VOCAB} is '!' here, None {here}", "one family", teacher=teacher)
    teacher = save(tmp_path / "fewer", make_model(1), make_tokenizer(CHARACTERS[:-1]))
    refused(f"token {VOCAB - 1} is None here, '\\n' {here}", "one family", teacher=teacher)


@pytest.mark.parametrize("flag", ["student", "teacher"])
def test_more_tokens_than_rows(flag, refused, tmp_path):
    model = save(tmp_path / "model", make_model(0, vocab=VOCAB - 3), make_tokenizer())
    refused(f"{VOCAB} tokens in the tokenizer, {VOCAB - 3} in the model", **{flag: model})


def test_padded_vocabularies_of_different_sizes_are_cut(call, tmp_path):
    student = save(tmp_path / "student", make_model(0, vocab=VOCAB + 14), make_tokenizer())
    teacher = save(tmp_path / "teacher", make_model(1, vocab=VOCAB + 30), make_tokenizer())
    assert call(student=student, teacher=teacher, topk=VOCAB)[0] == 0
    row = json.loads((tmp_path / "out/metrics.jsonl").read_text())
    for mass in (row["student_mass"], row["teacher_mass"]):  # of the top VOCAB tokens
        assert mass == pytest.approx(1)


def test_vocabulary_of_five_tokens(call, tmp_path):
    model = save(tmp_path / "model", make_model(0, vocab=5), make_tokenizer(["<pad>", "$", "a", "b", "c"]))
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "ab"}])
    assert call(student=model, teacher=model, data=data)[0] == 0


# ------------------------------------------------------------------------------------------ code that is data


@pytest.mark.parametrize("flag", ["student", "teacher"])
def test_code_in_a_model_folder_is_never_run(flag, tiny, call, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whatever the user, or a pipe, answers to a prompt
    ran, model = tmp_path / "ran", Path(shutil.copytree(tiny[flag], tmp_path / "model"))
    (model / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "import transformers\n"
        "class C(transformers.LlamaConfig): pass\n"
        "class M(transformers.LlamaForCausalLM): pass\n"
        "class T(transformers.PreTrainedTokenizerFast): pass\n"
    )
    edit(model / "config.json", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    assert call(**{flag: model})[0] == 0  # a Llama that also brings code: loaded without it
    shutil.rmtree(tmp_path / "out")
    classes = {"AutoTokenizer": ["code.T", "code.T"]}
    edit(model / "tokenizer_config.json", tokenizer_class="T", auto_map=classes)
    code, lines = call(**{flag: model})
    assert code == 0 or f"--{flag} {model}" in lines[-1]
    edit(model / "config.json", model_type="abacus")
    refused("custom code", **{flag: model})
    assert not ran.exists()


class Malicious:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_checkpoint_is_never_run(a_run, call, tmp_path):
    file = a_run / "step_000003/trainer.pt"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "more": Malicious(tmp_path / "ran")}, file)
    code, lines = call(resume=True, **{**A_RUN, "steps": 4})
    assert code == 0 and "step_000003: not a whole checkpoint" in lines[0]
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------- --out folder

A_RUN = dict(steps=3, save_every=1)


@pytest.fixture
def a_run(call, tmp_path):
    """The --out folder of a run of three steps, with checkpoints of the last two."""
    assert call(**A_RUN)[0] == 0
    return tmp_path / "out"


def steps_of(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_out_that_holds_a_run(a_run, refused):
    refused("continue it with --resume, or choose another", out=a_run, **A_RUN)


@pytest.mark.parametrize("thing", ["metrics.jsonl", "step_000007/x", "final/x"])
def test_out_that_holds_part_of_a_run(thing, refused, tmp_path):
    (tmp_path / "out" / thing).parent.mkdir(parents=True)
    (tmp_path / "out" / thing).write_text("mine")
    refused("continue it with --resume, or choose another", out=tmp_path / "out")


def test_out_that_cannot_be_a_folder(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    refused("choose another", out=tmp_path / "file")
    refused("choose another", out=tmp_path / "file/below")
    refused("choose another", out="/dev/null/below")
    monkeypatch.chdir(tmp_path)
    refused("choose another", out="")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_out_in_a_read_only_folder(refused, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o500)
    access = os.access  # root may write anywhere, so it is told here that it may not
    monkeypatch.setattr(os, "access", lambda path, *how: "locked" not in str(path) and access(path, *how))
    refused("choose another", out=tmp_path / "locked/out")


def test_other_files_in_out_are_left_alone(call, tmp_path):
    kept = ["notes.txt", "step_latest/x", "step_final"]
    for name in kept:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    assert call(keep=1, **A_RUN)[0] == 0
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in kept)
    assert (tmp_path / "out/step_000003/trainer.pt").exists()


def test_resume_with_other_arithmetic(a_run, tiny, refused):
    made_with = f"the run in --out {a_run} was made with"
    remedy = "resume with that, or choose another --out"
    refused(f"{made_with} sg_topk; {remedy}", loss="jsd", resume=True, **A_RUN)
    refused(f"{made_with} 0; {remedy}", seed=7, resume=True, **A_RUN)
    refused(f"{made_with} {tiny['student']}; {remedy}", student=tiny["teacher"], resume=True, **A_RUN)


def test_resume_where_there_is_no_run(call, tmp_path):
    assert call(resume=True, **A_RUN)[0] == 0
    assert steps_of(tmp_path / "out") == [1, 2, 3]


@pytest.mark.parametrize("file", ["trainer.pt", "model.safetensors", "config.json", "tokenizer.json"])
def test_resume_after_a_torn_checkpoint(file, a_run, call):
    cut(a_run / "step_000003" / file)
    code, lines = call(resume=True, **{**A_RUN, "steps": 4})
    assert code == 0 and "step_000003: not a whole checkpoint" in lines[0]
    assert ["trying the one before" in line for line in lines].count(True) == 1
    assert steps_of(a_run) == [1, 2, 3, 4]
    assert sorted(p.name for p in a_run.glob("step_*")) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("file", ["trainer.pt", "model.safetensors"])  # the second is read after the step
def test_resume_where_all_checkpoints_are_torn(file, a_run, call):
    for folder in a_run.glob("step_*"):
        cut(folder / file)
    before = contents(a_run)
    code, lines = call(resume=True, **{**A_RUN, "steps": 4})
    assert code == 2 and len(lines) == 3 and f"--out {a_run}: " in lines[-1] and "choose another" in lines[-1]
    assert contents(a_run) == before  # starting over would wipe metrics.jsonl


# ------------------------------------------------------------------------------------------------- not finite


def test_loss_that_is_not_finite(call, tmp_path):
    code, lines = call(lr=1e30, warmup_steps=0, save_every=1, steps=4)
    assert code == 2 and "step 2: " in lines[-1] and "not finite" in lines[-1] and "--lr 1e+30" in lines[-1]
    out = tmp_path / "out"
    assert sorted(contents(out)) == ["metrics.jsonl", "step_000001"] and steps_of(out) == [1]
    AutoModelForCausalLM.from_pretrained(out / "step_000001", use_safetensors=True)
    assert torch.load(out / "step_000001/trainer.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("flag", ["student", "teacher"])
def test_token_whose_embedding_is_not_finite(flag, tiny, call, tmp_path):
    model = Path(shutil.copytree(tiny[flag], tmp_path / "model"))
    poison(model, torch.nan, token=CHARACTERS.index("="))  # in every prompt, not in the check at the start
    code, lines = call(**{flag: model})
    assert code == 2 and "step 1: " in lines[-1] and "not finite" in lines[-1]
    assert sorted(contents(tmp_path / "out")) == ["metrics.jsonl"] and steps_of(tmp_path / "out") == []


# ----------------------------------------------------------------------------------- the script, as it is run


@pytest.fixture(scope="module")
def shell(tiny, tmp_path_factory):
    """name -> the --out folder and the ended process. Nearly all the time is spent importing: all at once."""
    tmp = tmp_path_factory.mktemp("shell")
    late = [{"prompt": "^1+1="}] * 1000 + [{"prompt": ""}] * 1000
    order = [[opd.row_at(slot, len(late), seed) for slot in (0, 1)] for seed in range(20)]
    seed = next(s for s, (first, second) in enumerate(order) if first < 1000 <= second)  # bad on rank 1 only
    (tmp / "slow").mkdir()
    (tmp / "slow/sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '0': time.sleep(4)\n"
    )
    no_hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing answers at this port
    slow = {"PYTHONPATH": str(tmp / "slow")}
    runs = {
        "hub model": dict(student=HUB_NAME, env=no_hub),
        "hub data": dict(data=HUB_NAME, env=no_hub),
        "ranks": dict(batch_size=3, ranks=2, env=slow),
        "late row": dict(batch_size=2, ranks=2, data=write_rows(tmp / "late.jsonl", late), seed=seed),
    }
    small = {k: v for k, v in {**tiny, **SMALL, "steps": 1}.items() if k != "eval_data"}
    with ThreadPoolExecutor() as pool:
        started = {
            name: pool.submit(run_script, "opd.py", **{**small, "out": tmp / name, **given})
            for name, given in runs.items()
        }
        return {name: (tmp / name, run.result()) for name, run in started.items()}


@pytest.mark.parametrize("name, flag", [("hub model", "student"), ("hub data", "data")])
def test_hub_that_does_not_answer(name, flag, shell):
    out, run = shell[name]
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()  # no log of retries: they would take a minute
    assert line.startswith(f"opd.py: error: --{flag} {HUB_NAME}: ")
    assert "a hub name that can be reached" in line
    assert not out.exists()


@pytest.mark.parametrize(
    "name, needed",
    [
        ("ranks", "--batch_size 3: must be a multiple of the 2 ranks"),  # also where rank 0 is the slower one
        ("late row", "late.jsonl, row 1"),  # of the rows after the first 1000, and only rank 1's turn
    ],
)
def test_ranks_say_it_once(name, needed, shell):
    out, run = shell[name]
    lines = [line for line in run.stderr.splitlines() if "opd.py: error: " in line]  # torchrun adds a report
    assert run.returncode != 0 and len(lines) == 1 and needed in lines[0], run.stderr
    assert f'{ROOT / "opd.py"}", line' not in run.stderr  # no traceback of ours
    assert out.exists() == (name == "late row")


@pytest.mark.parametrize(
    "words, needed",
    [
        ("decode nowhere", "no student/config.json in nowhere"),
        ("endurance --steps 0", "'0' is not a whole number of at least 1"),
        ("fuzz --only 7", "--only 7: write valid:NUMBER or invalid:NUMBER"),
        ("kill --kills -3", "'-3' is not a whole number of at least 1"),
        ("memory --limit none", "'none' is not a whole number of at least 1"),
        ("scaling nowhere", "no student/config.json in nowhere"),
        ("vs_trl nowhere", "build it with tutorials/smollm2.py --out nowhere"),
        ("vs_trl HERE --prompts 8 --micro_batch_size 3", "--micro_batch_size 3: must divide the 8 rows"),
        ("vs_trl HERE --loss kl", "--loss kl: unknown; choose one of forward_kl"),
        ("vs_trl HERE --rival tr1", "--rival tr1: unknown; choose one of trl forward_kl"),
        ("vs_trl HERE --side them", "--side them: unknown; choose one of ours trl"),
    ],
)
def test_flag_of_a_bench(words, needed, capsys, monkeypatch, tmp_path):
    bench = Path(opd.__file__).parent / "tests" / "bench"
    for file in ("student/config.json", "teacher/config.json", "train.jsonl"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    name, *rest = words.replace("HERE", str(tmp_path)).split()
    monkeypatch.setattr(sys, "path", [str(bench), *sys.path])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *rest])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(bench / f"{name}.py"), run_name="__main__")
    assert exit.value.code == 2
    assert needed in capsys.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------- resuming from what should not be there


def log_of(text):
    return lambda out: (out / "metrics.jsonl").write_text(text)


def gone(out):
    (out / "metrics.jsonl").unlink()


def a_folder(out):
    gone(out)
    (out / "metrics.jsonl").mkdir()


ROW = '{"step": 1}\n{"step": 2}\n'
TORN_LOGS = {  # what happened to metrics.jsonl of a run of three steps -> what the line must say
    "gone": (gone, "no row of step 3"),
    "empty": (log_of(""), "no row of step 3"),
    "a folder": (a_folder, "directory"),
    "a row without step": (log_of(ROW + '{"loss": 1}\n'), "'step'"),
    "a row that is a list": (log_of(ROW + "[3]\n"), "metrics.jsonl cannot be continued"),
    "no JSON": (log_of(ROW + "step 3\n"), "Expecting value"),
    "another run's": (log_of(ROW), "no row of step 3"),
    "not UTF-8": (lambda out: (out / "metrics.jsonl").write_bytes(b'{"step": "\xe9"}\n'), "utf-8"),
}


@pytest.mark.parametrize("steps", [3, 4], ids=["finished", "unfinished"])
@pytest.mark.parametrize("case", TORN_LOGS)
def test_resume_with_a_log_that_is_not_this_runs(case, steps, a_run, refused):
    spoil, needed = TORN_LOGS[case]
    spoil(a_run)
    line = refused(needed, out=a_run, resume=True, **{**A_RUN, "steps": steps})
    assert "metrics.jsonl" in line and "choose another --out" in line and "--data" not in line


def trainer(**changes):
    def spoil(folder):
        state = torch.load(folder / "trainer.pt", weights_only=True)
        torch.save({**state, **changes}, folder / "trainer.pt")

    return spoil


TORN_STATES = {
    "args of another kind": trainer(args=[1]),
    "args that are text": trainer(args="steps 3"),
    "no moments": trainer(optimizer={}),
    "moments of another kind": trainer(optimizer=3),
    "no state of any weight": trainer(optimizer={"state": {}, "param_groups": []}),
    "a step that is text": trainer(step="3"),
    "the step of another run": trainer(step=1000),
}


@pytest.mark.parametrize("case", TORN_STATES)
def test_resume_from_a_state_that_is_not_whole_takes_the_one_before(case, a_run, call):
    TORN_STATES[case](a_run / "step_000003")
    code, lines = call(resume=True, **{**A_RUN, "steps": 4})
    assert code == 0 and "step_000003: not a whole checkpoint" in lines[0]
    assert steps_of(a_run) == [1, 2, 3, 4]


def test_a_rank_that_fails_alone_says_so_after_the_others_had_their_time(monkeypatch, capsys):
    slept = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["opd.py", "--steps", "0"])
    monkeypatch.setattr(opd.time, "sleep", lambda seconds: slept.append((seconds, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as left:
        opd.main()
    assert left.value.code == 2 and slept == [(60, "")]
    assert capsys.readouterr().err == "opd.py: error: --steps 0: must be in [1,1e6)\n"


def test_resume_to_fewer_steps_than_were_taken(a_run, refused):
    refused(f"the run in --out {a_run} has 3 steps already; raise it", steps=2, save_every=1, resume=True)
