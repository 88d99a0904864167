"""Which causal language models of transformers work here: each family as a tiny random model.

    python tests/bench/architectures.py                     # all families: about a minute
    python tests/bench/architectures.py --only llama gpt2   # some of them
    python tests/bench/architectures.py --table             # also writes the table of tutorials/reference.md

A model with a family's default configuration, but small sizes, is saved and loaded as --student and as
--teacher, with the check at the start. If the check accepts it, sampling and scoring are compared with plain
forward passes of the model over one row at a time, in float64 where the model allows it.
"""

import argparse
import contextlib
import copy
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import VOCAB, make_tokenizer, save  # noqa: E402

import opd  # noqa: E402

TOLERANCE = 1e-3  # nats per token; also of the gradient, relative to its norm
ROWS = VOCAB + 3  # of the embeddings: more than the tokenizer has tokens, as in many models
SIZES = {  # what a configuration may call it -> a small value
    **dict(vocab_size=ROWS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8),
    **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, sliding_window=6),
    **dict(pad_token_id=0, eos_token_id=1, bos_token_id=2, vocab_size_per_layer_input=ROWS),
    **dict(hidden_size_per_layer_input=8, rotary_dim=4, d_inner=64, ffn_dim=64),
    # experts
    **dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_topk=2),
    **dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, n_group=1, topk_group=1),
    # latent and sparse attention
    **dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    **dict(qk_head_dim=16, index_head_dim=16, index_n_heads=8, index_topk=4),
    # linear attention and state-space layers
    **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8),
    **dict(linear_head_dim=8, linear_num_heads=4, state_size=8, mamba_d_state=8, mamba_n_heads=8),
    **dict(mamba_d_head=8, mamba_num_heads=8, mamba_head_dim=8, n_mamba_heads=2, chunk_size=8),
    **dict(mamba_chunk_size=8, n_groups=1),
    # encoder-decoders, of which this is the decoder
    **dict(encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64),
    **dict(num_encoder_layers=2, num_decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
    **dict(num_encoder_attention_heads=4, num_decoder_attention_heads=4),
    # images
    **dict(depth=2, out_hidden_size=32, num_heads=4, image_size=28, patch_size=14),
}
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4)
SHARED_KV = dict(**WINDOWS, num_kv_shared_layers=2)
EVERY_HEAD = dict(num_key_value_heads=4)
OVERRIDES = {  # where small sizes contradict each other, or a default leaves a mechanism out
    **{name: EVERY_HEAD for name in "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite".split()},
    **{name: EVERY_HEAD for name in "bailing_hybrid glm_moe_dsa kimi_linear minicpm3 youtu".split()},
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": dict(rope_type="default", rope_theta=10000.0)}
    ),
    "dbrx": dict(
        **dict(
            d_model=32, n_heads=4, n_layers=2, attn_config=dict(rope_theta=10000.0, kv_n_heads=2, clip_qkv=8)
        ),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
    "dots1": dict(**EVERY_HEAD, n_shared_experts=1, first_k_dense_replace=1),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        **SHARED_KV,
        laurel_rank=8,
        intermediate_size=[64] * 4,
        activation_sparsity_pattern=[0.9] + [0.0] * 3,
    ),
    "gemma4_text": SHARED_KV,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=6),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "llama4_text": dict(attention_chunk_size=6),
    "longcat_flash": dict(**EVERY_HEAD, num_layers=2, ffn_hidden_size=64, expert_ffn_hidden_size=32),
    "mamba2": dict(num_heads=8),
    "opt": dict(word_embed_proj_dim=16),
    "recurrent_gemma": dict(num_hidden_layers=3, attention_window_size=6),
    "reformer": dict(
        is_decoder=True, axial_pos_embds_dim=[16, 16], axial_pos_shape=[16, 16], attn_layers=["local"]
    ),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "xlnet": dict(d_head=8),
    "zamba": dict(layer_types=["linear_attention", "hybrid"] * 2, num_hidden_layers=4),
    "zaya": dict(num_experts_per_tok=1),
}


def small(config):
    """Small sizes for a configuration and those inside it, and one layer of each kind that it has."""
    known = {*config.to_dict(), *config.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    for key in ("layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(getattr(config, key, None) or ()))
        own = not isinstance(getattr(type(config), config.attribute_map.get(key, key), None), property)
        if len(kinds) > 1 and own:
            sizes.update({key: kinds, "num_hidden_layers": len(kinds)})
    inside = [key for key in config.sub_configs if getattr(config, key, None) is not None]
    sizes.update({key: small(getattr(config, key)) for key in inside})
    return {**sizes, **OVERRIDES.get(config.model_type, {})}


def make(name, seed=0):
    """A tiny random model of a family, with the uneven logits of a trained one."""
    config = AutoConfig.for_model(name, **small(AutoConfig.for_model(name)))
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 2e7:
        raise ValueError(f"{size / 1e6:.0f} M parameters with these small sizes")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def load(path):
    """A saved model as a run loads it, after the check at the start; UserError where that refuses it."""
    args = opd.Args(
        student=path, teacher=path, topk=5, dtype="float32", max_prompt_tokens=16, max_new_tokens=16
    )
    return opd.load_pair(path, path, args, torch.device("cpu"))[0]


def plain_logp(model, rollout):
    """Log-probabilities [T,V] of a completion, by one plain forward pass of the model over one row."""
    row = torch.tensor([rollout.prompt + rollout.completion])
    logits = model(input_ids=row, use_cache=False).logits[0, len(rollout.prompt) - 1 : -1]  # [T,rows]
    return logits[:, : model.vocab_in_use].double().log_softmax(-1)


def compare(model):
    """-> largest gap, in nats, of sampling and scoring from plain forward passes; and that of the gradient,
    relative to its norm. Prompts of unequal length, two completions of each, rows that finish early."""
    prompts, stop_ids = [list(range(5, 16)), [7, 3], [20, 4, 31, 9, 30]], list(range(1, VOCAB, 9))
    rollouts = opd.sample(model, prompts, 2, stop_ids, (1, 2), range(len(prompts)), 12)
    tokens = torch.tensor([y for r in rollouts for y in r.completion])[:, None]  # [N,1]
    sampled = torch.tensor([x for r in rollouts for x in r.logp])[:, None]  # [N,1]
    prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
    ours = opd.project(model, opd.completion_hidden(model, prompts, completions)).log_softmax(-1)  # [N,V]
    exact = copy.deepcopy(model).double()
    if exact._can_set_experts_implementation():
        exact.set_experts_implementation("eager")  # the default has no float64
    try:
        theirs = torch.cat([plain_logp(exact, r) for r in rollouts])  # [N,V]
    except RuntimeError:  # a model with float32 inside
        exact = copy.deepcopy(model)
        theirs = torch.cat([plain_logp(exact, r) for r in rollouts])
    gap = torch.cat([ours - theirs, sampled - theirs.gather(-1, tokens)], dim=1).abs().max()
    slopes = []  # gradient of the mean log-probability of the tokens, all weights in one vector
    for m, logp in ((model, ours), (exact, theirs)):
        weights = [p for p in m.parameters() if p.requires_grad]
        mean = logp.gather(-1, tokens).mean()
        found = torch.autograd.grad(mean, weights, allow_unused=True, materialize_grads=True)
        slopes.append(torch.cat([g.flatten().double() for g in found]))
    return gap.item(), ((slopes[0] - slopes[1]).norm() / slopes[1].norm()).item()


def reason(error):
    """The first line of what an exception says."""
    return f"{type(error).__name__}: {str(error.__cause__ or error).strip()}".splitlines()[0]


def verdict(name):
    """-> "exact", "refused", "WRONG" or "not built"; the largest gaps, or why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = save(f"{folder}/model", make(name), make_tokenizer())
        except Exception as error:  # whatever a configuration or a missing package raises
            return "not built", reason(error)
        try:
            gap, slope = compare(load(path))
        except opd.UserError as error:
            return "refused", str(error).removeprefix(f"--student {path}: ")
        except Exception as error:  # a traceback for the user
            return "WRONG", reason(error)
    right = gap <= TOLERANCE and slope <= TOLERANCE
    return "exact" if right else "WRONG", f"{gap:.0e} nats, gradient {slope:.0e}"


def table(found):
    """The Markdown of reference.md: one row for each kind of verdict."""
    kinds = {  # row -> what verdict and reason must match
        "exact": "exact",
        "WRONG": "WRONG",
        "refused: sampling differs from the plain forward pass": "refused.*is not causal",
        "refused: the check ends in an error": "refused: this architecture cannot be used",
        "refused: cannot be loaded": "refused",
        "not built: no small model of it, or a package is missing": "not built",
    }
    groups = {row: [] for row in kinds}
    for name, verdict in found.items():
        row = next(row for row, pattern in kinds.items() if re.match(pattern, ": ".join(verdict)))
        groups[row].append(name)
    rows = [f"| {row} ({len(names)}) | {', '.join(names)} |" for row, names in groups.items() if names]
    return "\n".join(["| verdict | families |", "|---|---|", *rows])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="FAMILY", choices=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser.add_argument("--table", action="store_true", help="write the table in tutorials/reference.md")
    args = parser.parse_args()
    if args.only and args.table:
        parser.error("--table: needs all families; leave out --only")
    opd.quiet_libraries(opd.Args())
    warnings.simplefilter("ignore")
    found, start = {}, time.perf_counter()
    print("| family | verdict | largest gaps, or why |\n|---|---|---|")
    for name in args.only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found[name] = verdict(name)
        print(f"| {name} | {found[name][0]} | {found[name][1]} |", flush=True)
    counts = Counter(kind for kind, _ in found.values())
    print(", ".join(f"{n} {kind}" for kind, n in counts.items()), f"in {time.perf_counter() - start:.0f} s")
    if args.table:
        page = ROOT / "tutorials/reference.md"
        ends = [f"<!-- {mark}architectures -->" for mark in ("", "/")]
        before, rest = page.read_text().split(ends[0])
        after = rest.split(ends[1])[1]
        page.write_text(f"{before}{ends[0]}\n{table(found)}\n{ends[1]}{after}")
    else:
        print(f"\n{table(found)}")
    sys.exit(counts["WRONG"] > 0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
