"""On-policy distillation (OPD), whole, in one file.

The student writes completions; a frozen teacher scores every prefix that the student visited; the student
moves to lessen a per-token divergence of the two next-token distributions. No reward, no critic, no replay.

    torchrun opd.py                                                    # a laptop: the toy pair, a few minutes
    torchrun opd.py --student S --teacher T --data prompts.jsonl --loss sg_topk                     # one GPU
    torchrun --nproc_per_node 8 opd.py ...                                                         # one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 opd.py ... # on each

Read it top to bottom: Args, set-up, data, models, sample, score, LOSSES, distill, evaluate, save, train.
Left out on purpose: an inference engine, a teacher server, sharded weights (every rank holds both models),
tokenizers that differ, multi-turn and multi-modal prompts. README.md says where to go for those.

Shapes: B prompts, R sampled rows, T completion positions, L positions of prompt and completion, V vocabulary,
K top-k, D hidden size, N completion tokens of a micro-batch (packed, no padding), n those of one chunk of it.
"""

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import datasets
import huggingface_hub
import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

import losses


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit code 2, no traceback."""


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    student: str = arg("toy", "model that learns: a Hugging Face name or folder; toy = the built-in pair")
    teacher: str = arg("toy", "frozen model that scores: a name or folder, same tokenizer; or toy")
    data: str = arg("toy", "prompts: .jsonl, .json, .parquet, a folder saved by datasets, a hub name; or toy")
    eval_data: str | None = arg(None, "held-out prompts, with a column answer; toy data brings its own")
    out: str = arg("runs/opd", "folder for metrics.jsonl, step_NNNNNN/ and final/")
    loss: str = arg("sg_topk", "one of the losses listed below")
    topk: int = arg(20, "k of the top-k losses, and of the metrics student_mass, teacher_mass, overlap")
    topk_source: str | None = arg(
        None, "student | teacher | union | intersection (default: teacher for *_forward losses, else student)"
    )
    beta: float = arg(0.5, "jsd only: weight of the teacher in the mixture, in (0, 1)")
    alpha: float = arg(0.1, "skew_* only: share of its first distribution mixed into its second, in (0, 1)")
    gamma: float = arg(0.0, "pg only: discount of later tokens in the advantage; 1 = sequence-level KL")
    loss_temperature: float = arg(1.0, "student AND teacher logits are divided by this in the loss")
    steps: int = arg(150, "steps in all, SFT steps included; a step = a batch of rollouts")
    batch_size: int = arg(64, "prompts a step, over all ranks")
    samples_per_prompt: int = arg(1, "completions for each prompt")
    micro_batch_size: int = arg(16, "rows per scoring forward of a rank; changes memory, not the result")
    max_prompt_tokens: int = arg(256, "a longer prompt is an error, never cut")
    max_new_tokens: int = arg(256, "a completion is cut here if it has not ended")
    temperature: float = arg(1.0, "of sampling, in training and evaluation")
    top_p: float = arg(1.0, "nucleus sampling; below 1 the sampled losses (k1 k2 k3 pg) are refused")
    lr: float | None = arg(None, "peak learning rate (default: 3e-4 for the toy student, else 2e-6)")
    lr_schedule: str = arg(
        "constant", "after the warm-up: constant | linear | cosine, to 0 after the last step"
    )
    warmup_steps: int = arg(5, "linear warm-up from 0")
    weight_decay: float = arg(0.0, "AdamW's, on all weights")
    max_grad_norm: float = arg(1.0, "gradients of a larger global norm are scaled down to it; inf = never")
    lmbda: float = arg(1.0, "share of batches sampled from the student, the others from the teacher (GKD)")
    sft_steps: int = arg(0, "first N steps: cross-entropy on teacher samples (SFT-stabilised student)")
    updates_per_rollout: int = arg(1, "optimizer steps on each batch of rollouts; pg then clips its ratios")
    ratio_clip: float = arg(0.2, "pg with several updates: the ratio is clipped to 1 -+ this")
    chunk_tokens: int = arg(512, "tokens whose logits exist at one time; changes memory, not the result")
    gradient_checkpointing: bool = arg(False, "recompute activations in backward: less memory, more time")
    dtype: str = arg("auto", "float32 | bfloat16 (autocast, float32 weights) | auto: bfloat16 on CUDA")
    device: str = arg("auto", "cpu | cuda | auto")
    seed: int = arg(0, "everything random is a pure function of this and of what it is drawn for")
    eval_every: int = arg(
        50, "evaluate every N steps, besides before the first and after the last; 0 = never"
    )
    eval_samples: int = arg(1, "completions per held-out prompt: eval_accuracy is avg@n, eval_pass pass@n")
    save_every: int = arg(0, "write a checkpoint every N steps, besides the last; 0 = never")
    keep: int = arg(2, "how many of the newest checkpoints to keep")
    resume: bool = arg(False, "continue the run in --out from its newest whole checkpoint")


def check_args(args, world):
    """UserError for the first value that makes no sense, naming it and the remedy."""

    def need(ok, flag, remedy):
        if not ok:
            raise UserError(f"--{flag} {getattr(args, flag)}: {remedy}")

    def choice(flag, names):
        need(getattr(args, flag) in names, flag, f"unknown; choose one of {' '.join(names)}")

    counts = "topk steps batch_size samples_per_prompt micro_batch_size max_prompt_tokens max_new_tokens"
    for flag in f"{counts} updates_per_rollout chunk_tokens eval_samples keep".split():
        need(1 <= getattr(args, flag), flag, "must be at least 1")
    for flag in "warmup_steps weight_decay sft_steps seed eval_every save_every".split():
        need(0 <= getattr(args, flag) < 2**62, flag, "must be 0 or more, and less than 2**62")
    for flag in "temperature loss_temperature".split():
        need(1e-6 <= getattr(args, flag) < math.inf, flag, "must be at least 1e-6 and finite")
    for flag in "lr ratio_clip".split():
        need(0 < getattr(args, flag) < 1e36, flag, "must be positive and finite")
    for flag in "gamma lmbda".split():
        need(0 <= getattr(args, flag) <= 1, flag, "must be between 0 and 1")
    for flag in "beta alpha".split():
        need(0 < getattr(args, flag) < 1, flag, "must be inside (0, 1); at the ends use a plain KL")
    need(0 < args.top_p <= 1, "top_p", "must be in (0, 1]")
    need(args.max_grad_norm > 0, "max_grad_norm", "must be positive; inf = no clipping")
    choice("loss", LOSSES)
    choice("topk_source", ("student", "teacher", "union", "intersection"))
    choice("lr_schedule", ("constant", "linear", "cosine"))
    choice("dtype", ("float32", "bfloat16", "auto"))
    need(args.steps < 1_000_000, "steps", "must be less than 1000000")
    need(args.sft_steps <= args.steps, "sft_steps", f"must not exceed --steps {args.steps}, which count them")
    out = Path(args.out).absolute()
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    writable = args.out and there.is_dir() and os.access(there, os.W_OK)
    need(writable, "out", f"{there} is not a folder that can be written to; choose another")
    holds_run = checkpoints(out) or any((out / name).exists() for name in ("metrics.jsonl", "final"))
    remedy = "already holds a run; continue it with --resume, or choose another folder"
    need(args.resume or not holds_run, "out", remedy)
    need(args.batch_size % world == 0, "batch_size", f"must be a multiple of the {world} ranks")
    if LOSSES[args.loss][0] == "sampled":  # their expectation is over the very distribution that they score
        why = f"--loss {args.loss} needs"
        need(args.top_p == 1, "top_p", f"{why} untruncated samples: use 1, or a full or top-k loss")
        same = args.loss_temperature == args.temperature
        need(same, "loss_temperature", f"{why} the --temperature of its samples, {args.temperature}")
        need(args.lmbda == 1, "lmbda", f"{why} the student's own samples: use 1")
        fresh = args.updates_per_rollout == 1 or args.loss == "pg"
        need(fresh, "updates_per_rollout", f"{why} fresh samples: use 1, or --loss pg")


# ----------------------------------------------------------------------------------------------------- set-up


def set_up(args):
    """Fill in the defaults, join the process group that torchrun describes -> args, rank, world, device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if args.device not in ("auto", "cpu", "cuda") or (cuda and not torch.cuda.is_available()):
        raise UserError(f"--device {args.device}: not available here; use cpu or auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    args = replace(
        args,
        lr=args.lr if args.lr is not None else 3e-4 if args.student == "toy" else 2e-6,
        dtype=args.dtype if args.dtype != "auto" else "bfloat16" if cuda else "float32",
        topk_source=args.topk_source or ("teacher" if args.loss.endswith("topk_forward") else "student"),
        eval_data=args.eval_data or ("toy" if args.data == "toy" else None),
    )
    check_args(args, world)
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        keep_freed_memory()
    if (world > 1 or cuda and "RANK" in os.environ) and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
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
    return args, rank, world, device


def keep_freed_memory():
    """Let glibc keep what one tensor frees for the next. By default every large tensor's pages go back to the
    kernel and come again zeroed, which took a quarter of an update's time. With another libc: no change.
    Until its first tensor, torch can also be told to begin large ones on pages of their own, and to ask for
    huge pages: they leave fewer holes, and the most memory is a tenth to a fifth less (SmolLM2, 8 rows)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for parameter, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)


def all_reduce(tensor):
    """Sum over ranks, in place; with one process nothing happens."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def uniforms(*key):
    """Uniform numbers in [0, 1), float64: a pure function of the key's integers (or int64 tensors).

    Counter-based (splitmix64's mixer, chained over the key): nothing is stored or advanced, so a draw does
    not depend on how many were drawn before it, on which rank, or in which row of which batch.
    """
    x = torch.zeros((), dtype=torch.int64)
    for part in key:  # sums and products wrap at 2**64; `& mask` makes the arithmetic shift a logical one
        x = x + torch.as_tensor(part, dtype=torch.int64) - 0x61C8864680B583EB
        x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
        x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
        x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 11) & (2**53 - 1)).double() / 2**53


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


# ------------------------------------------------------------------------------------------------------- data


def load_rows(path, flag, columns):
    """The data set at a path, memory-mapped (its size does not matter), with at least these columns."""
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(path).suffix)
    try:
        if Path(path).is_dir():
            rows = datasets.load_from_disk(path)
        elif kind and not Path(path).is_file():
            raise FileNotFoundError("no such file")
        else:
            rows = datasets.load_dataset(kind, data_files=path) if kind else datasets.load_dataset(path)
    except Exception as error:  # whatever a torn or foreign file makes its reader raise
        reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--{flag} {path}: cannot be read ({reason}); give a .jsonl, .json or .parquet file, a folder "
            "written by datasets.save_to_disk, or a hub name that can be reached, with at least one row"
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        splits = ["test", "validation", "train"] if flag == "eval_data" else ["train"]
        found = [split for split in splits if split in rows]
        if not found:
            raise UserError(f"--{flag} {path}: no split {splits[0]}, only {', '.join(rows)}; add one")
        rows = rows[found[0]]
    if len(rows) == 0:
        raise UserError(f"--{flag} {path}: the data set is empty; give at least one row")
    for column in columns:
        if column not in rows.column_names:
            hint = " (empty strings where there is none)" if column == "answer" else ""
            names = ", ".join(rows.column_names)
            raise UserError(f"--{flag} {path}: no column {column!r}, only {names}; add or rename it{hint}")
    return rows


def encode_prompt(tokenizer, prompt, limit, where):
    """Token ids of a string as it is, or of chat messages through the template, up to the assistant turn."""
    if not isinstance(prompt, (str, list)):
        raise UserError(f"{where}: a prompt must be a string or a list of chat messages, not {prompt!r}")
    if isinstance(prompt, list) and not tokenizer.chat_template:
        raise UserError(f"{where}: chat messages, but the tokenizer has no chat template; give strings")
    messages = prompt if isinstance(prompt, list) else []
    if not all(isinstance(m, dict) and m.get("role") for m in messages):
        raise UserError(f"{where}: a chat message must have a role and content; mend {prompt!r}")
    try:
        template = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True)
        ids = (
            template(prompt, return_dict=False) if messages else tokenizer(prompt).input_ids if prompt else []
        )
    except Exception as error:  # templates refuse what they do not like with errors of their own
        raise UserError(f"{where}: the chat template refuses the prompt ({error}); mend the row") from error
    if not ids or not all(m.get("content") for m in messages):
        raise UserError(f"{where}: the prompt is empty; remove the row")
    if len(ids) > limit:
        remedy = f"raise --max_prompt_tokens {limit} or remove the row"
        raise UserError(f"{where}: the prompt has {len(ids)} tokens; {remedy}")
    return ids


@functools.lru_cache(maxsize=2)
def epoch_order(n_rows, seed, epoch):
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch * 1_000_003)).tolist()


def row_at(position, n_rows, seed):
    """The row at a position of the endless stream of prompts: each epoch is a permutation of the data."""
    epoch, index = divmod(position, n_rows)
    return epoch_order(n_rows, seed, epoch)[index]


def marked_answer(text):
    """A text's last \\boxed{...}, else what follows its last ####, else None."""
    start, depth = text.rfind("\\boxed{") + len("\\boxed{"), 1
    for end in range(start, len(text)) if "\\boxed{" in text else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return text.rsplit("####", 1)[1].strip() if "####" in text else None


def extract_answer(text):
    """A text's last \\boxed{...}, else what follows its last ####, else its last number, else None."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    marked = marked_answer(text)
    return marked if marked is not None else numbers[-1] if numbers else None


def is_correct(completion, answer):
    """Whether a completion gives the answer: as numbers if both are ("$1,024.0" = "1024"), else as words.

    The answer may itself be a text with a \\boxed{} or ####; without them it is taken whole.
    """

    def normal(text):
        words = re.sub(r"[$,]", "", text).strip().rstrip(".").lower()
        try:
            return float(words)
        except ValueError:
            return words

    found, wanted = extract_answer(completion), marked_answer(answer)
    return found is not None and normal(found) == normal(answer if wanted is None else wanted)


# ----------------------------------------------------------------------------------------------------- models


def load_model(path, flag, dtype, device):
    """-> tokenizer, model in eval mode (no dropout, ever); safetensors only, no remote code."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # unset, it would ask
        options = dict(use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        if info["missing_keys"]:  # they would be drawn at random, in silence
            raise ValueError(f"weights are missing: {' '.join(sorted(info['missing_keys'])[:3])} ...")
    except Exception as error:  # whatever a torn or foreign file makes its reader raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--{flag} {path}: cannot be loaded ({reason}); give a folder with config, safetensors and "
            "tokenizer, or a hub name that can be reached"
        ) from error
    model.get_input_embeddings().padding_idx = (
        None  # it would get no gradient, and is often the end token too
    )
    return tokenizer, model.to(device).eval()


def load_pair(student_path, teacher_path, args, device):
    """-> student, teacher, tokenizer, stop_ids. The student's weights are always float32: a bfloat16
    weight swallows every update smaller than its 256th part."""
    tokenizer, student = load_model(student_path, "student", torch.float32, device)
    teacher_tokenizer, teacher = tokenizer, student
    if teacher_path:  # None: the student is its own teacher, in one copy
        teacher_tokenizer, teacher = load_model(teacher_path, "teacher", getattr(torch, args.dtype), device)
        teacher.requires_grad_(False)
        teacher.get_output_embeddings().float()  # logits are made in float32: see project

    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (tokenizer, teacher_tokenizer))
    if ours != theirs:
        i = min(i for i in {*ours, *theirs} if ours.get(i) != theirs.get(i))
        raise UserError(
            f"--teacher {args.teacher}: not the student's tokenizer: token {i} is {theirs.get(i)!r} here, "
            f"{ours.get(i)!r} in --student {args.student}; choose two models of one family"
        )
    vocab = max(ours) + 1
    if args.topk > vocab:
        raise UserError(f"--topk {args.topk}: must be in 1..{vocab}, the size of the vocabulary")
    stop_ids = {tokenizer.eos_token_id, teacher_tokenizer.eos_token_id}
    for flag, model in (("student", student), ("teacher", teacher)):
        rows = model.get_output_embeddings().weight.shape[0]
        if rows < vocab:
            sizes = f"{vocab} tokens in the tokenizer, {rows} in the model"
            raise UserError(f"--{flag} {getattr(args, flag)}: {sizes}; resize the model's embeddings")
        model.vocab_in_use = vocab  # models of one family pad their vocabularies differently: both are cut
        longest = getattr(model.config, "max_position_embeddings", None) or math.inf
        if args.max_prompt_tokens + args.max_new_tokens > longest:
            why = f"and --max_prompt_tokens {args.max_prompt_tokens}: the {flag} has {longest} positions"
            raise UserError(f"--max_new_tokens {args.max_new_tokens} {why} for both together; lower one")
        # A base model and its instruct sibling end their turns differently. All ends count: a student that
        # learns an end from its teacher that is not in this list would never stop.
        ends = model.generation_config.eos_token_id if model.generation_config else None
        stop_ids |= set(ends) if isinstance(ends, list | tuple) else {ends}
        check_projection(model, f"--{flag} {getattr(args, flag)}")
        model.shares_prompts = can_share_prompts(model)
    return student, teacher, tokenizer, sorted(i for i in stop_ids if i is not None and i < vocab)


def project(model, hidden):
    """Logits [N,V], float32, of final hidden states [N,D], as the model itself makes them.

    The model's own forward runs with its body replaced by the given states, so that whatever it does between
    body and logits (Granite's scale, Gemma's soft cap, a bias) is done. Not in bfloat16: logits rounded to 8
    bits give divergences off by as much as one wants to measure, some of them negative.
    """
    body, vocab = model.base_model, getattr(model, "vocab_in_use", None)
    states = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden.float()[None])
    states.router_logits = None  # mixtures of experts look for them
    body.forward = lambda *_, **__: states
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            return model(inputs_embeds=states[0], use_cache=False).logits[0, :, :vocab].float()
    finally:
        del body.forward


@torch.no_grad()
def check_projection(model, where):
    """UserError unless project() gives the model's own logits, and these are finite and causal."""
    ids = torch.arange(min(8, model.vocab_in_use), device=model.device)[None]  # [1,8]
    bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        own = model(input_ids=ids, use_cache=False).logits[0, :, : model.vocab_in_use].float()  # [8,V]
        if own.isnan().any() or own.isposinf().any():
            raise UserError(f"{where}: its logits are not finite: damaged weights; use another copy")
        gap = own - project(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
        first = model(input_ids=ids[:, :1], use_cache=False).logits[0, :, : model.vocab_in_use]  # [1,V]
    tolerance, name = (0.05 if bf16 else 1e-4) * own.abs().max(), type(model).__name__
    if not (own[:1] - first.float()).abs().max() <= tolerance:
        raise UserError(f"{where}: {name} looks at later tokens; use a causal language model")
    if not gap.abs().max() <= tolerance:
        why = f"the logits of {name} cannot be made from its last hidden states"
        raise UserError(f"{where}: {why}; use another model")


@torch.no_grad()
def can_share_prompts(model):
    """Whether completions of one prompt may share a row (see completion_hidden): not where attention has
    windows, which a mask of our own would undo, nor where a short test shows other hidden states."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "sliding_window", None) or kinds - {"full_attention"}:
        return False
    ids = [i % model.vocab_in_use for i in range(12)]
    prompt, completions = ids[:3], [ids[3:8], ids[8:]]
    bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        alone = torch.cat([completion_hidden(model, [prompt], [completion]) for completion in completions])
        model.shares_prompts = True
        try:
            together = completion_hidden(model, [prompt] * 2, completions)
        except Exception:  # whatever a model raises at a mask that it does not take
            return False
    return ((alone - together).abs().mean() <= (0.05 if bf16 else 1e-4) * alone.abs().mean()).item()


# ----------------------------------------------------------------------------------------------------- sample


@dataclass
class Rollout:
    prompt: list[int]  # token ids
    completion: list[int]  # token ids, at least one; the stop token that ended it belongs to it
    logp: list[float]  # of each completion token, under the distribution that it was drawn from
    ended: bool  # by a stop token; False: cut at max_new_tokens


def sampling_logp(logits, temperature, top_p):
    """Log-probabilities [...,V] of what is sampled: tempered, cut to the nucleus, renormalised."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        sorted_p, order = logp.exp().sort(dim=-1, descending=True)
        outside = sorted_p.cumsum(dim=-1) - sorted_p >= top_p  # the token that crosses top_p stays
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
        logp = torch.log_softmax(logp.masked_fill(outside, -math.inf), dim=-1)
    return logp


def few_rows_linear(weight, bias, x):
    """x @ weight.T + bias as (weight @ x.T).T, rows filled up to a multiple of 4, or of 8."""
    rows = x.reshape(-1, x.shape[-1])  # [R,D]
    if (r := len(rows)) < 2:
        return torch.nn.functional.linear(x, weight, bias)
    if filling := -r % (4 if r < 5 else 8):
        rows = torch.nn.functional.pad(rows, (0, 0, 0, filling))
    y = torch.mm(weight, rows.t()).t()[:r].contiguous().view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


@contextlib.contextmanager
def few_rows(model):
    """On a CPU, inside, a model's large linear layers multiply weight @ x.T: with the few rows of a decoding
    step the matrix library is up to twice as fast that way round (tests/bench/decode.py)."""
    layers = [x for x in model.modules() if type(x) is torch.nn.Linear and "forward" not in vars(x)]
    layers = [x for x in layers if x.weight.device.type == "cpu" and x.weight.numel() >= 2**16]
    for layer in layers:
        layer.forward = functools.partial(few_rows_linear, layer.weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def sample(model, prompts, n, stop_ids, key, prompt_keys, max_new_tokens, temperature=1.0, top_p=1.0):
    """n completions of each prompt (lists of token ids) -> list of Rollouts, the n of the first prompt first.

    Completion i of a prompt draws its token at position t with uniforms(*key, prompt's key, i, t): the same
    tokens in any order, batch size and number of ranks. Prompts are left-padded, and prefilled once for their
    n completions; rows that have ended leave the batch.
    """
    device, width, rows = model.device, max(map(len, prompts)), len(prompts) * n
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # [B]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B,width]
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()  # [B,width], from lengths
    cache = DynamicCache(config=model.config)
    body = functools.partial(model.base_model, past_key_values=cache, use_cache=True)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)  # [B,width]
    hidden = body(input_ids=ids, attention_mask=mask, position_ids=position).last_hidden_state  # [B,width,D]
    logits = project(model, hidden[:, -1]).repeat_interleave(n, dim=0)  # [R,V]
    cache.reorder_cache(torch.arange(len(prompts), device=device).repeat_interleave(n))
    mask = mask.repeat_interleave(n, dim=0)  # [R,width]
    position = lengths.repeat_interleave(n)[:, None]  # [R,1]
    row_prompt = torch.tensor(prompt_keys).repeat_interleave(n)  # [R], on the CPU as all keys
    row_sample = torch.arange(n).repeat(len(prompts))  # [R]

    stop = torch.tensor(stop_ids, device=device, dtype=torch.long)
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)  # [R,T]
    logps = torch.zeros(rows, max_new_tokens, device=device)  # [R,T]
    size, ended = torch.full((rows,), max_new_tokens), torch.zeros(rows, dtype=torch.bool)  # [R], [R]
    alive = torch.arange(rows)  # the rows still in the batch; it and all that follows shrink together
    with few_rows(model):
        for t in range(max_new_tokens):
            logp = sampling_logp(logits, temperature, top_p)  # [R,V]
            cdf = logp.double().exp().cumsum(dim=-1)  # [R,V]; in float32 150,000 terms add up to 1e-5 off
            u = uniforms(*key, row_prompt[alive], row_sample[alive], t).to(device)[:, None]  # [R,1]
            token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=logp.shape[1] - 1)  # [R,1]
            tokens[alive, t], logps[alive, t] = token[:, 0], logp.gather(-1, token)[:, 0]
            done = torch.isin(token[:, 0], stop).cpu()  # [R]
            ended[alive[done]], size[alive[done]] = True, t + 1
            if done.all() or t + 1 == max_new_tokens:
                break
            if done.any():
                stay = (~done).nonzero()[:, 0].to(device)
                cache.reorder_cache(stay)
                alive, token, mask, position = alive[~done], token[stay], mask[stay], position[stay]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            hidden = body(input_ids=token, attention_mask=mask, position_ids=position).last_hidden_state
            logits, position = project(model, hidden[:, 0]), position + 1
    found = zip(tokens.tolist(), logps.tolist(), size.tolist(), ended.tolist(), strict=True)
    return [Rollout(prompts[i // n], y[:end], lp[:end], e) for i, (y, lp, end, e) in enumerate(found)]


# ------------------------------------------------------------------------------------------------------ score


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


def completion_hidden(model, prompts, completions):
    """The hidden states that predict each completion token, [N,D], one completion after the other.

    THE causal shift is here: the state at position i predicts token i + 1, so a completion that starts at
    position P is predicted from P - 1 on; its last token predicts nothing that is needed and is not fed.
    A row is a prompt and its completion, padded on the right, and causal attention never looks right: no
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
    hidden = model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state  # [B,L,D]
    return hidden[torch.tensor(states, device=model.device).unbind(-1)]  # [N,D]


# name -> (family, call). What a call is given, all of it at the loss temperature:
#   full     args, student_logits [n,V], teacher_logits [n,V]
#   top-k    args, student_logits [n,V], teacher_topk_logp [n,K], topk_ids [n,K], valid [n,K]
#   sampled  args, student_logp [n], teacher_logp [n], advantage [n], behaviour_logp [n]
# A new loss is one function in losses.py, one row here, and its tests.
LOSSES = {
    "forward_kl": ("full", lambda args, *x: losses.forward_kl(*x)),
    "reverse_kl": ("full", lambda args, *x: losses.reverse_kl(*x)),
    "jsd": ("full", lambda args, *x: losses.jsd(*x, beta=args.beta)),
    "skew_forward_kl": ("full", lambda args, *x: losses.skew_forward_kl(*x, alpha=args.alpha)),
    "skew_reverse_kl": ("full", lambda args, *x: losses.skew_reverse_kl(*x, alpha=args.alpha)),
    "adaptive_kl": ("full", lambda args, *x: losses.adaptive_kl(*x)),
    "entropy_aware_kl": ("full", lambda args, *x: losses.entropy_aware_kl(*x)),
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
    "pg": ("sampled", lambda args, p, q, *a: losses.policy_gradient(p, *a, args.ratio_clip)),
}
SFT = ("sampled", lambda args, p, *_: -p)  # cross-entropy: a loss only on the teacher's samples


def token_loss(loss, student_logits, teacher_logits, tokens, advantage, behaviour_logp, args):
    """One loss per token, [n], from the logits [n,V] of both models."""
    (family, call), s, t = loss, student_logits, teacher_logits
    if args.loss_temperature != 1:  # 1 would copy [n,V] for nothing
        s, t = s / args.loss_temperature, t / args.loss_temperature  # both, or neither
    if family == "full":
        return call(args, s, t)
    if family == "top-k":
        topk_ids, teacher_topk_logp, valid = losses.topk_support(s, t, args.topk, args.topk_source)
        return call(args, s, teacher_topk_logp, topk_ids, valid)
    student_logp, teacher_logp = (x.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] for x in (s, t))
    return call(args, student_logp, teacher_logp, advantage, behaviour_logp)


@torch.no_grad()
def advantages(student, hidden, teacher, teacher_hidden, tokens, sizes, args):
    """pg's advantage of each completion token, [N]. It looks along the row: not to be had chunk by chunk."""

    def token_logp(model, hidden):  # -> [B,T]
        chunks = zip(hidden.split(args.chunk_tokens), tokens.split(args.chunk_tokens), strict=True)
        logits = ((project(model, h) / args.loss_temperature, y) for h, y in chunks)
        logp = torch.cat([x.log_softmax(-1).gather(-1, y[:, None]) for x, y in logits])
        return torch.zeros(inside.shape, device=hidden.device).masked_scatter(inside, logp)

    sizes = torch.tensor(sizes, device=hidden.device)  # [B]
    inside = torch.arange(sizes.max(), device=hidden.device) < sizes[:, None]  # [B,T]
    student_logp, teacher_logp = token_logp(student, hidden), token_logp(teacher, teacher_hidden)
    return losses.reverse_kl_advantage(student_logp, teacher_logp, inside, args.gamma)[inside]


TOKEN_METRICS = (
    "loss reverse_kl forward_kl student_entropy teacher_entropy student_mass teacher_mass "
    "student_logp teacher_logp overlap"
).split()


@torch.no_grad()
def token_metrics(student_logits, teacher_logits, tokens, args):
    """Sums over tokens of all TOKEN_METRICS after the loss: exact, full vocabulary, temperature 1."""
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)  # [n,V]
    p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
    topk_ids, _, valid = losses.topk_support(log_p, log_q, args.topk, args.topk_source)  # [n,K]
    shared = losses.topk_support(log_p, log_q, args.topk, "intersection")[2]  # [n,k]
    kls, entropies = ((p * gap).sum(-1), -(q * gap).sum(-1)), (-(p * log_p).sum(-1), -(q * log_q).sum(-1))
    masses = ((x.gather(-1, topk_ids) * valid).sum(-1) for x in (p, q))
    logps = (x.gather(-1, tokens[:, None])[:, 0] for x in (log_p, log_q))
    return torch.stack([*kls, *entropies, *masses, *logps, shared.float().mean(-1)]).double().sum(-1)


def distill(student, teacher, rollouts, teacher_prompts, loss, args, total_tokens):
    """Both models score a micro-batch; adds grad(sum of token losses / total_tokens) to the student's .grad.

    teacher_prompts: what the teacher reads in place of each rollout's prompt (the same in OPD, more in OPSD).
    total_tokens: completion tokens of the whole step, over all micro-batches and ranks: ONE mean, whatever
    the split. None: measure only. Returns sums over tokens [len(TOKEN_METRICS)], float64, and seconds.

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
        set_recompute(student, training and args.gradient_checkpointing)
        hidden = completion_hidden(student, prompts, completions)  # [N,D]
        set_recompute(student, False)
    advantage = torch.zeros_like(behaviour_logp)  # [N]
    if loss is LOSSES["pg"]:
        sizes = [len(completion) for completion in completions]
        advantage = advantages(student, hidden, teacher, teacher_hidden, tokens, sizes, args)

    sums = torch.zeros(len(TOKEN_METRICS), dtype=torch.float64, device=device)
    hidden_grad = torch.empty_like(hidden)  # [N,D]; pieces of it would break up the heap
    for start in range(0, len(tokens), args.chunk_tokens):
        chunk = slice(start, start + args.chunk_tokens)
        with timed(seconds, "teacher_s", device), torch.no_grad():
            teacher_logits = project(teacher, teacher_hidden[chunk])  # [n,V]
        with timed(seconds, "student_s", device), torch.set_grad_enabled(training):
            leaf = hidden[chunk].detach().requires_grad_(training)  # [n,D]
            logits = project(student, leaf)  # [n,V]
            inputs = (logits, teacher_logits, tokens[chunk], advantage[chunk], behaviour_logp[chunk])
            loss_sum = token_loss(loss, *inputs, args).sum()
            if training:
                (loss_sum / total_tokens).backward()
                hidden_grad[chunk] = leaf.grad
        metrics = token_metrics(logits.detach(), teacher_logits, tokens[chunk], args)
        sums += torch.cat([loss_sum.detach().double()[None], metrics])
    if training:
        with timed(seconds, "student_s", device):
            hidden.backward(hidden_grad)
    return sums, seconds


def set_recompute(model, on):
    """Let each layer forget its activations and compute them again in backward (torch.utils.checkpoint).

    Not transformers' own switch: that one works in training mode only, which would turn dropout on, and drops
    the KV cache, which sampling needs.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            vars(layer).pop("forward", None)
            if on:
                layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)


# --------------------------------------------------------------------------------------------------- evaluate


def evaluate(student, teacher, tokenizer, prompts, teacher_prompts, answers, stop_ids, args, rank, world):
    """-> eval_accuracy (avg@n), eval_pass (pass@n), eval_reverse_kl (nats; not if teacher=None), eval_len.

    Always the same random numbers: two evaluations differ by the weights alone. A row with an empty answer
    counts for KL and length only.
    """
    n, sums = args.eval_samples, torch.zeros(6, dtype=torch.float64)  # right, passed, asked, KL, tokens, rows
    mine = list(range(rank, len(prompts), world))
    group = max(1, args.batch_size * args.samples_per_prompt // world // n)  # no more rows than in training
    for which in (mine[i : i + group] for i in range(0, len(mine), group)):
        chosen, draw = [prompts[j] for j in which], (~args.seed, 0)
        limits = (args.max_new_tokens, args.temperature, args.top_p)
        rollouts = sample(student, chosen, n, stop_ids, draw, which, *limits)
        rows = [j for j in which for _ in range(n)]
        right = [
            is_correct(tokenizer.decode(r.completion, skip_special_tokens=True), answers[j])
            for r, j in zip(rollouts, rows, strict=True)
        ]
        for k, j in enumerate(which):
            if answers[j]:
                ours = right[k * n : k * n + n]
                sums[:3] += torch.tensor([sum(ours) / n, any(ours), 1])
        sums[4:] += torch.tensor([sum(len(r.completion) for r in rollouts), len(rollouts)])
        for k in range(0, len(rollouts) if teacher else 0, args.micro_batch_size):
            micro = rollouts[k : k + args.micro_batch_size]
            theirs = [teacher_prompts[j] for j in rows[k : k + args.micro_batch_size]]
            measured, _ = distill(student, teacher, micro, theirs, LOSSES["reverse_kl"], args, None)
            sums[3] += measured[TOKEN_METRICS.index("reverse_kl")].cpu()
    right, passed, asked, kl, tokens, rows = all_reduce(sums.to(student.device)).tolist()
    scores = {"eval_accuracy": right / asked, "eval_pass": passed / asked} if asked else {}
    return {**scores, **({"eval_reverse_kl": kl / tokens} if teacher else {}), "eval_len": tokens / rows}


# ------------------------------------------------------------------------------------------------- save, load


@contextlib.contextmanager
def writing(out):
    """UserError if something in --out cannot be written: a full disk, a quota, lost rights."""
    try:
        yield
    except Exception as error:  # OSError, and what torch and safetensors make of it
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--out {out}: cannot be written ({reason}); what was saved before stands: make room, then "
            "continue with --resume"
        ) from error


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
            for file in aside.iterdir():  # the bytes are on the disk before the name is
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_checkpoint(out, step, student, tokenizer, optimizer, args, rank, **extra):
    """OUT/step_NNNNNN; then all but the --keep newest go. There is no random state and no scheduler to save:
    draws and learning rates are pure functions of seed and step."""
    if rank == 0:
        state = {"step": step, "args": asdict(args), "optimizer": optimizer.state_dict(), **extra}
        save_model(out / f"step_{step:06d}", student, tokenizer, **state)
        for old in checkpoints(out)[args.keep :]:
            shutil.rmtree(old)
    all_reduce(torch.zeros(1, device=student.device))  # the other ranks wait here


def checkpoints(out):
    """Checkpoint folders, newest first."""
    return sorted(Path(out).glob("step_" + "[0-9]" * 6), reverse=True)


# What a continued run may change: nothing that enters the arithmetic of a step already taken.
FREE_ON_RESUME = set(
    "out eval_data eval_every eval_samples save_every keep resume device micro_batch_size chunk_tokens "
    "gradient_checkpointing".split()
)


def newest_checkpoint(args):
    """-> folder and trainer state of the newest whole checkpoint in --out, or None, None."""
    for folder in checkpoints(args.out):
        try:
            state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
            made_with, _, _ = state["args"], state["step"], state["optimizer"]
            load_model(folder, "out", torch.float32, "cpu")
        except Exception as error:  # whatever a torn or foreign file makes its reader raise
            problem = f"{folder}: not a whole checkpoint ({type(error).__name__}); trying the one before"
            if os.environ.get("RANK", "0") == "0":
                print(problem, file=sys.stderr)
            continue
        free = {"steps"} if args.lr_schedule == "constant" else set()
        for name in sorted(set(made_with) ^ set(asdict(args)) | set(made_with) - FREE_ON_RESUME - free):
            if made_with.get(name) != getattr(args, name, None):
                raise UserError(
                    f"--{name} {getattr(args, name, None)}: the run in --out {args.out} was made with "
                    f"{made_with.get(name)}; resume with that, or choose another --out"
                )
        return folder, state
    if checkpoints(args.out):
        raise UserError(f"--out {args.out}: none of its checkpoints is whole; choose another --out")
    return None, None


# ------------------------------------------------------------------------------------------------------ train


def lr_at(step, args):
    """Learning rate of step 1, 2, ...: linear warm-up, then constant or falling to 0 after the last step."""
    if step <= args.warmup_steps:
        return args.lr * step / (args.warmup_steps + 1)
    done = (step - 1 - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    shape = {"constant": 1, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return args.lr * shape[args.lr_schedule]


def make_optimizer(student, args, state):
    """-> AdamW over the student's weights and the step it has come to, 0 unless a trainer state is given."""
    weights, decay = student.parameters(), args.weight_decay
    optimizer = torch.optim.AdamW(weights, args.lr, betas=(0.9, 0.98), weight_decay=decay)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    return optimizer, state["step"] if state else 0


def batch_of(step, n_rows, args, rank, world):
    """A step's prompts: -> this rank's slots in the global batch, and the rows in the data of all slots."""
    size, share = args.batch_size, args.batch_size // world
    slots = range(rank * share, (rank + 1) * share)
    return slots, [row_at((step - 1) * size + slot, n_rows, args.seed) for slot in range(size)]


def repetition(completion, n=4):
    """Share of a completion's n-grams that it has said before."""
    grams = [tuple(completion[i : i + n]) for i in range(len(completion) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def peak_memory_gb(device):
    """The most that the GPU has held, or this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def update(student, teacher, rollouts, teacher_prompts, loss, optimizer, args, step):
    """One optimizer step on all ranks' rollouts -> metrics (means over tokens, seconds of this rank)."""
    device = student.device
    total_tokens = all_reduce(torch.tensor(sum(len(r.completion) for r in rollouts), device=device)).item()
    optimizer.zero_grad()
    sums, seconds = torch.zeros(len(TOKEN_METRICS), dtype=torch.float64, device=device), {}
    prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
    rows = shared_rows(student, prompts, completions)
    rows.sort(key=lambda row: len(prompts[row[0]]) + sum(len(completions[i]) for i in row))
    order = [i for row in rows for i in row]  # rows of like length: little padding
    for start in range(0, len(order), args.micro_batch_size):
        micro = order[start : start + args.micro_batch_size]
        ours, theirs = [rollouts[i] for i in micro], [teacher_prompts[i] for i in micro]
        some, spent = distill(student, teacher, ours, theirs, loss, args, total_tokens)
        sums, seconds = sums + some, {name: seconds.get(name, 0) + spent[name] for name in spent}
    # Data parallel (DDP): each rank has backpropagated its share of one global mean, so gradients add up.
    parameters = [p for p in student.parameters() if p.grad is not None]
    for parameter in parameters:
        all_reduce(parameter.grad)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
    means = dict(zip(TOKEN_METRICS, (all_reduce(sums) / total_tokens).tolist(), strict=True))
    if not all(map(math.isfinite, (grad_norm, *means.values()))):
        raise UserError(
            f"step {step}: loss {means['loss']:.4g}, gradient norm {grad_norm:.4g}: not finite; stopped "
            f"before the update; checkpoints in --out {args.out} stand; lower --lr {args.lr}"
        )
    optimizer.step()
    return {**means, "grad_norm": grad_norm, "tokens": total_tokens, **seconds}


def rollout_metrics(rollouts, device):
    """completion_len, truncated, repetition: means over the rollouts of all ranks."""
    sums = [(len(r.completion), not r.ended, repetition(r.completion), 1) for r in rollouts]
    *sums, rows = all_reduce(torch.tensor(sums, dtype=torch.float64, device=device).sum(0)).tolist()
    return dict(zip(("completion_len", "truncated", "repetition"), (x / rows for x in sums), strict=True))


def begin_log(out, last_step):
    """Start metrics.jsonl, or forget its rows after the step to continue from -> the rows that stay."""
    file, aside = out / "metrics.jsonl", out / ".metrics.jsonl.tmp"
    lines = file.read_text().splitlines(keepends=True) if last_step and file.exists() else []
    try:
        rows = [
            json.loads(line) for line in lines if line.endswith("\n")
        ]  # a killed run may have torn the last
    except ValueError as error:
        raise UserError(
            f"--out {out}: metrics.jsonl has a broken line ({error}); remove that line"
        ) from error
    rows = [row for row in rows if row["step"] <= last_step]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(aside, file)
    return rows


def record(history, row, out, rank):
    """Add a row to the history of every rank, and to metrics.jsonl."""
    history.append(row)
    if rank == 0:
        with writing(out), open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def deferred_signals():
    """SIGTERM and Ctrl-C are noted in the list that this gives, so that a step can finish; twice kills."""
    noted, signals = [], (signal.SIGTERM, signal.SIGINT)
    handlers = [
        signal.signal(s, lambda s, _: (noted.append(s), signal.signal(s, signal.SIG_DFL))) for s in signals
    ]
    try:
        yield noted
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


def show(bar, history):
    """KL, accuracy and speed beside the progress bar."""
    row, evals = history[-1], [row for row in history if "eval_accuracy" in row]
    shown = {"KL": f"{row['reverse_kl']:.4f}", "tok/s": f"{row['tokens_per_s']:.0f}"}
    bar.set_postfix({**shown, **({"acc": f"{evals[-1]['eval_accuracy']:.3f}"} if evals else {})})


def finish(out, history, student, tokenizer, args, rank, seconds):
    """Save the final model and say what has changed; or, where a signal stopped the run, how to go on."""
    if rank == 0 and history[-1]["step"] < args.steps:
        print(f"stopped after step {history[-1]['step']} and saved: continue with --resume")
    elif rank == 0:
        save_model(out / "final", student, tokenizer)
        evals = [row for row in history if "eval_len" in row]
        names = [name for name in ("eval_accuracy", "eval_reverse_kl") if evals and name in evals[0]]
        changes = [f"{name} {evals[0][name]:.3f} -> {evals[-1][name]:.3f}" for name in names]
        print("; ".join([*changes, f"{seconds:.0f} s", f"model in {out / 'final'}"]))


def resolve_paths(args, rank, device, task="opd"):
    """--student, --teacher, --data, --eval_data -> {flag: path}; "toy" is built once, by rank 0."""
    path = {flag: getattr(args, flag) for flag in ("student", "teacher", "data", "eval_data")}
    if "toy" in path.values():
        from tutorials import toy

        if rank == 0:
            toy.build(task)
        all_reduce(torch.zeros(1, device=device))  # the other ranks wait here
        path = {flag: toy.build(task)[flag] if name == "toy" else name for flag, name in path.items()}
    return path


def train(args):
    """Distil as the arguments say; returns the rows of metrics.jsonl."""
    args, rank, world, device = set_up(args)
    started, out = clock(device), Path(args.out)
    # Everything that can be wrong is found before the first byte is written.
    path = resolve_paths(args, rank, device)
    checkpoint, state = newest_checkpoint(args) if args.resume else (None, None)
    start_from = checkpoint or path["student"]
    student, teacher, tokenizer, stop_ids = load_pair(start_from, path["teacher"], args, device)
    data = load_rows(path["data"], "data", ["prompt"])
    held_out = load_rows(path["eval_data"], "eval_data", ["prompt", "answer"]) if args.eval_data else []

    def encode(rows, flag, i):
        where = f"--{flag} {path[flag]}, row {i}"
        return encode_prompt(tokenizer, rows[i]["prompt"], args.max_prompt_tokens, where)

    eval_prompts = [encode(held_out, "eval_data", i) for i in range(len(held_out))]
    answers = ["" if row["answer"] is None else str(row["answer"]) for row in held_out]
    for i in range(min(len(data), 1000)):  # the other rows of a longer data set: when their turn comes
        encode(data, "data", i)

    optimizer, done = make_optimizer(student, args, state)
    history = begin_log(out, done) if rank == 0 else []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    steps = range(done + 1, args.steps + 1)
    bar = tqdm(steps, initial=done, total=args.steps, disable=rank > 0, unit="step")

    def measure():
        inputs = (eval_prompts, eval_prompts, answers, stop_ids, args, rank, world)
        with autocast:
            return evaluate(student, teacher, tokenizer, *inputs) if held_out else {}

    if done == 0 and held_out:
        record(history, {"step": 0, **measure()}, out, rank)
    with deferred_signals() as signals, bar:
        for step in bar:
            begin, seconds = clock(device), {}
            slots, which = batch_of(step, len(data), args, rank, world)
            prompts = [encode(data, "data", i) for i in which]  # of all ranks, to fail alike
            prompts = [prompts[slot] for slot in slots]

            # Sample from the student; in SFT steps, and in a share 1 - lmbda of the others, from the teacher.
            on_policy = step > args.sft_steps and uniforms(args.seed, step).item() < args.lmbda
            limits = (args.max_new_tokens, args.temperature, args.top_p)
            with autocast, timed(seconds, "sample_s", device):
                writer, n = student if on_policy else teacher, args.samples_per_prompt
                rollouts = sample(writer, prompts, n, stop_ids, (args.seed, step), slots, *limits)

            # Score and update.
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, args)
            loss = LOSSES[args.loss] if step > args.sft_steps else SFT
            theirs = [r.prompt for r in rollouts]  # the teacher reads what the student reads; in OPSD, more
            updates = []
            for _ in range(args.updates_per_rollout):
                with autocast:  # left after each: until then it keeps the bfloat16 copies of the weights
                    updates.append(update(student, teacher, rollouts, theirs, loss, optimizer, args, step))

            # Evaluate, record, save.
            stop = all_reduce(torch.tensor(len(signals), device=device)).item() > 0
            last = step == args.steps
            row = {"step": step, **updates[0], **rollout_metrics(rollouts, device), **seconds}
            row.update(lr=lr_at(step, args), peak_mem_gb=peak_memory_gb(device))
            row["tokens_per_s"] = row["tokens"] / (clock(device) - begin)
            if last or (args.eval_every and step % args.eval_every == 0):
                row.update(measure())
            record(history, row, out, rank)
            if last or stop or (args.save_every and step % args.save_every == 0):
                save_checkpoint(out, step, student, tokenizer, optimizer, args, rank)
            show(bar, history)
            if stop and not last:
                break
    finish(out, history, student, tokenizer, args, rank, clock(device) - started)
    return history


def main(args_class=Args, train=train):
    """Parse the command line and train; what the user can mend ends in one line and exit code 2."""

    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser = HfArgumentParser(args_class, allow_abbrev=False, epilog=f"losses: {' '.join(LOSSES)}")
    parser.error = refuse
    try:
        options = {"return_remaining_strings": True, "look_for_args_file": False}
        args, unknown = parser.parse_args_into_dataclasses(**options)
        if unknown:
            refuse(f"{unknown[0]}: no such flag")
        train(args)
    except (UserError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError):  # of a row, at the time that it is read
            files = f"--data {args.data}, --eval_data {args.eval_data}"
            error = f"{files}: some text is not UTF-8 ({error}); convert the file"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks check the same things and fail alike
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        else:  # torchrun kills all ranks as soon as one has ended: the one that speaks goes first
            time.sleep(60)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
