"""Values and expected gradients of the losses of opd.py by enumeration: no language model and no sampling.

atlas, gamma and drift return the rows of metrics.csv that this chapter's README explains.
"""

import torch

import losses
import opd

V, PAIRS = 64, 50  # tokens; student-teacher pairs of one gap and seed
K, KS, GAMMAS = 8, (1, 2, 4, 8, 16, 32, 64), (0.0, 0.5, 1.0)
GAPS = {"equal": 0.0, "small": 0.3, "medium": 1.0, "large": 3.0}  # standard deviation of teacher - student
DRIFT = ("reverse_kl", "topk", "sg_topk", "norm_topk", "tail_topk")
OPTIMIZERS = {  # the betas are those of opd.py
    "AdamW": lambda z: torch.optim.AdamW([z], lr=0.03, betas=(0.9, 0.98), weight_decay=0.0),
    "GD": lambda z: torch.optim.SGD([z], lr=1.0),
}
RUNS = (("AdamW", K), ("AdamW", 2), ("GD", K))  # optimizer and k of the drift


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-12).mean().item()


def pairs(seed, gap):
    """Student and teacher logits [PAIRS,V]: peaked like a language model's, separated by the gap."""
    generator = torch.Generator().manual_seed(seed)
    student = 2.5 * torch.randn(PAIRS, V, generator=generator)
    return student, student + GAPS[gap] * torch.randn(PAIRS, V, generator=generator)


def reverse(student, teacher):
    """Reverse KL [PAIRS] and its gradient [PAIRS,V]."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl, log_p.exp() * (log_p - log_q - kl[:, None])


def forward(student, teacher):
    """Forward KL [PAIRS] and its gradient [PAIRS,V]."""
    return losses.forward_kl(student, teacher), student.softmax(-1) - teacher.softmax(-1)


def expected(name, k, student, teacher):
    """Value [PAIRS], expected gradient [PAIRS,V], RMS noise of a one-sample gradient [PAIRS] of a loss.

    A sampled loss is evaluated at every token y and weighted by p(y). pg_baseline is pg with the mean
    advantage at the prefix, -KL, subtracted.
    """
    loss, source = opd.LOSSES[name.removesuffix("_baseline")], "teacher" if "forward" in name else "student"
    n = V if loss[0] == "sampled" else 1
    y = torch.arange(n).repeat_interleave(PAIRS)  # [n*PAIRS]
    s, t = student.repeat(n, 1).requires_grad_(True), teacher.repeat(n, 1)  # [n*PAIRS,V]
    log_p, log_q = (x.detach().log_softmax(-1).gather(-1, y[:, None])[:, 0] for x in (s, t))
    advantage = log_q - log_p
    if name == "pg_baseline":
        advantage = advantage + reverse(student, teacher)[0].repeat(n)
    value = opd.token_loss(loss, s, t, y, advantage, log_p, opd.Args(topk=k, topk_source=source))
    grad = torch.autograd.grad(value.sum(), s)[0].view(n, PAIRS, V)
    weight = log_p.exp().view(n, PAIRS) if n == V else torch.ones(1, PAIRS)
    mean = (weight[..., None] * grad).sum(0)
    noise = (weight * (grad - mean).square().sum(-1)).sum(0).sqrt()
    return (weight * value.detach().view(n, PAIRS)).sum(0), mean, noise


def discounted(seed, gap, n=5, horizon=3):
    """For each of GAMMAS, the cosine of pg's gradient with that of the sequence-level reverse KL.

    Both are sums over all n^horizon sequences of two models whose logits depend on the prefix.
    """

    def logp(logits):  # one row for each prefix -> log-probability of each token of each sequence
        logits = logits.split([n**t for t in range(horizon)])  # [n^t,n]: prefixes of t tokens
        columns = [x.log_softmax(-1).flatten() for x in logits]
        return torch.stack([x.repeat_interleave(n**horizon // len(x)) for x in columns], 1)

    generator, shape = torch.Generator().manual_seed(seed), (sum(n**t for t in range(horizon)), n)
    student = 1.5 * torch.randn(shape, generator=generator)
    teacher = student + GAPS[gap] * torch.randn(shape, generator=generator)
    log_p, log_q = logp(student.requires_grad_(True)), logp(teacher)  # [n^horizon,horizon]
    weight = log_p.sum(1).exp()
    kl = (weight * (log_p - log_q).sum(1)).sum()
    exact = torch.autograd.grad(kl, student, retain_graph=True)[0].flatten()
    for g in GAMMAS:
        advantage = losses.reverse_kl_advantage(log_p, log_q, gamma=g)
        loss = (weight.detach() * losses.policy_gradient(log_p, advantage).sum(1)).sum()
        yield cosine(torch.autograd.grad(loss, student, retain_graph=True)[0].flatten(), exact)


def atlas(smoke=False):
    """The first gradient of each loss, compared with those of the two KLs."""
    rows = []
    for seed, gap in [(seed, gap) for seed in range(1 if smoke else 3) for gap in GAPS]:
        pair = pairs(seed, gap)
        (kl_reverse, grad_reverse), (kl_forward, grad_forward) = reverse(*pair), forward(*pair)
        for name in (*opd.LOSSES, "pg_baseline"):
            for k in KS if "topk" in name else (K,):
                value, grad, noise = expected(name, k, *pair)
                row = {"loss": name, "k": k, "gap": gap, "seed": seed, "noise": noise.mean().item()}
                row["bias"] = (value - (kl_forward if "forward" in name else kl_reverse)).mean().item()
                row["norm"] = grad.norm(dim=-1).mean().item()
                row["norm_reverse"] = grad_reverse.norm(dim=-1).mean().item()
                row["cos_reverse"] = cosine(grad, grad_reverse)
                rows.append({**row, "cos_forward": cosine(grad, grad_forward)})
    return rows


def gamma(smoke=False):
    """pg's gradient, compared with that of the sequence-level reverse KL."""
    rows = []
    for seed, gap in [(seed, gap) for seed in range(1 if smoke else 3) for gap in list(GAPS)[1:]]:
        for g, cos in zip(GAMMAS, discounted(seed, gap), strict=True):
            rows.append({"gamma": g, "gap": gap, "seed": seed, "cos_reverse": cos})
    return rows


def drift(smoke=False, steps=200):
    """Train the student logits of the large gap; every tenth step, before its update, gives a row."""
    rows = []
    runs = [(*run, name, seed) for run in RUNS for name in DRIFT for seed in range(1 if smoke else 3)]
    for how, k, name, seed in runs:
        student, teacher = pairs(seed, "large")
        optimizer = OPTIMIZERS[how](student)
        for step in range(steps + 1):
            _, student.grad, _ = expected(name, k, student, teacher)  # S is chosen anew
            if step % 10 == 0:
                kl, grad_reverse = reverse(student, teacher)
                row = {"loss": name, "optimizer": how, "k": k, "step": step, "seed": seed}
                row["kl"] = kl.mean().item()
                row["mass"] = student.softmax(-1).topk(k).values.sum(-1).mean().item()
                rows.append({**row, "cos_reverse": cosine(student.grad, grad_reverse)})
            optimizer.step()
    return rows
