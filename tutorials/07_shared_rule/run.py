"""OPSD with a rule that is the same for all prompts: which teacher works, and what else the training changes.

toy   Base models that follow the rule, to write the chain of thought, after the prompt `@|`. The arms differ
      in how the teacher's weights move, in the learning rate, or in the loss: SFT on the teacher's
      completions.
real  SmolLM2-135M-Instruct with a system prompt as the rule (rules.py): OPSD and SFT at equal steps, scored
      by the check of their rule. The controls: the check of the other rule, which is not trained, without and
      with that rule in the prompt, and trivia.
"""

import functools
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent), str(FOLDER)]

import figures  # noqa: E402
import lesson  # noqa: E402
import rules  # noqa: E402
import smollm2  # noqa: E402
import toy  # noqa: E402

import opsd  # noqa: E402

RULE, SEEDS, LIVE, REAL = "write_it_out", (0, 1, 2), {"teacher_mode": "live"}, ("OPSD", "SFT")
TOY = {"frozen": {}, "SFT": {}, "EMA": {"teacher_mode": "ema", "ema_decay": 0.95}, "live": LIVE}
TOY |= {"live_1e-4": {**LIVE, "lr": 1e-4}, "live_3e-5": {**LIVE, "lr": 3e-5, "steps": 300}}
FULL = {"batch_size": 32, "steps": 100, "max_new_tokens": 40, "eval_every": 25}


def base(seed, smoke):
    steps = 3 if smoke else 1000
    return lesson.kept(f"rule_{RULE}_{seed}_{steps}", lambda: toy.pretrain(toy.told, seed, steps), toy.told)


def toy_run(arm, seed, smoke):
    """Rows of one run of opsd.py. score: exact probability of the whole right chain."""
    start, rows = base(seed, smoke), toy.rows(4 if smoke else 256, True, "A", seed)
    args = {"student": start, "pi": "system", "pi_template": "{privileged}|{prompt}", "seed": seed}
    args |= {"data": lesson.kept_rows("rule_train", toy.rows(5000, seed=seed)), "loss": "reverse_kl"}
    args |= {"eval_data": lesson.kept_rows("rule_held_out", rows[:128]), "lr": 3e-4}
    args |= FULL | TOY[arm] | ({"batch_size": 4, "steps": 1, "max_new_tokens": 12} if smoke else {})
    at, ruled = {"rule": RULE, "arm": arm, "seed": seed}, [{**x, "prompt": f"@|{x['prompt']}"} for x in rows]
    with lesson.distilled(opsd, **args, sft_steps=args["steps"] * (arm == "SFT")) as (log, final):
        ends = []
        for who, path, asked in (("before", start, rows), ("prompted", start, ruled), ("after", final, rows)):
            text = lesson.answered(path, asked[:1], (seed,), 1, args["max_new_tokens"])[0]["text"]
            ends.append({**at, "who": who, "score": toy.accuracy(lesson.load(path)[1], asked), "text": text})
    ends[-1] |= {"drift": log[-1].get("teacher_drift", 0.0), "teacher": log[-1]["eval_with_pi_accuracy"]}
    return ends + [{**at, "step": x["step"], "accuracy": x["eval_accuracy"]} for x in log if "eval_len" in x]


def real_run(rule, arm, seed, smoke):
    """Rows of one run of opsd.py on SmolLM2; arm "none": the initial model, without and with the rule."""
    at, start = {"rule": rule, "arm": arm, "seed": seed}, str(rules.TEACHER)
    if arm == "none":
        look = functools.partial(rules.measured, start, rule, seed, smoke)
        return [{**at, "who": who, "step": 0, **look(who == "prompted")} for who in ("before", "prompted")]
    args = {"student": start, "pi": "system", "loss": "reverse_kl", "lr": 1e-4, "seed": seed}
    args |= {"data": lesson.kept_rows("trivia", rules.trivia(rule)[rules.HELD_OUT :]), "eval_every": 0}
    args |= {"steps": 1 if smoke else 12, "batch_size": 1 if smoke else 4, "warmup_steps": 2}
    args |= {"temperature": rules.TEMPERATURE, "max_new_tokens": 2 if smoke else rules.NEW_TOKENS}
    with lesson.distilled(opsd, **args, sft_steps=args["steps"] * (arm == "SFT")) as (_, final):
        found = rules.measured(final, rule, seed, smoke)
        found["other_prompted"] = rules.prompted_share(final, rules.OTHER[rule], seed, smoke)
        return [{**at, "who": "after", "step": args["steps"], **found}]


def run_toy(smoke):
    jobs = [(seed, smoke) for seed in SEEDS[: 1 if smoke else 3]]
    lesson.in_parallel(base, jobs, "base models")
    jobs = [(arm, *job) for job in jobs for arm in TOY]
    return sum(lesson.in_parallel(toy_run, jobs, "toy"), [])


def run_real(smoke):
    rules.need_packages()
    smollm2.build(rules.SMOL)
    jobs = [(rule, seed, smoke) for seed in SEEDS for rule in rules.SYSTEM][: 1 if smoke else 6]
    jobs = [(job[0], arm, *job[1:]) for job in jobs for arm in ("none", *REAL)[: 2 if smoke else 3]]
    return sum(lesson.in_parallel(real_run, jobs, "real model"), [])


if __name__ == "__main__":
    lesson.main(__file__, {"real": run_real, "toy": run_toy}, figures.plot, figures.tables)
