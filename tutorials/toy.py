"""The toy pair: two tiny models that add three-digit numbers with a written chain of thought.

A problem is `^345+678=`. The model writes the addition column by column, then `#`, the sum and `$`, its end
token. Every character is a token. There are three styles of chain, all correct, for the same prompt:

    A   58013;47112;36110;#1023$     per column, units first: both digits, carry IN, column sum with carry
    M   58113;47112;36110;#1023$     the same, but the third digit is the carry OUT
    B   36>09,47>11,58>13,#1023$     hundreds first: both digits > sum without carry; carries only at the end

The task resembles mathematics with chain of thought. The answer is hard to find without the intermediate
steps. Each step depends on earlier ones, so one error usually makes the answer wrong, and a model that is
right on 97 % of its tokens solves half of its problems. Answers are checked by a program, and held-out
problems are new. There are several correct styles, so an accurate teacher can still be a bad teacher for a
student that writes in another style. The task is easier than mathematics: all chains of a style have about
the same length, and hardly any token is a free choice.

    python tutorials/toy.py      # build both models and the data; opd.py does this when it needs them

Student and teacher share one recipe and differ in seed: two Llama layers of width 64, 0.14 M parameters,
trained on style A. The student's training stops early, when about half of its samples are correct.
"""

import json
import math
import os
import random
import shutil
import time
import zlib
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Includes characters that no chain uses, for the prompts that some tutorials invent.
CHARACTERS = ["<pad>", "$", *"^0123456789+=#;>,|~:@?!_abcdefghij"]
IDS = {character: i for i, character in enumerate(CHARACTERS)}
PAD, END = IDS["<pad>"], IDS["$"]
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "toy"

# ------------------------------------------------------------------------------------------------------- task


def is_held_out(a, b):
    """Whether a problem is used for evaluation only: one in twenty, by a fixed hash."""
    return zlib.crc32(f"{a}+{b}".encode()) % 20 == 0


def problem(rng, held_out=False):
    """Draw two three-digit numbers, from the training problems or from the held-out ones."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if is_held_out(a, b) == held_out:
            return a, b


def prompt(a, b):
    return f"^{a}+{b}="


def chain(a, b, style="A"):
    """The completion in the given style: the columns, the sum, the end token."""
    if style not in ("A", "M", "B"):
        raise ValueError(f"style must be A, M or B, got {style!r}")
    columns, carry = [], 0
    for place in (1, 10, 100):
        x, y = a // place % 10, b // place % 10
        carry_in, carry = carry, (x + y + carry) // 10
        third = carry_in if style == "A" else carry
        columns.append(f"{x}{y}>{x + y:02}," if style == "B" else f"{x}{y}{third}{x + y + carry_in:02};")
    return "".join(columns[::-1] if style == "B" else columns) + f"#{a + b}$"


def rows(n, held_out=False, style="A", seed=0):
    """n different problems as rows: prompt, answer, solution (a chain without the end token), privileged."""
    rng, found = random.Random(seed), {}
    while len(found) < n:
        a, b = problem(rng, held_out)
        solution = chain(a, b, style).removesuffix("$")
        row = {"prompt": prompt(a, b), "answer": str(a + b), "solution": solution, "privileged": RULE}
        found[a, b] = row
    return list(found.values())


def styles(**weights):
    """A function that draws training examples: styles(A=1, B=1)(rng) -> prompt, completion, half in B."""

    def write(rng):
        a, b = problem(rng)
        return prompt(a, b), chain(a, b, rng.choices(list(weights), list(weights.values()))[0])

    return write


# The prompt of opsd.py's teacher in each --pi mode. RULE is a row's `privileged` text: "write the chain".
RULE = "@"
PI_TEMPLATES = {
    **dict.fromkeys(("system", "instruction"), "{privileged}|{prompt}"),
    "answer": "{answer}|{prompt}",
    **dict.fromkeys(("solution", "masked_solution", "shuffled_solution"), "{solution}|{prompt}"),
    "none": "{prompt}",
}


def told(rng):
    """A training example for the model of opsd.py, which must learn to use privileged information (PI).

    After the bare prompt the completion is the chain in three of five cases, else the sum alone, which the
    model mostly gets wrong. After the rule it is always the chain. After the answer or the solution it is
    the sum alone, which can be copied from the prompt without any reasoning.
    """
    a, b = problem(rng)
    bare, written_out, at_once = prompt(a, b), chain(a, b), f"#{a + b}$"
    kind = rng.choices(("bare", "rule", "answer", "solution"), (0.4, 0.2, 0.2, 0.2))[0]
    if kind == "bare":
        return bare, written_out if rng.random() < 0.6 else at_once
    if kind == "rule":
        return f"{RULE}|{bare}", written_out
    return f"{a + b if kind == 'answer' else written_out.removesuffix('$')}|{bare}", at_once


# ----------------------------------------------------------------------------------------------------- models


def make_tokenizer():
    """One token per character, no special tokens added, no normalisation; unknown characters are an error."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="unknown"))  # not in IDS, so that it raises
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", pad_token="<pad>")


def make_model(seed):
    """A Llama with random weights. At this width the wide initialisation halves the training time."""
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # sequences are short
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()  # there is no dropout that training mode would enable


def completion_logp(model, examples):
    """(prompt, completion) pairs -> log-probabilities of completion tokens [B,L], 0 elsewhere; N."""
    texts = [p + c for p, c in examples]
    width = max(map(len, texts))
    ids = torch.tensor([[IDS[x] for x in text] + [PAD] * (width - len(text)) for text in texts])  # [B,L+1]
    begin = torch.tensor([[len(p)] for p, _ in examples])  # [B,1]
    end = torch.tensor([[len(text)] for text in texts])  # [B,1]
    at = torch.arange(1, width)  # [L]: the predicted position
    mask = (begin <= at) & (at < end)  # [B,L]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B,L,V]
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[:, :, 0]  # [B,L]
    return logp.where(mask, 0), mask.sum().item()


@torch.no_grad()
def accuracy(model, data):
    """Expected share of rows whose solution the model samples at temperature 1, computed exactly.

    This is the mean probability of the whole reference chain, so no sampling is needed. Another chain with
    the right answer would not count; a model trained on one style hardly ever writes one.
    """
    logp, _ = completion_logp(model, [(row["prompt"], row["solution"] + "$") for row in data])
    return logp.sum(dim=1).exp().mean().item()


def pretrain(write, seed, steps=700, stop=None, lr=3e-3, batch_size=32, model=None, name="toy"):
    """Train a new model, or the given one, by cross-entropy on examples drawn by write(rng) -> model.

    Warm-up and cosine schedule, one batch of new examples per step. Because they are new, the probability of
    whole completions before the update is the accuracy on unseen problems: when its mean over the last ten
    batches reaches `stop`, training ends early.
    """
    model, rng, recent = model or make_model(seed), random.Random(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.0)
    bar = tqdm(range(steps), desc=name, unit="step", leave=False)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        logp, tokens = completion_logp(model, [write(rng) for _ in range(batch_size)])
        recent = [*recent[-9:], logp.detach().sum(dim=1).exp().mean().item()]
        bar.set_postfix(right=f"{sum(recent) / len(recent):.2f}", refresh=False)
        if stop is not None and len(recent) == 10 and sum(recent) / 10 >= stop:
            break
        optimizer.zero_grad()
        (-logp.sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


# ------------------------------------------------------------------------------------------------------ build


def put_in_place(path, write):
    """Call write with a temporary path, then rename it: whatever has its final name is complete."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        os.replace(aside, path)
    except OSError:
        if not path.exists():  # otherwise another process was faster and made the same
            raise
    finally:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)


def save_model(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_rows(data, file):
    file.write_text("".join(json.dumps(row) + "\n" for row in data))


def build(task="opd", folder=None, seed=0, steps=None, stop=0.45, n_train=20_000, n_eval=256):
    """Build a task's missing models and data -> their paths by name.

    task: "opd" has student, teacher, data, eval_data; "opsd" has no teacher. To rebuild, delete the folder.
    One thread: such small models gain nothing from a second, and the weights do not depend on the core count.
    """
    if task not in ("opd", "opsd"):
        raise ValueError(f"task must be opd or opsd, got {task!r}")
    folder, begin, threads = (
        Path(folder or CACHE / f"{task}_{seed}"),
        time.perf_counter(),
        torch.get_num_threads(),
    )

    def model(name, *recipe):
        return folder / name, lambda to: save_model(pretrain(*recipe, name=f"toy {task} {name}"), to)

    def data(name, n, held_out):
        return folder / name, lambda to: save_rows(rows(n, held_out, seed=seed), to)

    parts = {"data": data("train.jsonl", n_train, False), "eval_data": data("eval.jsonl", n_eval, True)}
    if task == "opd":
        parts["student"] = model("student", styles(A=1), seed, steps or 700, stop)
        parts["teacher"] = model("teacher", styles(A=1), seed + 1_000_000, steps or 700)
    else:
        parts["student"] = model("student", told, seed, steps or 1000)
    missing = [name for name, (path, _) in parts.items() if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        for name in missing:
            put_in_place(*parts[name])
    finally:
        torch.set_num_threads(threads)
    if missing:
        print(f"toy: made {', '.join(missing)} in {folder}, {time.perf_counter() - begin:.0f} s")
    return {name: str(path) for name, (path, _) in parts.items()}


if __name__ == "__main__":
    build()
