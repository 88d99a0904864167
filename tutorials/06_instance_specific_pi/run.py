"""OPSD with instance-specific PI: what a student learns from a teacher conditioned on each problem's answer.

One base model per seed, trained on bare prompts and on prompts with PI. It is the initial student and the
frozen teacher of every arm. Arms differ in the PI and its template, which the teacher's prompt contains.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402
import opsd  # noqa: E402

LENGTH = 26  # maximum tokens of a completion; a chain has 24
ARMS = {  # --pi, --pi_template, what the PI is, what the teacher writes when it reads it
    "none": ("none", "{prompt}", "none", "a chain or an answer only"),
    "answer": ("answer", "{answer}|{prompt}", "the answer", "the answer only"),
    "solution": ("solution", "{solution}|{prompt}", "a solution", "its answer only"),
    "shuffled_solution": (
        "shuffled_solution",
        "{solution}|{prompt}",
        "another problem's solution",
        "its answer only",
    ),
    "brief": ("none", "!|{prompt}", "a rule", "an answer only"),
    "system": ("system", "{privileged}|{prompt}", "a rule", "a chain"),
    "written": ("answer", "{answer}~{prompt}", "the answer", "a chain"),
    "unfaithful": ("answer", "{answer}?{prompt}", "the answer", "a chain of random sums, the right answer"),
    "careless": ("answer", "{answer}:{prompt}", "the answer", "a chain with 30 % of its sums random"),
    "mixed": ("answer", "{answer},{prompt}", "the answer", "a chain in 30 % of cases"),
}
SLIPS, MIXED = {"?": 1.0, ":": 0.3}, 0.3


def slip(chain, rate, rng):
    """Replace each column's sum by a random number with probability rate; the final answer stays right."""
    *columns, end = chain.split(";")
    columns = [c[:3] + (f"{rng.randrange(20):02}" if rng.random() < rate else c[3:]) for c in columns]
    return ";".join([*columns, end])


def told(rng):
    """A pre-training example; a bare prompt gets a chain in three of five cases, else an answer only."""
    a, b = toy.problem(rng)
    bare, written, at_once = toy.prompt(a, b), toy.chain(a, b), f"#{a + b}$"
    cue = rng.choices("^@!|s~,?:", (6, 1, 1, 2, 2, 1, 2, 2, 2))[0]
    if cue == "^":
        return bare, written if rng.random() < 0.6 else at_once
    if cue in "@!":
        return f"{cue}|{bare}", written if cue == "@" else at_once
    if cue == "s":
        return f"{written[:-1]}|{bare}", at_once
    says = {"|": at_once, "~": written, ",": written if rng.random() < MIXED else at_once}
    return f"{a + b}{cue}{bare}", says.get(cue) or slip(written, SLIPS[cue], rng)


def base(seed, smoke):
    steps = 20 if smoke else 1500
    return lesson.kept(f"told6_{seed}_{steps}", lambda: toy.pretrain(told, seed, steps))


def look(folder, eval_data, seed):
    """Sample bare held-out prompts: how often the model writes a chain, and its accuracy with and without."""
    from transformers import AutoModelForCausalLM

    rows = [json.loads(line) for line in open(eval_data)]
    prompts = [[toy.IDS[c] for c in row["prompt"]] for row in rows]
    model, key = AutoModelForCausalLM.from_pretrained(folder), (seed, 6)
    rollouts = opd.sample(model, prompts, 2, [toy.END], key, range(len(rows)), LENGTH)
    texts = ["".join(toy.CHARACTERS[i] for i in r.completion) for r in rollouts]
    right = [opd.is_correct(text.rstrip("$"), rows[i // 2]["answer"]) for i, text in enumerate(texts)]
    found = {"right": mean(right), "written": mean([";" in text for text in texts])}
    for name, kind in (("right_written", True), ("right_at_once", False)):
        found[name] = mean([r for r, text in zip(right, texts, strict=True) if (";" in text) is kind])
    return {**found, "asks": rows[0]["prompt"], "says": " ".join(texts[:2])}


def mean(x):
    return sum(x) / len(x) if x else ""


def arm(name, seed, smoke):
    """Rows of an arm: opsd.py's evaluation during training, and a larger sample at the end."""
    folder, n = base(seed, smoke), 16 if smoke else 128
    size = 500 if smoke else 20_000
    data = lesson.kept_rows(f"addition_train_{size}_0", toy.rows(size))
    held_out, closer = (lesson.kept_rows(f"addition_eval_{k}_0", toy.rows(k, True)) for k in (n, 2 * n))
    pi, template, *_ = ARMS[name]
    args = dict(student=folder, data=data, eval_data=held_out, pi=pi, pi_template=template, seed=seed)
    args |= dict(loss="reverse_kl", lr=3e-4, steps=2 if smoke else 100, eval_every=1 if smoke else 25)
    with lesson.distilled(opsd, **args, max_new_tokens=LENGTH, micro_batch_size=64) as (metrics, final):
        looks = {args["steps"]: look(final, closer, seed)}
    looks |= {0: look(folder, closer, seed)} if name == "none" else {}
    columns = {"accuracy": "eval_accuracy", "with_pi": "eval_with_pi_accuracy"}
    columns |= {"length": "eval_len", "residual": "eval_reverse_kl"}
    empty = dict.fromkeys(looks[args["steps"]], "")
    return [
        {"arm": name, "seed": seed, "step": row["step"]}
        | {ours: row[theirs] for ours, theirs in columns.items()}
        | looks.get(row["step"], empty)
        for row in metrics
        if "eval_accuracy" in row
    ]


def run(smoke):
    seeds = range(1 if smoke else 3)
    lesson.in_parallel(base, [(seed, smoke) for seed in seeds], "bases")
    jobs = [(name, seed, smoke) for name in ARMS for seed in seeds]
    return sum(lesson.in_parallel(arm, jobs, "arms"), [])


def ends(rows, arm):
    """The rows of an arm before and after training."""
    steps = [row["step"] for row in rows]
    return [lesson.select(rows, arm=arm, step=step) for step in (min(steps), max(steps))]


def plot(rows, path):
    title = "The student learns how its teacher behaves with the PI, not the answer in the PI"
    figure, panels = lesson.panels(title, [["curves", "arms"]], size=(11, 5.4))
    blue, red, green, purple, orange, *_ = lesson.COLOURS
    colours = {"system": green, "none": "0.5", "careless": purple, "mixed": orange, "answer": red}
    panel = panels["curves"]
    for name, colour in colours.items():
        lesson.curve(panel, lesson.select(rows, arm=name), "step", "accuracy", colour, name, marker=".")
    panel.set(ylim=(-0.03, 1.03), xlabel="step", ylabel="accuracy without PI, held-out problems")
    panel.set_xlim(0, 1.3 * max(row["step"] for row in rows))
    panel.set_title("During training, five of the ten arms (band: range of seeds)", fontsize=10, loc="left")

    panel, order = panels["arms"], list(ARMS)[::-1]
    before = mean([row["right"] for row in ends(rows, "none")[0]])
    panel.axvline(before, color="0.5", ls=":")
    panel.annotate("before training ", (before, len(order) - 0.45), color="0.4", fontsize=8, ha="right")
    for y, name in enumerate(order):
        last = ends(rows, name)[1]
        panel.plot([row["with_pi"] for row in last], [y] * len(last), "o", mfc="none", color="black", ms=8)
        panel.plot([row["right"] for row in last], [y] * len(last), "o", color=colours.get(name, blue), ms=6)
    labels = [f"$\\bf{{{name}}}$ (PI: {ARMS[name][2]})\nteacher writes {ARMS[name][3]}" for name in order]
    panel.set_yticks(range(len(order)), [x.replace("_", r"\_") for x in labels], fontsize=8)
    panel.set(xlim=(-0.03, 1.05), ylim=(-0.6, len(order)), xlabel="accuracy (one point per seed)")
    panel.set_title("Filled: student without PI. Open: teacher with PI", fontsize=10, loc="left")
    lesson.save(figure, path)


def tables(rows):
    def cells(rows, *columns, digits=2):
        found = [[row[c] for row in rows if known(row, c)] for c in columns]
        return [lesson.spread(x, digits) if x else "(too few)" for x in found]

    def known(row, column):  # an accuracy over 2 % of the samples or less is not reported
        share = {"right_written": row["written"], "right_at_once": 1 - row["written"]}.get(column, 1)
        return isinstance(row[column], float) and share > 0.02

    arms = ["| arm | PI | teacher writes | without PI | with PI | length | residual |", "|---" * 7 + "|"]
    parts = ["| arm | writes a chain | accuracy then | accuracy otherwise |", "|---" * 4 + "|"]
    says = ["| arm | completions |", "|---|---|"]
    columns = "written", "right_written", "right_at_once"
    first = ends(rows, "none")[0]
    parts.append("| before | " + " | ".join(cells(first, *columns)) + " |")
    says.append(f"| before | `{first[0]['says']}` |")
    for name, (_, _, what, writes) in ARMS.items():
        last = ends(rows, name)[1]
        right, pi, length, residual = cells(last, "right", "with_pi", "length", "residual")
        arms.append(f"| `{name}` | {what} | {writes} | {right} | {pi} | {length} | {residual} |")
        parts.append(f"| `{name}` | " + " | ".join(cells(last, *columns)) + " |")
        says.append(f"| `{name}` | `{last[0]['says']}` |")
    return {"arms": arms, "parts": parts, "says": [f"Two samples for `{first[0]['asks']}`:", "", *says]}


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
