"""Every loss of opd.py on next-token distributions small enough to enumerate: its value and its gradient.

There is no language model and no sampling: a student p and a teacher q over V tokens, and the exact
expected gradient with respect to the student's logits, compared with the exact gradients of the two KLs.
One comparison trains the toy model: policy gradient with and without a baseline.
"""

import sys
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import lesson  # noqa: E402

import losses  # noqa: E402
import opd  # noqa: E402

V, PAIRS = 64, 50  # tokens; student-teacher pairs per gap and seed
GAPS = {
    "equal": 0.0,
    "small": 0.3,
    "medium": 1.0,
    "large": 3.0,
}  # standard deviation of the difference between the logits
KS = (1, 2, 4, 8, 16, 32, 64)
K = 8  # in the table and the left panel
GRID = torch.linspace(-4, 4, 81)  # ordered tokens, for the panel on mode-seeking
NAMES = (*opd.LOSSES, "pg_baseline")
TRAINED = {  # what is trained with one sampled token per prefix, and the full loss for comparison
    "pg": dict(loss="pg"),
    "pg_baseline": dict(loss="pg", pg_baseline="kl"),
    "pg_clip_reward": dict(loss="pg", pg_clip_reward=2.0),
    "reverse_kl": dict(loss="reverse_kl"),
}
SHOWN = "reverse_kl forward_kl jsd skew_reverse_kl sg_topk tail_topk k2 k3 pg pg_baseline".split()
cosine = torch.nn.functional.cosine_similarity


def is_topk(name):
    return opd.LOSSES.get(name, "?")[0] == "top-k"


def pairs(seed, gap):
    """Student and teacher logits [PAIRS,V]: peaked like a language model's, separated by the gap."""
    generator = torch.Generator().manual_seed(seed)
    student = 2.5 * torch.randn(PAIRS, V, generator=generator)
    return student, student + gap * torch.randn(PAIRS, V, generator=generator)


def expected(name, student_logits, teacher_logits, args):
    """Value [PAIRS], expected gradient [PAIRS,V], RMS noise of a one-sample gradient [PAIRS] of LOSSES[name].

    A sampled loss is evaluated at every token y and weighted by p(y): the exact expectation, not an estimate.
    pg_baseline: pg with the mean advantage at the prefix, -KL, subtracted from its advantage.
    """
    logits, loss = student_logits.clone().requires_grad_(True), opd.LOSSES[name.removesuffix("_baseline")]
    if loss[0] != "sampled":
        value = opd.token_loss(loss, logits, teacher_logits, None, None, None, args)
        return value.detach(), torch.autograd.grad(value.sum(), logits)[0], torch.zeros(len(value))
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    values, grads, p = [], [], log_p.exp()
    baseline = (p * (log_q - log_p)).sum(-1) if name == "pg_baseline" else 0
    for y in range(V):
        tokens, advantage = torch.full((len(p),), y), (log_q - log_p)[:, y] - baseline
        value = opd.token_loss(loss, logits, teacher_logits, tokens, advantage, log_p[:, y], args)
        values.append(value.detach())
        grads.append(torch.autograd.grad(value.sum(), logits)[0])
    values, grads = torch.stack(values, 1), torch.stack(grads, 1)  # [PAIRS,V], [PAIRS,V,V]: y is dim 1
    mean = (p[:, :, None] * grads).sum(1)
    return (p * values).sum(1), mean, (p[:, :, None] * (grads - mean[:, None]) ** 2).sum((1, 2)).sqrt()


def one_state(seed, gap):
    """One row for each loss and k: a single next-token distribution, at a fixed prefix."""
    student, teacher = pairs(seed, GAPS[gap])
    reverse, forward = losses.reverse_kl(student, teacher), losses.forward_kl(student, teacher)
    p, q = student.softmax(-1), teacher.softmax(-1)
    grad_reverse = p * (student.log_softmax(-1) - teacher.log_softmax(-1) - reverse[:, None])
    for name in NAMES:
        source, target = ("teacher", forward) if "forward" in name else ("student", reverse)
        for k in KS if is_topk(name) else (0,):
            args = opd.Args(topk=k or 1, topk_source=source)
            value, grad, noise = expected(name, student, teacher, args)
            length = grad.norm(dim=-1).sum()
            yield {
                **{"loss": name, "k": k, "gap": gap, "seed": seed, "bias": (value - target).mean().item()},
                "grad_norm": grad.norm(dim=-1).mean().item(),
                "cos_reverse": cosine(grad, grad_reverse, eps=1e-12).mean().item(),
                "cos_forward": cosine(grad, p - q, eps=1e-12).mean().item(),
                "norm_to_reverse": (length / grad_reverse.norm(dim=-1).sum()).item() if GAPS[gap] else 0.0,
                "noise": noise.mean().item(),
            }


def whole_sequences(seed, gap, n=5, horizon=3):
    """Rows for pg with gamma 0, 0.5, 1: all n^horizon sequences of a model whose logits depend on the prefix.

    Here cos_reverse is the cosine with the gradient of the sequence-level reverse KL.
    """
    generator = torch.Generator().manual_seed(seed)
    states = sum(n**t for t in range(horizon))  # one row of logits per prefix
    student = 1.5 * torch.randn(states, n, generator=generator)
    teacher = student + GAPS[gap] * torch.randn(states, n, generator=generator)
    student.requires_grad_(True)
    y = torch.cartesian_prod(*[torch.arange(n)] * horizon)  # [n^horizon,horizon]
    prefix = torch.zeros_like(
        y
    )  # [n^horizon,horizon], each prefix's row; prefixes of length t follow those of t - 1
    for t in range(1, horizon):
        prefix[:, t] = prefix[:, t - 1] * n + y[:, t - 1] + 1
    logp, logq = (x.log_softmax(-1)[prefix, y] for x in (student, teacher))  # [n^horizon,horizon]
    weight = logp.sum(1).exp()
    exact = torch.autograd.grad((weight * (logp - logq).sum(1)).sum(), student, retain_graph=True)[
        0
    ].flatten()
    for gamma in (0.0, 0.5, 1.0):
        advantage = losses.reverse_kl_advantage(logp, logq, gamma=gamma)
        loss = (weight.detach() * losses.policy_gradient(logp, advantage).sum(1)).sum()
        grad = torch.autograd.grad(loss, student, retain_graph=True)[0].flatten()
        yield {
            **{"loss": f"sequence_pg_gamma_{gamma:g}", "k": 0, "gap": gap, "seed": seed, "bias": 0.0},
            **{"grad_norm": grad.norm().item(), "cos_reverse": cosine(grad, exact, dim=0).item()},
            **{"cos_forward": 0.0, "norm_to_reverse": (grad.norm() / exact.norm()).item(), "noise": 0.0},
        }


def fit(loss):
    """Fit a student with one mode to a teacher with two -> their probabilities: teacher, student."""
    teacher = torch.logaddexp(-((GRID + 1.6) ** 2) / 0.3 + 0.7, -((GRID - 1.6) ** 2) / 0.3)
    bump = torch.tensor([-0.4, 0.5], requires_grad=True)
    optimizer = torch.optim.Adam([bump], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        loss(-(((GRID - bump[0]) / bump[1].exp()) ** 2), teacher).backward()
        optimizer.step()
    return teacher.softmax(-1), (-(((GRID - bump[0]) / bump[1].exp()) ** 2)).softmax(-1).detach()


def trained(arm, seed, smoke):
    """One run of opd.py on the toy pair: mean held-out KL after the first evaluation, last accuracy."""
    size = (
        dict(steps=2, batch_size=4, eval_every=1) if smoke else dict(steps=100, batch_size=32, eval_every=25)
    )
    with lesson.distilled(opd, seed=seed, max_new_tokens=32, **size, **TRAINED[arm]) as (rows, _):
        evaluations = [row for row in rows if "eval_len" in row]
        kl = fmean(row["eval_reverse_kl"] for row in evaluations[1:])
        norm = fmean(row["grad_norm"] for row in rows if "grad_norm" in row)
        accuracy = evaluations[-1]["eval_accuracy"]
    return {"loss": f"train_{arm}", "seed": seed, "kl": kl, "accuracy": accuracy, "grad_norm": norm}


def run(smoke):
    rows = []
    for seed in range(1 if smoke else 3):
        for gap in GAPS:
            rows += one_state(seed, gap)
            rows += whole_sequences(seed, gap) if GAPS[gap] else []
    rows = [{**row, "left": "", "kl": "", "accuracy": ""} for row in rows]
    for name in ("reverse_kl", "forward_kl"):  # left: mass left of 0, at the taller mode
        left = fit(getattr(losses, name))[1][GRID < 0].sum().item()
        rows.append({**dict.fromkeys(rows[0], ""), "loss": f"fit_{name}", "left": left})
    jobs = [(arm, seed, smoke) for arm in TRAINED for seed in range(1 if smoke else 3)]
    runs = lesson.in_parallel(trained, jobs, "policy gradient")
    return rows + [{**dict.fromkeys(rows[0], ""), **row} for row in runs]


def of(rows, name, **where):
    return lesson.select(rows, loss=name, k=K if is_topk(name) else 0, **where)


def mean(rows, column):
    return sum(row[column] for row in rows) / len(rows)


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, gaps = NAMES, ("medium", "large")
    figure, panels = plt.subplot_mosaic(
        [["atlas", "k"], ["atlas", "modes"]], figsize=(11, 7), layout="constrained"
    )
    title = "The gradients of k2 and pg follow the reverse KL, that of k3 the forward KL, that of k1 neither"
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    panel, columns = panels["atlas"], [(c, g) for g in gaps for c in ("cos_reverse", "cos_forward")]
    grid = torch.tensor([[mean(of(rows, n, gap=g), c) for c, g in columns] for n in names])
    grid[[names.index("k1")]] = 0  # the gradient is rounding error, without direction
    panel.imshow(grid.clamp(min=0), cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for i, name in enumerate(names):
        for j in range(len(columns)):
            bold = "bold" if grid[i, j] > 0.995 else "normal"  # same direction
            panel.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8, fontweight=bold)
        still = mean(of(rows, name, gap="equal"), "grad_norm")
        note = "grad ≠ 0 at p = q" if still > 1e-4 else "grad = 0" if grid[i].max() < 0.2 else ""
        panel.text(3.6, i, note, va="center", fontsize=8, color="#b2182b")
    panel.set_xlim(-0.5, 5.2)
    labels = [f"{kl} KL,\n{gap} gap" for gap in gaps for kl in ("reverse", "forward")]
    panel.set_xticks(range(4), labels, fontsize=8)
    panel.set_yticks(
        range(len(names)), [n + (f", k={K}" if of(rows, n)[0]["k"] else "") for n in names], fontsize=8
    )
    panel.set_title("Cosine of the expected gradient with that of each KL", fontsize=9, loc="left")

    colours = {"topk": "#b2182b", "sg_topk": "#2166ac", "norm_topk": "#4d9221", "tail_topk": "#e08214"}
    for name, colour in colours.items():
        ours = [[r["cos_reverse"] for r in lesson.select(rows, loss=name, k=k, gap="medium")] for k in KS]
        panels["k"].plot(KS, [sum(x) / len(x) for x in ours], color=colour, marker="o", ms=3, label=name)
        panels["k"].fill_between(
            KS, list(map(min, ours)), list(map(max, ours)), color=colour, alpha=0.2, lw=0
        )
    panels["k"].set_xscale("log", base=2)
    panels["k"].set_xticks(KS, KS)
    panels["k"].set_xlabel(f"k (of {V} tokens)", fontsize=9)
    panels["k"].set_ylabel("cosine", fontsize=9)
    panels["k"].set_title("Cosine with the gradient of the reverse KL, medium gap", fontsize=9, loc="left")
    panels["k"].legend(frameon=False, fontsize=8)

    shown = {"reverse_kl": "#2166ac", "forward_kl": "#b2182b"}
    for name, colour in shown.items():
        teacher, student = fit(getattr(losses, name))
        panels["modes"].plot(GRID, student, color=colour, label=name)
    panels["modes"].fill_between(GRID, teacher, color="0.85", label="teacher")
    panels["modes"].set_title("A student with one mode fitted to a teacher with two", fontsize=9, loc="left")
    panels["modes"].set_xlabel("token (ordered)", fontsize=9)
    panels["modes"].set_ylabel("probability", fontsize=9)
    panels["modes"].set_yticks([])
    panels["modes"].legend(frameon=False, fontsize=8)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tables(rows):
    def atlas(gap, names):
        heads = ["bias of value", "cos with grad of reverse KL", "cos with grad of forward KL"]
        lines = [["loss", *heads, "norm / reverse", "noise / grad", "grad norm at p = q"], ["---"] * 7]
        for name in names:
            r, at_equal = of(rows, name, gap=gap), mean(of(rows, name, gap="equal"), "grad_norm")
            grad_norm, noise = mean(r, "grad_norm"), mean(r, "noise")
            pulls = grad_norm > 1e-5
            cosines = [lesson.spread([x[f"cos_{kl}"] for x in r]) for kl in ("reverse", "forward")]
            cells = [
                f"`{name}`" + (f", k={K}" if r[0]["k"] else ""),
                f"{mean(r, 'bias'):+.3f}".replace("-0.000", "+0.000"),
                *(cosines if pulls else ["no gradient"] * 2),
                f"{mean(r, 'norm_to_reverse'):.2f}",
                (f"{noise / grad_norm:.1f}" if pulls else "only noise") if noise else "0",
                f"{at_equal:.3f}" if at_equal > 1e-5 else "0",
            ]
            lines.append(cells)
        return ["| " + " | ".join(line) + " |" for line in lines]

    gamma = ["| gamma | small gap | medium gap | large gap |", "|---|---|---|---|"]
    for g in ("0", "0.5", "1"):
        cells = [
            [r["cos_reverse"] for r in lesson.select(rows, loss=f"sequence_pg_gamma_{g}", gap=x)]
            for x in list(GAPS)[1:]
        ]
        gamma.append(f"| {g} | " + " | ".join(lesson.spread(x, 3) for x in cells) + " |")
    heads = "held-out reverse KL, mean of steps 25 to 100 | accuracy at step 100 | mean gradient norm"
    training = [f"| loss | {heads} |", "|---|---|---|---|"]
    for arm in TRAINED:
        runs = lesson.select(rows, loss=f"train_{arm}")
        columns = (("kl", 3), ("accuracy", 2), ("grad_norm", 1))
        cells = [lesson.spread([x[name] for x in runs], digits) for name, digits in columns]
        training.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    by_k = ["| loss | " + " | ".join(f"k={k}" for k in KS) + " |", "|---" * (len(KS) + 1) + "|"]
    for name in ("topk", "sg_topk", "norm_topk", "tail_topk"):
        cells = [mean(lesson.select(rows, loss=name, k=k, gap="medium"), "cos_reverse") for k in KS]
        by_k.append(f"| `{name}` | " + " | ".join(f"{x:.2f}" for x in cells) + " |")
    atlases = {"atlas": atlas("medium", NAMES), "large": atlas("large", SHOWN)}
    return {**atlases, "gamma": gamma, "by_k": by_k, "training": training}


if __name__ == "__main__":
    lesson.main(__file__, run, plot, tables)
