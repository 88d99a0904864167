"""Tiny model folders for the tests, ordinary ones: a character tokenizer and random models, made at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # models this small only wait for a second thread
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # nothing here needs the network, and a hub that cannot be reached must not cost time
)
CHARACTERS = ["<pad>", "$", "%"] + list("^0123456789+=#;>,| abcdefghijklmnopqrstuvwxyz:\n")
VOCAB = len(CHARACTERS)
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(characters=CHARACTERS, chat_template=None, pad="<pad>"):
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", pad_token=pad)
    fast.chat_template = chat_template
    return fast


def make_model(seed, vocab=VOCAB, layers=2, width=32, scale=8.0, **config):
    """A random Llama. scale: makes its logits uneven, as trained models' are, and unlike another seed's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            **dict(
                vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers
            ),
            **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024),
            **dict(eos_token_id=1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=False, **config),
        }
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PROMPTS = [
    "^12+34=",
    "^5+6=",
    "^100+200=",
    "^7+7=",
    "^99+1=",
    "^123+456=",
    "^8+80=",
    "^31+4=",
    "^2+2=",
    "^64+36=",
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags of a run on tiny random models: {"student", "teacher", "data", "eval_data"} -> path."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = [
        {"prompt": p, "answer": str(sum(map(int, p[1:-1].split("+")))), "solution": "a;b"} for p in PROMPTS
    ]
    return {
        "student": save(folder / "student", make_model(0), make_tokenizer()),
        "teacher": save(folder / "teacher", make_model(1, width=48), make_tokenizer()),
        "data": write_rows(folder / "train.jsonl", rows),
        "eval_data": write_rows(folder / "eval.jsonl", rows[:4]),
    }


SMALL = dict(
    steps=4, batch_size=4, micro_batch_size=3, max_prompt_tokens=16, max_new_tokens=12, lr=1e-3, topk=5,
    eval_every=0, warmup_steps=1, device="cpu", chunk_tokens=16,
)  # fmt: skip


def flags(**kwargs):
    return [word for name, value in kwargs.items() for word in (f"--{name}", str(value))]


def run_script(script, *, ranks=None, nodes=1, env=None, timeout=180, **kwargs):
    """Run a script of the project as a user would, under torchrun where ranks are given."""
    python = [sys.executable]
    if ranks:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*python, str(ROOT / script), *flags(**kwargs)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}
    )


FAMILIES = {  # what sets each apart from Llama, for a loop that must not care
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, dict(head_dim=8)),
    "gpt2": (GPT2Config, {}),  # absolute positions
    "gpt_neo": (GPTNeoConfig, dict(attention_types=[[["global", "local"], 1]], window_size=6)),  # likewise
    "mistral": (MistralConfig, dict(sliding_window=6)),
    "gemma2": (Gemma2Config, dict(head_dim=8, final_logit_softcapping=2.0, sliding_window=6)),
    "granite": (GraniteConfig, dict(logits_scaling=7.0)),
    "cohere": (CohereConfig, dict(logit_scale=0.3)),
    "mixtral": (MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (Qwen3MoeConfig, dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    "falcon": (FalconConfig, dict(new_decoder_architecture=True, num_kv_heads=2)),  # dropout in its layers
}


def make_family(name, seed=0, tied=False, vocab=VOCAB, **config):
    """A random model of another family, two layers of width 32, with the uneven logits of a trained one."""
    torch.manual_seed(seed)
    kind, extra = FAMILIES[name]
    common = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(kind(**{**common, **extra, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def make_args(**kwargs):
    """Arguments as opd.train has them once the defaults are filled in."""
    import opd

    return opd.set_up(opd.Args(**{**SMALL, "data": "none", "out": "no/such/folder", **kwargs}))[0]


def train_rows(out, *flags, **kwargs):
    """opd.train without evaluation unless asked for -> one row a step."""
    import opd

    merged = {name: value for some in flags for name, value in some.items() if name != "eval_data"}
    return opd.train(opd.Args(**{**SMALL, **merged, **kwargs, "out": str(out)}))
