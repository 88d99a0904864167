"""On-policy self-distillation (OPSD): the teacher is the student, conditioned on privileged information.

The student answers the bare prompt. The teacher is the same model behind a prompt that also holds privileged
information (PI): the answer, a solution, a rule. Both score the same completion token ids, and the student
learns the distribution that it would have with the PI in its prompt. At test time there is no PI.

    torchrun opsd.py                                        # toy: a shared rule is learned; accuracy rises
    torchrun opsd.py --pi answer --out runs/answer          # toy: each problem's answer; accuracy falls
    torchrun opsd.py --student S --data chat.jsonl --pi system --teacher_mode ema        # a real model

The loop is opd.train. New here: what the teacher reads (PI), how its weights follow the student (frozen, ema,
live), and what is measured about it: the methods of SelfTeacher.
"""

import re
import string
from dataclasses import dataclass, replace

import torch

import opd
from opd import UserError, arg, need, uniforms

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
    teacher: str | None = arg(None, "another model as the frozen teacher (default: the student itself)")
    out: str = arg("runs/opsd", "folder for metrics and models", group="evaluation and saving")
    pi: str = arg(
        "system",
        "answer: the final answer; solution: a reference solution; masked_solution: with tokens hidden; "
        "hidden_think: solution (or answer) in the assistant's think block; system: the row's `privileged` "
        "text as system message; instruction: the same in the user's turn; demonstration: another problem, "
        "solved; shuffled_solution: another problem's solution (control); none: no PI (control)",
        "|".join(TEMPLATES),
        "privileged information",
    )
    pi_template: str | None = arg(
        None, "own text: {prompt} {answer} {solution} {privileged} {example_prompt} {example_solution}"
    )
    mask_ratio: float = arg(0.5, "masked_solution: probability that a token is hidden", "[0,1]")
    teacher_mode: str = arg(
        "frozen", "frozen: initial weights; ema: moving average; live: the student's own", "frozen|ema|live"
    )
    ema_decay: float = arg(0.99, "ema: teacher = decay * teacher + (1 - decay) * student", "(0,1)")
    refresh_every: int = arg(0, "frozen: every N steps a copy of the student; 0 = never", "[0,inf)")


def check_args(args):
    """UserError for what is wrong with the flags that opd.py does not have."""
    mode, every, other = args.teacher_mode, args.refresh_every, args.teacher
    need(mode == "frozen" or not every, f"--refresh_every {every}: goes with frozen, not {mode}: use 0")
    own = f"--teacher {other}: goes with frozen; {mode} starts from the student"
    need(mode == "frozen" or not other, own)
    if args.pi_template is not None:
        where = f"--pi_template {args.pi_template}"
        with opd.blame(where, "not a template", "write {{ for a brace"):
            fields = template_fields(args.pi_template)
            known = "prompt answer solution privileged".split()
            known += ["example_prompt", "example_solution"] if args.pi == "demonstration" else []
            for name in fields:
                need(name in known, f"no field {{{name}}}; there are {' '.join(known)}")
            needed = " or ".join(f"{{{name}}}" for name in NEEDS[args.pi])
            need(set(NEEDS[args.pi]) & set(fields), f"--pi {args.pi} needs {needed} in it")
            placed = args.pi in ("system", "hidden_think") or "prompt" in fields
            need(placed, "needs {prompt} in it, or the teacher would not see the problem")


def template_fields(template):
    """Names of the fields of a template; ValueError for what is more than a name."""
    fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    for _, name, spec, conversion in fields:
        if spec or conversion:
            raise ValueError(f"a field is a name alone, as {{{name}}}")
    return [name for _, name, _, _ in fields]


# ------------------------------------------------------------------------------------- what the teacher reads


def partner(rows, i, what, seed):
    """Another row, drawn for row i from the seed, in which what(row) is not the same as in row i."""
    others = len(rows) - 1  # tried one after the other from a random one on; 0 is the row after row i
    start = int(uniforms(seed, -2, i).item() * others)
    for k in range(start, start + others):
        other = rows[(i + 1 + k % others) % len(rows)]
        if has(other.get("solution")) and what(other) != what(rows[i]):
            return other
    raise UserError("no other row has another problem and solution; give more rows or another --pi")


def has(value):
    return value is not None and value != ""


def mask_solution(tokenizer, solution, ratio, key):
    """The solution with each token hidden with probability ratio: a pure function of the key."""
    spans = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    hidden, text, at = (uniforms(*key, torch.arange(len(spans))) < ratio).tolist(), "", 0
    for (start, end), hide in zip(spans, hidden, strict=True):
        if end > at:  # spans overlap where a token is a part of a character
            text, at = text + solution[at:start] + (MASKED if hide else solution[max(at, start) : end]), end
    return text + solution[at:]


def user_text(prompt):
    """The prompt, or its last message of the user; None if there is none."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), None)


def teacher_prompt(tokenizer, rows, i, args):
    """Row i's prompt with its PI: a string, or chat messages plus what the assistant's turn already holds."""
    row, prompt = rows[i], rows[i]["prompt"]
    if args.pi == "none" and args.pi_template is None:
        return prompt, ""
    template = args.pi_template or TEMPLATES[args.pi]
    if args.pi == "hidden_think" and args.pi_template is None and "solution" not in rows.column_names:
        template = "{answer}"
    fields, user = template_fields(template), user_text(prompt)
    for column in (name.replace("example_", "") for name in fields):  # its own, also if another row is shown
        need(has(row.get(column)), f"--pi {args.pi} needs {column!r}, missing or empty there; fill it in")
    placed = user is not None or ("prompt" not in fields and args.pi in ("system", "hidden_think"))
    need(placed, f"--pi {args.pi} needs a message of the user, there is none; remove the row")
    values = {name: row.get(name) for name in ("answer", "solution", "privileged")}
    if args.pi == "shuffled_solution":
        values["solution"] = partner(rows, i, lambda row: row["solution"], args.seed)["solution"]
    if args.pi == "demonstration":
        other = partner(rows, i, lambda row: user_text(row["prompt"]), args.seed)
        values.update(example_prompt=user_text(other["prompt"]), example_solution=other["solution"])
    if args.pi == "masked_solution":
        key = (args.seed, -3, i)
        values["solution"] = mask_solution(tokenizer, str(values["solution"]), args.mask_ratio, key)
    text = template.format(prompt=user, **values)

    if args.pi == "hidden_think":
        # The completion continues where the student's does: in a block that the prompt opened, else after it.
        start = prompt if isinstance(prompt, str) else chat_text(tokenizer, prompt)
        opened = start.rstrip().endswith("<think>")
        return prompt, f"{text}\n" if opened else f"<think>\n{text}\n</think>\n\n"
    if isinstance(prompt, str):
        return (text if "prompt" in fields else f"{text}\n\n{prompt}"), ""
    if args.pi == "system":
        if prompt[0]["role"] == "system":
            text, prompt = f"{text}\n\n{prompt[0]['content']}", prompt[1:]
        return [{"role": "system", "content": text}, *prompt], ""
    last = max(k for k, message in enumerate(prompt) if message["role"] == "user")
    return [*prompt[:last], {"role": "user", "content": text}, *prompt[last + 1 :]], ""


def chat_text(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode_teacher_prompt(tokenizer, rows, i, args, limit):
    """Token ids of what the teacher reads for row i."""
    prompt, begun = teacher_prompt(tokenizer, rows, i, args)
    if args.pi == "system" and isinstance(prompt, list):
        remedy = "use --pi instruction, which puts the same text into the user's turn"
        with opd.blame("--pi system", "the chat template refuses a system message", remedy):
            ids = opd.encode_prompt(tokenizer, prompt)
    elif begun:
        raw = isinstance(prompt, str)
        start = prompt if raw else chat_text(tokenizer, prompt)
        start = re.sub(r"<think>\s*</think>\s*$", "", start)  # a template's empty block: ours takes its place
        ids = tokenizer(start + begun, add_special_tokens=raw).input_ids
    else:
        ids = opd.encode_prompt(tokenizer, prompt)
    room = f"the model has room for {limit} before --max_new_tokens {args.max_new_tokens}"
    fits = len(ids) <= limit
    need(fits, f"the prompt with its PI has {len(ids)} tokens; {room}; lower that, or remove the row")
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
    prompts, key = teacher_prompts[:8], (~args.seed, 1)
    rollouts = opd.sample(teacher, prompts, 1, stop_ids, key, range(len(prompts)), args.max_new_tokens)
    tokens = 0
    for r in rollouts:
        r.completion = r.completion[: limit - tokens]
        tokens += len(r.completion)
    kept = [r for r in rollouts if r.completion]
    hidden = opd.completion_hidden(teacher, [r.prompt for r in kept], [r.completion for r in kept])
    return kept, opd.project(teacher, hidden).log_softmax(-1)


@torch.no_grad()
def teacher_drift(teacher, anchors):
    """KL of the current teacher to the initial one, nats per token, on the initial one's completions."""
    rollouts, initial_logp = anchors
    hidden = opd.completion_hidden(teacher, [r.prompt for r in rollouts], [r.completion for r in rollouts])
    logp = opd.project(teacher, hidden).log_softmax(-1)
    return (logp.exp() * (logp - initial_logp)).sum(-1).mean().item()


class SelfTeacher(opd.Teacher):
    """The student itself, conditioned on privileged information; its weights frozen, an average, or live."""

    task = "opsd"

    def __init__(self, args):
        check_args(args)
        super().__init__(toy_template(args) if args.student == "toy" else args)
        self.live = args.teacher_mode == "live"
        self.moves = args.teacher_mode == "ema" or args.refresh_every > 0
        self.dtype = "float32" if self.moves else args.dtype  # small steps of a teacher vanish in bfloat16
        fields = template_fields(self.args.pi_template or TEMPLATES[args.pi])
        columns = {name.replace("example_", "") for name in fields} - {"prompt"}
        self.columns = sorted(columns - ({"solution"} if args.pi == "hidden_think" else set()))

    def source(self, path):
        return None if self.live else path["teacher"] or path["student"]

    def prompt(self, tokenizer, rows, i, prompt):
        limit = opd.positions(self.model) - self.args.max_new_tokens
        tokenizer = self.model.tokenizer if self.args.teacher_template == "own" else tokenizer
        return encode_teacher_prompt(tokenizer, rows, i, self.args, limit)

    def begin(self, student, data, held_out, tokenizer, stop_ids):
        shapes, theirs = ([p.shape for p in model.parameters()] for model in (student, self.model))
        why = f"--teacher {self.args.teacher} is of another shape; use 0, or another teacher"
        need(not self.moves or shapes == theirs, f"--refresh_every {self.args.refresh_every}: {why}")
        self.held_out = [x._replace(prompt=x.teacher_prompt) for x in held_out]  # with PI, for the ceiling
        self.evaluation, self.ceiling, self.anchors = (tokenizer, stop_ids, self.args), {}, None
        if self.live or self.moves:
            prompts = [data[i].teacher_prompt for i in range(min(8, len(data)))]
            self.anchors = drift_anchors(self.model, prompts, stop_ids, self.args)

    def follow(self, student, step):
        if self.args.teacher_mode == "ema":
            move_teacher(self.model, student, self.args.ema_decay)
        elif self.args.refresh_every and step % self.args.refresh_every == 0:
            move_teacher(self.model, student, 0)

    def measure(self, row, evaluating):
        """pi_gap: how much likelier PI makes what was sampled. On evaluation also the ceiling and drift."""
        found = {"pi_gap": row["teacher_logp"] - row["student_logp"]} if row["step"] else {}
        if evaluating and self.held_out:
            if self.anchors or not self.ceiling:  # a frozen teacher's does not change
                self.ceiling, _ = opd.evaluate(self.model, None, self.held_out, *self.evaluation)
            with_pi = {"eval_accuracy": "eval_with_pi_accuracy", "eval_len": "eval_with_pi_len"}
            found.update({with_pi[name]: x for name, x in self.ceiling.items() if name in with_pi})
        if evaluating and self.anchors and row["step"]:
            found["teacher_drift"] = teacher_drift(self.model, self.anchors)
        return found


def train(args):
    """opd.train with a SelfTeacher; returns the rows of metrics.jsonl."""
    return opd.train(args, SelfTeacher)


def toy_template(args):
    """The toy's prompts are not words: its own templates stand in for those above."""
    from tutorials import toy

    need(args.teacher != "toy", "--teacher toy: goes with opd.py; the toy of opsd.py is its own teacher")
    known = " ".join(toy.PI_TEMPLATES)
    need(args.pi in toy.PI_TEMPLATES, f"--pi {args.pi}: not in the toy task, which has {known}")
    return replace(args, pi_template=args.pi_template or toy.PI_TEMPLATES[args.pi])


if __name__ == "__main__":
    opd.main(Args, train)
