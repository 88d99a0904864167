"""What chapters 4 and 5 measure of a student and a teacher, before training and in it."""

import json
from pathlib import Path

import lesson
import torch
import toy

import opd

CUTS = (0, 1, 3, 6, 12, 18)  # lengths of the student's prefix in handover
LENGTH, SHOWN = 24, 12  # tokens of a chain, and of the table of tokens


def scores(student, teacher, found):
    """Measures of each token of sampled completions (lesson.answered), and the teacher's log_q [N,V].

    The mean of student_logp - teacher_logp over the student's own completions estimates the mean of kl.
    """
    prompts, ids = [x["rollout"].prompt for x in found], [x["ids"] for x in found]
    log_p, log_q = (lesson.log_probs(lesson.load(x)[1], prompts, ids) for x in (student, teacher))  # [N,V]
    y = torch.tensor([[token] for completion in ids for token in completion])  # [N,1]
    values = {"student_logp": log_p.gather(-1, y)[:, 0], "teacher_logp": log_q.gather(-1, y)[:, 0]}
    values |= {"kl": (log_p.exp() * (log_p - log_q)).sum(-1), "entropy": -(log_q.exp() * log_q).sum(-1)}
    return values, log_q


def finished(path, problems, prefixes, key, n=32):
    """The prefixes, each continued by at most n tokens that the model samples."""
    rows = [{"prompt": x["prompt"] + text} for x, text in zip(problems, prefixes, strict=True)]
    found = lesson.answered(path, rows, key, max_new_tokens=n)
    return [text + x["text"] for text, x in zip(prefixes, found, strict=True)]


def accuracy(texts, problems):
    """Share of completions that give the right answer."""
    right = [opd.is_correct(text, x["answer"]) for text, x in zip(texts, problems, strict=True)]
    return sum(right) / len(right)


def rows(student, teacher, problems, key, token_table, positions=range(LENGTH)):
    """All measures as rows; token_table: also the tokens of one wrong completion."""
    written = {who: lesson.answered(x, problems, key) for who, x in (("student", student), ("own", teacher))}
    measured = []
    for kind, found in written.items():
        values, log_q = scores(student, teacher, found)
        means = {name: value.mean().item() for name, value in values.items()}
        means["accuracy"] = accuracy([x["text"] for x in found], problems)
        measured.append({"kind": kind, "gap": means["student_logp"] - means["teacher_logp"], **means})
        if kind == "student" and token_table:  # the first completion with an error in its first column
            wrong = [i for i, x in enumerate(found) if x["text"][:5] != problems[i]["solution"][:5]] or [0]
            start = sum(len(x["ids"]) for x in found[: wrong[0]])
            for t, token in enumerate(found[wrong[0]]["ids"][:SHOWN]):
                top = zip(*(x.tolist() for x in log_q[start + t].exp().topk(3)), strict=True)
                top = ", ".join(f"`{toy.CHARACTERS[v]}` {q:.2f}" for q, v in top)
                some = {name: value[start + t].item() for name, value in values.items()}
                more = {
                    "text": f"`{toy.CHARACTERS[token]}`",
                    "top": top,
                    "prompt": problems[wrong[0]]["prompt"],
                }
                measured.append({"kind": "token", "at": t, **some, **more})
    texts = [x["text"] for x in written["student"]]
    for cut in CUTS:  # the teacher writes all the rest
        whole = finished(teacher, problems, [text[:cut] for text in texts], (*key, cut))
        measured.append({"kind": "handover", "at": cut, "accuracy": accuracy(whole, problems)})
    for t in positions:  # the teacher writes one token (an end token is ignored), the student the rest
        one = finished(teacher, problems, [text[:t] for text in texts], (*key, t), 1)
        whole = finished(student, problems, one, (*key, t, 1))
        measured.append({"kind": "one_token", "at": t, "accuracy": accuracy(whole, problems)})
    change = sum(x["accuracy"] for x in measured[-len(positions) :]) / len(positions)
    return [*measured, {"kind": "turns", "accuracy": change - measured[0]["accuracy"]}]


def carries(path, problems, key):
    """Which third digit a model writes in columns where A's carry in and M's carry out differ, and its sum.

    -> columns, share with the carry out, share whose sum adds the digit that was written, as A's sums do.
    """
    columns = []
    for text, x in zip(finished(path, problems, [""] * len(problems), key), problems, strict=True):
        a, b = map(int, x["prompt"].strip("^=").split("+"))
        for i in (2, 8, 14):
            carry_in, carry_out, column = (
                toy.chain(a, b, "A")[i],
                toy.chain(a, b, "M")[i],
                text[i - 2 : i + 3],
            )
            if carry_in != carry_out and len(column) == 5 and column.isdigit():
                columns.append((column[2] == carry_out, int(column[3:]) == sum(map(int, column[:3]))))
    shares = [sum(x) / len(columns) for x in zip(*columns, strict=True)] or [0.0, 0.0]
    return {"columns": len(columns), "carry_out": shares[0], "adds_it": shares[1]}


def evaluations(log, final, at, first=1):
    """Rows of a run of opd.py: its evaluations, three samples of the first and the last, a summary.

    log: rows of metrics.jsonl; final: path of the final model; first: the first step on the student's own
    completions. The gap in its row is that of the student before this step's update.
    """
    samples = [json.loads(line) for line in (Path(final).parent / "samples.jsonl").open(encoding="utf-8")]
    measured, evals = [], [row for row in log if "eval_reverse_kl" in row]
    for row in evals:
        texts = [x for x in samples if x["step"] == row["step"]]  # eight held-out prompts
        letters = [x for text in texts for x in text["completion"].removesuffix("<|im_end|>") if x.isalpha()]
        values = {"accuracy": row["eval_accuracy"], "kl": row["eval_reverse_kl"]}
        values["capitals"] = sum(x.isupper() for x in letters) / max(len(letters), 1)
        measured.append({**at, "kind": "curve", "at": row["step"], **values})
        for x in texts[:3] if row in (evals[0], evals[-1]) else []:
            values = {"row": x["row"], "prompt": x["prompt"], "text": x["completion"], "kl": x["mean_kl"]}
            measured.append({**at, "kind": "text", "at": row["step"], **values})
    begin = [row["student_logp"] - row["teacher_logp"] for row in log if row["step"] == first]
    closed = 1 - evals[-1]["eval_reverse_kl"] / max(evals[0]["eval_reverse_kl"], 1e-9)
    return [*measured, {**at, "kind": "run", "gap": begin[0] if begin else "", "closed": closed}]
