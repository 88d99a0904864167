"""OPSD with m latent rules: one policy, many teachers. Its residual KL, its limit, and its consistency.

The prompt `^347=` asks for (347 + r) mod 10, twice: `8#8$`. The teacher's prompt contains the rule r
(`a|^347=`), the student's does not. All values are enumerated over held-out prompts, rules and tokens.
"""

import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import toy  # noqa: E402

import opsd  # noqa: E402

RULES, NOISE = "abcdefghij", 0.1  # with probability NOISE a digit is drawn at random
PROMPTS = [f"^{x:03}=" for x in range(1000)]
HELD_OUT = sorted(random.Random(0).sample(PROMPTS, 100))  # in no training data, of base models or students
SEEN = [x for x in PROMPTS if x not in HELD_OUT]
LINKS = {  # the rule as a function of the prompt: easy to infer, or to be memorised prompt by prompt
    "linked": lambda x, rules: rules[int(x[1]) * len(rules) // 10],
    "hashed": lambda x, rules: random.Random(x).choice(rules),
}
ARMS = {
    "reverse": dict(loss="reverse_kl"),
    "forward": dict(loss="forward_kl"),
    "off_policy": dict(loss="forward_kl", lmbda=0.0),  # the same on completions of the teacher
}
LOOK = {"reverse": (0, "geometric"), "forward": (1, "arithmetic"), "linked": (2, ""), "hashed": (4, "")}


def answer(x, rule):
    """The digit that a rule asks for: rule number k (a letter) is "add 3k + 1, modulo 10"."""
    return (int(x[1:4]) + 3 * RULES.index(rule) + 1) % 10


def write(rng):
    """A pre-training example: the prompt has the rule in two of three cases; both digits follow one rule."""
    x, rule = rng.choice(SEEN), rng.choice(RULES)
    first, second = (rng.randrange(10) if rng.random() < NOISE else answer(x, rule) for _ in "12")
    return (x if rng.random() < 1 / 3 else f"{rule}|{x}"), f"{first}#{second}$"


def base(seed, smoke):
    steps = 20 if smoke else 1000
    return lesson.kept(f"rules_{seed}_{steps}", lambda: toy.pretrain(write, seed, steps))


@torch.no_grad()
def next_digit(model, texts):
    """Probabilities [B,10] of the ten digits after each text; all texts have equal length."""
    ids = torch.tensor([[toy.IDS[c] for c in text] for text in texts])
    return model(input_ids=ids).logits[:, -1, toy.IDS["0"] : toy.IDS["9"] + 1].softmax(-1)


def measure(student, teacher, arm, m):
    """{(quantity, at): value} on the held-out prompts, exact: computed from the softmax of both models."""
    rules = [[LINKS[arm](x, RULES[:m])] if arm in LINKS else RULES[:m] for x in HELD_OUT]  # per prompt
    q = [next_digit(teacher, [f"{r}|{x}" for r in rs]) for x, rs in zip(HELD_OUT, rules, strict=True)]
    p, q = next_digit(student, HELD_OUT), torch.stack(q)  # [B,10], [B,m,10]
    log_p, log_q, arithmetic = p.log()[:, None], q.log(), q.mean(1)  # [B,1,10], [B,m,10], [B,10]
    z = log_q.mean(1).exp().sum(-1, keepdim=True)  # [B,1]
    geometric = log_q.mean(1).exp() / z  # [B,10]
    found = {
        "reverse": (p[:, None] * (log_p - log_q)).sum(-1),
        "forward": (q * (log_q - log_p)).sum(-1),
        "reverse_floor": -z.log(),
        "forward_floor": (q * (log_q - arithmetic.log()[:, None])).sum(-1),
        "to_geometric": (p * (p / geometric).log()).sum(-1),
        "to_arithmetic": (arithmetic * (arithmetic / p).log()).sum(-1),
    }
    # Both digits follow one rule: p(y) p(y | y#), for each of the ten rules.
    y = torch.tensor([[answer(x, r) for r in RULES] for x in HELD_OUT])  # [B,10]
    second = [next_digit(student, [f"{x}{d}#" for d in range(10)]).diagonal() for x in HELD_OUT]
    both = (p * torch.stack(second)).gather(1, y)  # [B,10], one column per rule
    found["coherent"] = both.sum(1)
    found["right"] = torch.stack([both[i, [RULES.index(r) for r in rs]].mean() for i, rs in enumerate(rules)])
    # Probability that the teacher with the rule repeats a wrong first digit; its students learn to do so too.
    told = [next_digit(teacher, [f"a|{x}{d}#" for d in range(10)]).diagonal() for x in HELD_OUT]
    found["copies"] = torch.stack(told)[torch.arange(10) != y[:, :1]]
    found = {(name, 0): value.mean() for name, value in found.items()}
    for name, mean in (("student", p), ("geometric", geometric), ("arithmetic", arithmetic)):
        moved = [row.roll(-int(x[3])) for row, x in zip(mean, HELD_OUT, strict=True)]  # y -> y - x (mod 10)
        found |= {(name, at): value for at, value in enumerate(torch.stack(moved).mean(0))}
    return found


def arm(name, m, seed, smoke):
    from transformers import AutoModelForCausalLM

    load, folder = AutoModelForCausalLM.from_pretrained, base(seed, smoke)
    if name == "before":
        found = measure(load(folder), load(folder), name, m)
    else:
        of, link = {x: RULES[:m] for x in SEEN}, name if name in LINKS else "drawn"
        of = {x: LINKS[name](x, RULES[:m]) for x in SEEN} if name in LINKS else of
        rows = [{"prompt": x, "privileged": rule} for x in SEEN for rule in of[x]]
        args = dict(student=folder, data=lesson.kept_rows(f"rules_{link}_{m}", rows), seed=seed)
        args |= dict(pi="system", pi_template="{privileged}|{prompt}", steps=3 if smoke else 200, lr=1e-3)
        args |= dict(lr_schedule="cosine", max_new_tokens=4, micro_batch_size=64, eval_every=0)
        with lesson.distilled(opsd, **args, **ARMS.get(name, ARMS["reverse"])) as (metrics, final):
            found = measure(load(final), load(folder), name, m)
            late = [step["reverse_kl"] for step in metrics[-20:]]
            found["run_reverse_kl", 0] = sum(late) / len(late)
    where = {"arm": name, "m": m, "seed": seed}
    return [{**where, "quantity": q, "at": at, "value": float(value)} for (q, at), value in found.items()]


def run(smoke):
    seeds, ms = range(1 if smoke else 3), (4, 10) if smoke else (1, 2, 4, 10)
    lesson.in_parallel(base, [(seed, smoke) for seed in seeds], "bases")
    jobs = [("before", 10), *((name, m) for name in ("reverse", "forward") for m in ms)]
    jobs += [(name, m) for name in ("off_policy", *LINKS) for m in ms[-3::2]]
    return sum(lesson.in_parallel(arm, [(*job, s, smoke) for job in jobs for s in seeds], "arms"), [])


def values(rows, quantity, **where):
    return [row["value"] for row in lesson.select(rows, quantity=quantity, **where)]


def mean(x):
    return sum(x) / len(x)


def plot(rows, path):
    title = "With many teachers the student approaches their mean, and its KL to them stays at a floor"
    layout = [["reverse", "forward"], ["residual", "coherent"]]
    figure, panels = lesson.panels(title, layout, size=(11, 7.6))
    residual, coherent = panels["residual"], panels["coherent"]
    for name in ("reverse", "forward"):
        panel, colour, kind = panels[name], lesson.COLOURS[LOOK[name][0]], LOOK[name][1]
        ours, theirs = ([values(rows, q, arm=name, m=4, at=k) for k in range(10)] for q in ("student", kind))
        panel.bar(range(10), [mean(x) for x in ours], color=colour, alpha=0.4, label="student (dots: seeds)")
        for at, seeds in enumerate(ours):
            panel.plot([at] * len(seeds), seeds, ".", color=colour, ms=5)
        label = f"{kind} mean of the four teachers"
        panel.plot(range(10), [mean(x) for x in theirs], "_", color="black", ms=24, mew=2, label=label)
        panel.set(ylim=(0, 0.31), xticks=range(10), ylabel="probability")
        panel.set_xlabel("(first digit - last digit of the prompt) mod 10; rules add 0, 1, 4, 7")
        panel.set_title(f"Student with {name} KL, m = 4: the {kind} mean", fontsize=10, loc="left")
        panel.legend(frameon=False, fontsize=8, loc="upper right")
    for name, (colour, kind) in LOOK.items():
        kl, colour, arms = name if kind else "reverse", lesson.COLOURS[colour], lesson.select(rows, arm=name)
        label = {"linked": "linked", "hashed": ""}.get(name, f"{name} KL")
        style = {"ls": "", "marker": "o"} if kind else {"ls": ":", "marker": "s"}
        lesson.curve(residual, lesson.select(arms, quantity=kl), "m", "value", colour, label, **style)
        if kind:
            lesson.curve(residual, lesson.select(arms, quantity=f"{kl}_floor"), "m", "value", colour)
    residual.annotate("hashed\n(cf. chapter 6)", (11, 2.12), color=lesson.COLOURS[LOOK["hashed"][0]])
    residual.annotate("shared rule (chapter 7)", (1.06, -0.07), color="0.4", fontsize=9)
    residual.set_ylim(-0.15, 2.5)
    labels = {
        "reverse": "reverse\n",
        "forward": "\nforward",
        "off_policy": "\n\n\nforward, on teacher's\ncompletions",
    }
    for i, (name, label) in enumerate(labels.items()):
        of = lesson.select(rows, quantity="coherent", arm=name)
        lesson.curve(coherent, of, "m", "value", lesson.COLOURS[i], label, marker="o")
    before = mean(values(rows, "coherent", arm="before"))
    coherent.axhline(before, color="0.5", ls=":")
    coherent.annotate("before training", (3.1, before + 0.03), color="0.4", fontsize=9)
    coherent.set(ylim=(0, 1), ylabel="probability that both digits\nfollow the same rule")
    coherent.set_title("On-policy students contradict themselves more often", fontsize=10, loc="left")
    residual.set_ylabel("KL to the teacher, first digit,\nnew prompts (nats)")
    residual.set_title("Residual KL: lines are floors, points are students", fontsize=10, loc="left")
    for panel in (residual, coherent):
        panel.set(xscale="log", xlim=(0.9, 26), xlabel="m, number of latent rules")
        panel.set_xticks([1, 2, 4, 10], ["1", "2", "4", "10"])
        panel.minorticks_off()
    lesson.save(figure, path)


def tables(rows):
    def table(head, lines):
        return [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {' | '.join(x)} |" for x in lines)]

    def cells(arm, m, *quantities, digits=2):
        found = [values(rows, quantity, arm=arm, m=m) for quantity in quantities]
        return [lesson.spread(x, digits).replace("-0.0", "0.0") for x in found]

    def of(*arms):
        return sorted({(row["m"], row["arm"]) for row in rows if row["arm"] in arms})

    far = {"reverse": "to_arithmetic", "forward": "to_geometric"}
    residual = [
        [f"{m:g}", a, *cells(a, m, f"{a}_floor", a, f"to_{LOOK[a][1]}", far[a], digits=3)]
        for m, a in of("reverse", "forward")
    ]
    coherent = [[f"{m:g}", a, *cells(a, m, "coherent", "right")] for m, a in of("before", *ARMS)]
    copies = [("before", "copies"), ("before", "coherent"), ("reverse", "coherent"), ("forward", "coherent")]
    seeds = [
        [f"{s:g}", *(f"{values(rows, q, arm=a, m=10, seed=s)[0]:.2f}" for a, q in copies)]
        for s in sorted({row["seed"] for row in rows})
    ]
    links = [
        [
            f"{m:g}",
            "drawn" if a == "reverse" else a,
            *cells(a, m, "reverse_floor", "reverse", "run_reverse_kl", "right"),
        ]
        for m, a in of("reverse", *LINKS)
    ]
    log = [[f"{m:g}", *cells(a, m, "reverse_floor", "run_reverse_kl")] for m, a in of("reverse")]
    late = "`reverse_kl`, last 20 steps"
    return {
        "residual": table(
            "m | KL | floor | residual of the student | KL to its mean | to the other mean", residual
        ),
        "coherent": table("m | arm | both digits follow one rule | both follow the rule in the PI", coherent),
        "seeds": table("seed | teacher repeats a wrong first digit | before | reverse | forward", seeds),
        "links": table(f"m | rule | floor | residual, new prompts | {late} | both follow the rule", links),
        "log": table(f"m | floor, first digit | {late}", log),
    }


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
