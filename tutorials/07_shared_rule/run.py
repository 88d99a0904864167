"""OPSD with a rule shared by all prompts: a toy, and SmolLM2-135M-Instruct with a system prompt.

In the toy part the rule is to write a chain or to prefer one of two styles, and three kinds of teacher are
compared: frozen, EMA and live. In the real part a chat model is to answer in French, or briefly.
"""

import contextlib
import importlib.util
import io
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import smollm2  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402
import opsd  # noqa: E402

COLUMNS = "part rule teacher who seed step score accuracy length kl drift text".split()
MODES = {"frozen": {}, "ema": {"teacher_mode": "ema", "ema_decay": 0.95}, "live": {"teacher_mode": "live"}}
# A system prompt, and a pattern that answers which follow it contain.
RULES = {
    "french": (
        "You are a French assistant. You only speak French. Réponds en français.",
        r"\b(le|la|les|un|une|des|du|de|et|est|sont|en|au|aux|que|qui|dans|pour|par|avec|ce|cette|il|elle|je|vous|"
        r"nous|ne|pas|où|sa|ses|leur|être|été|votre)\b",
    ),
    "short": ("Answer with a single short sentence. Do not explain.", None),
    "pirate": (
        "You are Captain Blackbeard, a fearsome pirate. You always speak in pirate slang, with words such as "
        "arrr, matey, aye, ye, treasure and ship.",
        r"\b(arr+|matey|aye|ahoy|ye|treasure|ship|captain|pirates?)\b",
    ),
    "cat": (
        "You are a cat. You love fish, naps and mice, and you say meow in every sentence.",
        r"\b(meow|purr|fish|naps?|mice|mouse)",
    ),
    "fairy_tale": (
        'You tell fairy tales to children. Begin every answer with "Once upon a time".',
        r"\bonce upon a time\b",
    ),
}
TRAINED = ("french", "short")
NEW_TOKENS, HELD_OUT, TEMPERATURE, SHOWN = 24, 48, 0.7, 4


def row(**values):
    return {**dict.fromkeys(COLUMNS, ""), **values}


# ------------------------------------------------------------------------------------------------------- toy


def either_style(rng):
    """A training example: style A or B at random after a bare prompt, always B after the rule."""
    a, b = toy.problem(rng)
    ruled = rng.random() < 0.4
    style = "B" if ruled else rng.choice("AB")
    return (f"{toy.RULE}|" if ruled else "") + toy.prompt(a, b), toy.chain(a, b, style)


WRITERS = {"write_it_out": toy.told, "prefer_style_B": either_style}


def base(rule, seed, smoke):
    steps = 20 if smoke else 1000
    return lesson.kept(
        f"{rule}_{seed}_{steps}", lambda: toy.pretrain(WRITERS[rule], seed, steps), WRITERS[rule]
    )


def toy_run(rule, mode, seed, smoke):
    """One run of opsd.py -> CSV rows. score: probability of the whole right chain in the rule's style."""
    n, style = 16 if smoke else 256, "A" if rule == "write_it_out" else "B"
    held_out = toy.rows(n, held_out=True, style=style, seed=seed)
    args = {"student": base(rule, seed, smoke), "seed": seed}
    args["data"] = lesson.kept_rows(f"rule_train_{seed}", toy.rows(5000, seed=seed))
    args["eval_data"] = lesson.kept_rows(f"rule_held_out_{style}_{n}_{seed}", held_out)
    args.update(
        pi="system", pi_template="{privileged}|{prompt}", loss="reverse_kl", lr=3e-4, max_new_tokens=40
    )
    args.update(steps=2 if smoke else 100, eval_every=25, batch_size=32, **MODES[mode])
    at = {"part": "toy", "rule": rule, "teacher": mode, "seed": seed}
    prompted = [{**x, "prompt": f"{toy.RULE}|{x['prompt']}"} for x in held_out]
    with lesson.distilled(opsd, **args) as (log, final):
        scores = {
            who: toy.accuracy(opd.load_model(folder, "student", torch.float32, "cpu")[1], asked)
            for who, folder, asked in (
                ("before", args["student"], held_out),
                ("prompted", args["student"], prompted),
                ("after", final, held_out),
            )
        }
    curve = [
        row(**at, step=r["step"], accuracy=r["eval_accuracy"], length=r["eval_len"], kl=r["eval_reverse_kl"])
        | {"drift": r.get("teacher_drift", "")}
        for r in log
        if "eval_accuracy" in r
    ]
    return curve + [row(**at, who=who, score=score) for who, score in scores.items()]


# ------------------------------------------------------------------------------------------------ real model


def real_model():
    with contextlib.redirect_stdout(io.StringIO()):
        return str(smollm2.build(lesson.ROOT / ".cache" / "smollm2")["teacher"])


def questions():
    """Short questions (trivia, small talk) from the chatterbot-corpus package, in a fixed random order."""
    import yaml

    folder = Path(importlib.util.find_spec("chatterbot_corpus").submodule_search_locations[0])
    found = set()
    for file in sorted((folder / "data" / "english").glob("*.yml")):
        if file.stem != "coding":  # answers to these are code, in which the rules cannot be detected
            talks = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
            found |= {str(talk[0]).strip() for talk in talks}
    found = sorted(text for text in found if 12 <= len(text) <= 100 and text.endswith("?"))
    random.Random(0).shuffle(found)
    return found


def follows(rule, text, ended):
    """Whether an answer follows the rule. french: a tenth of its words match; short: it ended within
    NEW_TOKENS; the other rules: at least one match."""
    if rule == "short":
        return ended
    found = len(re.findall(RULES[rule][1], text.lower()))
    return found >= (0.1 * len(text.split()) if rule == "french" else 1) and found > 0


def answers(folder, rule, prompted, n, new_tokens):
    """Sample answers to the n held-out questions, with or without the system prompt -> CSV columns."""
    model, _, tokenizer, stop_ids = opd.load_pair(folder, None, opd.Args(), torch.device("cpu"))
    system = [{"role": "system", "content": RULES[rule][0]}] if prompted else []
    talks = [[*system, {"role": "user", "content": text}] for text in questions()[:n]]
    prompts = [opd.encode_prompt(tokenizer, talk, 256) for talk in talks]
    rollouts = opd.sample(model, prompts, 1, stop_ids, (7,), range(n), new_tokens, TEMPERATURE, 1.0)
    texts = [tokenizer.decode(r.completion, skip_special_tokens=True) for r in rollouts]
    scores = [follows(rule, text, r.ended) for text, r in zip(texts, rollouts, strict=True)]
    shown = " // ".join(" ".join(text.split()) for text in texts[:SHOWN])
    length = sum(len(r.completion) for r in rollouts) / n
    return {"score": sum(scores) / n, "length": length, "text": shown}


def real_run(rule, seed, smoke):
    """One run of opsd.py on SmolLM2-135M-Instruct with the rule as system prompt of the teacher -> rows."""
    n, new_tokens = (2, 4) if smoke else (HELD_OUT, NEW_TOKENS)
    rows = [
        {"prompt": [{"role": "user", "content": text}], "answer": "", "privileged": RULES[rule][0]}
        for text in questions()
    ]
    args = {"student": real_model(), "pi": "system", "loss": "reverse_kl", "lr": 5e-5, "seed": seed}
    args["eval_data"] = lesson.kept_rows(f"chat_{rule}_held_out_{n}", rows[:n])
    args["data"] = lesson.kept_rows(f"chat_{rule}_train", rows[HELD_OUT:])
    args.update(steps=1 if smoke else 30, batch_size=2 if smoke else 8, micro_batch_size=8)
    args.update(max_new_tokens=new_tokens, temperature=TEMPERATURE, eval_every=0)  # 0: before and after only
    at = {"part": "real", "rule": rule, "teacher": "frozen", "seed": seed}
    with lesson.distilled(opsd, **args) as (log, final):
        after = answers(final, rule, False, n, new_tokens)
    kl = [row(**at, step=r["step"], kl=r["eval_reverse_kl"]) for r in log if "eval_len" in r]
    return kl + [row(**at, step=log[-1]["step"], who="after", **after)]


def untrained(rule, smoke):
    """Answers of the untrained model with and without the system prompt -> CSV rows."""
    n, new_tokens = (2, 4) if smoke else (HELD_OUT, NEW_TOKENS)
    at = {"part": "real", "rule": rule, "seed": 0, "step": 0}
    who = (("before", False), ("prompted", True))
    return [
        row(**at, who=name, **answers(real_model(), rule, prompted, n, new_tokens)) for name, prompted in who
    ]


# ------------------------------------------------------------------------------------------------------- run


def run(smoke):
    command = smollm2.missing_packages()
    if command or importlib.util.find_spec("chatterbot_corpus") is None:
        more = command or "pip install chatterbot-corpus==1.3.3 pyyaml"
        print(f"this chapter needs more packages: {more}", file=sys.stderr)
        sys.exit(2)
    seeds = (0,) if smoke else (0, 1, 2)
    rules = list(WRITERS)
    lesson.in_parallel(base, [(rule, seed, smoke) for rule in rules for seed in seeds], "toy bases")
    jobs = [(rule, mode, seed, smoke) for rule in rules for mode in MODES for seed in seeds]
    rows = sum(lesson.in_parallel(toy_run, jobs, "toy"), [])
    real_model()
    rules = ["french"] if smoke else list(RULES)
    rows += sum(lesson.in_parallel(untrained, [(rule, smoke) for rule in rules], "real model, untrained"), [])
    jobs = [("french", seed, smoke) for seed in seeds] + [("short", 0, smoke)] * (not smoke)
    return rows + sum(lesson.in_parallel(real_run, jobs, "real model"), [])


def scores(rows, who, **where):
    return [r["score"] for r in lesson.select(rows, who=who, **where)]


def plot(rows, path):
    figure, axes = lesson.panels(
        "A student learns a shared rule from a frozen or EMA teacher; a live one fails at this step size",
        [["curve", "toy", "real"]],
        (11, 3.8),
    )
    panel = axes["curve"]
    for colour, mode in zip(lesson.COLOURS, MODES, strict=False):
        runs = [r for r in lesson.select(rows, part="toy", rule="write_it_out", teacher=mode) if not r["who"]]
        lesson.curve(panel, runs, "step", "accuracy", colour, mode + "\n" * (mode == "live"))
    panel.set(xlabel="step", ylabel="accuracy without the rule", ylim=(0, 1.05), xlim=(0, 125))
    panel.set_title("toy, rule: write a chain", fontsize=9, loc="left")

    def dots(panel, x, where):
        grey, blue, red = "0.55", "#0072B2", "#D55E00"
        shown = (("before", "before", grey), ("after", "after", blue), ("prompted", "with rule\n", red))
        for dx, (who, label, colour) in zip((-0.2, 0, 0.2), shown, strict=True):
            ys = scores(rows, who, **where)
            panel.plot([x + dx] * len(ys), ys, "o", color=colour, ms=6, alpha=0.8)
            panel.text(x + dx, max(ys, default=0) + 0.04, label, ha="center", color=colour, fontsize=7)
        panel.set(ylim=(-0.05, 1.17))

    for x, mode in enumerate(MODES):
        dots(axes["toy"], x, {"part": "toy", "rule": "prefer_style_B", "teacher": mode})
    axes["toy"].set_xticks(range(3), list(MODES))
    axes["toy"].set_xlim(-0.5, 2.5)
    axes["toy"].set(ylabel="probability of the right chain in style B", xlabel="teacher")
    axes["toy"].set_title("toy, rule: prefer style B", fontsize=9, loc="left")
    for x, rule in enumerate(TRAINED):
        dots(axes["real"], x, {"part": "real", "rule": rule})
    axes["real"].set_xticks(range(len(TRAINED)), [f"'{rule}'" for rule in TRAINED])
    axes["real"].set_xlim(-0.5, len(TRAINED) - 0.5)
    axes["real"].set(ylabel="share of answers that follow the rule", xlabel="rule (system prompt)")
    axes["real"].set_title("SmolLM2-135M, frozen teacher", fontsize=9, loc="left")
    lesson.save(figure, path)


def tables(rows):
    toy_rows = lesson.select(rows, part="toy")
    toy_table = [
        "| rule | teacher | student before | student after | initial model with the rule | teacher drift |",
        "|---|---|---|---|---|---|",
    ]
    for rule in WRITERS:
        for mode in MODES:
            where = {"part": "toy", "rule": rule, "teacher": mode}
            cells = [lesson.spread(scores(rows, who, **where)) for who in ("before", "after", "prompted")]
            runs = [r for r in lesson.select(toy_rows, rule=rule, teacher=mode) if r["drift"] != ""]
            drift = [r["drift"] for r in runs if r["step"] == max(x["step"] for x in runs)]
            cells.append(lesson.spread(drift, 3) if drift else "0")
            toy_table.append(f"| {rule} | `{mode}` | " + " | ".join(cells) + " |")
    real = [
        "| rule | follows it before | after | teacher with the rule | KL to the teacher before | after |",
        "|---|---|---|---|---|---|",
    ]
    said = ["| | answers to four held-out questions, separated by // |", "|---|---|"]
    for rule in dict.fromkeys(r["rule"] for r in lesson.select(rows, part="real")):
        runs = lesson.select(rows, part="real", rule=rule)
        kl = [r for r in runs if r["kl"] != ""]
        ends = [
            [r["kl"] for r in kl if r["step"] == end] for end in (0, max((r["step"] for r in kl), default=0))
        ]
        cells = [scores(runs, "before"), scores(runs, "after"), scores(runs, "prompted"), *ends]
        cells = [lesson.spread(x) if len(x) > 1 else f"{x[0]:.2f}" if x else "not trained" for x in cells]
        real.append(f"| {rule} | " + " | ".join(cells) + " |")
        for r in runs:
            if r["who"] and r["seed"] == 0 and rule in TRAINED:
                who = "teacher with the rule" if r["who"] == "prompted" else r["who"]
                said.append(f"| {rule}, {who} | {r['text'].replace('|', '/')} |")
    return {"toy": toy_table, "real": real, "said": said}


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
