"""On-policy distillation (OPD) in one file.

The student samples completions. A frozen teacher scores every prefix that the student visited. The student
minimises a per-token divergence between the two next-token distributions. No reward, critic or replay buffer.

    torchrun opd.py                                                    # a laptop: the toy pair, one minute
    torchrun opd.py --student S --teacher T --data prompts.jsonl --loss sg_topk                     # one GPU
    torchrun --nproc_per_node 8 opd.py ...                                                         # one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 opd.py ... # on each

Part 1 is the algorithm, top down: Args, train, sample, completion_hidden (the causal shift), LOSSES, distill,
update, evaluate. Part 2 is what a run needs: ranks, data, models, checkpoints, log, command line, memory and
speed. Left out on purpose: an inference engine, a teacher server, sharded weights (every rank holds both
models), tokenizers that differ, multi-turn and multimodal prompts. README.md says where to find those.

Shapes: B sequences, R sampled rows, T completion positions, L positions of prompt and completion, V tokens
of the vocabulary, K top-k, D hidden size, N completion tokens of a micro-batch (packed, no padding), n those
of a chunk of it. As an argument, n is the number of completions of each prompt.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, get_args

import datasets
import huggingface_hub
import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.hf_argparser import string_to_bool
from transformers.modeling_layers import GradientCheckpointingLayer

import losses

# ============================================================================================================
# Part 1: the algorithm
# ============================================================================================================


def arg(default, help, within=None, group=None):
    """A flag: default, help, the interval or choices that it must be within, the --help group it begins."""
    return field(default=default, metadata={"help": help, "within": within, "group": group})


@dataclass
class Args:
    student: str = arg("toy", "model to train: Hugging Face name, folder, or toy", None, "models and data")
    teacher: str = arg("toy", "frozen model that scores: a name or folder with the same tokenizer; or toy")
    data: str = arg("toy", "prompts: .jsonl, .json, .parquet, a folder saved by datasets, a hub name; or toy")
    eval_data: str | None = arg(None, "held-out prompts, with a column answer; toy data brings its own")
    chat_template_kwargs: str | None = arg(None, 'for chat templates, as JSON: {"enable_thinking": false}')
    teacher_template: str = arg(
        "student", "whose chat template the teacher reads; own: it was tuned on another format", "student|own"
    )
    max_prompt_tokens: int = arg(256, "a longer prompt ends the run: none is ever truncated", "[1,inf)")
    max_new_tokens: int = arg(256, "a completion is truncated at this length", "[1,inf)")
    loss: str = arg("sg_topk", "one of the losses listed at the end", group="loss")
    topk: int = arg(20, "k of the top-k losses and of student_mass, teacher_mass, overlap", "[1,inf)")
    topk_source: str | None = arg(None, "whose top k; default by loss", "student|teacher|union|intersection")
    beta: float = arg(0.5, "jsd: weight of the teacher in the mixture; at the ends use a plain KL", "(0,1)")
    kl_weight: float = arg(0.5, "mixed_kl: weight of the forward KL; the reverse KL has the rest", "[0,1]")
    alpha: float = arg(0.1, "skew_*: share of its first distribution mixed into its second", "(0,1)")
    gamma: float = arg(0.0, "pg: discount of later tokens in the advantage; 1 = sequence-level KL", "[0,1]")
    mu: float = arg(0.5, "adaptive_kl: the teacher's head is its likeliest tokens up to this mass", "(0,1)")
    tau: float = arg(1.0, "entropy_aware_kl: adds forward KL above this teacher entropy, nats", "[0,inf)")
    eta: float = arg(1.0, "entropy_aware_kl: weight of that forward KL", "[0,inf)")
    pg_baseline: str = arg("none", "pg: kl centres the advantage on the prefix's reverse KL", "none|kl")
    pg_clip_reward: float | None = arg(None, "pg: bounds |log q - log p| of a token; biased", "(0,inf)")
    loss_temperature: float = arg(1.0, "student AND teacher logits are divided by this", "[1e-6,inf)")
    batch_size: int = arg(64, "prompts per step, over all ranks", "[1,inf)", "sampling")
    samples_per_prompt: int = arg(1, "completions of each prompt", "[1,inf)")
    temperature: float = arg(1.0, "sampling temperature, in training and evaluation", "[1e-6,inf)")
    top_p: float = arg(1.0, "nucleus sampling; the sampled losses (k1 k2 k3 pg) need 1", "(0,1]")
    lmbda: float = arg(1.0, "share of batches sampled from the student, others from the teacher", "[0,1]")
    sft_steps: int = arg(0, "first N steps: cross-entropy on teacher samples", "[0,inf)")
    seed: int = arg(0, "all randomness is a pure function of this and of what it is drawn for", "[0,4e18]")
    steps: int = arg(150, "total steps, SFT steps included", "[1,1e6)", "optimisation")
    lr: float | None = arg(None, "peak rate (default: 3e-4 for the toy student, else 2e-6)", "(0,1e36)")
    lr_schedule: str = arg("constant", "linear and cosine fall to 0", "constant|linear|cosine")
    warmup_steps: int = arg(5, "linear warm-up from 0", "[0,inf)")
    weight_decay: float = arg(0.0, "AdamW's, on all weights", "[0,inf)")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this global norm; inf = never", "(0,inf]")
    updates_per_rollout: int = arg(1, "optimizer steps on each batch; pg clips its ratios", "[1,inf)")
    ratio_clip: float = arg(0.2, "pg: the ratio p / p when sampled is clipped to 1 -+ this", "(0,inf)")
    micro_batch_size: int = arg(16, "rollouts scored at once; no effect on the result", "[1,inf)", "memory")
    chunk_tokens: int = arg(512, "tokens whose logits exist at one time; no effect on the result", "[1,inf)")
    gradient_checkpointing: bool = arg(False, "recompute activations in backward: less memory, more time")
    dtype: str = arg("auto", "of matrix products; student weights stay float32", "auto|float32|bfloat16")
    device: str = arg("auto", "where to run", "auto|cpu|cuda")
    out: str = arg("runs/opd", "folder for metrics and models", group="evaluation and saving")
    eval_every: int = arg(50, "evaluate at both ends and every N steps; 0 = at both ends only", "[0,inf)")
    eval_samples: int = arg(1, "completions of each held-out prompt: avg@n and pass@n", "[1,inf)")
    save_every: int = arg(0, "write a checkpoint every N steps and after the last; 0 = only then", "[0,inf)")
    show_samples: int = arg(0, "print N of the samples of each evaluation", "[0,8]")
    keep: int = arg(2, "number of newest checkpoints to keep", "[1,inf)")
    resume: bool = arg(False, "continue the run in --out from its newest whole checkpoint")
    dry_run: bool = arg(False, "show what student and teacher read, and the memory needed; then stop")


class Teacher:
    """The teacher as train sees it; the functions that compute get its model. This one is frozen and reads
    the student's prompt; opsd.py's reads privileged information, and its weights may follow the student's."""

    task, columns = "opd", []  # which toy --student toy builds; columns that the data must have beside prompt
    moves = False  # whether the weights change, and so belong in a checkpoint

    def __init__(self, args):
        self.args, self.dtype, self.model = args, args.dtype, None

    def source(self, path):  # where its weights are; None if it is the student itself
        return path["teacher"]

    def prompt(self, tokenizer, rows, i, prompt):  # -> token ids that it reads for row i
        if self.args.teacher_template == "student":
            return prompt
        return encode_prompt(self.model.tokenizer, rows[i]["prompt"], self.args.max_prompt_tokens)

    def begin(self, student, data, held_out, tokenizer, stop_ids):
        """Called once, with the initial weights."""

    def follow(self, student, step):
        """Called after each step."""

    def measure(self, row, evaluating):  # -> metrics of its own, given those of the step
        return {}


def train(args, make_teacher=Teacher):
    """Distil as the arguments say; returns the rows of metrics.jsonl."""
    # What the flags, the models and the first 1,000 rows can show is found before a byte is written.
    args, device = set_up(args)
    started, out, teacher = clock(device), Path(args.out), make_teacher(args)
    path = resolve_paths(args, teacher.task, device)
    sources, teacher_args = (path["student"], teacher.source(path)), replace(args, dtype=teacher.dtype)
    student, teacher.model, tokenizer, stop_ids = load_pair(*sources, teacher_args, device)
    held_out = list(Examples(path, "eval_data", tokenizer, teacher, args)) if args.eval_data else []
    data = Examples(path, "data", tokenizer, teacher, args)
    if args.dry_run:
        return describe(student, teacher.model, data, tokenizer, stop_ids, args)
    watched = held_out
    if args.eval_every and not held_out:  # the first training prompts, for samples.jsonl only
        watched = [data[i] for i in range(min(8, len(data)))]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    with autocast:
        teacher.begin(student, data, held_out, tokenizer, stop_ids)
    options = dict(betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, **options)
    done = resume(student, teacher, optimizer, args)  # steps already taken: 0 unless --resume
    history = begin_log(out, done)

    steps, quiet = range(done + 1, args.steps + 1), ranks()[0] > 0
    bar = tqdm(steps, initial=done, total=args.steps, disable=quiet, unit="step")

    def evaluated(row):  # the row, with an evaluation of the student and what the teacher measures
        with autocast:
            if watched:
                scores, samples = evaluate(student, teacher.model, watched, tokenizer, stop_ids, args)
                row = {**row, **(scores if held_out else {})}
                record_samples(samples, row, out, args)
            row.update(teacher.measure(row, evaluating=True))
        bar.set_description(f"accuracy {row['eval_accuracy']:.3f}" if "eval_accuracy" in row else None)
        return row

    if done == 0 and watched:
        row = evaluated({"step": 0})
        if held_out:
            record(history, row, out)
    with deferred_signals() as signals, bar:
        for step in bar:
            begin, seconds = clock(device), {}
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, args)

            # 1. Sample from the student; in SFT steps and a share 1 - lmbda of the others, from the teacher.
            with saving_first(step - 1, out, student, teacher, tokenizer, optimizer, args):
                slots, batch = batch_of(step, data, args)
            on_policy = step > args.sft_steps and uniforms(args.seed, step).item() < args.lmbda
            writer = student if on_policy else teacher.model
            prompts = [x.prompt if on_policy else x.teacher_prompt for x in batch]
            n, limits = args.samples_per_prompt, (args.max_new_tokens, args.temperature, args.top_p)
            with autocast, timed(seconds, "sample_s", device):
                rollouts = sample(writer, prompts, n, stop_ids, (args.seed, step), slots, *limits)

            # 2. Score and update: both models score the same completion tokens, each after its own prompt.
            examples = [x for x in batch for _ in range(n)]  # one for each rollout
            # Whoever sampled a rollout, the student reads it after its own prompt.
            rollouts = [replace(r, prompt=x.prompt) for r, x in zip(rollouts, examples, strict=True)]
            teacher_prompts = [x.teacher_prompt for x in examples]
            loss = LOSSES[args.loss] if step > args.sft_steps else SFT
            updates = []
            for _ in range(args.updates_per_rollout):
                inputs = (student, teacher.model, rollouts, teacher_prompts, loss, optimizer, args, step)
                with autocast:  # entered for each update: it caches bfloat16 copies of the weights
                    updates.append(update(*inputs))
            teacher.follow(student, step)

            # 3. Evaluate, log, save. Of several updates, the first scored the weights that sampled.
            row = {"step": step, **updates[0], **rollout_metrics(rollouts, device), **seconds}
            row.update(teacher.measure(row, evaluating=False), lr=lr_at(step, args))
            row.update(tokens_per_s=row["tokens"] / (clock(device) - begin), peak_mem_gb=peak_gb(device))
            stop = all_reduce(torch.tensor(len(signals), device=device)).item() > 0  # on any rank
            last = step == args.steps
            if last or (args.eval_every and step % args.eval_every == 0):
                row = evaluated(row)
            record(history, row, out)
            bar.set_postfix_str(f"KL {row['reverse_kl']:.4f}, {row['tokens_per_s']:.0f} tokens/s")
            if last or stop or (args.save_every and step % args.save_every == 0):
                save_checkpoint(out, step, student, teacher, tokenizer, optimizer, args)
            if stop:
                break
    finish(out, history, student, tokenizer, args, clock(device) - started)
    return history


# ----------------------------------------------------------------------------------------------------- sample
@dataclass
class Rollout:
    prompt: list[int]  # token ids
    completion: list[int]  # token ids, at least one; the stop token that ended it is part of it
    logp: list[float]  # of each completion token, under the distribution that it was drawn from
    ended: bool  # by a stop token; False: truncated at max_new_tokens


def sampling_logp(logits, temperature, top_p):
    """Log-probabilities [...,V] of the sampling distribution: tempered, cut to the nucleus, renormalised."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        sorted_p, order = logp.exp().sort(dim=-1, descending=True)
        outside = sorted_p.cumsum(dim=-1) - sorted_p >= top_p  # the token that crosses top_p stays
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
        logp = torch.log_softmax(logp.masked_fill(outside, -math.inf), dim=-1)
    return logp


@torch.no_grad()
def sample(model, prompts, n, stop_ids, key, prompt_keys, max_new_tokens, temperature=1.0, top_p=1.0):
    """n completions of each prompt (lists of token ids) -> list of Rollouts, the n of the first prompt first.

    Completion i of a prompt draws its token at position t with uniforms(*key, prompt's key, i, t): the same
    number in any order, batch size and number of ranks. Prompts are left-padded, and prefilled once for their
    n completions; the rows that finished leave the batch.
    """
    device, width = model.device, max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # [B]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B,width]
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()  # [B,width], from lengths
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)  # [B,width]
    cache = DynamicCache(config=model.config)
    forward = functools.partial(body_of(model), past_key_values=cache, use_cache=True)
    hidden = forward(input_ids=ids, attention_mask=mask, position_ids=position).last_hidden_state
    logits = project(model, hidden[:, -1]).repeat_interleave(n, dim=0)  # [R,V]
    cache.reorder_cache(torch.arange(len(prompts), device=device).repeat_interleave(n))
    mask = mask.repeat_interleave(n, dim=0)  # [R,width]
    position = lengths.repeat_interleave(n)[:, None]  # [R,1]
    row_key = torch.tensor([(k, i) for k in prompt_keys for i in range(n)], device=device)  # [R,2]
    rollouts = [Rollout(prompt, [], [], False) for prompt in prompts for _ in range(n)]
    alive = rollouts  # those still in the batch; it and the tensors of its rows shrink together
    for t in range(max_new_tokens):
        logp = sampling_logp(logits, temperature, top_p)  # [R,V]
        cdf = logp.double().exp().cumsum(dim=-1)  # [R,V]; in float32 150,000 terms add up to 1e-5 off
        u = uniforms(*key, *row_key.unbind(-1), t)[:, None] * cdf[:, -1:]  # [R,1]
        token = torch.searchsorted(cdf, u, right=True)  # [R,1]
        token = token.clamp(max=logp.shape[1] - 1)  # u may have been rounded up to the end of the cdf
        drawn = zip(alive, token[:, 0].tolist(), logp.gather(-1, token)[:, 0].tolist(), strict=True)
        for rollout, y, log_p in drawn:
            rollout.completion.append(y)
            rollout.logp.append(log_p)
            rollout.ended = y in stop_ids
        stay = [i for i, rollout in enumerate(alive) if not rollout.ended]
        if not stay or t + 1 == max_new_tokens:
            break
        if len(stay) < len(alive):
            alive, kept = [alive[i] for i in stay], torch.tensor(stay, device=device)
            cache.reorder_cache(kept)
            token, mask, position, row_key = token[kept], mask[kept], position[kept], row_key[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # [R,width+t+1]
        hidden = forward(input_ids=token, attention_mask=mask, position_ids=position).last_hidden_state
        logits, position = project(model, hidden[:, 0]), position + 1  # [R,V], [R,1]
    return rollouts


# ------------------------------------------------------------------------------------------------------ score
def completion_hidden(model, prompts, completions):
    """The hidden states that predict each completion token, [N,D], one completion after the other.

    THE causal shift is here: the state at position i predicts token i + 1. A completion that starts at
    position P is predicted from P - 1 on; its last token predicts nothing that is needed and is not fed.
    A row is a prompt and its completion, padded on the right. Causal attention never looks right, so no
    attention mask is needed and no token id is special. Where several completions of a prompt share a row,
    each has the positions that it would have alone, and a mask lets it see the prompt and itself.
    """
    rows, states = [], []
    for b, shared in enumerate(shared_rows(model, prompts, completions)):
        prompt = prompts[shared[0]]
        row = [(y, t, 0) for t, y in enumerate(prompt)]  # token id, position, part: 0 is the prompt
        for part, i in enumerate(shared, start=1):  # 1, 2, ... are its completions
            fed = completions[i][:-1]
            states += [(b, len(prompt) - 1), *((b, len(row) + t) for t in range(len(fed)))]
            row += [(y, len(prompt) + t, part) for t, y in enumerate(fed)]
        rows.append(row)
    width = max(map(len, rows))
    rows = [row + [(0, 0, -1)] * (width - len(row)) for row in rows]
    ids, position, part = torch.tensor(rows, device=model.device).unbind(-1)  # [B,L] each
    options = {}
    if len(rows) < len(prompts):
        causal = torch.ones(width, width, dtype=torch.bool, device=model.device).tril()  # [L,L]
        seen = causal & ((part[:, :, None] == part[:, None]) | (part[:, None] == 0))  # [B,L,L]
        options = {"attention_mask": seen[:, None], "position_ids": position}
    hidden = body_of(model)(input_ids=ids, use_cache=False, **options).last_hidden_state  # [B,L,D]
    return hidden[torch.tensor(states, device=model.device).unbind(-1)]  # [N,D]


# name -> (family, call). What a call is given, all at the loss temperature (sampled: the sampler's as well):
#   full     args, student_logits [n,V], teacher_logits [n,V]
#   top-k    args, student_logits [n,V], teacher_topk_logp [n,K], topk_ids [n,K], valid [n,K]
#   sampled  args, student_logp [n], teacher_logp [n], advantage [n], behaviour_logp [n]
# A new loss is one function in losses.py, one row here, and its tests.
LOSSES = {
    "forward_kl": ("full", lambda args, *x: losses.forward_kl(*x)),
    "reverse_kl": ("full", lambda args, *x: losses.reverse_kl(*x)),
    "mixed_kl": ("full", lambda args, *x: losses.mixed_kl(*x, weight=args.kl_weight)),
    "jsd": ("full", lambda args, *x: losses.jsd(*x, beta=args.beta)),
    "skew_forward_kl": ("full", lambda args, *x: losses.skew_forward_kl(*x, alpha=args.alpha)),
    "skew_reverse_kl": ("full", lambda args, *x: losses.skew_reverse_kl(*x, alpha=args.alpha)),
    "adaptive_kl": ("full", lambda args, *x: losses.adaptive_kl(*x, mu=args.mu)),
    "entropy_aware_kl": ("full", lambda args, *x: losses.entropy_aware_kl(*x, tau=args.tau, eta=args.eta)),
    "tvd": ("full", lambda args, *x: losses.tvd(*x)),
    "topk": ("top-k", lambda args, *x: losses.topk_reverse_kl(*x)),
    "sg_topk": ("top-k", lambda args, *x: losses.sg_topk_reverse_kl(*x)),
    "norm_topk": ("top-k", lambda args, *x: losses.norm_topk_reverse_kl(*x)),
    "tail_topk": ("top-k", lambda args, *x: losses.tail_topk_reverse_kl(*x)),
    "topk_forward": ("top-k", lambda args, *x: losses.topk_forward_kl(*x)),
    "norm_topk_forward": ("top-k", lambda args, *x: losses.norm_topk_forward_kl(*x)),
    "tail_topk_forward": ("top-k", lambda args, *x: losses.tail_topk_forward_kl(*x)),
    "k1": ("sampled", lambda args, p, q, *_: losses.k1(p, q)),
    "k2": ("sampled", lambda args, p, q, *_: losses.k2(p, q)),
    "k3": ("sampled", lambda args, p, q, *_: losses.k3(p, q)),
    "pg": ("sampled", lambda args, p, q, adv, old: losses.policy_gradient(p, adv, old, args.ratio_clip)),
}
SFT = ("sampled", lambda args, p, *_: -p)  # cross-entropy of the sampled tokens, which are the teacher's


def token_loss(loss, student_logits, teacher_logits, tokens, advantage, behaviour_logp, args):
    """One loss per token, [n], from the logits [n,V] of both models."""
    (family, call), s, t = loss, student_logits, teacher_logits
    if args.loss_temperature != 1:  # 1 would copy [n,V] for nothing
        s, t = s / args.loss_temperature, t / args.loss_temperature  # [n,V]; both, or neither
    if family == "full":
        return call(args, s, t)
    if family == "top-k":
        topk_ids, teacher_topk_logp, valid = losses.topk_support(s, t, args.topk, args.topk_source)
        return call(args, s, teacher_topk_logp, topk_ids, valid)
    student_logp, teacher_logp = (x.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] for x in (s, t))  # [n]
    return call(args, student_logp, teacher_logp, advantage, behaviour_logp)


@torch.no_grad()
def advantages(student, hidden, teacher, teacher_hidden, tokens, sizes, args):
    """pg's advantage of each completion token, [N]. It sums along a row, so no single chunk can give it."""
    columns = []
    for start in range(0, len(tokens), args.chunk_tokens):
        chunk = slice(start, start + args.chunk_tokens)
        s = project(student, hidden[chunk]) / args.loss_temperature  # [n,V]
        t = project(teacher, teacher_hidden[chunk]) / args.loss_temperature  # [n,V]
        logps = (x.log_softmax(-1).gather(-1, tokens[chunk, None])[:, 0] for x in (s, t))  # [n] each
        columns.append(torch.stack([*logps, losses.reverse_kl(s, t)], dim=-1))  # [n,3]
    rows = torch.nn.utils.rnn.pad_sequence(torch.cat(columns).split(sizes), batch_first=True)  # [B,T,3]
    ends = torch.tensor(sizes, device=hidden.device)[:, None]  # [B,1]
    inside = torch.arange(rows.shape[1], device=hidden.device) < ends  # [B,T]
    p, q, kl = rows.unbind(-1)  # log p(y), log q(y), KL(p || q), [B,T] each
    baseline = kl if args.pg_baseline == "kl" else None
    return losses.reverse_kl_advantage(p, q, inside, args.gamma, baseline, args.pg_clip_reward)[inside]


TOKEN_METRICS = (
    "loss reverse_kl forward_kl student_entropy teacher_entropy student_mass teacher_mass "
    "student_logp teacher_logp overlap"
).split()


@torch.no_grad()
def token_metrics(student_logits, teacher_logits, tokens, args):
    """All TOKEN_METRICS after the loss, of each token [9,n]: exact, full vocabulary, temperature 1."""
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)  # [n,V]
    p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
    topk_ids, _, valid = losses.topk_support(log_p, log_q, args.topk, args.topk_source)  # [n,K]
    shared = losses.topk_support(log_p, log_q, args.topk, "intersection")[2]  # [n,topk]
    kls = (p * gap).sum(-1), -(q * gap).sum(-1)  # [n] each, as all that follows
    entropies = -(p * log_p).sum(-1), -(q * log_q).sum(-1)
    masses = ((x.gather(-1, topk_ids) * valid).sum(-1) for x in (p, q))
    logps = (x.gather(-1, tokens[:, None])[:, 0] for x in (log_p, log_q))
    return torch.stack([*kls, *entropies, *masses, *logps, shared.float().mean(-1)])


def distill(student, teacher, rollouts, teacher_prompts, loss, args, total_tokens):
    """Both models score a micro-batch; adds grad(sum of token losses / total_tokens) to the student's .grad.

    teacher_prompts: what the teacher reads in place of each rollout's prompt (the same in OPD, more in OPSD).
    total_tokens: completion tokens of the whole step, over all micro-batches and ranks: ONE mean, however the
    step is split. None: measure only. Returns TOKEN_METRICS of each token [10,N], float64, and seconds.

    No [B,T,V] tensor ever exists: the hidden states are packed, then projection, loss and their backward run
    chunk by chunk, down to the hidden states; the body's backward runs once, from the collected gradients.
    """
    device, training, seconds = student.device, total_tokens is not None, {}
    prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
    tokens = torch.tensor([y for r in rollouts for y in r.completion], device=device)  # [N]
    behaviour_logp = torch.tensor([x for r in rollouts for x in r.logp], device=device)  # [N]
    with timed(seconds, "teacher_s", device), torch.no_grad():
        teacher_hidden = completion_hidden(teacher, teacher_prompts, completions)  # [N,D], the teacher's D
    with timed(seconds, "student_s", device), torch.set_grad_enabled(training):
        with recomputing(student, training and args.gradient_checkpointing):
            hidden = completion_hidden(student, prompts, completions)  # [N,D]
    advantage = torch.zeros_like(behaviour_logp)  # [N]
    if loss is LOSSES["pg"]:
        sizes = [len(completion) for completion in completions]
        advantage = advantages(student, hidden, teacher, teacher_hidden, tokens, sizes, args)

    metrics, hidden_grad = [], torch.empty_like(hidden)  # [N,D]; one tensor: pieces would fragment the heap
    for start in range(0, len(tokens), args.chunk_tokens):
        chunk = slice(start, start + args.chunk_tokens)
        with timed(seconds, "teacher_s", device), torch.no_grad():
            teacher_logits = project(teacher, teacher_hidden[chunk])  # [n,V]
        with timed(seconds, "student_s", device), torch.set_grad_enabled(training):
            leaf = hidden[chunk].detach().requires_grad_(training)  # [n,D]
            logits = project(student, leaf)  # [n,V]
            inputs = (logits, teacher_logits, tokens[chunk], advantage[chunk], behaviour_logp[chunk])
            token_losses = token_loss(loss, *inputs, args)  # [n]
            if training:
                (token_losses.sum() / total_tokens).backward()
                hidden_grad[chunk] = leaf.grad
        others = token_metrics(logits.detach(), teacher_logits, tokens[chunk], args)
        metrics.append(torch.cat([token_losses.detach()[None], others]).double())
    if training:
        with timed(seconds, "student_s", device):
            hidden.backward(hidden_grad)
    return torch.cat(metrics, dim=1), seconds


# ---------------------------------------------------------------------------------------- update and evaluate
def update(student, teacher, rollouts, teacher_prompts, loss, optimizer, args, step):
    """One optimizer step on the rollouts of all ranks -> metrics: means over tokens, seconds of this rank."""
    device, seconds = student.device, {}
    total_tokens = all_reduce(torch.tensor(sum(len(r.completion) for r in rollouts), device=device)).item()
    optimizer.zero_grad()
    sums = torch.zeros(len(TOKEN_METRICS), dtype=torch.float64, device=device)
    order = by_length(student, rollouts)
    for start in range(0, len(order), args.micro_batch_size):
        micro = order[start : start + args.micro_batch_size]
        ours, theirs = [rollouts[i] for i in micro], [teacher_prompts[i] for i in micro]
        metrics, spent = distill(student, teacher, ours, theirs, loss, args, total_tokens)
        sums += metrics.sum(dim=1)
        seconds = {name: seconds.get(name, 0) + spent[name] for name in spent}
    # Data parallel (DDP): each rank has backpropagated its share of one global mean, so gradients add up.
    parameters = [p for p in student.parameters() if p.grad is not None]
    all_reduce(*(p.grad for p in parameters))
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
    means = dict(zip(TOKEN_METRICS, (all_reduce(sums) / total_tokens).tolist(), strict=True))
    check_finite(means, grad_norm, step, args)
    optimizer.step()
    return {**means, "grad_norm": grad_norm, "tokens": total_tokens, **seconds}


def evaluate(student, teacher, examples, tokenizer, stop_ids, args):
    """-> scores: eval_accuracy (avg@n), eval_pass (pass@n), eval_len and, given a teacher, eval_reverse_kl of
    all tokens and of each third of the completions; and the first 8 rollouts as text. The random numbers are
    the same every time: two evaluations differ by the weights alone."""
    n, (rank, world), limits = args.eval_samples, ranks(), (args.max_new_tokens, args.temperature, args.top_p)
    found, mine, key = [], range(rank, len(examples), world), (~args.seed, 0)  # < 0: not a key of training
    group = max(n, args.micro_batch_size, args.batch_size * args.samples_per_prompt // world) // n  # prompts
    for which in (mine[i : i + group] for i in range(0, len(mine), group)):
        rollouts = sample(student, [examples[i].prompt for i in which], n, stop_ids, key, which, *limits)
        rows = [(i, examples[i]) for i in which for _ in range(n)]  # of each rollout
        kls = [torch.empty(0)] * len(rollouts)  # [T] of each
        for k in range(0, len(rollouts) if teacher else 0, args.micro_batch_size):
            micro = slice(k, k + args.micro_batch_size)
            inputs = (rollouts[micro], [x.teacher_prompt for _, x in rows[micro]], LOSSES["reverse_kl"])
            metrics, _ = distill(student, teacher, *inputs, args, None)  # [10,N]
            kls[micro] = metrics[1].cpu().split([len(r.completion) for r in rollouts[micro]])  # reverse_kl
        found += [grade(*row, r, kl, tokenizer) for row, r, kl in zip(rows, rollouts, kls, strict=True)]
    found = gather(found)  # of all ranks
    return scores(found, n), [sample for row, *_, sample in found[::n] if row < 8]


# ============================================================================================================
# Part 2: what a run needs
# ============================================================================================================
def ranks():
    """-> rank and number of ranks, as torchrun says; one process alone is rank 0 of 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def set_up(args):
    """Fill in defaults, check the flags, join the process group that torchrun describes -> args, device."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    need(cuda or args.device != "cuda", "--device cuda: not available here; use cpu or auto")
    args = replace(
        args,
        lr=args.lr if args.lr is not None else 3e-4 if args.student == "toy" else 2e-6,
        dtype=args.dtype if args.dtype != "auto" else "bfloat16" if cuda else "float32",
        topk_source=args.topk_source or ("teacher" if args.loss.endswith("topk_forward") else "student"),
        eval_data=args.eval_data or ("toy" if args.data == "toy" else None),
    )
    check_args(args)
    quiet_libraries(args)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # NVIDIA's containers turn TF32 on: 10 bits of a logit
        torch.backends.cuda.enable_cudnn_sdp(False)  # its attention plans each new length: 90 ms a token
    else:
        keep_freed_memory()
    if (ranks()[1] > 1 or cuda and "RANK" in os.environ) and not dist.is_initialized():
        patience = timedelta(hours=2)  # nccl's 10 minutes are too few where rank 0 saves a large model
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    return args, device


def all_reduce(*tensors):
    """Sum over ranks, in place, all tensors in flight at once; each rank waits here -> the first tensor."""
    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
    return tensors[0]


def gather(entries):
    """The entries of all ranks in one list, by their first item."""
    parts = [entries] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, entries)
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry[0])


@contextlib.contextmanager
def deferred_signals():
    """SIGTERM and Ctrl-C are noted in the list that this yields, so that a step can finish. A second Ctrl-C
    kills; a second SIGTERM may come at once, from a torchrun that Slurm signals as well as its ranks."""
    noted = []

    def note(number, _):
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, note))
        yield noted


def uniforms(*key):
    """Uniform numbers in [0, 1), float64: a pure function of the key's integers (or int64 tensors), by
    splitmix64's mixer. Nothing is stored or advanced, so a draw depends on no other, nor on rank or batch."""
    x = torch.zeros((), dtype=torch.int64)
    for part in key:  # sums and products wrap at 2**64; `& mask` makes the arithmetic shift a logical one
        x = x + torch.as_tensor(part, dtype=torch.int64) - 0x61C8864680B583EB
        x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
        x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
        x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 11) & (2**53 - 1)).double() / 2**53


# ------------------------------------------------------------------------------------------------------- data
def resolve_paths(args, task, device):
    """--student, --teacher, --data, --eval_data -> {flag: path}; the toy is built once, by rank 0."""
    path = {flag: getattr(args, flag) for flag in ("student", "teacher", "data", "eval_data")}
    if "toy" in path.values():
        from tutorials import toy

        if ranks()[0] == 0:
            toy.build(task)
        all_reduce(torch.zeros(1, device=device))  # the other ranks wait here
        path = {flag: toy.build(task)[flag] if name == "toy" else name for flag, name in path.items()}
    return path


def load_rows(path, flag, columns):
    """The data set at a path, memory-mapped (its size does not matter), with at least these columns."""
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(path).suffix)
    remedy = "give a .jsonl, .json or .parquet file, a folder written by datasets.save_to_disk, or a hub name"
    with blame(f"--{flag} {path}", "cannot be read", f"{remedy} that can be reached, with at least one row"):
        if Path(path).is_dir():
            rows = datasets.load_from_disk(path)
        elif kind and not Path(path).is_file():
            raise FileNotFoundError("no such file")
        else:
            rows = datasets.load_dataset(kind or path, data_files=path if kind else None)
        if isinstance(rows, datasets.DatasetDict):
            found = [x for x in ("test", "validation") if x in rows] if flag == "eval_data" else []
            need(found or "train" in rows, f"no split train, only {', '.join(rows)}; add one")
            rows = rows[[*found, "train"][0]]
        need(len(rows), "the data set is empty; give at least one row")
        for column in columns:
            names = ", ".join(rows.column_names)
            need(column in rows.column_names, f"no column {column!r}, only {names}; add or rename it")
    return rows


class Example(NamedTuple):
    prompt: list[int]  # token ids that the student reads
    teacher_prompt: list[int]  # token ids that the teacher reads: the same in OPD, more in OPSD
    answer: str  # of a held-out row; "" if there is none


class Examples:
    """The rows of a data set, each encoded when it is read; the first 1,000 are checked at once."""

    def __init__(self, path, flag, tokenizer, teacher, args):
        columns = ["prompt", *["answer"] * (flag == "eval_data"), *teacher.columns]
        self.rows, self.where = load_rows(path[flag], flag, columns), f"--{flag} {path[flag]}"
        self.tokenizer, self.teacher, self.limit = tokenizer, teacher, args.max_prompt_tokens
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        n, found = min(len(self), 1000), []
        for i in range(n):
            self[i]  # encoded only to see that it can be
            row = self.rows[i]
            chat = [x["content"] for x in row["prompt"] if isinstance(x, dict)]  # a raw prompt may hold them
            text = str([chat, *map(row.get, ("answer", "solution", "privileged"))])
            if any(token in text for token in specials):
                found.append(i)
        if found:
            many = f"{len(found)} of the first {n} rows hold special tokens as text, row {found[0]} first"
            why = "they become control tokens, and may end a turn early on one side only"
            say(f"{self.where}: {many}; {why}", sys.stderr)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        with blame(self.where, "some text is not UTF-8", "convert the file", UnicodeDecodeError):
            row = self.rows[i]
        remedy = "give a string, or messages with role and content that the chat template accepts"
        with blame(f"{self.where}, row {i}", "the prompt cannot be encoded", remedy):
            prompt = encode_prompt(self.tokenizer, row["prompt"], self.limit)
            teacher_prompt = self.teacher.prompt(self.tokenizer, self.rows, i, prompt)
        return Example(prompt, teacher_prompt, "" if row.get("answer") is None else str(row["answer"]))


def encode_prompt(tokenizer, prompt, limit=math.inf):
    """Token ids of a string as it is, or of chat messages through the template, up to the assistant turn."""
    if isinstance(prompt, list):
        need(tokenizer.chat_template, "chat messages, but the tokenizer has no chat template; give strings")
        filled = prompt and all(m["role"] and m.get("content") for m in prompt)
        ids = filled and tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    else:
        need(isinstance(prompt, str), f"a prompt must be a string or a list of chat messages, not {prompt!r}")
        ids = prompt and tokenizer(prompt).input_ids
    need(ids, "the prompt is empty; remove the row")
    remedy = f"raise --max_prompt_tokens {limit} or remove the row"
    need(len(ids) <= limit, f"the prompt has {len(ids)} tokens; {remedy}")
    return ids


@functools.lru_cache(maxsize=2)
def epoch_order(n_rows, seed, epoch):
    """Each epoch reads the rows in an order of its own: a pure function of seed and epoch."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch * 1_000_003)).tolist()


def row_at(position, n_rows, seed):
    """The row at a position of the endless stream of epochs."""
    return epoch_order(n_rows, seed, position // n_rows)[position % n_rows]


def batch_of(step, data, args):
    """-> this rank's slots in the global batch, and their Examples; at a bad row all ranks fail alike."""
    (rank, world), size = ranks(), args.batch_size
    batch = [data[row_at((step - 1) * size + slot, len(data), args.seed)] for slot in range(size)]
    slots = range(rank * size // world, (rank + 1) * size // world)
    return slots, [batch[slot] for slot in slots]


def extract_answer(text, otherwise=None):
    """A text's last \\boxed{...}, else one line after its last ####, else `otherwise` or its last number."""
    _, boxed, inside = text.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(inside if boxed else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return inside[:end].strip()
    marked = text.rpartition("####")[2].strip() if "####" in text else "\n"
    if "\n" not in marked:  # else it is a heading, or more text follows: the last number counts
        return marked
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return numbers[-1] if numbers and otherwise is None else otherwise


def is_correct(completion, answer):
    """Whether a completion gives the answer: as numbers if both are ("$1,024.0" = "1024"), else as words."""
    pair = extract_answer(completion), extract_answer(answer, otherwise=answer)
    ours, theirs = (re.sub(r"[$,]", "", x or "").strip().rstrip(".").lower() for x in pair)
    with contextlib.suppress(ValueError):
        return float(ours) == float(theirs)
    return pair[0] is not None and ours == theirs


def grade(row, example, rollout, kl, tokenizer):
    """-> what evaluate counts of one rollout, and its line of samples.jsonl; kl: of its tokens, or empty."""
    completion = tokenizer.decode(rollout.completion, skip_special_tokens=True)
    right = is_correct(completion, example.answer) if example.answer else None
    kls = [(x.sum().item(), len(x)) for x in (kl, *kl.tensor_split(3))]  # of the whole, of each third
    if row >= 8:  # only the first 8 are kept as text
        return row, right, len(rollout.completion), kls, None
    sample = {"row": row, "prompt": tokenizer.decode(example.prompt)}
    if example.teacher_prompt != example.prompt:
        sample["teacher_prompt"] = tokenizer.decode(example.teacher_prompt)
    sample.update(completion=tokenizer.decode(rollout.completion), answer=example.answer, right=right)
    if len(kl):
        sample.update(mean_kl=kl.mean().item(), max_kl=kl.max().item())
    return row, right, len(rollout.completion), kls, sample


def scores(found, n):
    """The metrics of an evaluation from what grade returned, n for each row, over all ranks."""
    _, right, lengths, kls, _ = zip(*found, strict=True)
    metrics = {"eval_len": sum(lengths) / len(lengths)}
    right = [x for x in right if x is not None]  # None: a row without an answer
    if right:
        passed = [any(right[i : i + n]) for i in range(0, len(right), n)]
        metrics.update(eval_accuracy=sum(right) / len(right), eval_pass=sum(passed) / len(passed))
    names = ("eval_reverse_kl", "eval_reverse_kl_first", "eval_reverse_kl_middle", "eval_reverse_kl_last")
    sums = torch.tensor(kls, dtype=torch.float64).sum(0)  # [4,2]: sum of the KLs, number of tokens
    for name, (total, tokens) in zip(names, sums.tolist(), strict=True):
        if tokens:  # a completion of one token has a first third only
            metrics[name] = total / tokens
    return metrics


# ----------------------------------------------------------------------------------------------------- models
def load_model(path, flag, dtype, device):
    """-> tokenizer, model in eval mode (no dropout, ever); safetensors only, no remote code."""
    remedy = "give a folder with config, safetensors and tokenizer, or a hub name that can be reached"
    with blame(f"--{flag} {path}", "cannot be loaded", remedy):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # unset, it would ask
        options = dict(use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        if info["missing_keys"]:  # they would be drawn at random, in silence
            raise ValueError(f"weights are missing: {' '.join(sorted(info['missing_keys'])[:3])} ...")
    model.get_input_embeddings().padding_idx = None  # it would get no gradient, and is often the end token
    model.tokenizer = tokenizer
    return tokenizer, model.to(device).eval()


def load_pair(student_path, teacher_path, args, device):
    """-> student, teacher, tokenizer, stop_ids; refuses models that cannot score the same tokens."""
    # bfloat16 rounds away an update below 1/256 of the weight, so the student's weights are float32.
    tokenizer, student = load_model(student_path, "student", torch.float32, device)
    teacher = student
    if teacher_path:  # None: the student is its own teacher, in one copy
        _, teacher = load_model(teacher_path, "teacher", getattr(torch, args.dtype), device)
        teacher.requires_grad_(False)
        teacher.get_output_embeddings().float()  # logits are made in float32: see project
    ours, theirs = ({i: token for token, i in m.tokenizer.get_vocab().items()} for m in (student, teacher))
    i = min((i for i in {*ours, *theirs} if ours.get(i) != theirs.get(i)), default=0)  # where they part
    differs = f"token {i} is {theirs.get(i)!r} here, {ours.get(i)!r} in --student {args.student}"
    remedy = "choose two models of one family"
    need(ours == theirs, f"--teacher {args.teacher}: not the student's tokenizer: {differs}; {remedy}")
    vocab, stop_ids = max(ours) + 1, set()
    need(args.topk <= vocab, f"--topk {args.topk}: must be in 1..{vocab}, the size of the vocabulary")
    for flag, model in (("student", student), ("teacher", teacher)):
        where = f"--{flag} {getattr(args, flag)}"
        with blame(where, "this architecture cannot be used", "use another model"):
            check_model(model, vocab)
        both = f"--max_new_tokens {args.max_new_tokens} and --max_prompt_tokens {args.max_prompt_tokens}"
        fits = args.max_prompt_tokens + args.max_new_tokens <= positions(model)
        need(fits, f"{both}: the {flag} has {positions(model)} positions for both together; lower one")
        # A base model and its instruct sibling end their turns differently. All ends count: a student that
        # learns an end from its teacher that is not in this list would never stop.
        ends = getattr(model.generation_config, "eos_token_id", None)  # one, a list, or None
        stop_ids |= {model.tokenizer.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])}
        template, options = model.tokenizer.apply_chat_template, json.loads(args.chat_template_kwargs or "{}")
        model.tokenizer.apply_chat_template = functools.partial(template, **options)  # for all later calls
    return student, teacher, tokenizer, sorted(i for i in stop_ids if i is not None and i < vocab)


def positions(model):
    """How many tokens a model can read; inf where its config sets no limit (XLNet says -1)."""
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    return limit if limit > 0 else math.inf


def body_of(model):
    """The part of a model that makes hidden states (Llama 4's base_model is the whole model)."""
    body = model.base_model if model.base_model is not model else model.model
    return getattr(body, "decoder", body)  # OPT's and Whisper's forward call this part of it


def project(model, hidden):
    """Logits [N,V], float32, of final hidden states [N,D]: the model's own forward, its body replaced by the
    states, so that all it does after its body (Granite's scale, Gemma's soft cap, a bias) is done. bfloat16
    logits have 8 bits, and their divergences errors as large as what is measured, some of them negative."""
    body, vocab = body_of(model), getattr(model, "vocab_in_use", None)
    if not hasattr(model, "body_output"):  # its forward may read more of the body's output than hidden states
        one = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        with torch.no_grad():
            model.body_output = body(input_ids=one, use_cache=False)
    states = replace(model.body_output, last_hidden_state=hidden.float()[None])  # [1,N,D]
    with replaced({body: lambda *_, **__: states}), torch.autocast(hidden.device.type, enabled=False):
        return model(inputs_embeds=states.last_hidden_state, use_cache=False).logits[0, :, :vocab].float()


@torch.no_grad()
def check_model(model, vocab, sample=sample):
    """UserError unless the log-probabilities of sample, calling body, cache and head one by one, are those
    of one forward of the whole model."""
    size = model.get_output_embeddings().weight.shape[0]
    need(size >= vocab, f"{vocab} tokens in the tokenizer, {size} in the model; resize its embeddings")
    model.vocab_in_use = vocab  # models of one family pad their vocabularies differently: both are cut
    bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    ids, gaps = list(range(min(8, vocab))), []
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        # Prompts of unequal length, and rows that finish early. `sample` is bound in the signature, so that a
        # tutorial's patch of it does not reach this check.
        rollouts = sample(model, [ids[:3], ids], 2, list(range(0, vocab, 8)), (0, 0), (0, 1), 6)
        rows = [torch.tensor(r.prompt + r.completion, device=model.device) for r in rollouts]
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [R,L], padded on the right
        logits = model(input_ids=rows, use_cache=False).logits[..., :vocab]
        own = logits.float().log_softmax(-1)  # [R,L,V], by one forward of the whole model
        need(not own.isnan().any(), "its logits are not finite: damaged weights; use another copy")
        for logp, r in zip(own, rollouts, strict=True):
            # The causal shift once more, written independently: this checks the other.
            drawn = zip(logp[len(r.prompt) - 1 :], r.completion, r.logp, strict=False)
            gaps += [abs(logp_t[y].item() - reported) for logp_t, y, reported in drawn]
        why = "is not causal, has another kind of cache, or logits made of more than hidden states"
        exact = sum(gaps) / len(gaps) <= (0.5 if bf16 else 5e-5) * own.std().item()
        need(exact, f"this architecture cannot be used ({type(model).__name__} {why}); use another model")
        model.shares_prompts = can_share_prompts(model, 0.05 if bf16 else 1e-4)


def can_share_prompts(model, tolerance=1e-4):
    """Whether completions of one prompt may share a row (see completion_hidden): not where attention has
    windows, which a mask of our own would undo, nor where a short test shows other hidden states."""
    config, model.shares_prompts = model.config.get_text_config(), False
    windows = getattr(config, "sliding_window", None)
    if windows or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return False
    ids = [i % model.vocab_in_use for i in range(12)]
    prompt, completions = ids[:3], [ids[3:8], ids[8:]]
    alone = torch.cat([completion_hidden(model, [prompt], [completion]) for completion in completions])
    model.shares_prompts = True
    with contextlib.suppress(Exception):  # whatever a model raises at a mask that it does not take
        gap = (alone - completion_hidden(model, [prompt] * 2, completions)).abs().mean()
        return (gap <= tolerance * alone.abs().mean()).item()
    return False


# ------------------------------------------------------------------------------------------------ checkpoints
def writing(out):
    """Protects what was saved from a full disk, a quota or lost rights: one line says how to go on."""
    remedy = "what was saved before stands: make room, then continue with --resume"
    return blame(f"--out {out}", "cannot be written", remedy)


def save_model(folder, model, tokenizer, **state):
    """A Hugging Face folder, and trainer.pt if there is a state; whole or not at all."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(folder.parent):
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            if state:
                torch.save(state, aside / "trainer.pt")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_checkpoint(out, step, student, teacher, tokenizer, optimizer, args):
    """OUT/step_NNNNNN; all but the --keep newest go. Random numbers and schedule have no state to save."""
    if ranks()[0] == 0:
        state = {"step": step, "args": asdict(args), "optimizer": optimizer.state_dict()}
        if teacher.moves:
            state["teacher"] = teacher.model.state_dict()
        save_model(out / f"step_{step:06d}", student, tokenizer, **state)
        for old in checkpoints(out)[args.keep :]:
            shutil.rmtree(old)
    all_reduce(torch.zeros(1, device=student.device))  # the other ranks wait here


@contextlib.contextmanager
def saving_first(step, out, *state):
    """A row that cannot be encoded, after those checked at the start, ends the run but loses no step."""
    try:
        yield
    except UserError as error:
        if step > 0:
            save_checkpoint(out, step, *state)
            raise UserError(f"{error}; step {step} is saved: continue with --resume") from error
        raise


def checkpoints(out):
    """Checkpoint folders, newest first."""
    return sorted(Path(out).glob("step_" + "[0-9]" * 6), reverse=True)


FREE_ON_RESUME = (  # what a resumed run may change: nothing that enters the arithmetic of steps already taken
    "out eval_data eval_every eval_samples save_every keep resume device max_prompt_tokens micro_batch_size "
    "chunk_tokens gradient_checkpointing show_samples dry_run"
).split()


def resume(student, teacher, optimizer, args):
    """With --resume, put the newest whole checkpoint's weights and moments in place -> its steps, else 0;
    the same on all ranks."""
    folders, step = checkpoints(args.out) if args.resume else [], 0
    for folder in folders:
        try:
            state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
            made_with, moments, step = dict(state["args"]), state["optimizer"]["state"], state["step"]
            if folder.name != f"step_{step:06d}" or not moments:
                raise ValueError("of another step, or without moments")
            weights = load_model(folder, "out", torch.float32, "cpu")[1].state_dict()
        except Exception as error:  # whatever a torn file makes its reader raise
            why = f"not a whole checkpoint ({type(error).__name__})"
            say(f"{folder}: {why}; trying the one before", sys.stderr)
            step = 0
            continue
        free = {*FREE_ON_RESUME, "steps"} if args.lr_schedule == "constant" else {*FREE_ON_RESUME}
        for name in sorted({*made_with, *asdict(args)} - free):
            was, now = made_with.get(name), getattr(args, name, None)
            this = f"--{name} {now}: the run in --out {args.out} was made with {was}"
            need(was == now, f"{this}; resume with that, or choose another --out")
        taken = f"the run in --out {args.out} has {step} steps already; raise it"
        need(step <= args.steps, f"--steps {args.steps}: {taken}")
        student.load_state_dict(weights)
        if teacher.moves:
            teacher.model.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        break
    need(step or not folders, f"--out {args.out}: none of its checkpoints is whole; choose another --out")
    total = all_reduce(torch.tensor(step, device=student.device)).item()
    same = total == step * ranks()[1]  # else two runs would be mixed in silence
    need(same, f"--out {args.out}: not all ranks find step {step} there; all nodes must share the folder")
    return step


# -------------------------------------------------------------------------------------------------------- log
def begin_log(out, last_step):
    """Start metrics.jsonl and samples.jsonl, or drop their rows after the step to resume from -> metrics."""
    kept, restore = {}, "restore it, or choose another --out"
    for file in (out / "samples.jsonl", out / "metrics.jsonl"):
        with blame(f"--out {out}", f"{file.name} cannot be continued", restore):
            text = file.read_text(encoding="utf-8") if last_step and file.exists() else ""
            rows = map(json.loads, text.split("\n")[:-1])  # not the last line: a kill may have torn it
            kept[file] = history = [row for row in rows if row["step"] <= last_step]
    lost = f"--out {out}: metrics.jsonl has no row of step {last_step}; {restore}"
    need(not last_step or (history and history[-1]["step"] == last_step), lost)
    if ranks()[0] == 0:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            for file, rows in kept.items():
                aside = out / f".{file.name}.tmp"
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                aside.write_text("".join(lines), encoding="utf-8")
                os.replace(aside, file)
            if not kept[out / "samples.jsonl"]:  # the first evaluation creates it
                (out / "samples.jsonl").unlink()
    return history


def append(file, rows):
    """Add rows to a .jsonl file."""
    if ranks()[0] == 0:
        with writing(file.parent), open(file, "a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def record(history, row, out):
    """Add a row to the history of every rank, and to metrics.jsonl."""
    history.append(row)
    append(out / "metrics.jsonl", [row])


def record_samples(samples, row, out, args):
    """Add an evaluation's samples to samples.jsonl, and print the first --show_samples of them."""
    samples = [{"step": row["step"], **sample} for sample in samples]
    append(out / "samples.jsonl", samples)
    for sample in samples[: args.show_samples]:
        say(json.dumps(sample, ensure_ascii=False))


def describe(student, teacher, examples, tokenizer, stop_ids, args):
    """--dry_run: print what both models read, special tokens visible, and what a rank must hold."""
    for i in range(min(2, len(examples))):
        for who, ids in (("student", examples[i].prompt), ("teacher", examples[i].teacher_prompt)):
            say(f"row {i}, the {who} reads {len(ids)} tokens:\n{tokenizer.decode(ids)}")
        say(f"row {i}, answer: {examples[i].answer!r}\n")
    if tokenizer.chat_template != teacher.tokenizer.chat_template:
        say(f"the chat templates differ: --teacher_template {args.teacher_template}")
    say("stop tokens: " + ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in stop_ids))
    sizes = [student.num_parameters(), teacher.num_parameters()]
    say(f"parameters: student {sizes[0]:,}, teacher {sizes[1]:,}")
    weights = 0 if teacher is student else sum(p.nbytes for p in teacher.parameters()) / 1e9
    each = 18 if args.dtype == "bfloat16" else 16  # bytes; autocast keeps copies of the weights in an update
    gb = [each * sizes[0] / 1e9, weights, 32 * args.chunk_tokens * student.vocab_in_use / 1e9]
    parts = f"student's weights, gradients, moments {gb[0]:.2f}, teacher's weights {gb[1]:.2f}"
    parts += f", logits of a chunk {gb[2]:.2f}; in all {sum(gb):.2f}"  # about 8 float32 tensors
    say(f"GB per rank, besides activations and KV cache: {parts}")
    return []


def repetition(completion, n=4):
    """Share of a completion's n-grams that occurred in it before."""
    grams = [tuple(completion[i : i + n]) for i in range(len(completion) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rollout_metrics(rollouts, device):
    """completion_len, truncated, repetition: means over the rollouts of all ranks."""
    sums = [(len(r.completion), not r.ended, repetition(r.completion), 1) for r in rollouts]
    *sums, rows = all_reduce(torch.tensor(sums, dtype=torch.float64, device=device).sum(0)).tolist()
    return dict(zip(("completion_len", "truncated", "repetition"), (x / rows for x in sums), strict=True))


def check_finite(means, grad_norm, step, args):
    """UserError before an update that would destroy the weights."""
    found = f"step {step}: loss {means['loss']:.4g}, gradient norm {grad_norm:.4g}: not finite"
    remedy = f"stopped before the update; checkpoints in --out {args.out} stand; lower --lr {args.lr}"
    need(all(map(math.isfinite, (grad_norm, *means.values()))), f"{found}; {remedy}")


def lr_at(step, args):
    """Learning rate of step 1, 2, ...: linear warm-up, then constant or falling to 0 after the last step."""
    if step <= args.warmup_steps:
        return args.lr * step / (args.warmup_steps + 1)
    done = (step - 1 - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    shape = {"constant": 1, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return args.lr * shape[args.lr_schedule]


def finish(out, history, student, tokenizer, args, seconds):
    """Save the final model and say what has changed; or, where a signal stopped the run, how to continue."""
    if history[-1]["step"] < args.steps:
        return say(f"stopped after step {history[-1]['step']} and saved: continue with --resume")
    if ranks()[0] == 0:
        save_model(out / "final", student, tokenizer)
    evals = [row for row in history if "eval_len" in row]
    names = [name for name in ("eval_accuracy", "eval_reverse_kl") if evals and name in evals[0]]
    changes = [f"{name} {evals[0][name]:.3f} -> {evals[-1][name]:.3f}" for name in names]
    say("; ".join([*changes, f"{seconds:.0f} s", f"model in {out / 'final'}"]))


# ----------------------------------------------------------------------------------------------- command line
class UserError(Exception):
    """A mistake that the user can fix: shown as one line, exit code 2, no traceback."""


def need(ok, message):
    """UserError unless all is well."""
    if not ok:
        raise UserError(message)


def say(text, file=None):
    """Print above the progress bar, on rank 0 only."""
    if ranks()[0] == 0:
        tqdm.write(text, file)


@contextlib.contextmanager
def blame(where, what, remedy, kind=Exception):
    """What a torn file, a strange model or a full disk raises becomes one line: where: what (why); remedy."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except kind as error:
        why = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{where}: {what} ({why}); {remedy}") from error


def check_ranges(args):
    """UserError for the first flag that is not one of its choices, "a|b", or not in its interval, "[0,1)"."""
    for item in fields(args):
        value, within = getattr(args, item.name), item.metadata["within"]
        if within is None or value is None:
            continue
        if "|" in within:
            ok, words = value in within.split("|"), f"unknown; choose one of {within.replace('|', ' ')}"
        else:
            low, high = map(float, within[1:-1].split(","))
            above = value >= low if within[0] == "[" else value > low
            below = value <= high if within[-1] == "]" else value < high
            ok, words = above and below, f"must be in {within}"
        need(ok, f"--{item.name} {value}: {words}")


def check_args(args):
    """UserError for the first value that makes no sense, alone or beside the others."""
    need(args.loss in LOSSES, f"--loss {args.loss}: unknown; choose one of {' '.join(LOSSES)}")
    check_ranges(args)
    text, remedy = args.chat_template_kwargs, 'write {"enable_thinking": false}'
    with blame(f"--chat_template_kwargs {text}", "not a JSON object", remedy):
        dict(**json.loads(text or "{}"))
    sft = f"--sft_steps {args.sft_steps}: must not exceed --steps {args.steps}, which count them"
    need(args.sft_steps <= args.steps, sft)
    out, size, world = Path(args.out).absolute(), args.batch_size, ranks()[1]
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    writable = args.out and there.is_dir() and os.access(there, os.W_OK)
    need(writable, f"--out {args.out}: {there} is not a folder that can be written to; choose another")
    holds_run = checkpoints(out) or any((out / name).exists() for name in ("metrics.jsonl", "final"))
    remedy = "already holds a run; continue it with --resume, or choose another folder"
    need(args.resume or args.dry_run or not holds_run, f"--out {args.out}: {remedy}")
    need(size % world == 0, f"--batch_size {size}: must be a multiple of the {world} ranks")
    if LOSSES[args.loss][0] == "sampled":  # its expectation is over the very distribution that it scores
        needed = {"top_p": 1, "loss_temperature": args.temperature, "lmbda": 1, "updates_per_rollout": 1}
        if args.loss == "pg":
            del needed["updates_per_rollout"]  # its ratios account for stale samples
        for flag, value in needed.items():
            why = f"--loss {args.loss} is an expectation over the student's own fresh, untruncated samples"
            need(getattr(args, flag) == value, f"--{flag} {getattr(args, flag)}: {why}; use {value}")


def quiet_libraries(args):
    """Keeps the libraries' logs and bars from hiding the one line that says what is wrong, and works offline
    if the hub does not answer."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # its errors end up in a UserError
    names = {args.student, args.teacher, args.data, args.eval_data} - {"toy", None}
    if not all(Path(name).exists() for name in names):
        try:  # a hub that does not answer costs one try, not the minute of retries that the libraries make
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        except Exception:  # of whichever HTTP library; what is cached can still be loaded
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def make_parser(args_class):
    """One flag for each field of the dataclass, in the groups that the fields begin."""
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog=f"losses: {' '.join(LOSSES)}")
    for item in fields(args_class):
        if item.metadata["group"]:
            group = parser.add_argument_group(item.metadata["group"])
        kind = (get_args(item.type) or [item.type])[0]  # float of float | None
        options = {"type": kind, "metavar": {int: "N", float: "X", str: "S"}.get(kind)}
        if kind is bool:  # --resume alone means true
            options = {"type": string_to_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
        default = None if item.default is None else f"default {item.default}"
        notes = "; ".join(filter(None, [item.metadata["within"], default]))
        help = item.metadata["help"] + (f" ({notes})" if notes else "")
        group.add_argument(f"--{item.name}", default=item.default, help=help, **options)
    return parser


def main(args_class=Args, train=train):
    """Parse the command line and train; what the user can fix ends in one line and exit code 2."""

    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser = make_parser(args_class)
    parser.error = refuse
    try:
        found, unknown = parser.parse_known_args()
        need(not unknown, f"{''.join(unknown[:1])}: no such flag; see --help")
        train(args_class(**vars(found)))
    except UserError as error:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
        # Most errors meet all ranks: the first prints and exits, and torchrun kills the others. A rank that
        # is still there after a minute has failed alone, and prints too.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(60)
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- memory and speed
def keep_freed_memory():
    """On a CPU, lets glibc keep what one tensor frees for the next: fresh pages took a quarter of an update.
    The variable, set before torch's first tensor, aligns large ones to huge pages: 10 to 20 % less memory."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        for parameter, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)


@contextlib.contextmanager
def replaced(forwards):
    """Replaces the forward of modules inside the block: {module: forward}."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def recomputing(model, on):
    """Inside, layers forget their activations and compute them again in backward. (transformers' own switch
    works in training mode only, which would turn dropout on.)"""
    layers = [x for x in model.modules() if on and isinstance(x, GradientCheckpointingLayer)]
    return replaced({x: functools.partial(recompute, x.forward, use_reentrant=False) for x in layers})


def shared_rows(model, prompts, completions):
    """Which completions share a row of a scoring pass: lists of indices. Neighbours with one prompt (the same
    list, as in what sample returns) do, up to 1,024 tokens: attention's cost is the square of a row."""
    rows, tokens = [], 0
    for i, completion in enumerate(completions):
        same = i > 0 and prompts[i] is prompts[i - 1] and getattr(model, "shares_prompts", False)
        if not same or tokens + len(completion) > 1024:
            rows, tokens = [*rows, []], 0
        rows[-1].append(i)
        tokens += len(completion)
    return rows


def by_length(model, rollouts):
    """The order in which rollouts are scored: rows of like length together, for little padding."""
    prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
    rows = shared_rows(model, prompts, completions)
    rows.sort(key=lambda row: len(prompts[row[0]]) + sum(len(completions[i]) for i in row))
    return [i for row in rows for i in row]


def clock(device):
    """Seconds, after the device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def timed(seconds, name, device):
    """Add the time spent inside to seconds[name]."""
    start = clock(device)
    yield
    seconds[name] = seconds.get(name, 0.0) + clock(device) - start


def peak_gb(device):
    """The most that the GPU has held, or this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()
