"""A dozen families of transformers, tiny: exact, or refused in one line before anything is written.

tests/bench/architectures.py tries all of them; tutorials/reference.md holds what it found.
"""

import re
import sys

import pytest
from conftest import ROOT, make_tokenizer, save
from test_bad_input import call, refused  # noqa: F401

import opd

sys.path.insert(0, str(ROOT / "tests/bench"))
import architectures  # noqa: E402

EXACT = {  # family -> what sets it apart
    "gemma3_text": "windows in every second layer here",
    "gemma4_text": "windows; layers that share keys and values; an embedding for each layer",
    "gpt_oss": "attention sinks, experts",
    "granitemoehybrid": "Mamba-2 and attention layers, experts",
    "kimi_linear": "linear and latent attention",
    "lfm2": "short convolutions",
    "llama4_text": "attention in chunks; base_model is the whole model",
    "opt": "a projection after the last layer; the forward does not call base_model",
    "qwen3_next": "gated delta rule, experts",
    "xglm": "sinusoidal positions",
}
REFUSED = {
    "bert": "is not causal",
    "deepseek_v4": "has another kind of cache",  # it compresses blocks of positions, padding included
    "mamba": "has another kind of cache",
    "minimax": "MiniMax uses cache of its own",
    "openai-gpt": "Expected size",  # it has no cache
    "recurrent_gemma": "has another kind of cache",  # its state includes the padding
    "rwkv": "has another kind of cache",
    "xlnet": "is not causal",
    "zamba2": "has another kind of cache",  # steps with a cache leave out the limit on its time step
}


@pytest.mark.parametrize("family", EXACT)
def test_exact(family, tmp_path):
    path = save(tmp_path / "model", architectures.make(family), make_tokenizer())
    gap, gradient = architectures.compare(architectures.load(path))
    assert gap < 1e-3 and gradient < 1e-3


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family, refused, tmp_path):  # noqa: F811
    opd.quiet_libraries(opd.Args())  # while the model is made and saved
    model = save(tmp_path / "model", architectures.make(family), make_tokenizer())
    refused("this architecture cannot be used", REFUSED[family], student=model, teacher=model)


def test_the_reference_says_the_same():
    text = (ROOT / "tutorials/reference.md").read_text()
    rows = text.split("<!-- architectures -->")[1].split("<!-- /architectures -->")[0].strip().splitlines()
    found = {name: row for row in rows for name in re.findall(r"[\w-]+", row.split("|")[2])}
    assert all(found[family].startswith("| exact") for family in EXACT)
    assert all(found[family].startswith("| refused") for family in REFUSED)
    assert "WRONG" not in text
