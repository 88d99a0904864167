"""On-policy self-distillation with privileged information (OPSD): the teacher is the student, told more.

The student answers the bare prompt. The teacher is the same model behind a prompt that also holds privileged
information (PI): the answer, a solution, a rule. Both score the same completion token ids; the student moves
towards what it would have said, had it known. At test time there is no PI.

    torchrun opsd.py                                        # toy: a shared rule is learned; accuracy rises
    torchrun opsd.py --pi answer --out runs/answer          # toy: each problem's answer; accuracy falls
    torchrun opsd.py --student S --data chat.jsonl --pi system --teacher_mode ema        # a real model

All that sampling, scoring and updating need is opd.py's. New here: which text the teacher reads (PI), which
weights it has (frozen, ema, live), and what is measured about both.
"""

import math
import re
import string
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import opd
from opd import UserError, all_reduce, arg, clock, timed, uniforms

# What the teacher reads in place of the user's turn (or of the whole prompt, if a string). {prompt} is
# the user's own text. Two modes are placed elsewhere: `system` before all, `hidden_think` after all.
SOLUTION = "{prompt}\n\nHere is a reference solution:\n{solution}\n\nSolve the problem in your own words."
TEMPLATES = {
    "answer": "{prompt}\n\nThe final answer is known to be {answer}. Work out how to get there.",
    "solution": SOLUTION,
    "masked_solution": SOLUTION.replace("solution:", "solution, with parts of it hidden (_):"),
    "hidden_think": "{solution}",
    "system": "{privileged}",
    "instruction": "{privileged}\n\n{prompt}",
    "demonstration": "Here is a solved example.\n\nProblem:\n{example_prompt}\n\nSolution:\n"
    "{example_solution}\n\nNow solve this problem.\n\n{prompt}",
    "shuffled_solution": SOLUTION,
    "none": "{prompt}",
}
NEEDS = {  # the fields of which a template must have at least one, or its PI would not be shown
    **{"answer": ["answer"], "hidden_think": ["solution", "answer"], "none": ["prompt"]},
    **{mode: ["solution"] for mode in ("solution", "masked_solution", "shuffled_solution")},
    **{mode: ["privileged"] for mode in ("system", "instruction")},
    **{"demonstration": ["example_solution"]},
}
MASKED = "_"  # stands for a hidden token of a masked solution


@dataclass
class Args(opd.Args):
    teacher: str | None = arg(
        None, "another model as the teacher of --teacher_mode frozen (default: the student)"
    )
    out: str = arg("runs/opsd", "folder for metrics.jsonl, step_NNNNNN/ and final/")
    pi: str = arg(
        "system",
        "answer: the final answer is told | solution: a reference solution is shown | masked_solution: the "
        "same, tokens hidden | hidden_think: solution (or answer) in the assistant's think block | system: "
        "the row's `privileged` text as system message | instruction: the same text in the user's turn | "
        "demonstration: another problem, solved | shuffled_solution: another's solution | none (controls)",
    )
    pi_template: str | None = arg(
        None, "text that replaces the mode's, with {prompt} {answer} {solution} {privileged} "
        "{example_prompt} {example_solution}"
    )  # fmt: skip
    mask_ratio: float = arg(0.5, "masked_solution: probability that a token of the solution is hidden")
    teacher_mode: str = arg(
        "frozen", "frozen: initial weights | ema: moving average | live: the student's own"
    )
    ema_decay: float = arg(0.99, "ema: teacher = decay * teacher + (1 - decay) * student after each step")
    refresh_every: int = arg(0, "frozen: every N steps the teacher becomes a copy of the student; 0 = never")


def check_args(args):
    """UserError for what is wrong with the flags that opd.py does not have."""

    def need(ok, flag, remedy):
        if not ok:
            value = str(getattr(args, flag)).replace("\n", "\\n")  # a template has lines, a message has one
            raise UserError(f"--{flag} {value}: {remedy}")

    need(args.pi in TEMPLATES, "pi", f"unknown; choose one of {' '.join(TEMPLATES)}")
    need(
        args.teacher_mode in ("frozen", "ema", "live"), "teacher_mode", "unknown; choose frozen, ema or live"
    )
    need(0 < args.ema_decay < 1, "ema_decay", "must be inside (0, 1); for the ends use frozen or live")
    need(0 <= args.mask_ratio <= 1, "mask_ratio", "must be between 0 and 1")
    need(args.refresh_every >= 0, "refresh_every", "must be 0 or more")
    frozen = args.teacher_mode == "frozen"
    need(
        frozen or not args.refresh_every, "refresh_every", f"goes with frozen, not {args.teacher_mode}: use 0"
    )
    need(
        frozen or not args.teacher,
        "teacher",
        f"goes with frozen; {args.teacher_mode} starts from the student",
    )
    if args.pi_template is not None:
        try:
            fields = template_fields(args.pi_template)
        except ValueError as error:
            raise UserError(f"--pi_template {args.pi_template!r}: {error}; write {{{{ for a brace") from error
        known = "prompt answer solution privileged".split()
        known += ["example_prompt", "example_solution"] if args.pi == "demonstration" else []
        for name in fields:
            need(name in known, "pi_template", f"no field {{{name}}}; there are {' '.join(known)}")
        needed = " or ".join(f"{{{name}}}" for name in NEEDS[args.pi])
        need(set(NEEDS[args.pi]) & set(fields), "pi_template", f"--pi {args.pi} needs {needed} in it")
        placed = args.pi in ("system", "hidden_think") or "prompt" in fields
        need(placed, "pi_template", "needs {prompt} in it, or the teacher would not see the problem")


def template_fields(template):
    """Names of the fields of a template; ValueError for what is more than a name."""
    fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    for _, name, spec, conversion in fields:
        if spec or conversion:
            raise ValueError(f"a field is a name alone, as {{{name}}}")
    return [name for _, name, _, _ in fields]


# ------------------------------------------------------------------------------------- what the teacher reads


def partner(rows, i, what, seed, where):
    """Another row, drawn for row i from the seed, in which what(row) is not the same as in row i."""
    start = int(uniforms(seed, -2, i).item() * (len(rows) - 1))
    for step in range(len(rows) - 1):
        other = rows[(i + 1 + (start + step) % (len(rows) - 1)) % len(rows)]
        if has(other.get("solution")) and what(other) != what(rows[i]):
            return other
    raise UserError(f"{where}: no other row has another problem and solution; give more rows or another --pi")


def has(value):
    return value is not None and value != ""


def mask_solution(tokenizer, solution, ratio, key):
    """The solution with each token hidden with probability ratio: a pure function of the key."""
    spans = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    hidden, text, at = (uniforms(*key, torch.arange(len(spans))) < ratio).tolist(), "", 0
    for (start, end), hide in zip(spans, hidden, strict=True):  # of the text: a token may be half a letter
        if end > at:
            text, at = text + solution[at:start] + (MASKED if hide else solution[max(at, start) : end]), end
    return text + solution[at:]


def user_text(prompt):
    """The prompt, or its last message of the user; None if there is none."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), None)


def teacher_prompt(tokenizer, rows, i, args, where):
    """Row i's prompt with its PI: a string, or chat messages plus what the assistant's turn already holds."""
    row, prompt = rows[i], rows[i]["prompt"]
    if args.pi == "none" and args.pi_template is None:
        return prompt, ""
    template = args.pi_template or TEMPLATES[args.pi]
    if args.pi == "hidden_think" and args.pi_template is None and "solution" not in rows.column_names:
        template = "{answer}"
    fields = template_fields(template)
    for column in (name.replace("example_", "") for name in fields):  # its own, also if another row is shown
        if not has(row.get(column)):
            raise UserError(f"{where}: --pi {args.pi} needs {column!r}, missing or empty there; fill it in")
    user = user_text(prompt)
    if user is None and ("prompt" in fields or args.pi not in ("system", "hidden_think")):
        raise UserError(f"{where}: --pi {args.pi} needs a message of the user, there is none; remove the row")
    values = {name: row.get(name) for name in ("answer", "solution", "privileged")}
    if args.pi == "shuffled_solution":
        values["solution"] = partner(rows, i, lambda row: row["solution"], args.seed, where)["solution"]
    if args.pi == "demonstration":
        other = partner(rows, i, lambda row: user_text(row["prompt"]), args.seed, where)
        values.update(example_prompt=user_text(other["prompt"]), example_solution=other["solution"])
    if args.pi == "masked_solution":
        key = (args.seed, -3, i)
        values["solution"] = mask_solution(tokenizer, str(values["solution"]), args.mask_ratio, key)
    text = template.format(prompt=user, **values)

    if args.pi == "hidden_think":
        # The completion goes on where the student's does: inside a block that the prompt opened, else after.
        start = prompt if isinstance(prompt, str) else chat_text(tokenizer, prompt)
        opened = start.rstrip().endswith("<think>")
        return prompt, f"{text}\n" if opened else f"<think>\n{text}\n</think>\n\n"
    if isinstance(prompt, str):
        return (text if "prompt" in template_fields(template) else f"{text}\n\n{prompt}"), ""
    if args.pi == "system":
        if prompt[0]["role"] == "system":
            text, prompt = f"{text}\n\n{prompt[0]['content']}", prompt[1:]
        return [{"role": "system", "content": text}, *prompt], ""
    last = max(k for k, message in enumerate(prompt) if message["role"] == "user")
    return [*prompt[:last], {"role": "user", "content": text}, *prompt[last + 1 :]], ""


def chat_text(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode_teacher_prompt(tokenizer, rows, i, args, limit, where):
    """Token ids of what the teacher reads for row i."""
    prompt, begun = teacher_prompt(tokenizer, rows, i, args, where)
    if not begun:
        ids = opd.encode_prompt(tokenizer, prompt, math.inf, where)
    else:
        raw = isinstance(prompt, str)
        start = prompt if raw else chat_text(tokenizer, prompt)
        start = re.sub(r"<think>\s*</think>\s*$", "", start)  # a template's empty block: ours takes its place
        ids = tokenizer(start + begun, add_special_tokens=raw).input_ids
    if len(ids) > limit:
        raise UserError(
            f"{where}: the prompt with its PI has {len(ids)} tokens; the model has room for {limit} before "
            f"--max_new_tokens {args.max_new_tokens}; lower that, or remove the row"
        )
    return ids


# ------------------------------------------------------------------------------------- which weights it has


@torch.no_grad()
def move_teacher(teacher, student, decay):
    """teacher = decay * teacher + (1 - decay) * student, weight by weight; decay 0 is a copy."""
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        theirs.lerp_(ours, 1 - decay)


@torch.no_grad()
def drift_anchors(teacher, teacher_prompts, stop_ids, args, limit=256):
    """What the initial teacher says: some of its completions, and its log-probabilities [N,V] along them.

    Kept in place of its weights, so that a live teacher needs no second copy of the model. N <= limit.
    """
    rollouts = opd.sample(
        teacher, teacher_prompts[:8], 1, stop_ids, (~args.seed, 1), range(8), args.max_new_tokens
    )
    kept, tokens = [], 0
    for r in rollouts:
        r.completion = r.completion[: limit - tokens]
        kept, tokens = kept + [r] * bool(r.completion), tokens + len(r.completion)
    hidden = opd.completion_hidden(teacher, [r.prompt for r in kept], [r.completion for r in kept])
    return kept, opd.project(teacher, hidden).log_softmax(-1)


@torch.no_grad()
def teacher_drift(teacher, anchors):
    """KL of the current teacher to the initial one, nats per token, on the initial one's completions."""
    rollouts, initial_logp = anchors
    hidden = opd.completion_hidden(teacher, [r.prompt for r in rollouts], [r.completion for r in rollouts])
    logp = opd.project(teacher, hidden).log_softmax(-1)
    return (logp.exp() * (logp - initial_logp)).sum(-1).mean().item()


# ------------------------------------------------------------------------------------------------------ train


def train(args):
    """Self-distil as the arguments say; returns the rows of metrics.jsonl. Read opd.train first."""
    args, rank, world, device = opd.set_up(args)
    check_args(args)
    started, out = clock(device), Path(args.out)
    path = opd.resolve_paths(args, rank, device, "opsd")
    if args.student == "toy":
        args = toy_template(args)
    live, moving = args.teacher_mode == "live", args.teacher_mode == "ema" or args.refresh_every > 0

    # Start from the initial weights, also on resume: the teacher is made of them.
    checkpoint, state = opd.newest_checkpoint(args) if args.resume else (None, None)
    teacher_path = None if live else path["teacher"] or path["student"]
    exact = replace(args, dtype="float32") if moving else args  # small steps of a teacher vanish in bfloat16
    student, teacher, tokenizer, stop_ids = opd.load_pair(path["student"], teacher_path, exact, device)
    if moving and [p.shape for p in student.parameters()] != [p.shape for p in teacher.parameters()]:
        why = f"--teacher {args.teacher} is of another shape"
        raise UserError(f"--refresh_every {args.refresh_every}: {why}; use 0, or another teacher")

    needed = {
        name.replace("example_", "") for name in template_fields(args.pi_template or TEMPLATES[args.pi])
    }
    needed = ["prompt", *sorted(needed - {"prompt", *(["solution"] if args.pi == "hidden_think" else [])})]
    data = opd.load_rows(path["data"], "data", needed)
    held_out = opd.load_rows(path["eval_data"], "eval_data", ["answer", *needed]) if args.eval_data else []
    room = (getattr(teacher.config, "max_position_embeddings", None) or math.inf) - args.max_new_tokens

    def encode(rows, flag, i):  # -> what the student reads, what the teacher reads
        where = f"--{flag} {path[flag]}, row {i}"
        ours = opd.encode_prompt(tokenizer, rows[i]["prompt"], args.max_prompt_tokens, where)
        return ours, encode_teacher_prompt(tokenizer, rows, i, args, room, where)

    eval_prompts = [encode(held_out, "eval_data", i) for i in range(len(held_out))]
    eval_ours, eval_theirs = [ours for ours, _ in eval_prompts], [theirs for _, theirs in eval_prompts]
    answers = ["" if row["answer"] is None else str(row["answer"]) for row in held_out]
    checked = [encode(data, "data", i) for i in range(min(len(data), 1000))]

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    with autocast:
        anchors = (
            drift_anchors(teacher, [theirs for _, theirs in checked], stop_ids, args)
            if live or moving
            else None
        )
    if checkpoint:
        student.load_state_dict(opd.load_model(checkpoint, "out", torch.float32, device)[1].state_dict())
        if moving:
            teacher.load_state_dict(state["teacher"])
    optimizer, done = opd.make_optimizer(student, args, state)
    history = opd.begin_log(out, done) if rank == 0 else []
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, disable=rank > 0, unit="step")
    ceiling = {}

    def measure():
        if not held_out:
            return {}
        with autocast:
            common = (answers, stop_ids, args, rank, world)
            scores = opd.evaluate(student, teacher, tokenizer, eval_ours, eval_theirs, *common)
            if live or moving or not ceiling:  # a frozen teacher's does not change
                ceiling.update(opd.evaluate(teacher, None, tokenizer, eval_theirs, eval_theirs, *common))
        if "eval_accuracy" in ceiling:
            scores["eval_with_pi_accuracy"] = ceiling["eval_accuracy"]
        return {**scores, "eval_with_pi_len": ceiling["eval_len"]}

    if done == 0 and held_out:
        opd.record(history, {"step": 0, **measure()}, out, rank)
    with opd.deferred_signals() as signals, bar:
        for step in bar:
            begin, seconds = clock(device), {}
            slots, which = opd.batch_of(step, len(data), args, rank, world)
            prompts = [encode(data, "data", i) for i in which]  # of all ranks, to fail alike
            prompts = [prompts[slot] for slot in slots]

            # Sample: whoever writes, reads its own prompt; what it wrote is then scored behind both.
            n, limits = args.samples_per_prompt, (args.max_new_tokens, args.temperature, args.top_p)
            on_policy = step > args.sft_steps and uniforms(args.seed, step).item() < args.lmbda
            writer, read = (student, 0) if on_policy else (teacher, 1)
            with autocast, timed(seconds, "sample_s", device):
                texts = [pair[read] for pair in prompts]
                rollouts = opd.sample(writer, texts, n, stop_ids, (args.seed, step), slots, *limits)
            theirs = [prompts[k // n][1] for k in range(len(rollouts))]
            rollouts = [replace(r, prompt=prompts[k // n][0]) for k, r in enumerate(rollouts)]

            # Score and update; then the teacher follows, if it does.
            for group in optimizer.param_groups:
                group["lr"] = opd.lr_at(step, args)
            loss = opd.LOSSES[args.loss] if step > args.sft_steps else opd.SFT
            updates = []
            for _ in range(args.updates_per_rollout):
                with autocast:  # left after each: until then it keeps the bfloat16 copies of the weights
                    updates.append(
                        opd.update(student, teacher, rollouts, theirs, loss, optimizer, args, step)
                    )
            if args.teacher_mode == "ema":
                move_teacher(teacher, student, args.ema_decay)
            elif args.refresh_every and step % args.refresh_every == 0:
                move_teacher(teacher, student, 0)

            # Evaluate, record, save.
            stop = all_reduce(torch.tensor(len(signals), device=device)).item() > 0
            last = step == args.steps
            row = {"step": step, **updates[0], **opd.rollout_metrics(rollouts, device), **seconds}
            row.update(lr=opd.lr_at(step, args), peak_mem_gb=opd.peak_memory_gb(device))
            row["pi_gap"] = (
                row["teacher_logp"] - row["student_logp"]
            )  # what knowing more is worth, on what was said
            row["tokens_per_s"] = row["tokens"] / (clock(device) - begin)
            if last or (args.eval_every and step % args.eval_every == 0):
                with autocast:
                    row.update(
                        measure(), **({"teacher_drift": teacher_drift(teacher, anchors)} if anchors else {})
                    )
            opd.record(history, row, out, rank)
            if last or stop or (args.save_every and step % args.save_every == 0):
                extra = {"teacher": teacher.state_dict()} if moving else {}
                opd.save_checkpoint(out, step, student, tokenizer, optimizer, args, rank, **extra)
            opd.show(bar, history)
            if stop and not last:
                break
    opd.finish(out, history, student, tokenizer, args, rank, clock(device) - started)
    return history


def toy_template(args):
    """The toy's prompts are not words: its own templates stand in for those above."""
    from tutorials import toy

    if args.pi not in toy.PI_TEMPLATES:
        raise UserError(f"--pi {args.pi}: not in the toy task, which has {' '.join(toy.PI_TEMPLATES)}")
    return replace(args, pi_template=args.pi_template or toy.PI_TEMPLATES[args.pi])


if __name__ == "__main__":
    opd.main(Args, train)
