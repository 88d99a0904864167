"""On-policy distillation against SFT on the teacher's samples: by tokens, by compute, by chain position."""

import itertools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import toy  # noqa: E402

import opd  # noqa: E402

SEEDS, PROMPTS, EVERY, EXAMPLE = 3, (4000, 100), 25, "58013;47112;36110;#1023$"
# 125 steps of SFT cost as much as 100 of OPD. off-policy, the control: OPD's loss on the teacher's samples.
STEPS = {"OPD": 100, "SFT": 175, "off-policy": 100}
# Forward passes per trained token, for models of equal size: to sample it, to score it with the teacher, and
# to train on it (forward, and a backward that counts as two). SFT needs no score.
COST = {"OPD": 1 + 1 + 3, "SFT": 1 + 0 + 3, "off-policy": 1 + 1 + 3}
COLOUR = dict(zip(("OPD", "SFT", "off-policy"), lesson.COLOURS, strict=False), start="0.45")
TRAINED = [(arm, n) for n in PROMPTS for arm in ("SFT", "OPD")] + [("off-policy", PROMPTS[0])]
STYLES = {"clean": "-", "slipped": ":", "teacher": "--"}  # line style by kind of prefix
EMPTY = dict.fromkeys(
    "tokens cost accuracy prefixes position tokens_seen error kl teacher_entropy".split(), ""
)


def models(seed, smoke):
    """Paths of the student and the teacher."""
    recipes = ((seed, 0.45), (seed + 1_000_000, None))
    return [lesson.toy_model("A", s, 10 if smoke else 700, stop) for s, stop in recipes]


def data(n, held_out=False):
    return lesson.kept_rows(f"{'held_out' if held_out else 'train'}_{n}_seed_0", toy.rows(n, held_out))


@torch.no_grad()
def by_position(path, teacher_path, n):
    """How the student differs from the teacher at each position, on three kinds of prefix.

    teacher: sampled from the teacher; clean: from the student, no error so far; slipped: the student's, after
    its first error. error: 1 - p(the teacher's most likely token); kl: KL(p || q).
    """
    tokenizer, student = opd.load_model(path, "student", torch.float32, "cpu")
    teacher, found = opd.load_model(teacher_path, "teacher", torch.float32, "cpu")[1], []
    rows = [row for row in toy.rows(n, held_out=True) if int(row["answer"]) > 999]  # equally long chains
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    right = [tokenizer(row["solution"] + "$").input_ids for row in rows]
    for writer, kinds in ((teacher, ("teacher",)), (student, ("clean", "slipped"))):
        rollouts = opd.sample(writer, prompts, 1, [toy.END], (1,), range(len(rows)), 32)
        ys = [r.completion[: len(EXAMPLE)] for r in rollouts]
        hidden = [opd.completion_hidden(model, prompts, ys) for model in (student, teacher)]  # [N,D]
        log_p, log_q = (
            opd.project(m, h).log_softmax(-1) for m, h in zip((student, teacher), hidden, strict=True)
        )
        error = 1 - log_p.gather(-1, log_q.argmax(-1, keepdim=True)).exp()[:, 0]  # [N]
        kl, entropy = (log_p.exp() * (log_p - log_q)).sum(-1), -(log_q.exp() * log_q).sum(-1)  # [N]
        position = torch.tensor([t for y in ys for t in range(len(y))])  # [N]
        pairs = zip(ys, right, strict=True)
        slipped = torch.tensor([y[:t] != r[:t] for y, r in pairs for t in range(len(y))])
        for kind in kinds:
            for t in range(len(EXAMPLE)):
                here = (position == t) & ((kind == "teacher") | (slipped == (kind == "slipped")))
                if here.any():
                    means = {"error": error, "kl": kl, "teacher_entropy": entropy}
                    means = {name: x[here].mean().item() for name, x in means.items()}
                    found.append({"prefixes": kind, "position": t, "tokens_seen": here.sum().item(), **means})
    return found


def one(arm, prompts, seed, smoke):
    """Rows of a run: accuracy during training, then the final student by position; start: before training."""
    (student, teacher), n = models(seed, smoke), 20 if smoke else 500
    head, rows, tokens = {"arm": arm, "prompts": prompts, "seed": seed}, [], 0
    if arm == "start":
        return [{**head, "step": 0, **EMPTY, **row} for row in by_position(student, teacher, n)]
    steps = 2 if smoke else STEPS[arm]
    args = {"student": student, "teacher": teacher, "data": data(prompts), "loss": "reverse_kl", "lr": 3e-4}
    args |= {"eval_data": data(20 if smoke else 300, held_out=True), "eval_every": 1 if smoke else EVERY}
    args |= {"steps": steps, "batch_size": 32, "max_new_tokens": 32, "seed": seed}
    args |= {"SFT": {"sft_steps": steps}, "off-policy": {"lmbda": 0.0}}.get(arm, {})
    with lesson.distilled(opd, **args) as (history, final):
        for row in history:
            tokens += row.get("tokens", 0)
            if "eval_accuracy" in row:
                numbers = {"tokens": tokens, "cost": tokens * COST[arm], "accuracy": row["eval_accuracy"]}
                rows.append({**head, "step": row["step"], **EMPTY, **numbers})
        return rows + [{**head, "step": steps, **EMPTY, **row} for row in by_position(final, teacher, n)]


def run(smoke):
    seeds = range(1 if smoke else SEEDS)
    lesson.in_parallel(models, [(s, smoke) for s in seeds], "models")
    for n, held_out in ((4000, False), (100, False), (20 if smoke else 300, True)):
        data(n, held_out)
    jobs = [(*arm, s, smoke) for s in seeds for arm in (*TRAINED, ("start", 0))]
    found = lesson.in_parallel(one, jobs, "runs")
    return [row for rows in found for row in rows]


def per_seed(rows, column, **where):
    """Mean over tokens, for each seed."""
    chosen, found = lesson.select(rows, **where), []
    for seed in sorted({r["seed"] for r in chosen}):
        of_seed = lesson.select(chosen, seed=seed)
        found.append(
            sum(r[column] * r["tokens_seen"] for r in of_seed) / sum(r["tokens_seen"] for r in of_seed)
        )
    return found


def plot(rows, path):
    layout = [[*map(str, PROMPTS), "kinds"], ["chain"] * 3]
    title = "After an error SFT's error per token rises tenfold; full distributions reduce it on average"
    figure, panels = lesson.panels(title, layout, (11, 7))
    for n in PROMPTS:
        panel = panels[str(n)]
        for arm in STEPS:
            curve = [r for r in lesson.select(rows, arm=arm, prompts=n) if r["accuracy"] != ""]
            if curve:
                label = arm + "\n" * (arm == "off-policy")  # written above OPD's
                lesson.curve(panel, curve, "step", "accuracy", COLOUR[arm], label, marker="o", ms=3)
        panel.set_title(f"{n} prompts", loc="left", fontsize=10)
        panel.set(xlabel="steps of 32 completions", ylabel="accuracy on held-out problems", ylim=(0.3, 1))
    for i, (arm, n) in enumerate((("start", 0), ("SFT", 4000), ("off-policy", 4000), ("OPD", 4000))):
        for dx, kind, fill in ((-0.12, "clean", "full"), (0.12, "slipped", "none")):
            ys = per_seed(rows, "error", arm=arm, prompts=n, prefixes=kind)
            panels["kinds"].plot([i + dx] * len(ys), ys, "o", color=COLOUR[arm], fillstyle=fill)
    panels["kinds"].set_xticks(range(4), ["before", "SFT", "off-policy", "OPD"])
    panels["kinds"].set(ylabel="error per token (log scale)", yscale="log")
    panels["kinds"].set_title("Filled: no error yet; open: after an error", loc="left", fontsize=10)
    for arm, (kind, style) in itertools.product(("SFT", "OPD"), STYLES.items()):
        chosen = lesson.select(rows, arm=arm, prompts=4000, prefixes=kind)
        chosen = [r for r in chosen if r["tokens_seen"] >= 10]
        lesson.curve(panels["chain"], chosen, "position", "error", COLOUR[arm], ls=style)
    panels["chain"].set_xticks(range(len(EXAMPLE)), EXAMPLE)
    panels["chain"].set(xlabel="position in the chain (tokens of an example)", ylabel="error per token")
    title = "Error by position, 4000 prompts (orange: SFT, blue: OPD). Student's prefix: solid without error,"
    title += " dotted after an error; teacher's prefix: dashed"
    panels["chain"].set_title(title, loc="left", fontsize=10)
    lesson.save(figure, path)


def tables(rows):
    budget = [
        "| prompts | arm | steps | trained tokens | forward passes | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for n in PROMPTS:
        for arm, step in (("OPD", 100), ("off-policy", 100), ("SFT", 100), ("SFT", 125), ("SFT", 175)):
            found = [r for r in lesson.select(rows, arm=arm, prompts=n, step=step) if r["accuracy"] != ""]
            if found:
                size = [sum(r[c] for r in found) / len(found) / 1000 for c in ("tokens", "cost")]
                accuracy = lesson.spread([r["accuracy"] for r in found])
                budget.append(f"| {n} | {arm} | {step} | {size[0]:.0f} k | {size[1]:.0f} k | {accuracy} |")
    prefixes = ["| student | teacher's prefix | own, no error | own, after an error |", "|---|---|---|---|"]
    for arm, n in (("start", 0), *TRAINED):
        cells = [
            per_seed(rows, "error", arm=arm, prompts=n, prefixes=k) for k in ("teacher", "clean", "slipped")
        ]
        name = "before" if arm == "start" else f"{arm}, {n} prompts"
        prefixes.append(f"| {name} | " + " | ".join(lesson.spread(x, 3) for x in cells) + " |")
    return {"budget": budget, "prefixes": prefixes}


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
