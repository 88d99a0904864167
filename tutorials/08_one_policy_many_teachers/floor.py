"""The floor of a distillation KL: what a student that does not see which teacher it has cannot remove.

`floors` compares distributions; `measure` samples from a student and scores the same completions with each of
the m teachers, which are one model behind m prompts. Both work for any models that opd.py loads.
"""

from statistics import fmean

import lesson  # run.py puts its folder on sys.path
import torch

import opd


def floors(log_p, log_q):
    """KLs and floors at N prefixes, from log p [N,V] of the student and log q [m,N,V] of its m teachers."""
    p, q = log_p.exp(), log_q.exp()
    reverse = (p * (log_p - log_q)).sum(-1).mean(0)  # mean over the teachers of KL(p || q_r)
    floor = -log_q.mean(0).logsumexp(-1)  # -log Z
    forward = (q * (log_q - log_p)).sum(-1).mean(0)  # mean over the teachers of KL(q_r || p)
    information = (q * (log_q - q.mean(0).log())).sum(-1).mean(0)  # floor of the forward KL
    found = {"reverse": reverse, "floor": floor, "to_geometric": reverse - floor}
    return {**found, "forward": forward, "information": information, "to_arithmetic": forward - information}


def measure(student, teacher, rows, n, length, key):
    """Sample n completions of each row's prompt from the student; score them with it and with all teachers.

    student, teacher: folders. rows: dicts with prompt and teachers, the m prompts that the teacher may read.
    Returns dicts: means over all positions, then the values of each token of the first completion.
    """
    samples = lesson.answered(student, rows, key, n, length)
    (tokenizer, student), teacher = lesson.load(student), lesson.load(teacher)[1]
    texts, ids = [x["text"] for x in samples], [x["ids"] for x in samples]
    asked = zip(*(rows[x["row"]]["teachers"] for x in samples), strict=True)  # m times one prompt per sample
    asked = [[opd.encode_prompt(tokenizer, prompt) for prompt in prompts] for prompts in asked]
    log_p = lesson.log_probs(student, [x["rollout"].prompt for x in samples], ids)  # [N,V]
    found = floors(log_p, torch.stack([lesson.log_probs(teacher, prompts, ids) for prompts in asked]))
    coherent = fmean(text[:1] == text[2:3] for text in texts)  # toy: each digit is that of exactly one rule
    means = {name: x.mean().item() for name, x in found.items()}
    tokens = [{name: x[t].item() for name, x in found.items()} for t in range(min(12, len(ids[0])))]
    words = [repr(tokenizer.decode([y])) for y in ids[0]]  # quoted, so that a CSV keeps digits as text
    head = {"at": "all", "text": " / ".join(texts[:n]), "coherent": coherent, **means}
    return [head, *({"at": f"token_{t + 1}", "text": words[t], **x} for t, x in enumerate(tokens))]
