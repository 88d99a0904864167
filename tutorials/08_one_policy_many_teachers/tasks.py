"""The two tasks of this chapter: a toy with ten rules, and a chat model with three system prompts.

toy_task and real_task return the model's folder, training rows, new rows, and arguments for opsd.py. A
training row has the PI of one teacher (`privileged`), a new row the prompts of all m teachers.

toy    the prompt `^347_=` asks for (347 + r) mod 10, twice: `8#8$`. The teacher's prompt names the rule r
       (`a|^347_=`), the student's does not. The character before `=` means nothing to the base model.
real   SmolLM2-135M-Instruct; r is one of m system prompts, drawn for each training example.
"""

import json
import random

import lesson  # run.py puts its folder on sys.path
import toy

# NOISE: probability that a digit is random; without it the floor is infinite. SHORT: characters of a prompt.
RULES, NOISE, SHORT = "abcdefghij", 0.1, 120
HELD_OUT = sorted(random.Random(0).sample(range(1000), 100))  # in no training data
SEEN = sorted(set(range(1000)) - set(HELD_OUT))
SMOL = lesson.ROOT / ".cache" / "smollm2"
SYSTEM = {  # the first m are the real model's rules
    "French": "You are a French assistant. You only speak French. Réponds en français.",
    "pirate": "You are Captain Blackbeard, a fearsome pirate. You always speak in pirate slang, with words "
    "such as arrr, matey, aye, ye, treasure and ship.",
    "short": "Answer with a single short sentence. Do not explain.",
}


def write(rng):
    """A pre-training example: the prompt names the rule two times in three; both digits follow one rule."""
    x, rule, slot = rng.choice(SEEN), rng.choice(RULES), rng.choice("_" + RULES)
    digit = str((x + 3 * RULES.index(rule) + 1) % 10)
    first, second = (rng.choice("0123456789") if rng.random() < NOISE else digit for _ in "12")
    return ("" if rng.random() < 1 / 3 else f"{rule}|") + f"^{x:03}{slot}=", f"{first}#{second}$"


def base(seed, smoke):
    steps, recipe = 20 if smoke else 1000, (write, RULES, NOISE, SEEN)
    return lesson.kept(f"rules_{seed}_{steps}", lambda: toy.pretrain(write, seed, steps), *recipe)


def toy_rows(arm, m, xs):
    """Rows for the numbers xs. shown: the student's prompt names r; hashed: r is a function of the prompt."""
    for x in xs:
        rules = random.Random(x).choice(RULES[:m]) if arm == "hashed" else RULES[:m]
        for slot, named in zip(rules, rules, strict=True) if arm == "shown" else [("_", rules)]:
            yield {"prompt": f"^{x:03}{slot}=", "teachers": [f"{r}|^{x:03}{slot}=" for r in named]}


def toy_task(arm, m, seed, smoke):
    rows = toy_rows(arm, m, SEEN)
    train = [{"prompt": row["prompt"], "privileged": prompt[0]} for row in rows for prompt in row["teachers"]]
    new = list(toy_rows(arm, m, HELD_OUT[: 8 if smoke else 100]))
    args = dict(pi_template="{privileged}|{prompt}", max_new_tokens=4, micro_batch_size=64)
    return base(seed, smoke), train, new, args | dict(steps=10 if smoke else 300)


def real_task(arm, m, seed, smoke):
    train, new = ([*map(json.loads, (SMOL / f"{x}.jsonl").open())] for x in ("train", "eval"))
    train, new = ([row for row in x if len(row["prompt"][0]["content"]) <= SHORT] for x in (train, new))
    systems, rng = list(SYSTEM.values())[:m], random.Random(seed)
    for row in new:
        row["teachers"] = [[{"role": "system", "content": text}, *row["prompt"]] for text in systems]
    train = [{**row, "privileged": rng.choice(systems)} for row in train]
    args = dict(batch_size=4, samples_per_prompt=2, max_new_tokens=12, steps=12, warmup_steps=2)
    args |= dict(batch_size=1, max_new_tokens=4, steps=1) if smoke else {}
    return str(SMOL / "teacher"), train, new[: 2 if smoke else 16], args
