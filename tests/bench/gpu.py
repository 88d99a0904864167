"""What README's GPU commands cost on this GPU: time and peak memory of each part of a step, at full size.

    python tests/bench/gpu.py               # minutes, 60 GB of GPU memory; one rank's share of each command
    python tests/bench/gpu.py --cudnn       # with cuDNN's attention, which opd.py turns off
    python tests/bench/gpu.py --rehearse    # the script itself, with tiny models on any device

The models have the shapes of Qwen3 and random weights, since neither time nor memory depends on their values.
Every completion has the full length, which is the worst case. Decoding is timed at both ends of a completion:
--decode_steps tokens after a prompt of full length, and as many at the end of a completion of full length.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from flags import positive
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import opd  # noqa: E402

TOKENS, VOCAB = 151_669, 151_936  # of Qwen3's tokenizer; of its models, padded
SHAPES = {  # name: hidden size, intermediate size, layers, heads, tied embeddings
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
COMMANDS = {  # name: student, teacher, and one rank's flags
    "one GPU": ("1.7B", "4B", dict(batch_size=16, max_new_tokens=2048, micro_batch_size=2)),
    "a node of 8": ("1.7B", "8B", dict(batch_size=8, max_new_tokens=4096, micro_batch_size=4)),
}


def save_config(folder, name, small):
    """A model folder without weights: config and a tokenizer of as many words as Qwen3 has tokens."""
    width, inner, layers, heads, tied = (64, 128, 2, 4, True) if small else SHAPES[name]
    sizes = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers)
    sizes.update(
        num_attention_heads=heads, num_key_value_heads=4 if small else 8, head_dim=16 if small else 128
    )
    config = Qwen3Config(
        vocab_size=VOCAB, **sizes, tie_word_embeddings=tied, max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(TOKENS)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t1").save_pretrained(folder)
    return str(folder)


def measure(name, options):
    """Load both models as opd.py does, sample, update twice; print what each part took."""
    student_name, teacher_name, flags = COMMANDS[name]
    more = dict(max_prompt_tokens=1024, loss="sg_topk", topk=20, gradient_checkpointing=True)
    if options.rehearse:
        more.update(max_prompt_tokens=24), flags.update(max_new_tokens=16)
    with tempfile.TemporaryDirectory() as folder:
        path = {
            flag: save_config(Path(folder) / flag, size, options.rehearse)
            for flag, size in (("student", student_name), ("teacher", teacher_name))
        }
        args, device = opd.set_up(opd.Args(**path, **flags, **more, out=f"{folder}/out"))
        torch.backends.cuda.enable_cudnn_sdp(options.cudnn)
        student, teacher, _, _ = opd.load_pair(path["student"], path["teacher"], args, device)
    cuda, new, width = device.type == "cuda", args.max_new_tokens, args.max_prompt_tokens
    peak = lambda: torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")  # noqa: E731
    found = {"command": name, "models_gb": peak()}
    prompts = [[(97 * i + j) % TOKENS for j in range(width)] for i in range(args.batch_size)]

    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        for end in ("first", "last"):  # tokens of a completion: a longer prompt stands for what came before
            n = min(options.decode_steps, new)
            before = [p + [2] * (new - n if end == "last" else 0) for p in prompts]
            seconds = []
            for tokens in (1, 1, n + 1):  # a warm-up, the prefill alone, and n tokens more
                start = opd.clock(device)
                opd.sample(student, before, 1, [], (0, 1), range(len(prompts)), tokens)
                seconds.append(opd.clock(device) - start)
            found[f"{end}_token_ms"] = 1000 * (seconds[2] - seconds[1]) / n
            found["prefill_s"] = found.get("prefill_s", seconds[1])
    found["sample_gb"] = peak()  # at full length
    completion = torch.randint(2, TOKENS, (len(prompts), new)).tolist()
    rollouts = [opd.Rollout(p, y, [0.0] * new, False) for p, y in zip(prompts, completion, strict=True)]
    optimizer = torch.optim.AdamW(student.parameters(), 1e-6, betas=(0.9, 0.98), fused=True)
    for step in (1, 2):  # the first allocates AdamW's moments
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = opd.clock(device)
        inputs = (student, teacher, rollouts, prompts, opd.LOSSES[args.loss], optimizer, args, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            row = opd.update(*inputs)
        found["update_s"] = opd.clock(device) - start
    found.update(teacher_s=row["teacher_s"], student_s=row["student_s"], update_gb=peak())
    found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9 if cuda else float("nan")
    sample_s = found["prefill_s"] + new * (found["first_token_ms"] + found["last_token_ms"]) / 2000
    found["sample_s"] = sample_s  # estimated from both ends
    found["tokens_per_s"] = args.batch_size * new / (sample_s + found["update_s"])
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decode_steps", type=positive, default=64, help="tokens timed at each end")
    parser.add_argument("--cudnn", action="store_true", help="leave cuDNN's attention on")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on whatever device there is")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("needs a GPU; --rehearse runs the script without one")

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def made(path, dtype, **_):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        return model, {"missing_keys": []}

    opd.AutoModelForCausalLM.from_pretrained = made
    print(
        torch.cuda.get_device_name() if device == "cuda" else device, "torch", torch.__version__, flush=True
    )
    start = time.perf_counter()
    for name in COMMANDS:
        measure(name, options)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
