"""SFT of the toy student on a fixed set of completions of its teacher B, costs and scores."""

import diagnose
import lesson
import toy

BATCH, LR = 32, 1e-3  # the same for SFT and OPD
# Cost of a token in forward passes: to sample it, to score it with the teacher, to train (backward = 2).
SAMPLE, SCORE, TRAIN = 1, 1, 3
OPD_COST = SAMPLE + SCORE + TRAIN  # of a step; for SFT on fresh samples, as in opd.py, SAMPLE + TRAIN


def steps_for(budget, n):
    """SFT steps that a budget pays for; the n completions are sampled once."""
    return round((budget - n / BATCH * SAMPLE) / TRAIN)


def written(n, seed, smoke):
    """The first n training problems with the teacher's completions: (prompt, completion) pairs."""
    rows = toy.rows(n, style="B")
    found = lesson.answered(lesson.teacher(seed, smoke, "B"), rows, (seed, 2))
    return [(x["prompt"], y["text"] + "$" * y["rollout"].ended) for x, y in zip(rows, found, strict=True)]


def trained(n, steps, seed, smoke):
    """The student after `steps` steps of cross-entropy on n completions of the teacher -> its path, a row."""
    start, pairs = lesson.student(seed, smoke), written(n, seed, smoke)

    def make():
        model = lesson.load(start)[1]
        return toy.pretrain(lambda rng: rng.choice(pairs), seed, steps, None, LR, BATCH, model)

    path = lesson.kept(f"sft_{n}_{steps}_{seed}", make, start, pairs, LR, BATCH)
    cost = min(n, steps * BATCH) / BATCH * SAMPLE + steps * TRAIN
    return path, {"n": n, "seed": seed, "at": steps, "cost": cost, **scores(path, n, seed, smoke)}


def accuracy(path, rows):
    """Probability of the right chain in the teacher's style, mean over the rows: exact, without sampling."""
    return toy.accuracy(lesson.load(path)[1], rows)


def scores(path, n, seed, smoke):
    """Accuracy on held-out problems and on those of the SFT set; kl of its held-out completions (texts)."""
    written = texts(path, 16 if smoke else 256, seed, smoke)
    tokens = sum(x["tokens"] for x in written)
    return {
        "accuracy": accuracy(path, toy.rows(16 if smoke else 1000, held_out=True, style="B")),
        "own_set": accuracy(path, toy.rows(min(n, 1000), style="B")) if n else "",
        "kl": sum(x["kl"] * x["tokens"] for x in written) / tokens,
    }


def texts(path, n, seed, smoke):
    """Completions of the first n held-out problems; kl: exact reverse KL to the teacher, mean per token."""
    problems = toy.rows(n, held_out=True)
    found = lesson.answered(path, problems, (seed, 3))
    kl = diagnose.scores(path, lesson.teacher(seed, smoke, "B"), found)[0]["kl"]  # [N]
    parts = kl.split([len(x["ids"]) for x in found])
    found_kl = zip(problems, found, parts, strict=True)
    return [
        {
            "row": i,
            "prompt": problem["prompt"],
            "text": x["text"] + "$" * x["rollout"].ended,
            "kl": part.mean().item(),
            "tokens": len(part),
        }
        for i, (problem, x, part) in enumerate(found_kl)
    ]
