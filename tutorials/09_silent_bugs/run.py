"""Bugs that raise no error, each compared with the correct code: one argument or a patch of a few lines."""

import pkgutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import toy  # noqa: E402

import losses  # noqa: E402
import opd  # noqa: E402

SEEDS, STEPS, END, OTHER_END, RIGHT_SAMPLE = 3, 60, toy.END, toy.IDS["~"], opd.sample
LOGGED = "loss reverse_kl forward_kl student_entropy student_logp grad_norm completion_len".split()
COLOURS = {"fatal": "#D55E00", "costly": "#E69F00", "harmless": "#0072B2"}


def instead(name, call):  # a bug inside a loss: what is patched, and a function real -> replacement
    return "opd.LOSSES", lambda real: {**real, name: (real[name][0], lambda args, *x: call(*x))}


def terms(logits, log):
    log_p, log_q = map(log, logits)
    return log_p.exp() * (log_p - log_q)  # [...,V], not yet summed over the vocabulary


def constant_advantage(loss, s, t, tokens, *_):
    log_p = s.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return losses.policy_gradient(log_p, -losses.reverse_kl(s, t))  # does not depend on the sampled token


def missing_as(filler):
    def topk_support(real, s, t, k, source):  # a server that returns the teacher's top k only
        ids, logp, valid = real(s, t, k, source)
        missing = logp < t.log_softmax(-1).topk(k).values[..., -1:]
        return ids, logp.where(~missing, filler(s.detach().log_softmax(-1).gather(-1, ids))), valid

    return "losses.topk_support", lambda real: lambda *x: topk_support(real, *x)


def known_ends(*stop_ids):
    def load_pair(real, *x):  # the student ends half of its completions with the teacher's $, half with ~
        student, *rest, _ = real(*x)
        for weight in (student.get_input_embeddings().weight, student.lm_head.weight):
            weight.data[OTHER_END] = weight.data[END]
        return student, *rest, stop_ids

    return "opd.load_pair", lambda real: lambda *x: load_pair(real, *x)


def without_prompt(r):
    body = r.prompt[1:] + r.completion
    return replace(r, prompt=r.prompt[:1], completion=body, logp=[0.0] * len(body))


def one_to_the_right(prompts, ys):
    return [x + y[:1] for x, y in zip(prompts, ys, strict=True)], [y[1:] + y[-1:] for y in ys]


clamp_min_0 = instead("sg_topk", lambda *x: losses.sg_topk_reverse_kl(*x).clamp_min(0))
value_clamp = instead("reverse_kl", lambda *x: losses.reverse_kl(*x).clamp(max=0.5))
pointwise = instead("reverse_kl", lambda *x: terms(x, lambda z: z.log_softmax(-1)).clamp(max=0.05).sum(-1))
log_of_clamped = instead("reverse_kl", lambda *x: terms(x, lambda z: z.softmax(-1).clamp(1e-8).log()).sum(-1))
bfloat16 = instead("reverse_kl", lambda *x: terms(x, lambda z: z.bfloat16().log_softmax(-1)).sum(-1))
kl_as_advantage = "opd.token_loss", lambda real: constant_advantage
one_temperature = "opd.token_loss", lambda real: lambda loss, s, t, *x: real(loss, s, t * 2.0, *x)
end_masked = "opd.token_loss", lambda real: lambda loss, s, t, y, *x: real(loss, s, t, y, *x) * (y != END)
top_p_scored_whole = "opd.sample", lambda real: lambda *x: real(*x[:-1], 0.9)
prompt_in_loss = "opd.sample", lambda real: lambda *x: [without_prompt(r) for r in real(*x)]
shifted = "opd.completion_hidden", lambda real: lambda model, *x: real(model, *one_to_the_right(*x))
own_mean = "opd.distill", lambda real: lambda *x: real(*x[:-1], 2 * sum(len(r.completion) for r in x[2]))

ARMS = {  # name: correct code to compare with, metric to compare, patch, Args that differ
    "start": ("", "", None, {"loss": "reverse_kl", "lr": 1e-30, "steps": 1}),
    "reverse_kl": ("", "", None, {"loss": "reverse_kl"}),
    "pg": ("", "", None, {"loss": "pg"}),
    "sg_topk": ("", "", None, {"loss": "sg_topk", "topk": 2}),
    "temperature_2": ("", "", None, {"loss": "reverse_kl", "loss_temperature": 2.0}),
    "two_ends": ("", "", known_ends(END, OTHER_END), {"loss": "reverse_kl"}),
    "k1_as_loss": ("pg", "reverse_kl", None, {"loss": "k1"}),
    "k3_as_reverse_kl": ("pg", "loss", None, {"loss": "k3"}),
    "kl_as_advantage": ("pg", "reverse_kl", kl_as_advantage, {}),
    "top_p_scored_whole": ("pg", "student_logp", top_p_scored_whole, {}),
    "shifted_pg": ("pg", "student_logp", shifted, {}),
    "clamp_min_0": ("sg_topk", "loss", clamp_min_0, {}),
    "missing_as_0": ("sg_topk", "loss", missing_as(torch.zeros_like), {}),
    "missing_as_own": ("sg_topk", "loss", missing_as(lambda own: own), {}),
    "pointwise_clip": ("reverse_kl", "loss", pointwise, {}),
    "value_clamp": ("reverse_kl", "loss", value_clamp, {}),
    "log_of_clamped": ("reverse_kl", "loss", log_of_clamped, {}),
    "bfloat16_logits": ("reverse_kl", "loss", bfloat16, {}),
    "other_direction": ("reverse_kl", "loss", None, {"loss": "forward_kl"}),
    "tiny_beta": ("reverse_kl", "grad_norm", None, {"loss": "jsd", "beta": 0.001}),
    "end_masked": ("reverse_kl", "loss", end_masked, {}),
    "prompt_in_loss": ("reverse_kl", "completion_len", prompt_in_loss, {}),
    "micro_batch_mean": ("reverse_kl", "loss", own_mean, {}),
    "shifted_full_kl": ("reverse_kl", "student_logp", shifted, {}),
    "one_temperature": ("temperature_2", "loss", one_temperature, {}),
    "forgotten_end": ("two_ends", "completion_len", known_ends(OTHER_END), {}),
}


def one(arm, seed, smoke):
    right, _, patch, change = ARMS[arm]
    where, bug = patch or ("opd.Args", lambda real: real)
    recipe, n = (10, 10) if smoke else (700, 500)
    args = {"steps": 1 if smoke else STEPS, "batch_size": 32, "max_new_tokens": 32, "lr": 3e-4, "seed": seed}
    args["data"] = lesson.kept_rows("train_4000", toy.rows(4000))
    args["student"] = lesson.toy_model("A", seed, recipe, 0.45)
    args["teacher"] = lesson.toy_model("A", seed + 1_000_000, recipe)
    new = mock.patch(where, bug(pkgutil.resolve_name(where.replace(".", ":"))))
    with new, lesson.distilled(opd, **args | ARMS[right or arm][3] | change) as (history, final):
        tokenizer, model = opd.load_model(final, "student", torch.float32, "cpu")
    rows, stop_ids = toy.rows(n, held_out=True), [OTHER_END] if arm == "forgotten_end" else [END, OTHER_END]
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    found = RIGHT_SAMPLE(model, prompts, 1, stop_ids, (1,), range(n), 32)  # graded by the correct code
    texts = [tokenizer.decode(r.completion, skip_special_tokens=True).rstrip("~") for r in found]
    accuracy = fmean(opd.is_correct(text, row["answer"]) for text, row in zip(texts, rows, strict=True))
    row = {"arm": arm, "seed": seed, "accuracy": accuracy, "length": fmean(len(r.completion) for r in found)}
    return row | {name: fmean(step[name] for step in history[-10:]) for name in LOGGED}


def run(smoke):
    seeds, recipe = range(1 if smoke else SEEDS), 10 if smoke else 700
    makes = [("A", s + base, recipe, stop) for s in seeds for base, stop in ((1_000_000, None), (0, 0.45))]
    lesson.in_parallel(lesson.toy_model, makes, "models")
    lesson.kept_rows("train_4000", toy.rows(4000))
    rows = lesson.in_parallel(one, [(arm, s, smoke) for s in seeds for arm in ARMS], "runs")
    accuracy = {(row["arm"], row["seed"]): row["accuracy"] for row in rows}
    right = [accuracy[ARMS[row["arm"]][0] or row["arm"], row["seed"]] for row in rows]
    return [{**row, "difference": row["accuracy"] - r} for row, r in zip(rows, right, strict=True)]


def ranked(rows):
    """The bugs, worst first -> arm, arm of the correct code, verdict, metric in the last 10 steps of both."""

    def mean(arm, column):
        return fmean(row[column] for row in lesson.select(rows, arm=arm))

    found = []
    for arm, (right, metric, *_) in ARMS.items():
        if right:
            dead, lost = mean(arm, "accuracy") < mean("start", "accuracy") + 0.05, mean(arm, "difference")
            verdict = "fatal" if dead else "costly" if lost < -0.03 else "harmless"
            tells = f"{metric}: {mean(right, metric):.2g} \N{RIGHTWARDS ARROW} {mean(arm, metric):.2g}"
            found.append((lost, arm, right, verdict, tells))
    return [bug[1:] for bug in sorted(found)]


def plot(rows, path):
    message = "On this task, six of twenty silent bugs are fatal, six are costly and eight are harmless"
    figure, panels = lesson.panels(message, [["all"]], (11, 7))
    panel, found = panels["all"], ranked(rows)[::-1]
    for y, (arm, right, verdict, tells) in enumerate(found):
        good, bad = ([r["accuracy"] for r in lesson.select(rows, arm=name)] for name in (right, arm))
        panel.plot([fmean(bad), fmean(good)], [y, y], color=COLOURS[verdict], lw=1.5, alpha=0.6)
        panel.plot(bad, [y] * len(bad), "o", color=COLOURS[verdict], ms=4, alpha=0.7)
        panel.plot([fmean(good)], [y], "o", mfc="white", mec="black", ms=6)
        panel.text(1.03, y, verdict, va="center", color=COLOURS[verdict], weight="bold")
        panel.text(1.17, y, tells, va="center")
    start = fmean(r["accuracy"] for r in lesson.select(rows, arm="start"))
    panel.axvline(start, color="0.6", lw=1, ls=":")
    panel.text(start, len(found) - 0.3, "before training", color="0.4", ha="center", backgroundcolor="w")
    panel.text(1.17, len(found) - 0.3, "metric: correct code \N{RIGHTWARDS ARROW} bug", color="0.4")
    panel.set_yticks(range(len(found)), [arm.replace("_", " ") for arm, *_ in found])
    panel.set(xlim=(-0.02, 1.55), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    panel.set_xlabel("accuracy after 60 steps (filled: bug, one point per seed; open: correct code, mean)")
    panel.xaxis.label.set(x=0, ha="left")
    lesson.save(figure, path)


def tables(rows):
    lines = ["| bug | correct code | accuracy | with bug | difference | metric | verdict |", "|---" * 7 + "|"]
    for arm, right, verdict, tells in ranked(rows):
        cells = ((right, "accuracy"), (arm, "accuracy"), (arm, "difference"))
        spreads = [lesson.spread([r[c] for r in lesson.select(rows, arm=name)]) for name, c in cells]
        lines.append(f"| `{arm}` | `{right}` | {' | '.join(spreads)} | {tells} | {verdict} |")
    return {"bugs": lines}


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
