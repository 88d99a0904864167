"""Two comparisons of a bug with the correct code: 60 steps of training, and the gradient of one batch."""

import contextlib
import json
from statistics import fmean
from unittest import mock

import lesson
import torch
import toy
from bugs import ends, patched, settings, two_ends

import opd

STEPS = 60
LOGGED = "loss reverse_kl forward_kl student_entropy student_logp grad_norm completion_len".split()
SMOL = lesson.ROOT / ".cache" / "smollm2"
SETTINGS = {  # where bugs that are harmless in training hurt: (description and reason, those bugs)
    "near": (
        "student = teacher + 1 % of noise: the right gradient vanishes, the error does not",
        ("one_temperature", "bfloat16_logits"),
    ),
    "flat": (
        "student = teacher, logits halved: the truncated KL is often below zero",
        ("clamp_min_0",),
    ),
    "far": (
        "a teacher of another style: the weight 1 - q/p is never above 1",
        ("k3_as_reverse_kl",),
    ),
    "sharp": (
        "the teacher's logits times three: a gap beyond q = 1e-8 does not count",
        ("log_of_clamped",),
    ),
    "unequal": (
        "completions of 1 to 24 tokens: tokens of short ones weigh more",
        ("micro_batch_mean",),
    ),
    "short": (
        "completions of about 2 tokens: the first is not trained, one after the end is",
        ("shifted_full_kl",),
    ),
    "ends": (
        "as the first, on completions of the teacher; the end token is halved, and masked: no error is left",
        ("end_masked",),
    ),
}


def train(arm, seed, smoke):
    """One run of opd.py with the bug, its student graded by the correct code -> a row."""
    files = lesson.data(smoke, 4000) | {"eval_data": None, "eval_every": 0}
    files |= {"student": lesson.student(seed, smoke), "teacher": lesson.teacher(seed, smoke)}
    batch, steps, limit = (2, 1, 8) if smoke else (32, STEPS, 32)
    size = {"batch_size": batch, "micro_batch_size": batch // 2, "max_new_tokens": limit}
    size |= {"steps": steps, "topk": 2, "lr": 3e-4}
    rows, stop_ids = toy.rows(10 if smoke else 500, held_out=True), ends(len(toy.CHARACTERS))
    stop_ids = stop_ids[1:] if arm == "forgotten_end" else stop_ids
    with patched(arm), lesson.distilled(opd, **files | size | {"seed": seed} | settings(arm)) as (log, final):
        tokenizer, model = lesson.load(final)
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    found = opd.sample(model, prompts, 1, stop_ids, (1,), range(len(rows)), limit)
    texts = [tokenizer.decode(r.completion, skip_special_tokens=True).rstrip("~") for r in found]
    right = fmean(opd.is_correct(text, row["answer"]) for text, row in zip(texts, rows, strict=True))
    said = {"text": tokenizer.decode(found[0].completion), "marks": marks(model, files["teacher"], found[0])}
    means = {name: fmean(step[name] for step in log[-10:]) for name in LOGGED}
    return {"arm": arm, "seed": seed, "accuracy": right, **means, **said}


def marks(model, teacher, rollout):
    """The student's reverse KL at each token: . is less than 0.1 nats, x less than 1, X more."""
    models = (model, lesson.load(teacher)[1])
    log_p, log_q = (lesson.log_probs(m, [rollout.prompt], [rollout.completion]) for m in models)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return "".join("." if x < 0.1 else "x" if x < 1 else "X" for x in kl.tolist())


def prepare(setting, seed, smoke):
    """What a setting compares gradients on -> Args, (student, teacher, tokenizer, stop ids), token ids."""
    if setting == "SmolLM2":
        size, student, teacher = (2 if smoke else 8), str(SMOL / "student"), str(SMOL / "teacher")
        lines = sorted((SMOL / "train.jsonl").read_text(encoding="utf-8").splitlines(), key=len)
        prompts = [json.loads(line)["prompt"] for line in lines[seed : 9 * size : 9]]  # short
    else:
        size, teacher = 32, lesson.teacher(seed, smoke, "B" if setting == "far" else "A")
        student = teacher if setting in ("near", "flat", "ends") else lesson.student(seed, smoke)
        given = {"unequal": [i * 23 // size for i in range(size)], "short": [-1] * size}
        given = given.get(setting, [0] * size)  # how much of the chain the prompt contains
        rows = toy.rows(size, seed=seed)
        prompts = [row["prompt"] + row["solution"][:n] for row, n in zip(rows, given, strict=True)]
    shape = {"micro_batch_size": max(1, size // 4), "max_new_tokens": 4 if smoke else 32, "device": "cpu"}
    shape |= {"topk": 20 if setting == "SmolLM2" else 2, "topk_source": "student"}
    shape |= {"max_grad_norm": float("inf"), "dtype": "float32"}
    args = opd.Args(student=student, teacher=teacher, batch_size=size, **shape)
    pair = opd.load_pair(student, teacher, args, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for weight in pair[0].parameters() if setting in ("near", "ends") else ():
        weight.data *= 1 + 0.01 * torch.randn(weight.shape, generator=generator)
    if setting in ("flat", "sharp"):
        pair[setting == "sharp"].get_output_embeddings().weight.data *= 3 if setting == "sharp" else 0.5
    if setting == "ends":
        two_ends(pair[0])
    return args, pair, [opd.encode_prompt(pair[2], prompt, 256) for prompt in prompts]


def gradients(setting, groups, seed, smoke):
    """One step without an update for each correct code and its arms -> rows: cosine and ratio of norms."""
    args, pair, prompts = prepare(setting, seed, smoke)
    real, known, correct, rows = opd.sample, {}, None, []

    def sample(model, prompts, n, stop_ids, *x):  # each batch is sampled once
        key = (*stop_ids, *x)
        known[key] = known.get(key) or real(model, prompts, n, stop_ids, *x)
        return known[key]

    for arm in (arm for right in groups for arm in (right, *groups[right])):
        ours = opd.Args(**vars(args) | settings(arm))
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("opd.load_pair", lambda *_: pair))
            stack.enter_context(mock.patch("opd.sample", sample))
            stack.enter_context(patched(arm))
            student, teacher, _, stop_ids = opd.load_pair(args.student, args.teacher, args, "cpu")
            writer = teacher if setting == "ends" else student
            limits = (args.max_new_tokens, 1.0, 1.0)
            rollouts = opd.sample(writer, prompts, 1, stop_ids, (seed, 1), range(len(prompts)), *limits)
            still = torch.optim.SGD(student.parameters(), lr=0.0)
            loss, read = opd.LOSSES[ours.loss], [r.prompt for r in rollouts]
            opd.update(student, teacher, rollouts, read, loss, still, ours, 1)
        wrong = [p.grad.clone() for p in student.parameters()]
        correct = wrong if arm in groups else correct
        dots = [sum((a * b).sum().item() for a, b in zip(x, wrong, strict=True)) for x in (correct, wrong)]
        norm = sum((a * a).sum().item() for a in correct) ** 0.5
        cosine, ratio = dots[0] / (norm * dots[1] ** 0.5 or 1), dots[1] ** 0.5 / norm
        row = {"arm": arm, "setting": setting, "seed": seed, "cosine": cosine, "ratio": ratio}
        rows += [] if arm in groups else [row]
    return rows
