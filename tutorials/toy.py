"""The toy pair: two tiny models that add three-digit numbers with a written chain of thought.

A problem is `^345+678=`. The model writes the addition column by column, then `#`, the sum and `$`, its end
token. Every character is a token. Three styles of chain, all right, all for the same prompt:

    A   58013;47112;36110;#1023$     per column, units first: both digits, carry IN, column sum with carry
    M   58113;47112;36110;#1023$     the same, but the third digit is the carry OUT
    B   36>09,47>11,58>13,#1023$     hundreds first: both digits > their bare sum; carries only at the end

Why it is a fair miniature of mathematics with chain of thought: the answer can hardly be had without the
intermediate steps; each step depends on those before it, so one slip ruins the answer, and a model that is
right in 97 % of its tokens is right in half of its problems; answers are checked by machine, and held-out
problems are new; and there are several good styles, so that a teacher can be excellent and still be a bad
teacher for a student that writes another one. It is easier than mathematics in that all chains of a style are
about equally long, and hardly a token is a matter of taste.

    python tutorials/toy.py      # build both models and the data now; opd.py does it when it needs them

Student and teacher are one recipe from two initialisations: two Llama layers of width 64, 0.14 M parameters,
trained on style A. The student stops when about half of what it samples is right, the teacher at the end.
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

# Beyond what the chains need, there are characters for tutorials to invent prompts with.
CHARACTERS = ["<pad>", "$", *"^0123456789+=#;>,|~:@?!_abcdefghij"]
IDS = {character: i for i, character in enumerate(CHARACTERS)}
PAD, END = IDS["<pad>"], IDS["$"]
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "toy"

# ------------------------------------------------------------------------------------------------------- task


def is_held_out(a, b):
    """Whether a problem is for evaluation only: one in twenty, by a fixed hash."""
    return zlib.crc32(f"{a}+{b}".encode()) % 20 == 0


def problem(rng, held_out=False):
    """Two three-digit numbers, from the training problems or from the held-out ones."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if is_held_out(a, b) == held_out:
            return a, b


def prompt(a, b):
    return f"^{a}+{b}="


def chain(a, b, style="A"):
    """The completion in a style: the columns, the sum, the end token."""
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
    """n different problems as data: prompt, answer, solution (a chain without the end token), privileged."""
    rng, found = random.Random(seed), {}
    while len(found) < n:
        a, b = problem(rng, held_out)
        solution = chain(a, b, style).removesuffix("$")
        row = {"prompt": prompt(a, b), "answer": str(a + b), "solution": solution, "privileged": RULE}
        found[a, b] = row
    return list(found.values())


def styles(**weights):
    """A writer of training examples: styles(A=1, B=1)(rng) -> prompt, completion, half of them in style B."""

    def write(rng):
        a, b = problem(rng)
        return prompt(a, b), chain(a, b, rng.choices(list(weights), list(weights.values()))[0])

    return write


# What the teacher of opsd.py reads in each mode; RULE is a row's `privileged` text and means "write it out".
RULE = "@"
PI_TEMPLATES = {
    **dict.fromkeys(("system", "instruction"), "{privileged}|{prompt}"),
    "answer": "{answer}|{prompt}",
    **dict.fromkeys(("solution", "masked_solution", "shuffled_solution"), "{solution}|{prompt}"),
    "none": "{prompt}",
}


def told(rng):
    """A training example for the model of opsd.py, which knows what to make of being told more.

    The bare prompt is written out in three of five cases, else answered at once, which goes wrong more often
    than not. With the rule before it, it is written out; with its answer or its solution before it, that is
    read off and answered at once, as a model does that need not think.
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
    """One token a character, nothing added, nothing normalised; an unknown character is an error."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="unknown"))  # not in IDS: that is what raises
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", pad_token="<pad>")


def make_model(seed):
    """A Llama with random weights. The wide initialisation, for this width, halves the time to learn."""
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # nothing to tell apart is far away
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()  # there is no dropout to switch on


def completion_logp(model, examples):
    """Log-probabilities of the completion tokens of (prompt, completion) pairs, 0 elsewhere: [B,L], and N."""
    texts = [p + c for p, c in examples]
    width = max(map(len, texts))
    ids = torch.tensor([[IDS[x] for x in text] + [PAD] * (width - len(text)) for text in texts])  # [B,L+1]
    begin = torch.tensor([[len(p)] for p, _ in examples])  # [B,1]
    end = torch.tensor([[len(text)] for text in texts])  # [B,1]
    at = torch.arange(1, width)  # [L]: the position that is predicted
    mask = (begin <= at) & (at < end)  # [B,L]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B,L,V]
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[:, :, 0]  # [B,L]
    return logp.where(mask, 0), mask.sum().item()


@torch.no_grad()
def accuracy(model, data):
    """Share of rows whose solution the model writes, sampling at temperature 1: the expectation, exactly.

    It is the mean probability of the whole reference chain, so that nothing need be sampled. Another chain
    to the right answer would not count; a model trained on one style hardly ever writes one.
    """
    logp, _ = completion_logp(model, [(row["prompt"], row["solution"] + "$") for row in data])
    return logp.sum(dim=1).exp().mean().item()


def pretrain(write, seed, steps=700, stop=None, lr=3e-3, batch_size=32, model=None, name="toy"):
    """Teach a new model, or the one given, by cross-entropy on the completions write(rng) shows -> model.

    Warm-up and cosine, one batch of new examples a step. As they are new, the probability that the model
    gives to whole completions, before it learns from them, is its accuracy on unseen problems: where that is
    `stop` on average over the last ten batches, training ends early.
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
    """write(a name beside the path), then rename that: what has its final name is whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        os.replace(aside, path)
    except OSError:
        if not path.exists():  # else another process was faster, and made the same
            raise
    finally:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)


def save_model(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_rows(data, file):
    file.write_text("".join(json.dumps(row) + "\n" for row in data))


def build(task="opd", folder=None, seed=0, steps=None, stop=0.45, n_train=20_000, n_eval=256):
    """Make what is missing of a task's models and data, once -> their paths by name.

    task: "opd" has student, teacher, data, eval_data; "opsd" has no teacher. To build anew, remove it.
    One thread: models this small gain nothing by a second one, and the weights do not depend on the cores.
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
