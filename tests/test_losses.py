"""What losses.py promises, one test per promise.

The oracle is plain Python in float64: explicit sums over lists of probabilities, sharing no tensor, no
log-space trick and no code with the functions it judges. Where losses.py holds something still (sg, detached
weights), the oracle reads it from `p0`, a second copy of the student that central differences do not move.
"""

import ast
import inspect
import math

import pytest
import torch
from pytest import approx

import losses

V, K, NEVER = 7, 3, -math.inf
SOURCES = ["student", "teacher", "union", "intersection"]

# ------------------------------------------------------------------------------------------------- the oracle


def softmax(z):
    e = [math.exp(x - max(z)) for x in z]
    total = math.fsum(e)
    return [x / total for x in e]


def kl(a, b):
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mix(w, a, b):
    return [w * x + (1 - w) * y for x, y in zip(a, b, strict=True)]


def adaptive(p, q, p0, mu=0.5):
    gap = [abs(x - y) for x, y in zip(p0, q, strict=True)]
    head, mass = 0.0, 0.0
    for i in sorted(range(len(q)), key=lambda i: -q[i]):
        if mass < mu:
            head, mass = head + gap[i], mass + q[i]
    w = head / sum(gap)
    return w * kl(q, p) + (1 - w) * kl(p, q)


def entropy_aware(p, q, p0, tau=1.0, eta=1.0):
    entropy = -sum(x * math.log(x) for x in q)
    return kl(p, q) + (eta * kl(q, p) if entropy > tau else 0.0)


FULL = {  # name -> oracle(student p, teacher q, student held still p0)
    "forward_kl": lambda p, q, p0: kl(q, p),
    "reverse_kl": lambda p, q, p0: kl(p, q),
    "mixed_kl": lambda p, q, p0, weight=0.5: weight * kl(q, p) + (1 - weight) * kl(p, q),
    "jsd": lambda p, q, p0, beta=0.5: beta * kl(q, mix(beta, q, p)) + (1 - beta) * kl(p, mix(beta, q, p)),
    "skew_forward_kl": lambda p, q, p0, alpha=0.1: kl(q, mix(alpha, q, p)),
    "skew_reverse_kl": lambda p, q, p0, alpha=0.1: kl(p, mix(alpha, p, q)),
    "adaptive_kl": adaptive,
    "entropy_aware_kl": entropy_aware,
    "tvd": lambda p, q, p0: sum(max(x - y, 0) for x, y in zip(p, q, strict=True)),
}


def normed(a):
    return [x / sum(a) for x in a]


def tailed(a):
    return [*a, 1 - math.fsum(a)]


TOPK = {  # name -> oracle(student p over V, teacher q as {id: probability} over S, p0)
    "topk_reverse_kl": lambda p, q, p0: sum(p[i] * math.log(p[i] / q[i]) for i in q),
    "sg_topk_reverse_kl": lambda p, q, p0: sum(p[i] * math.log(p0[i] / q[i]) for i in q),
    "norm_topk_reverse_kl": lambda p, q, p0: kl(normed([p[i] for i in q]), normed([*q.values()])),
    "tail_topk_reverse_kl": lambda p, q, p0: kl(tailed([p[i] for i in q]), tailed([*q.values()])),
    "topk_forward_kl": lambda p, q, p0: sum(q[i] * math.log(q[i] / p[i]) for i in q),
    "norm_topk_forward_kl": lambda p, q, p0: kl(normed([*q.values()]), normed([p[i] for i in q])),
    "tail_topk_forward_kl": lambda p, q, p0: kl(tailed([*q.values()]), tailed([p[i] for i in q])),
}


def surrogate(a, advantage, behaviour=None, clip=None):
    if behaviour is None:
        return -advantage * a
    r = math.exp(a - behaviour)
    return -(
        r * advantage if clip is None else min(r * advantage, min(max(r, 1 - clip), 1 + clip) * advantage)
    )


SAMPLED = {  # name -> oracle(log p(y), log q(y) or the advantage, ...)
    "k1": lambda a, b: a - b,
    "k2": lambda a, b: (a - b) ** 2 / 2,
    "k3": lambda a, b: math.exp(b) / math.exp(a) - 1 - (b - a),
    "policy_gradient": surrogate,
}
HELPERS = ["topk_support", "reverse_kl_advantage"]
LOSSES = [*FULL, *TOPK, *SAMPLED]
LOSSES_ON_SUPPORTS = [(n, s) for n in LOSSES for s in (SOURCES if n in TOPK else [""])]


def slopes(oracle, z, *args, h=1e-5, **kw):
    """Central differences of oracle(softmax(z), ...) with respect to each logit."""
    moved = [[x + h * sign * (i == j) for j, x in enumerate(z)] for i in range(len(z)) for sign in (1, -1)]
    values = [oracle(softmax(m), *args, **kw) for m in moved]
    return [(up - down) / (2 * h) for up, down in zip(values[::2], values[1::2], strict=True)]


# ------------------------------------------------------------------------------------------------ small tools


def logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(x):
    return x.detach().float().reshape(-1, x.shape[-1]).tolist()


def distributions(ids, logp, valid):
    """Teacher inputs of the top-k family as one {id: probability} per token, valid entries only."""
    entries = zip(ids.reshape(-1, ids.shape[-1]).tolist(), rows(logp), rows(valid), strict=True)
    return [{i: math.exp(x) for i, x, ok in zip(*entry, strict=True) if ok} for entry in entries]


def inputs(name, s, t, k=K, source="union"):
    """What `name` is called with, from student and teacher logits [N,V]; sampled losses: every token as y."""
    log_p, log_q = torch.log_softmax(s.float(), -1), torch.log_softmax(t.float(), -1)
    if name in FULL:
        return s, t
    if name in TOPK:
        ids, logp, valid = losses.topk_support(s, t, k, source)
        return s, logp, ids, valid
    if name == "policy_gradient":
        return log_p, losses.reverse_kl_advantage(log_p, log_q), torch.full_like(log_p, -2.0), 0.2
    helpers = {"topk_support": (s, t, k, source), "reverse_kl_advantage": (log_p, log_q, log_p > -2, 0.5)}
    return helpers.get(name, (log_p, log_q))


def both(name, s, t, *support):
    """Loss of each of N tokens [N] (a sampled loss: expected over y ~ p) and its gradient [N,V]."""
    z = s.clone().requires_grad_()
    out = getattr(losses, name)(*inputs(name, z, t, *support))
    out = (torch.softmax(s.float(), -1) * out).sum(-1) if name in SAMPLED else out
    return out.detach(), torch.autograd.grad(out.sum(), z)[0]


def close(a, b, tol=2e-6):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=tol, check_dtype=False)


def check(f, oracle, student, teacher, teacher_rows, **kw):
    """f(student, *teacher) is the oracle, token by token, in value, gradient, shape and dtype."""
    z = student.detach().clone().requires_grad_()
    out = f(z, *teacher, **kw)
    assert out.dtype == torch.float32 and out.shape == student.shape[:-1]
    out.sum().backward()
    values = out.reshape(-1).tolist()
    for z_p, q, value, grad in zip(rows(z), teacher_rows, values, rows(z.grad), strict=True):
        p = softmax(z_p)
        assert value == approx(oracle(p, q, p, **kw), rel=1e-5, abs=2e-6)
        assert grad == approx(slopes(oracle, z_p, q, p, **kw), rel=RELATIVE[z.dtype], abs=3e-6)


# ------------------------------------------------------------------- values and gradients, against the oracle

# How near a gradient must come: computed in float32, then rounded once to the dtype of the logits.
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
any_input = pytest.mark.parametrize(
    "shape, dtype",
    [((), torch.float32), ((5,), torch.float64), ((2, 3), torch.float32)]
    + [((12,), torch.bfloat16), ((2, 3), torch.float16)],
    ids=str,
)


@any_input
@pytest.mark.parametrize(
    "name, kw",
    [(name, {}) for name in FULL]
    + [("mixed_kl", {"weight": w}) for w in (0.0, 0.2, 1.0)]
    + [("jsd", {"beta": 0.1}), ("jsd", {"beta": 0.9})]
    + [("skew_forward_kl", {"alpha": 0.7}), ("skew_reverse_kl", {"alpha": 0.7})]
    + [("adaptive_kl", {"mu": 0.2}), ("adaptive_kl", {"mu": 0.95})]
    + [("entropy_aware_kl", {"tau": 0.0, "eta": 0.3}), ("entropy_aware_kl", {"tau": 5.0})],
    ids=str,
)
def test_full_vocabulary_loss_is_its_equation(name, kw, shape, dtype):
    s, t = logits(*shape, V, seed=1).to(dtype), logits(*shape, V, seed=2).to(dtype)
    check(getattr(losses, name), FULL[name], s, [t], [softmax(z) for z in rows(t)], **kw)


@any_input
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TOPK)
def test_topk_loss_is_its_equation_on_any_support(name, source, shape, dtype):
    s, t = logits(*shape, V, seed=1).to(dtype), logits(*shape, V, seed=2).to(dtype)
    ids, logp, valid = losses.topk_support(s, t, K, source)
    logp = logp.to(dtype)
    check(getattr(losses, name), TOPK[name], s, [logp, ids, valid], distributions(ids, logp, valid))
    if valid.all():
        check(getattr(losses, name), TOPK[name], s, [logp, ids], distributions(ids, logp, valid))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9, 0.0, -math.inf])
@pytest.mark.parametrize("name", TOPK)
def test_what_lies_behind_valid_false_does_not_matter(name, garbage):
    s, t = logits(4, V, seed=1), logits(4, V, seed=2)
    ids, logp, _ = losses.topk_support(s, t, K, "teacher")
    ids = torch.cat([t.argmin(-1, keepdim=True), ids, ids[:, :1], ids[:, :1]], -1)  # a stranger, S, repeats
    logp = torch.cat([logp[:, :1] * 0 + garbage, logp, logp[:, :2] * 0 + garbage], -1)
    valid = torch.tensor([False, True, True, True, False, False]).expand(4, -1)
    check(getattr(losses, name), TOPK[name], s, [logp, ids, valid], distributions(ids, logp, valid))


@any_input
@pytest.mark.parametrize(
    "name, extra", [("k1", 0), ("k2", 0), ("k3", 0)] + [("policy_gradient", n) for n in (0, 1, 2)]
)
def test_sampled_loss_is_its_equation(name, extra, shape, dtype):
    z = (-logits(*shape, seed=1, scale=6.0).abs()).to(dtype).requires_grad_()
    b = logits(*shape, seed=2, scale=6.0).to(dtype)
    b = b if name == "policy_gradient" else -b.abs() - 1  # an advantage of either sign, or log q(y)
    behaviour = (z + 0.5 * torch.sin(20 * z)).detach()  # ratios from e^-.5 to e^.5
    args = [b, behaviour, 0.2][: 1 + extra]
    out = getattr(losses, name)(z, *args)
    assert out.dtype == torch.float32 and out.shape == shape
    out.sum().backward()
    flat = [x.detach().float().reshape(-1).tolist() for x in (z, out, z.grad, *args[:2])]
    for a, value, grad, *rest in zip(*flat, strict=True):
        rest, oracle, h = rest + args[2:], SAMPLED[name], 1e-6
        assert value == approx(oracle(a, *rest), rel=1e-5, abs=1e-6)
        slope = (oracle(a + h, *rest) - oracle(a - h, *rest)) / (2 * h)
        assert grad == approx(slope, rel=RELATIVE[dtype], abs=1e-5)


@pytest.mark.parametrize("ratio, advantage, slope", [(2, 1, 0), (2, -1, 2), (0.5, 1, -0.5), (0.5, -1, 0)])
def test_clipping_stops_the_gradient_where_the_ratio_has_already_moved_too_far(ratio, advantage, slope):
    z = torch.tensor(math.log(0.3 * ratio), requires_grad=True)
    losses.policy_gradient(z, torch.tensor(advantage), torch.tensor(0.3).log(), clip=0.2).backward()
    assert z.grad.item() == approx(slope)


def test_advantage_of_no_tokens_is_empty():
    assert losses.reverse_kl_advantage(torch.zeros(2, 0), torch.zeros(2, 0), gamma=0.5).shape == (2, 0)


@pytest.mark.parametrize("clip", [(), (0.2,)])
def test_policy_gradient_is_finite_for_tokens_of_probability_0(clip):
    impossible, A = torch.tensor([NEVER, NEVER, 0.0]), torch.tensor([1.0, -1.0, -1.0])
    z = impossible.clone().requires_grad_()
    stale = losses.policy_gradient(z, A, torch.tensor([NEVER, -1.0, NEVER]), *clip)
    worst = losses.policy_gradient(z, torch.full((3,), -1e9), torch.full((3,), NEVER), *clip)
    assert worst.isfinite().all()
    assert stale[0] == -1  # impossible then and now: the ratio is 1
    total = stale + losses.policy_gradient(z, A)
    assert total.isfinite().all() and torch.autograd.grad(total.sum(), z)[0].isfinite().all()


# ----------------------------------------- expected gradients, by enumeration of everything y could have been

# The student, the teacher and a stale student.
Z, T, OLD = (logits(5, seed=seed, scale=1.0).double() for seed in (3, 4, 5))
P, Q = Z.softmax(-1), T.softmax(-1)
GAP = P.log() - Q.log()
REVERSE_KL = (P * GAP).sum()
NOTHING, REVERSE, FORWARD = 0 * P, P * (GAP - REVERSE_KL), P - Q  # d/d student logits, in closed form


pg = losses.policy_gradient


def advantage(log_p, log_q):
    return losses.reverse_kl_advantage(log_p[None], log_q[None])[0]


EXPECTED = {  # claim -> loss(log p, log q) of every y, what the expected gradient is
    "k1 goes nowhere": (losses.k1, NOTHING),
    "k2 descends the reverse KL": (losses.k2, REVERSE),
    "k3 descends the forward KL": (losses.k3, FORWARD),
    "the gap as advantage descends the reverse KL": (lambda p, q: pg(p, advantage(p, q)), REVERSE),
    "a baseline changes nothing": (lambda p, q: pg(p, advantage(p, q) - 3.7), REVERSE),
    "a full KL as advantage teaches nothing": (
        lambda p, q: pg(p, -losses.reverse_kl(p, q).expand(5)),
        NOTHING,
    ),
}


@pytest.mark.parametrize("claim", EXPECTED)
def test_expected_gradient(claim):
    loss, gradient = EXPECTED[claim]
    z = Z.clone().requires_grad_()
    (P * loss(z.log_softmax(-1), T.log_softmax(-1))).sum().backward()
    close(z.grad, gradient)
    assert (FORWARD - REVERSE).abs().max() > 0.05  # so that the claims differ


@pytest.mark.parametrize("ratio, unbiased", [(True, True), (False, False)])
def test_stale_samples_need_the_ratio(ratio, unbiased):
    z, old = Z.clone().requires_grad_(), OLD.log_softmax(-1)
    log_p, log_q = z.log_softmax(-1), T.log_softmax(-1)
    loss = pg(log_p, advantage(log_p, log_q), old if ratio else None)
    (old.exp() * loss).sum().backward()
    assert torch.allclose(z.grad, REVERSE, atol=2e-6) == unbiased


def test_k1_and_k3_estimate_the_reverse_kl_and_k2_only_close_to_the_teacher():
    k1, k2, k3 = ((P * f(P.log(), Q.log())).sum() for f in (losses.k1, losses.k2, losses.k3))
    close(k1, REVERSE_KL)
    close(k3, REVERSE_KL)
    assert abs(k2 - REVERSE_KL) > 0.05
    near = (Z + 0.01 * (T - Z)).log_softmax(-1)
    k2, reverse_kl = (P * losses.k2(P.log(), near)).sum(), (P * (P.log() - near)).sum()
    assert k2.item() == approx(reverse_kl.item(), rel=0.02)


def sequences(horizon=3, vocab=3):
    """A policy tabulated by prefix -> its tables, the teacher's, log p and log q [27,T] of every sequence."""
    sizes = [vocab**t for t in range(horizon)]
    student = [logits(n, vocab, seed=10 + n, scale=1.0).double().requires_grad_() for n in sizes]
    teacher = [logits(n, vocab, seed=20 + n, scale=1.0).double() for n in sizes]
    y = torch.cartesian_prod(*[torch.arange(vocab)] * horizon)  # [27,T]
    prefix = torch.arange(len(y))[:, None] // vocab ** torch.arange(horizon, 0, -1)  # [27,T], table rows

    def log_probs(tables):
        return torch.stack([tables[t].log_softmax(-1)[prefix[:, t], y[:, t]] for t in range(horizon)], 1)

    return student, teacher, log_probs(student), log_probs(teacher)


def slopes_of_tables(scalar, tables):
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, tables)])


def expected_policy_gradient(gamma):
    student, _, log_p, log_q = sequences()
    token_losses = losses.policy_gradient(log_p, losses.reverse_kl_advantage(log_p, log_q, gamma=gamma))
    return slopes_of_tables((log_p.sum(1).exp().detach() * token_losses.sum(1)).sum(), student)


def sequence_kl_gradient():
    student, _, log_p, log_q = sequences()
    return slopes_of_tables((log_p.sum(1).exp() * (log_p - log_q).sum(1)).sum(), student)


def test_gamma_1_gives_the_gradient_of_the_sequence_level_reverse_kl():
    close(expected_policy_gradient(gamma=1.0), sequence_kl_gradient())


def test_gamma_0_gives_the_gradient_of_the_reverse_kl_at_each_visited_prefix():
    student, teacher, _, _ = sequences()
    reach, total = torch.ones(1), 0.0  # the probability of each prefix, held still
    for p_table, q_table in zip(student, teacher, strict=True):
        p = p_table.softmax(-1)
        total += (reach * (p * (p.log() - q_table.log_softmax(-1))).sum(-1)).sum()
        reach = (reach[:, None] * p.detach()).flatten()
    close(expected_policy_gradient(gamma=0.0), slopes_of_tables(total, student))


def test_gamma_0_is_myopic():
    exact = sequence_kl_gradient()
    assert (expected_policy_gradient(gamma=0.0) - exact).norm() > 0.2 * exact.norm()


# -------------------------------------------------------- where the gradient leads: biased members and others


@pytest.mark.parametrize("name, source", LOSSES_ON_SUPPORTS)
def test_only_plain_truncation_moves_a_student_that_equals_its_teacher(name, source):
    s = logits(6, V, seed=1) * torch.tensor([0.1, 1, 1, 2, 4, 8])[:, None]
    value, grad = both(name, s, s, K, source)
    assert value.abs().max() < 1e-6 or name == "policy_gradient"
    if name not in ("topk_reverse_kl", "topk_forward_kl"):
        exactly = name in ("reverse_kl", "sg_topk_reverse_kl")  # not a rounding error for AdamW to scale up
        assert grad.abs().max() <= (0 if exactly else 1e-6)
        return
    p, inside = s.softmax(-1), torch.zeros(6, V).scatter(-1, s.topk(K).indices, 1.0)
    grad_mass = p * (inside - (p * inside).sum(-1, keepdim=True))  # of sum_S p
    close(grad, grad_mass if name == "topk_reverse_kl" else -grad_mass)
    assert grad.abs().max() > 0.05


Q0 = torch.tensor([0.30, 0.05, 0.10, 0.20, 0.10, 0.15, 0.10])
P0 = torch.tensor([0.05, 0.20, 0.05, 0.10, 0.30, 0.20, 0.10])
S = torch.tensor([5, 0, 3])  # .65 of the teacher's mass


def descend(name, steps=1000, lr=3.0):
    """Gradient descent from P0 on one tabular state, S held fixed -> p, the loss at the end."""
    z, log_q, f = P0.log(), Q0.log(), getattr(losses, name)
    for _ in range(steps):
        z = z.detach().requires_grad_()
        loss = f(z, log_q) if name in FULL else f(z, log_q[S], S)
        z = z - lr * torch.autograd.grad(loss, z)[0]
    return z.detach().softmax(-1), loss.item()


@pytest.mark.parametrize(
    "name, p_on_s, final_loss",
    [
        ("topk_reverse_kl", lambda q: q / math.e, lambda m: -m / math.e),
        ("topk_forward_kl", lambda q: q / q.sum(), lambda m: m * math.log(m)),
        *[(f"tail_topk_{way}_kl", lambda q: q, lambda m: 0) for way in ("reverse", "forward")],
        *[(f"{way}_kl", lambda q: q, lambda m: 0) for way in ("reverse", "forward")],
    ],
)
def test_descent_settles_at_q_except_for_the_biased_members(name, p_on_s, final_loss):
    p, loss = descend(name)
    close(p[S], p_on_s(Q0[S]), 2e-3)
    assert loss == approx(final_loss(0.65), abs=1e-3)


@pytest.mark.parametrize("name", ["norm_topk_reverse_kl", "norm_topk_forward_kl"])
def test_norm_losses_reach_the_teachers_shape_on_the_support_whatever_its_mass(name):
    p, _ = descend(name)
    close(p[S] / p[S].sum(), Q0[S] / 0.65, 1e-3)
    assert abs(p[S].sum() - 0.65) > 0.1


@pytest.mark.parametrize("name", ["norm_topk_reverse_kl", "norm_topk_forward_kl"])
def test_norm_losses_are_blind_to_mass_outside_the_support_and_to_the_teachers_normalisation(name):
    s, t, f = logits(5, V, seed=1), logits(5, V, seed=2), getattr(losses, name)
    ids, logp, _ = losses.topk_support(s, t, K, "student")
    outside = torch.ones(5, V).scatter(-1, ids, 0.0)
    close(f(s + 3 * outside, logp - 7.0, ids), f(s, logp, ids))
    assert not both(name, s, t, K, "student")[1][outside > 0].any()


@pytest.mark.parametrize("name", ["norm_topk_reverse_kl", "norm_topk_forward_kl"])
def test_norm_losses_have_no_signal_at_k_1(name):
    value, grad = both(name, logits(5, V, seed=1), logits(5, V, seed=2), 1, "teacher")
    assert not value.any() and not grad.any()


def test_sg_topk_leaks_mass_out_of_the_support_while_its_value_is_positive():
    p = torch.tensor([0.80, 0.05, 0.05, 0.06, 0.04])
    q = torch.tensor([0.05, 0.80, 0.05, 0.06, 0.04])  # as much on S, the same tail: nothing need leave S
    z, ids = p.log().requires_grad_(), torch.tensor([0, 1, 2])
    value = losses.sg_topk_reverse_kl(z, q[ids].log(), ids)
    value.backward()
    close(z.grad[3:], -p[3:] * value.detach())  # descent lifts every token outside S
    assert value > 0 and (z - z.grad).softmax(-1)[ids].sum() < p[ids].sum() - 0.05


# ------------------------------------------------------------------------------------------ bounds and limits

STUDENTS = logits(300, 30, seed=8) * torch.logspace(-1, 1.3, 300)[:, None]  # from flat to one-hot
TEACHERS = logits(300, 30, seed=9) * torch.logspace(-1, 1.3, 300).roll(100)[:, None]


@pytest.mark.parametrize(
    "k, source", [(1, "student"), (1, "teacher"), (5, "union"), (5, "intersection"), (25, "student")]
)
@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_tail_losses_lie_between_0_and_the_full_kl(direction, k, source):
    _, logp, valid = losses.topk_support(STUDENTS, TEACHERS, k, source)
    seen = 1 - (logp.double().exp() * valid).sum(-1) > 1e-3  # a tail that 1 - sum still resolves in float32
    full = getattr(losses, direction)(STUDENTS, TEACHERS)
    tail, _ = both(f"tail_topk_{direction}", STUDENTS, TEACHERS, k, source)
    norm, _ = both(f"norm_topk_{direction}", STUDENTS, TEACHERS, k, source)
    assert (tail[seen] <= full[seen] + 1e-3).all() and seen.sum() > 50
    assert tail.min() >= -1e-5 and norm.min() >= -1e-6


BOUNDS = [("jsd", {"beta": b}, math.log(2)) for b in (0.1, 0.5, 0.9)] + [("tvd", {}, 1.0)]
BOUNDS += [("skew_forward_kl", {"alpha": a}, -math.log(a)) for a in (0.1, 0.6)]
BOUNDS += [("skew_reverse_kl", {"alpha": a}, -math.log(a)) for a in (0.1, 0.6)]


@pytest.mark.parametrize("name, kw, bound", BOUNDS, ids=str)
def test_bounded_losses_keep_their_bound_and_reach_it_on_disjoint_supports(name, kw, bound):
    value = getattr(losses, name)(STUDENTS, TEACHERS, **kw)
    assert value.min() >= -1e-6 and value.max() <= bound + 1e-6
    disjoint = getattr(losses, name)(torch.tensor([99.0, 0, 0]), torch.tensor([0, 99.0, 0]), **kw).item()
    assert disjoint == approx(bound, rel=1e-6) or kw.get("beta", 0.5) != 0.5


@pytest.mark.parametrize("direction, beta", [("forward_kl", 1e-3), ("reverse_kl", 1 - 1e-3)])
def test_jsd_over_its_small_weight_tends_to_the_kl(direction, beta):
    s, t = logits(5, V, seed=1, scale=1.0), logits(5, V, seed=2, scale=1.0)
    scaled = losses.jsd(s, t, beta=beta) / min(beta, 1 - beta)
    torch.testing.assert_close(scaled, getattr(losses, direction)(s, t), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("vocab, scale", [(V, 2.0), (1000, 0.1), (50_000, 1.0), (50_000, 6.0)])
@pytest.mark.parametrize("name", TOPK)
def test_with_k_equal_to_v_a_topk_loss_is_its_full_vocabulary_twin(name, vocab, scale):
    s, t = logits(1, vocab, seed=1, scale=scale).requires_grad_(), logits(1, vocab, seed=2, scale=scale)
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[None]
    value = getattr(losses, name)(s, t.log_softmax(-1).gather(-1, ids), ids)
    twin = getattr(losses, "reverse_kl" if "reverse" in name else "forward_kl")(s, t)
    close(value, twin, 1e-4)
    grad, twin_grad = torch.autograd.grad(value, s)[0], torch.autograd.grad(twin, s)[0]
    close(grad, twin_grad, 2e-5 * twin_grad.abs().max().item())


# --------------------------------------------------------------------- masked vocabularies and extreme logits

A, B = logits(1, V, seed=1), logits(1, V, seed=2)
MASK = torch.tensor([False, False, True, False, True, False, False])
HOT = torch.tensor([[0, 0, 1e4, 0, 0, 0, 0]])
HUGE = torch.tensor([[3e38, -3e38, 3e38, 1, 0, -1, -3e38]]).bfloat16()
EXTREME = {
    "same mask": (A.masked_fill(MASK, NEVER), B.masked_fill(MASK, NEVER)),
    "different masks": (A.masked_fill(MASK, NEVER), B.masked_fill(MASK.roll(1), NEVER)),
    "disjoint masks": (A.masked_fill(MASK, NEVER), B.masked_fill(~MASK, NEVER)),
    "all but one masked": (A.masked_fill(HOT == 0, NEVER), B),
    "+-1e4": (1e4 * A.sign(), 1e4 * B.sign()),
    "+-3e38 in bf16": (HUGE, HUGE.roll(1)),
    "teacher one-hot": (A, HOT),
    "student one-hot": (HOT, B),
    "both one-hot, elsewhere": (HOT, HOT.roll(3)),
    "student tail of 1e-26": (A + HOT.clamp(max=60), B),
    "tails of 1e-35": (HOT.clamp(max=80), HOT.clamp(max=80)),
}


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("name, source", LOSSES_ON_SUPPORTS)
def test_value_and_gradient_are_finite_at_the_extremes(name, source, case):
    for k in (1, K, V):
        value, grad = both(name, *EXTREME[case], k, source)
        assert value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_masked_in_both_is_as_good_as_absent(name):
    s, t = logits(4, V, seed=1), logits(4, V, seed=2)
    masked_value, masked_grad = both(name, s.masked_fill(MASK, NEVER), t.masked_fill(MASK, NEVER))
    value, grad = both(name, s[:, ~MASK], t[:, ~MASK])
    close(masked_value, value)
    close(masked_grad[:, ~MASK], grad)
    assert not masked_grad[:, MASK].any()


def test_an_infinite_divergence_is_1e9_times_the_mass():
    p, q = (x.softmax(-1)[0, MASK].sum().item() for x in (A, B))
    assert losses.reverse_kl(A, B.masked_fill(MASK, NEVER)).item() == approx(1e9 * p, rel=1e-5)
    assert losses.forward_kl(A.masked_fill(MASK, NEVER), B).item() == approx(1e9 * q, rel=1e-5)
    can, cannot = torch.zeros(1, 1), torch.full((1, 1), NEVER)
    assert losses.k1(can, cannot) == 1e9 and losses.reverse_kl_advantage(can, cannot) == -1e9


@pytest.mark.parametrize("name", TOPK)
def test_an_empty_intersection_costs_nothing(name):
    assert not losses.topk_support(HOT, HOT.roll(1), 1, "intersection")[2].any()
    value, grad = both(name, HOT, HOT.roll(1), 1, "intersection")
    assert value.abs() < 1e-6 and grad.abs().max() < 1e-6


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_tail_losses_see_a_student_tail_that_1_minus_sum_would_lose(direction):
    z, logp = torch.tensor([50.0, 0, 0], requires_grad=True), torch.tensor([2.0, 0, 0]).log_softmax(-1)[:1]
    loss = getattr(losses, f"tail_topk_{direction}")(z, logp, torch.tensor([0]))
    loss.backward()
    q, each = logp.exp().item(), math.exp(-50)  # on S: q, and p = 1; each token outside: e^-50 of p
    gap = math.log(2 * each / (1 - q))
    value = {"reverse_kl": -math.log(q), "forward_kl": q * math.log(q) - (1 - q) * gap}
    slope = {"reverse_kl": each * (gap + math.log(q)), "forward_kl": each - (1 - q) / 2}
    assert loss.item() == approx(value[direction], rel=1e-5)
    assert z.grad[1:].tolist() == approx([slope[direction]] * 2, rel=1e-4, abs=0)


def test_a_teacher_tail_below_float32_resolution_is_floored_or_counts_as_none():
    s, ids, logp = torch.tensor([1.0, 0, 0]), torch.tensor([0]), torch.zeros(1)  # all of q is on S
    p = s.softmax(-1)[0].item()
    floored = p * math.log(p) + (1 - p) * math.log((1 - p) / 2**-23)
    assert losses.tail_topk_reverse_kl(s, logp, ids).item() == approx(floored, rel=1e-5)
    assert losses.tail_topk_forward_kl(s, logp, ids).item() == approx(-math.log(p), rel=1e-5)
    logp = torch.tensor([12.0, 0, 0]).log_softmax(-1)[:1]  # a tail of 1e-5 counts in full
    check(losses.tail_topk_forward_kl, TOPK["tail_topk_forward_kl"], s, [logp, ids], [{0: logp.exp().item()}])


# ------------------------------------------------------------------------------------------------ the helpers


@any_input
@pytest.mark.parametrize("k", [1, K, V])
@pytest.mark.parametrize("source", SOURCES)
def test_topk_support_is_the_set_it_says_with_exact_teacher_log_probs(source, k, shape, dtype):
    s, t = logits(*shape, V, seed=1).to(dtype), logits(*shape, V, seed=2).to(dtype)
    ids, logp, valid = losses.topk_support(s, t, k, source)
    assert logp.dtype == torch.float32 and valid.dtype == torch.bool
    assert torch.equal(ids[..., :k], (t if source == "teacher" else s).topk(k).indices)
    assert ids.shape == logp.shape == valid.shape == (*shape, 2 * k if source == "union" else k)
    found = distributions(ids, logp, valid)
    assert valid.sum() == sum(len(q) for q in found)  # no token is valid twice
    for z_p, z_q, q in zip(rows(s), rows(t), found, strict=True):
        a, b = ({z.index(x) for x in sorted(z)[-k:]} for z in (z_p, z_q))
        best = {"student": a, "teacher": b, "union": a | b, "intersection": a & b}
        assert q == approx({i: softmax(z_q)[i] for i in best[source]})


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]], ids=str)
def test_advantage_is_the_discounted_sum_of_later_gaps(gamma, mask):
    log_p, log_q = -logits(3, 5, seed=1).abs(), -logits(3, 5, seed=2).abs()
    keep, gap, time = mask or [[1] * 5] * 3, (log_q - log_p).tolist(), range(5)
    want = [
        [k[t] * sum(gamma ** (u - t) * g[u] * k[u] for u in time if u >= t) for t in time]
        for g, k in zip(gap, keep, strict=True)
    ]
    if mask is not None:
        mask = torch.tensor(mask)
        log_p = log_p.where(mask.bool(), math.nan)  # what stands at padding is not read
    out = losses.reverse_kl_advantage(log_p.double(), log_q.double(), mask, gamma)
    assert out.dtype == torch.float32
    close(out, torch.tensor(want))


@pytest.mark.parametrize("weight, twin", [(0.0, "reverse_kl"), (1.0, "forward_kl")])
def test_mixed_kl_is_exactly_a_pure_kl_at_either_end(weight, twin):
    s, t = logits(6, V, seed=1), logits(6, V, seed=2)
    results = []
    for f in (lambda z: losses.mixed_kl(z, t, weight=weight), lambda z: getattr(losses, twin)(z, t)):
        z = s.clone().requires_grad_()
        out = f(z)
        results.append((out.detach(), torch.autograd.grad(out.sum(), z)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def gradients_of_pg(baseline=None, clip=None):
    """Of the surrogate at each y, [y, logits]: what is averaged over y ~ p."""
    found = []
    for y in range(5):
        z = Z.clone().requires_grad_()
        log_p, log_q = z.log_softmax(-1)[None, y : y + 1], T.log_softmax(-1)[None, y : y + 1]
        A = losses.reverse_kl_advantage(log_p, log_q, baseline=baseline, clip=clip)
        found.append(torch.autograd.grad(pg(log_p, A).sum(), z)[0])
    return torch.stack(found)


def test_the_reverse_kl_as_baseline_keeps_the_mean_gradient_and_lowers_its_variance():
    plain, centred = gradients_of_pg(), gradients_of_pg(baseline=REVERSE_KL[None, None])

    def moments(gradients):
        mean = (P[:, None] * gradients).sum(0)
        return mean, (P[:, None] * (gradients - mean) ** 2).sum()

    (mean, variance), (same_mean, lower) = moments(plain), moments(centred)
    close(mean, REVERSE)
    close(same_mean, REVERSE)
    assert lower < 0.9 * variance


def test_clipped_gaps_bound_the_advantage_and_bias_the_gradient():
    log_p, log_q = P.log()[None], Q.log()[None]
    clipped = losses.reverse_kl_advantage(log_p, log_q, clip=0.3)
    close(clipped, (log_q - log_p).clamp(-0.3, 0.3))
    assert clipped.abs().max() < (log_q - log_p).abs().max() - 0.1
    mean = (P[:, None] * gradients_of_pg(clip=0.3)).sum(0)
    assert (mean - REVERSE).abs().max() > 0.01
    close((P[:, None] * gradients_of_pg(clip=100.0)).sum(0), REVERSE)


def test_a_baseline_of_padding_is_not_read():
    log_p, log_q = -logits(2, 3, seed=1).abs(), -logits(2, 3, seed=2).abs()
    mask, baseline = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.full((2, 3), 0.5)
    out = losses.reverse_kl_advantage(log_p, log_q, mask, 0.7, baseline.where(mask.bool(), math.nan))
    want = losses.reverse_kl_advantage(log_p, log_q, mask, 0.7) + 0.5 * mask
    close(out, want)


def test_supports_and_advantages_carry_no_gradient():
    s, t = logits(3, V, seed=1).requires_grad_(), logits(3, V, seed=2).requires_grad_()
    for source in SOURCES:
        assert not any(x.requires_grad for x in losses.topk_support(s, t, K, source))
    for gamma in (0.0, 1.0):
        assert not losses.reverse_kl_advantage(s, t, gamma=gamma).requires_grad
    for args in [(t,), (t, t), (t, t, 0.2)]:
        assert torch.autograd.grad(losses.policy_gradient(s, *args).sum(), t, allow_unused=True) == (None,)


# ---------------------------------------------------------------------------------- manners of every function


@pytest.mark.parametrize("name", [*LOSSES, *HELPERS])
def test_inputs_are_left_as_they_were(name):
    s, t = logits(4, V, seed=1).masked_fill(MASK, NEVER), logits(4, V, seed=2)
    given = inputs(name, s, t)
    before = [x.clone() for x in given if torch.is_tensor(x)]
    getattr(losses, name)(*given)
    assert all(torch.equal(x, y) for x, y in zip(filter(torch.is_tensor, given), before, strict=True))


@pytest.mark.parametrize("name", [*LOSSES, *HELPERS])
def test_a_function_cut_out_by_itself_runs_with_torch_alone(name):
    namespace = {}
    exec("import torch\n\n" + inspect.getsource(getattr(losses, name)), namespace)
    args = inputs(name, logits(4, V, seed=1), logits(4, V, seed=2))
    torch.testing.assert_close(namespace[name](*args), getattr(losses, name)(*args), rtol=0, atol=0)


def test_losses_imports_torch_only_and_every_function_is_tested_here():
    tree = ast.parse(inspect.getsource(losses))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == ["import torch"]
    assert [f.name for f in tree.body if isinstance(f, ast.FunctionDef)] == [*LOSSES, *HELPERS]


@pytest.mark.parametrize("name", LOSSES)
def test_docstring_states_equation_value_gradient_cost_and_source(name):
    first, second, *rest = inspect.getdoc(getattr(losses, name)).splitlines()
    assert first.strip() and not second.strip()
    for key in ("value: ", "grad: ", "teacher sends: ", "ref: "):
        assert sum(line.startswith(key) and len(line) > len(key) for line in rest) == 1, key
    biased = ("topk_reverse_kl", "topk_forward_kl", "k1", "k3")
    assert ("BIASED" in first) == (name in biased)


X = torch.zeros(1, V)
REFUSED = [
    *[("mixed_kl", {"weight": w}) for w in (-0.1, 1.1, math.nan)],
    *[("jsd", {"beta": b}) for b in (-0.1, 0, 1, 1.5, math.nan)],
    *[(name, {"alpha": a}) for name in ("skew_forward_kl", "skew_reverse_kl") for a in (-0.1, 0.0, 1.0, 2)],
    *[("adaptive_kl", {"mu": mu}) for mu in (-0.1, 0.0, 1.0, 1.1)],
    *[("entropy_aware_kl", {"tau": -0.5}), ("entropy_aware_kl", {"eta": -0.25})],
    *[("entropy_aware_kl", {"tau": math.nan}), ("policy_gradient", {"clip": math.nan, "behaviour_logp": X})],
    *[("policy_gradient", {"clip": 0.2}), ("policy_gradient", {"clip": 0.0, "behaviour_logp": X})],
    ("policy_gradient", {"clip": -0.2, "behaviour_logp": X}),
    *[("topk_support", {"k": k, "source": "student"}) for k in (0, -1, V + 1)],
    ("topk_support", {"source": "both", "k": 1}),
    *[("reverse_kl_advantage", {"gamma": g}) for g in (-0.1, 1.01)],
    *[("reverse_kl_advantage", {"clip": c}) for c in (-1.0, 0.0, math.nan)],
]


@pytest.mark.parametrize("name, kw", REFUSED, ids=lambda x: str(x)[:40])
def test_an_argument_out_of_range_is_refused_by_name_and_value(name, kw):
    argument, value = next(iter(kw.items()))
    with pytest.raises(ValueError, match=f"{argument}.*got .*{value}"):
        getattr(losses, name)(X, X, **kw)
