"""The arms of this chapter: one run of opsd.py each, on the toy or on SmolLM2. run.py starts them."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import toy  # noqa: E402

import opsd  # noqa: E402

# What the teacher reads beside the prompt: {answer} is that of the problem, {other} that of another problem.
TOY = {"brief": "!|", "system": "@|", "answer": "{answer}|", "written": "{answer}~", "shuffled": "{other}|"}
TOY |= {"pg_gamma_0": TOY["answer"], "pg_gamma_1": TOY["answer"]}
MORE = {f"pg_gamma_{x}": {"loss": "pg", "gamma": float(x)} for x in (0, 1)}  # the other arms: reverse_kl
REAL = {
    "answer": "The answer is {answer}.",
    "shuffled": "The answer is {other}.",
    "rule": "Answer in French.",
}
RATES = {"answer": (1e-4, 2e-5), "shuffled": (2e-5,), "rule": (1e-4,)}  # learning rates of the real part
TEMPLATE = {"toy": "{privileged}{prompt}", "real": "{prompt}\n\n{privileged}"}
CHAIN = {"^": 0.6, "@": 1, "!": 0, "|": 0, "~": 1}  # share of chains in pre-training: bare prompt, each PI
SMOL, SHORT, HELD_OUT, TEMPERATURE = lesson.ROOT / ".cache" / "smollm2", 120, 12, 0.7


def example(rng):
    """A pre-training example: with or without PI, a chain or the sum alone."""
    a, b = toy.problem(rng)
    mark = rng.choices("^@!|~", (6, 1, 1, 2, 2))[0]
    pi = {"^": "", "@": "@|", "!": "!|"}.get(mark, f"{a + b}{mark}")
    return pi + toy.prompt(a, b), toy.chain(a, b) if rng.random() < CHAIN[mark] else f"#{a + b}$"


def base(seed, smoke):
    """Path of the toy model that is the initial student and the frozen teacher of every arm."""
    steps = 10 if smoke else 1000
    return lesson.kept(f"pi_{seed}_{steps}", lambda: toy.pretrain(example, seed, steps), example, CHAIN)


def with_pi(rows, pi):
    """The rows with the column privileged; {other} is the next answer of the same kind that is different."""
    kinds = [row["answer"].lstrip("-").isdigit() for row in rows]
    found = []
    for i, row in enumerate(rows):
        order = [*range(i + 1, len(rows)), *range(i)]
        others = (rows[k]["answer"] for k in order if kinds[k] == kinds[i])
        other = next((x for x in others if x != row["answer"]), "none")
        found.append({**row, "privileged": pi.format(answer=row["answer"], other=other)})
    return found


def add_kl(part, found, rows, pi, student, teacher):
    """Add to each completion of lesson.answered the KL of each token to the teacher that reads the PI."""
    args = opsd.Args(pi="instruction", pi_template=TEMPLATE[part])
    (tokenizer, student), (_, teacher) = lesson.load(student), lesson.load(teacher)
    student.shares_prompts = teacher.shares_prompts = True  # completions of one prompt share its pass
    shown = with_pi(rows, pi)
    prompts = [opsd.encode_teacher_prompt(tokenizer, shown, i, args, 1000) for i in range(len(rows))]
    for some in (found[i : i + 16] for i in range(0, len(found), 16)):
        ids = [x["ids"] for x in some]
        log_p = lesson.log_probs(student, [x["rollout"].prompt for x in some], ids)  # [N,V]
        log_q = lesson.log_probs(teacher, [prompts[x["row"]] for x in some], ids)
        kls = (log_p.exp() * (log_p - log_q)).sum(-1).split([len(x) for x in ids])
        for x, kl in zip(some, kls, strict=True):
            x |= {"tokens": [tokenizer.decode([i]) for i in x["ids"]], "kl": kl.tolist()}
    return found


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def measured(part, model, teacher, rows, pi, found):
    """Columns of the CSV, of a model's completions without PI (from lesson.answered, not changed).

    kl is per token, kl_completion per completion.
    """
    found = add_kl(part, [dict(x) for x in found], rows, pi, model, teacher)
    row = {"accuracy": mean(x["right"] for x in found), "length": mean(len(x["ids"]) for x in found)}
    row |= {"kl": mean(y for x in found for y in x["kl"]), "kl_completion": mean(sum(x["kl"]) for x in found)}
    row["chain"] = mean(";" in x["text"] for x in found)
    return row | {"text": json.dumps([[x["tokens"], [round(y, 2) for y in x["kl"]]] for x in found[:8]])}


def toy_arm(arm, seed, smoke):
    """Rows of one run on the toy: opsd.py's evaluations, and at both ends samples."""
    folder, n, steps = base(seed, smoke), 16 if smoke else 256, 2 if smoke else 100
    train, held_out = toy.rows(40 * n), toy.rows(n, held_out=True)
    args = {"data": lesson.kept_rows(f"pi_{arm}_train", with_pi(train, TOY[arm]))}
    args |= {"eval_data": lesson.kept_rows(f"pi_{arm}_held_out", with_pi(held_out, TOY[arm]))}
    args |= {"student": folder, "seed": seed, "lr": 3e-4, "steps": steps, "eval_every": min(20, steps)}
    args |= {"pi": "instruction", "pi_template": TEMPLATE["toy"], "max_new_tokens": 26, "eval_samples": 2}
    args |= {"micro_batch_size": 64, "loss": "reverse_kl", **MORE.get(arm, {})}
    with lesson.distilled(opsd, **args) as (log, final):
        found = [(x, lesson.answered(x, held_out, (seed, 6), 1, 26)) for x in (folder, final)]
        old, new = (measured("toy", x, folder, held_out, TOY[arm], said) for x, said in found)
    rows = []
    for x in (x for x in log if "eval_len" in x):
        row = {"arm": arm, "seed": seed, "step": x["step"], **{0: old, steps: new}.get(x["step"], {})}
        row |= {
            "accuracy": x["eval_accuracy"],
            "with_pi": x["eval_with_pi_accuracy"],
            "length": x["eval_len"],
        }
        row |= {"kl": x["eval_reverse_kl"], "kl_completion": x["eval_reverse_kl"] * x["eval_len"]}
        rows.append(row)
    return rows


def real_rows():
    """Short prompts, which keep the steps short on a CPU -> rows to train on, held-out rows."""
    lines = [x for name in ("train", "eval") for x in (SMOL / f"{name}.jsonl").read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if len(row["prompt"][0]["content"]) <= SHORT]
    return rows[:-HELD_OUT], rows[-HELD_OUT:]


def real_settings(smoke):
    """Held-out rows, and the arguments that all runs on SmolLM2 have in common."""
    args = {"student": str(SMOL / "teacher"), "pi": "instruction", "pi_template": TEMPLATE["real"]}
    args |= {"loss": "reverse_kl", "warmup_steps": 2, "eval_every": 0, "temperature": TEMPERATURE}
    args |= {"steps": 8, "batch_size": 4, "samples_per_prompt": 2, "max_new_tokens": 24}
    tiny = {"steps": 1, "batch_size": 1, "samples_per_prompt": 1, "max_new_tokens": 4}
    return real_rows()[1][: 2 if smoke else HELD_OUT], args | (tiny if smoke else {})


def real_samples(path, rows, args, seed, n=None):
    """n completions of each row, by default as many as in training."""
    n = n or args["samples_per_prompt"]
    return lesson.answered(path, rows, (seed, 6), n, args["max_new_tokens"], TEMPERATURE)


def real_before(seed, smoke):
    """Columns of the initial model for each arm. with_pi: the accuracy of the teacher, which reads the PI."""
    (held_out, args), found = real_settings(smoke), {}
    said = real_samples(args["student"], held_out, args, seed)
    for arm, pi in REAL.items():
        row = measured("real", args["student"], args["student"], held_out, pi, said)
        shown = with_pi(held_out, pi)
        prompts = [opsd.teacher_prompt(None, shown, i, opsd.Args(**args))[0] for i in range(len(shown))]
        asked = [{**row, "prompt": prompt} for row, prompt in zip(shown, prompts, strict=True)]
        answers = real_samples(args["student"], asked, args, seed, 1)
        found[arm] = {"step": 0, **row, "with_pi": mean(x["right"] for x in answers)}
    return found


def real_after(arm, lr, seed, smoke):
    """Columns of SmolLM2 after one run of opsd.py."""
    held_out, args = real_settings(smoke)
    args["data"] = lesson.kept_rows(f"pi_real_{arm}", with_pi(real_rows()[0], REAL[arm]))
    with lesson.distilled(opsd, **args, lr=lr, seed=seed) as (_, final):
        said = real_samples(final, held_out, args, seed)
        row = measured("real", final, args["student"], held_out, REAL[arm], said)
    return {"step": args["steps"], **row}
