"""Four teachers: another style, nearly the student's style, the student's style, and the student after RL.

For each: the student's accuracy after distillation, and how the teacher scores the student's completions.
"""

import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402
import toy  # noqa: E402

import losses  # noqa: E402
import opd  # noqa: E402

SEEDS, STEPS, BATCH, NEW = (0, 1, 2), 150, 32, 32  # NEW: max_new_tokens; a chain has LENGTH
LENGTH, CUTS = 24, (0, 1, 2, 3, 6, 9, 12, 15, 18, 21)  # CUTS: prefix lengths at which the teacher continues
SHOWN = (0, 1, 3, 6, 12, 18)  # those in the table
PROMPTS, GROUP, GRPO_LR, GRPO_STEPS = 32, 8, 2e-4, 120
LABELS = {"B": "another style", "M": "nearly the student's style"}
LABELS |= {"RL": "the student after GRPO", "A": "the student's style"}
COLOURS = dict(zip(LABELS, (lesson.COLOURS[i] for i in (1, 4, 0, 2)), strict=True))
TEXT = {  # column of the table -> column and kind in the CSV
    "student's log-prob of its own completions": ("student_logp", "student_text"),
    "teacher's log-prob of the student's completions": ("teacher_logp", "student_text"),
    "teacher's log-prob of its own": ("teacher_logp", "own_text"),
    "teacher's entropy on the student's completions": ("teacher_entropy", "student_text"),
    "teacher's entropy on its own": ("teacher_entropy", "own_text"),
}
CPU = torch.device("cpu")


def data(smoke):
    """Paths of the training and held-out problems."""
    n = 16 if smoke else 256
    train = lesson.kept_rows("addition_train_20000_0", toy.rows(20_000))
    return {"data": train, "eval_data": lesson.kept_rows(f"addition_eval_{n}_0", toy.rows(n, held_out=True))}


def student(seed, smoke):
    return lesson.toy_model("A", seed, 10) if smoke else lesson.toy_model("A", seed, stop=0.45)


def teacher(name, seed, smoke):
    """Path of a teacher, trained if it is not cached; the teacher of seed s has seed s + 1,000,000."""
    if name != "RL":
        return lesson.toy_model(name, seed + 1_000_000, *([10] if smoke else []))
    start, steps = student(seed, smoke), 2 if smoke else GRPO_STEPS
    recipe = f"grpo_{Path(start).name}_{steps}x{PROMPTS}x{GROUP}_{GRPO_LR}"
    return lesson.kept(recipe, lambda: grpo(start, seed + 1_000_000, steps))


def right(completions, rows, tokenizer):
    """The verifiable reward [R]: 1 if a completion (token ids) ends in the answer of its row, else 0."""
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    pairs = zip(texts, rows, strict=True)
    return torch.tensor([float(opd.is_correct(text, row["answer"])) for text, row in pairs])


def scored(model, rollouts):
    """For every completion token: its log-probability [N], and the entropy of the model there [N]."""
    completions = [r.completion for r in rollouts]
    hidden = opd.completion_hidden(model, [r.prompt for r in rollouts], completions)  # [N,D]
    logp = opd.project(model, hidden).log_softmax(-1)  # [N,V]
    tokens = torch.tensor([[y] for completion in completions for y in completion])  # [N,1]
    return logp.gather(-1, tokens)[:, 0], -(logp.exp() * logp).sum(-1)


def grpo(path, seed, steps):
    """Reinforcement learning with verifiable rewards (RLVR) by GRPO -> the model at a path, improved.

    The model gets problems and rewards: no teacher, and no chains but its own. Ratio clipping is left out
    because each batch is used once, and so is the optional KL penalty towards the initial model.
    """
    args, rows = opd.Args(lr=GRPO_LR), toy.rows(20_000)
    model, _, tokenizer, stop_ids = opd.load_pair(path, None, args, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, steps + 1):
        batch = [rows[opd.row_at(step * PROMPTS + i, len(rows), seed)] for i in range(PROMPTS)]
        prompts = [tokenizer(row["prompt"]).input_ids for row in batch]
        rollouts = opd.sample(model, prompts, GROUP, stop_ids, (seed, step), range(PROMPTS), NEW)
        wanted = [row for row in batch for _ in range(GROUP)]
        reward = right([r.completion for r in rollouts], wanted, tokenizer).view(PROMPTS, GROUP)  # [B,G]
        # A_i = (r_i - mean(r)) / std(r) over the G answers to a problem; 0 if all are right or all wrong
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)  # [B,G]
        sizes = torch.tensor([len(r.completion) for r in rollouts])  # [B*G]
        advantage = advantage.flatten().repeat_interleave(sizes)  # [N]: each token has its answer's A_i
        logp, _ = scored(model, rollouts)  # [N]
        loss = losses.policy_gradient(logp, advantage).mean()  # -1/N sum A_i log p(y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
    return model


def row_of(kind, name, seed, at, **values):
    blank = dict.fromkeys(("accuracy", "teacher_logp", "student_logp", "teacher_entropy", "token"), "")
    return {"kind": kind, "teacher": name, "seed": seed, "at": at, **blank, **values}


def arm(name, seed, smoke):
    """Rows of one run of opd.py; the arms differ in --teacher only."""
    run = {"student": student(seed, smoke), "loss": "reverse_kl", "lr": 3e-4, "batch_size": BATCH}
    run |= {
        "max_new_tokens": NEW,
        "steps": 2 if smoke else STEPS,
        "eval_every": 1 if smoke else 25,
        "seed": seed,
        **data(smoke),
    }
    with lesson.distilled(opd, teacher=teacher(name, seed, smoke), **run) as (history, _):
        evals = [row for row in history if "eval_accuracy" in row]
    keys = ("teacher_logp", "student_logp", "teacher_entropy")
    trained = [{key: row[key] for key in keys if key in row} for row in evals]
    return [
        row_of("curve", name, seed, row["step"], accuracy=row["eval_accuracy"], **more)
        for row, more in zip(evals, trained, strict=True)
    ] + looked_at(name, seed, smoke)


@torch.no_grad()
def looked_at(name, seed, smoke):
    """Rows on a teacher's scores of the initial student's completions and of its own; handover; the map."""
    args, rows = opd.Args(dtype="float32"), toy.rows(16 if smoke else 256, held_out=True)
    ours, theirs, tokenizer, stop_ids = opd.load_pair(
        student(seed, smoke), teacher(name, seed, smoke), args, CPU
    )
    prompts, found = [tokenizer(row["prompt"]).input_ids for row in rows], []

    def written(model, prompts, draw):
        return opd.sample(model, prompts, 1, stop_ids, (~seed, draw), range(len(rows)), NEW)

    text = {"student_text": written(ours, prompts, 0), "own_text": written(theirs, prompts, 0)}
    for kind, rollouts in text.items():
        at = torch.cat([torch.arange(len(r.completion)) for r in rollouts])  # [N]
        seen = dict(zip(("teacher_logp", "teacher_entropy"), scored(theirs, rollouts), strict=True))
        seen["student_logp"] = scored(ours, rollouts)[0]
        for t in range(LENGTH):
            values = {key: value[at == t].mean().item() for key, value in seen.items()}
            found.append(row_of(kind, name, seed, t, **values))
    student_text = [r.completion for r in text["student_text"]]
    if seed == SEEDS[0]:  # for the map: the first wrong completion as long as a chain
        marks = zip(text["student_text"], right(student_text, rows, tokenizer).tolist(), strict=True)
        fit = [r for r, mark in marks if not mark and len(r.completion) == LENGTH] or text["student_text"]
        logp = {"teacher_logp": scored(theirs, fit[:1])[0], "student_logp": scored(ours, fit[:1])[0]}
        for t, token in enumerate(fit[0].completion):
            values = {key: value[t].item() for key, value in logp.items()}
            found.append(row_of("token", name, seed, t, token=repr(toy.CHARACTERS[token]), **values))
    for cut in CUTS:
        begun = [completion[: min(cut, len(completion) - 1)] for completion in student_text]
        rest = written(theirs, [p + b for p, b in zip(prompts, begun, strict=True)], 1)
        whole = [b + r.completion for b, r in zip(begun, rest, strict=True)]
        accuracy = right(whole, rows, tokenizer).mean().item()
        found.append(row_of("handover", name, seed, cut, accuracy=accuracy))
    return found


def run(smoke):
    jobs = [(name, seed, smoke) for name in ("RL", "B", "M", "A") for seed in SEEDS[: 1 if smoke else None]]
    data(smoke)
    # The longest jobs first. Only the RL jobs build students, which are their initial models.
    lesson.in_parallel(teacher, jobs, "teachers")
    return sum(lesson.in_parallel(arm, jobs, "students"), [])


def values(rows, kind, name, column, at):
    return [row[column] for row in lesson.select(rows, kind=kind, teacher=name, at=at)]


def plot(rows, path):
    title = "A more accurate teacher can be worse: what matters is its accuracy on the student's prefixes"
    layout = [["curve", "handover"], ["teacher_logp", "teacher_entropy"], ["map", "map"]]
    figure, panels = lesson.panels(title, layout, (11, 9.5))
    for name, colour in COLOURS.items():
        own = statistics.fmean(values(rows, "handover", name, "accuracy", 0))
        apart = {"A": "A\n\n", "M": "\n\nM"}  # labels that would overlap
        ends = {"curve": f"{name} ({own:.2f})", "handover": apart.get(name, name)}
        for kind, label in ends.items():
            ours = lesson.select(rows, kind=kind, teacher=name)
            lesson.curve(panels[kind], ours, "at", "accuracy", colour, label)
        for column in ("teacher_logp", "teacher_entropy"):
            for kind, style in (("student_text", "-"), ("own_text", ":")):
                ours = lesson.select(rows, kind=kind, teacher=name)
                label = name if name == "B" and kind == "student_text" else None
                lesson.curve(panels[column], ours, "at", column, colour, label, ls=style)
    start = statistics.fmean(row["accuracy"] for row in lesson.select(rows, kind="curve", at=0))
    panels["handover"].axhline(start, color="0.5", lw=1)
    panels["teacher_logp"].text(1.4, -8, "M", color=COLOURS["M"])
    scored_on, accuracy = "Student's completions (dotted: teacher's own)", "accuracy at T = 1"
    continued = "Teacher continues the student's prefix (grey: student alone)"
    axes = {
        "curve": ("Student by teacher (in brackets: teacher's accuracy)", "step", accuracy),
        "handover": (continued, "length of the student's prefix, tokens", accuracy),
        "teacher_logp": (scored_on, "token position", "teacher's log-prob, nats"),
        "teacher_entropy": (scored_on, "token position", "teacher's entropy, nats"),
    }
    for name, (heading, x, y) in axes.items():
        panels[name].set_title(heading, fontsize=10, loc="left")
        panels[name].set(xlabel=x, ylabel=y)

    token, panel = {name: lesson.select(rows, kind="token", teacher=name) for name in COLOURS}, panels["map"]
    grid = [[row["student_logp"] for row in token["A"]]]
    grid += [[row["teacher_logp"] for row in token[name]] for name in ("A", "RL", "M", "B")]
    image = panel.imshow(grid, cmap="Oranges_r", vmin=-12, vmax=1, aspect="auto")
    for i in range(len(grid)):
        for j, row in enumerate(token["A"]):
            colour = "white" if grid[i][j] < -8 else "black"
            panel.text(j, i, row["token"].strip("'"), ha="center", va="center", color=colour)
    panel.set_yticks(range(len(grid)), ["student", "A", "RL", "M", "B"])
    panel.set_xticks([])
    heading = "A wrong completion of the student: log-prob of each token by model"
    panel.set_title(heading, fontsize=10, loc="left")
    figure.colorbar(image, ax=panel, label="log-prob, nats", pad=0.01, ticks=[-12, -8, -4, 0])
    lesson.save(figure, path)


def table(head, cells):
    """Lines of Markdown, one per teacher; cells(name): for each column the numbers of all seeds."""
    lines = ["| " + " | ".join(["teacher", *head]) + " |", "|---" * (len(head) + 1) + "|"]
    for name, label in LABELS.items():
        found = " | ".join(map(lesson.spread, cells(name))).replace("-0.00", "0.00")
        lines.append(f"| {name}: {label} | {found} |")
    return lines


def tables(rows):
    steps = sorted({row["at"] for row in lesson.select(rows, kind="curve")})[::2]

    def result(name):
        own = values(rows, "handover", name, "accuracy", 0)
        return [own] + [values(rows, "curve", name, "accuracy", step) for step in steps]

    def text(name):  # mean over the positions of a chain, for each seed
        for column, kind in TEXT.values():
            at = [values(rows, kind, name, column, t) for t in range(LENGTH)]
            yield [statistics.fmean(seed) for seed in zip(*at, strict=True)]

    def handover(name):
        return [values(rows, "handover", name, "accuracy", cut) for cut in SHOWN]

    return {
        "result": table(["teacher's own accuracy", *(f"student, step {step:g}" for step in steps)], result),
        "text": table(TEXT, text),
        "handover": table([f"after {cut} token{'s' * (cut != 1)}" for cut in SHOWN], handover),
    }


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
