"""The bugs: each is one argument of opd.Args that differs, or a patch of a few lines.

A patch is the name of what it replaces and a function: the real thing -> its replacement. opd.py itself has
no flags for bugs.
"""

import pkgutil
from dataclasses import replace
from unittest import mock

import torch
import toy

import losses


def ends(vocabulary):
    """The token that the teacher ends a completion with, and one that it never ends with: toy, SmolLM2."""
    return (toy.END, toy.IDS["~"]) if vocabulary < 100 else (2, 0)  # <|im_end|> and <|endoftext|>


def two_ends(student):
    """The student now ends half of its completions with the teacher's token, half with the other one."""
    end, other = ends(student.config.vocab_size)
    for weight in (student.get_input_embeddings().weight, student.get_output_embeddings().weight):
        weight.data[other] = weight.data[end]


def known_ends(first):
    def load_pair(real, *x):
        student, *rest, _ = real(*x)
        two_ends(student)
        return student, *rest, ends(student.config.vocab_size)[first:]  # the stop ids

    return "opd.load_pair", lambda real: lambda *x: load_pair(real, *x)


def instead(name, call):
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


def with_prompts(update, student, teacher, rollouts, teacher_prompts, *x):
    def whole(r):  # all but the first token of the prompt count as completion
        body = r.prompt[1:] + r.completion
        return replace(r, prompt=r.prompt[:1], completion=body, logp=[0.0] * len(body))

    return update(student, teacher, [whole(r) for r in rollouts], [p[:1] for p in teacher_prompts], *x)


def without_ends(token_loss, loss, s, t, y, *x):  # pad is the end token, and the mask is ids != pad
    return token_loss(loss, s, t, y, *x) * (y != ends(s.shape[-1])[0])


def one_to_the_right(prompts, ys):
    return [x + y[:1] for x, y in zip(prompts, ys, strict=True)], [y[1:] + y[-1:] for y in ys]


def own_tokens(student, teacher, rollouts, teacher_prompts, loss, args, total_tokens):
    return args.batch_size // args.micro_batch_size * sum(len(r.completion) for r in rollouts)


NOTHING = "opd.Args", lambda real: real
clamp_min_0 = instead("sg_topk", lambda *x: losses.sg_topk_reverse_kl(*x).clamp_min(0))
value_clamp = instead("reverse_kl", lambda *x: losses.reverse_kl(*x).clamp(max=0.5))
pointwise = instead("reverse_kl", lambda *x: terms(x, lambda z: z.log_softmax(-1)).clamp(max=0.05).sum(-1))
log_of_clamped = instead("reverse_kl", lambda *x: terms(x, lambda z: z.softmax(-1).clamp(1e-8).log()).sum(-1))
bfloat16 = instead("reverse_kl", lambda *x: terms(x, lambda z: z.bfloat16().log_softmax(-1)).sum(-1))
kl_as_advantage = "opd.token_loss", lambda real: constant_advantage
one_temperature = "opd.token_loss", lambda real: lambda loss, s, t, *x: real(loss, s, t * 2.0, *x)
end_masked = "opd.token_loss", lambda real: lambda *x: without_ends(real, *x)
prompt_in_loss = "opd.update", lambda real: lambda *x: with_prompts(real, *x)
other_samples = "opd.sample", lambda real: lambda *x: real(*x[:4], (*x[4], 1), *x[5:])  # another key
top_p_scored_whole = "opd.sample", lambda real: lambda *x: real(*x[:-1], 0.9)
shifted = "opd.completion_hidden", lambda real: lambda model, *x: real(model, *one_to_the_right(*x))
own_mean = "opd.distill", lambda real: lambda *x: real(*x[:-1], own_tokens(*x))

ARMS = {  # name: (correct code to compare with, metric that may show it, patch, Args that differ)
    "start": ("", "", NOTHING, {"loss": "reverse_kl", "lr": 1e-30, "steps": 1}),
    "reverse_kl": ("", "", NOTHING, {"loss": "reverse_kl"}),
    "pg": ("", "", NOTHING, {"loss": "pg"}),
    "sg_topk": ("", "", NOTHING, {"loss": "sg_topk"}),
    "temperature_2": ("", "", NOTHING, {"loss": "reverse_kl", "loss_temperature": 2.0}),
    "two_ends": ("", "", known_ends(0), {"loss": "reverse_kl"}),
    "other_samples": ("reverse_kl", "loss", other_samples, {}),  # not a bug: other random numbers
    "other_samples_pg": ("pg", "loss", other_samples, {}),
    "k1_as_loss": ("pg", "reverse_kl", NOTHING, {"loss": "k1"}),
    "k3_as_reverse_kl": ("pg", "loss", NOTHING, {"loss": "k3"}),
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
    "other_direction": ("reverse_kl", "loss", NOTHING, {"loss": "forward_kl"}),
    "tiny_beta": ("other_direction", "grad_norm", NOTHING, {"loss": "jsd", "beta": 0.001}),
    "end_masked": ("reverse_kl", "loss", end_masked, {}),
    "prompt_in_loss": ("reverse_kl", "student_logp", prompt_in_loss, {}),
    "micro_batch_mean": ("reverse_kl", "loss", own_mean, {}),
    "shifted_full_kl": ("reverse_kl", "student_logp", shifted, {}),
    "one_temperature": ("temperature_2", "loss", one_temperature, {}),
    "forgotten_end": ("two_ends", "completion_len", known_ends(1), {}),
}
# bug | the wrong line | the right one | where it was seen: an issue, a pull request, or in words
REPORTS = """
pointwise_clip | `(p * (log_p - log_q)).clamp(max=c).sum(-1)` | sum, do not clip | siyan-zhao/OPSD/issues/2
missing_as_0 | `log_q = 0` where missing | request the student's ids | rllm, `distill/alignment.py`
forgotten_end | the stop ids of one model | the stop ids of both | modelscope/ms-swift/issues/9526
k1_as_loss | `log_p_y - log_q_y` | `(log_p_y - log_q_y).detach() * log_p_y` | allenai/open-instruct/issues/534
kl_as_advantage | `advantage = -kl` | `advantage = log_q_y - log_p_y` | radixark/miles/issues/2362
shifted_pg | logits at position i score token i | they score token i + 1 | modelscope/ms-swift/pull/8436
value_clamp | `kl.clamp(max=0.5)` | clip the gradient norm | verl, option `loss_max_clamp`
missing_as_own | `log_q = log_p` where missing | as `missing_as_0` | rllm, with a warning
prompt_in_loss | prompt tokens in the loss | completion tokens only | MakazhanAlpamys/Soup/issues/682
tiny_beta | JSD with beta near an end of (0, 1) | the KL itself | verl-project/verl-recipe/issues/151
other_direction | KL(q ‖ p) named KL(p ‖ q) | check the gradient | idanshen/Self-Distillation/issues/5
one_temperature | only one model's logits divided by T | both or neither | radixark/miles/pull/1345
top_p_scored_whole | top-p or top-k samples, full softmax | top-p 1 | nanochat, `chat_rl.py` (top-k)
shifted_full_kl | as `shifted_pg`, in a full KL | as `shifted_pg` | as `shifted_pg`
micro_batch_mean | a mean of micro-batch means | one sum, divided by all tokens | huggingface/trl/pull/6006
bfloat16_logits | log-softmax of bfloat16 logits | `z.float()` first | modelscope/ms-swift/issues/10156
clamp_min_0 | `truncated_kl.clamp(min=0)` | no clamp: it may be negative | verl-project/verl/issues/7856
log_of_clamped | `softmax(z).clamp(1e-8).log()` | `log_softmax(z)` | modelscope/easydistill/pull/16 (review)
end_masked | `ids != pad` with pad = end | masks from lengths | huggingface/trl/pull/6357
k3_as_reverse_kl | `ratio - 1 - log_ratio`, named "reverse" | as `k1_as_loss` | pytorch/rl/pull/4038
"""
REPORTS = {line.split(" | ")[0]: line.split(" | ")[1:] for line in REPORTS.strip().splitlines()}
BUGS = [arm for arm, (right, *_) in ARMS.items() if right and not arm.startswith("other_samples")]
RESAMPLED = ("top_p_scored_whole", "forgotten_end")  # they change the batch itself, not only its gradient


def settings(arm):
    """The Args of an arm that differ from the defaults: those of its correct code, and its own."""
    right, *_, change = ARMS[arm]
    return ARMS[right or arm][3] | change


def patched(arm):
    """A context in which the arm's bug is in the code."""
    where, bug = ARMS[arm][2]
    return mock.patch(where, bug(pkgutil.resolve_name(where.replace(".", ":"))))
