"""Every divergence and estimator of on-policy distillation, one self-contained function each.

    p = student, q = teacher, y = the token the student sampled, S = a top-k support, sg = stop-gradient

Three families, by what the teacher must send for each token:

    full      f(student_logits [...,V], teacher_logits [...,V], *, ...)                             -> [...]
    top-k     f(student_logits [...,V], teacher_topk_logp [...,K], topk_ids [...,K], valid=None)    -> [...]
    sampled   f(student_logp [...], teacher_logp [...])                                             -> [...]

Every function returns one unreduced, unmasked number per token, in nats, for any leading shape; computes in
float32 whatever comes in; never writes to its inputs; knows no model, tokenizer, padding or config; and calls
no other function of this file, so that any one of them copies out whole and runs with `import torch` alone (a
little repetition is the price). Divide by temperatures, mask and average outside, once. Top-k losses take
teacher log-probabilities normalised over the WHOLE vocabulary: `topk_support` makes them.

Each docstring says:
    first line      the equation; BIASED, and why, where the expected gradient is not that of the
                    divergence that the loss is named after or taken for
    value:          what the number estimates
    grad:           what the expected gradient is; often not the gradient of what the value estimates! Always
                    at a fixed prefix: only reverse_kl_advantage(gamma=1) counts what it does to later ones
    teacher sends:  how much a teacher server would have to return
    ref:            where it comes from

A log-probability is floored at -1e9, so that a masked token (logit -inf) has probability 0, adds 0 and gets
no gradient. Where a divergence is truly infinite (p > 0 = q in a reverse KL) it is huge but finite: 1e9 p.
"""

import torch

# ---------------------------------------------------------------- full vocabulary: the teacher sends V logits


def forward_kl(student_logits, teacher_logits):
    """KL(q || p) = sum_v q (log q - log p)

    value: forward KL, exact. Mode-covering: infinite where the student gives no mass to what the teacher
          does.
    grad: exact; with respect to the student's logits it is p - q.
    teacher sends: logits [...,V]
    ref: arXiv 1503.02531
    """
    log_p = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1).clamp(min=-1e9)
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def reverse_kl(student_logits, teacher_logits):
    """KL(p || q) = sum_v p (log p - log q)

    value: reverse KL, exact. Mode-seeking: large where the student puts mass that the teacher does not.
    grad: exact: sum_v p grad(log p) (log p - log q). The derivative of the inner log p sums to zero over
          the vocabulary and is left out: where student = teacher its rounding would be the whole gradient,
          which AdamW would scale up. So the gradient is exactly zero there.
    teacher sends: logits [...,V]
    ref: arXiv 2306.08543
    """
    log_p = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1).clamp(min=-1e9)
    return (log_p.exp() * (log_p.detach() - log_q)).sum(dim=-1)


def mixed_kl(student_logits, teacher_logits, *, weight=0.5):
    """w KL(q || p) + (1 - w) KL(p || q)

    value: forward KL with weight w and reverse KL with weight 1 - w, exact; at the ends one of the two.
    grad: exact. The forward share counteracts the reverse KL's loss of entropy on long sequences.
    teacher sends: logits [...,V]
    ref: arXiv 2605.16826
    Raises ValueError unless 0 <= weight <= 1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    log_p = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1).clamp(min=-1e9)
    forward_kl = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    reverse_kl = (log_p.exp() * (log_p.detach() - log_q)).sum(dim=-1)  # inner log p: see reverse_kl
    return weight * forward_kl + (1 - weight) * reverse_kl


def jsd(student_logits, teacher_logits, *, beta=0.5):
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p

    value: generalised Jensen-Shannon divergence (GKD's convention), exact; at most log 2.
    grad: exact. It vanishes at both ends: JSD / beta -> forward KL as beta -> 0, JSD / (1 - beta) ->
          reverse KL as beta -> 1.
    teacher sends: logits [...,V]
    ref: arXiv 2306.13649
    Raises ValueError unless 0 < beta < 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}: at the ends, use forward_kl or reverse_kl")
    log_p = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1).clamp(min=-1e9)
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=torch.float64, device=log_p.device).log()
    log_m = torch.logaddexp(log_q + log_beta, log_p + log_rest)
    kl_q_m = (log_q.exp() * (log_q - log_m)).sum(dim=-1)
    kl_p_m = (log_p.exp() * (log_p - log_m)).sum(dim=-1)
    return beta * kl_q_m + (1 - beta) * kl_p_m


def skew_forward_kl(student_logits, teacher_logits, *, alpha=0.1):
    """KL(q || alpha q + (1 - alpha) p)

    value: skewed forward KL, exact; bounded by -log alpha, so one forgotten teacher token cannot dominate a
          batch.
    grad: exact.
    teacher sends: logits [...,V]
    ref: arXiv 2402.03898
    Raises ValueError unless 0 < alpha < 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha must be in (0, 1), got {alpha}: use forward_kl for alpha = 0; at 1 the loss is constant"
        )
    log_p = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1).clamp(min=-1e9)
    log_alpha, log_rest = torch.tensor([alpha, 1 - alpha], dtype=torch.float64, device=log_p.device).log()
    log_m = torch.logaddexp(log_q + log_alpha, log_p + log_rest)
    return (log_q.exp() * (log_q - log_m)).sum(dim=-1)


def skew_reverse_kl(student_logits, teacher_logits, *, alpha=0.1):
    """KL(p || (1 - alpha) q + alpha p)

    value: skewed reverse KL, exact; bounded by -log alpha, so a token the teacher forbids costs a finite
          amount.
    grad: exact.
    teacher sends: logits [...,V]
    ref: arXiv 2402.03898
    Raises ValueError unless 0 < alpha < 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha must be in (0, 1), got {alpha}: use reverse_kl for alpha = 0; at 1 the loss is constant"
        )
    log_p = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1).clamp(min=-1e9)
    log_alpha, log_rest = torch.tensor([alpha, 1 - alpha], dtype=torch.float64, device=log_p.device).log()
    log_m = torch.logaddexp(log_q + log_rest, log_p + log_alpha)
    return (log_p.exp() * (log_p - log_m)).sum(dim=-1)


def adaptive_kl(student_logits, teacher_logits, *, mu=0.5):
    """w KL(q || p) + (1 - w) KL(p || q), w = sg[sum_head |q - p| / sum_v |q - p|], head = top of q, mass mu

    head: the fewest of the teacher's tokens, best first, whose mass reaches mu.

    value: a mix of forward KL (gap in the teacher's head) and reverse KL (gap in its tail), weighed token
          by token.
    grad: w grad(forward KL) + (1 - w) grad(reverse KL) with w held constant: not the derivative of the
          value through w.
    teacher sends: logits [...,V]
    ref: arXiv 2404.02657
    Raises ValueError unless 0 < mu < 1.
    """
    if not 0 < mu < 1:
        raise ValueError(
            f"mu must be in (0, 1), got {mu}: use reverse_kl for mu = 0 and forward_kl for mu = 1"
        )
    log_p = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1).clamp(min=-1e9)
    p, q = log_p.exp(), log_q.exp()
    with torch.no_grad():
        sorted_q, order = q.sort(dim=-1, descending=True)
        in_head = (
            sorted_q.cumsum(dim=-1) - sorted_q < mu
        )  # mass strictly before a token: the one that crosses mu belongs too
        gap = (q - p).abs()
        head_gap = (gap.gather(-1, order) * in_head).sum(dim=-1)
        w = head_gap / gap.sum(dim=-1).clamp(
            min=torch.finfo(torch.float32).tiny
        )  # p = q: both KLs are 0, any w will do
    return w * (q * (log_q - log_p)).sum(dim=-1) + (1 - w) * (p * (log_p - log_q)).sum(dim=-1)


def entropy_aware_kl(student_logits, teacher_logits, *, tau=1.0, eta=1.0):
    """KL(p || q) + eta 1[H(q) > tau] KL(q || p)

    value: reverse KL, plus eta times the forward KL where the teacher is uncertain (entropy above tau
          nats).
    grad: exact; the gate depends on the teacher alone.
    teacher sends: logits [...,V]
    ref: arXiv 2603.07079
    Raises ValueError if tau or eta is negative.
    """
    if not (tau >= 0 and eta >= 0):
        raise ValueError(f"tau and eta must be >= 0, got tau={tau}, eta={eta}")
    log_p = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1).clamp(min=-1e9)
    p, q = log_p.exp(), log_q.exp()
    uncertain = -(q * log_q).sum(dim=-1) > tau
    reverse = (p * (log_p.detach() - log_q)).sum(dim=-1)  # detached as in reverse_kl
    return reverse + eta * uncertain * (q * (log_q - log_p)).sum(dim=-1)


def tvd(student_logits, teacher_logits):
    """1/2 sum_v |p - q|

    value: total variation distance, exact; in [0, 1].
    grad: exact almost everywhere (a subgradient, 0, where p = q). Bounded, and nearly 0 where student and
          teacher hardly overlap.
    teacher sends: logits [...,V]
    ref: arXiv 2307.15190
    """
    p = torch.softmax(student_logits.float(), dim=-1)
    q = torch.softmax(teacher_logits.float(), dim=-1)
    return 0.5 * (p - q).abs().sum(dim=-1)


# ----------------------------------------- top-k: the teacher sends K log-probabilities (and the K token ids)


def topk_reverse_kl(student_logits, teacher_topk_logp, topk_ids, valid=None):
    """sum_S p (log p - log q), BIASED: grad(sum_S p) pushes mass out of S, even where student = teacher

    student_logits [...,V], teacher_topk_logp and topk_ids [...,K], valid [...,K] bool or None -> nats [...]
    value: reverse KL truncated to S. Not a divergence: it falls below zero when mass leaves S, so a falling
          loss proves nothing.
    grad: sum_S p grad(log p) (log p - log q + 1): the truncated true gradient plus grad(sum_S p), which is
          not zero. With S held fixed its minimum is p = q / e on S. Use sg_topk_reverse_kl or
          tail_topk_reverse_kl instead.
    teacher sends: K log-probabilities at the ids it is asked for, normalised over the whole vocabulary
    ref: arXiv 2605.11182
    """
    valid = torch.ones_like(topk_ids, dtype=torch.bool) if valid is None else valid
    log_p = torch.log_softmax(student_logits.float(), dim=-1).gather(-1, topk_ids).clamp(min=-1e9)
    log_q = teacher_topk_logp.float().clamp(min=-1e9).where(valid, -1e9)  # q = 0 at what is not in S
    terms = log_p.exp() * (log_p - log_q)
    return terms.where(valid, 0).sum(dim=-1)


def sg_topk_reverse_kl(student_logits, teacher_topk_logp, topk_ids, valid=None):
    """sum_S p (sg[log p] - log q)

    student_logits [...,V], teacher_topk_logp and topk_ids [...,K], valid [...,K] bool or None -> nats [...]
    value: reverse KL truncated to S (usually the student's top k), the same number as topk_reverse_kl.
    grad: sum_S p grad(log p) (log p - log q), the true reverse-KL gradient without the terms outside S;
          exactly zero where student = teacher. Tokens outside S cost nothing, so mass still leaks out of S
          while the value is positive: with small K and large steps it can collapse. Watch student_mass.
    teacher sends: K log-probabilities at the ids it is asked for, normalised over the whole vocabulary
    ref: arXiv 2605.11182
    """
    valid = torch.ones_like(topk_ids, dtype=torch.bool) if valid is None else valid
    log_p = torch.log_softmax(student_logits.float(), dim=-1).gather(-1, topk_ids).clamp(min=-1e9)
    log_q = teacher_topk_logp.float().clamp(min=-1e9).where(valid, -1e9)  # q = 0 at what is not in S
    terms = log_p.exp() * (log_p.detach() - log_q)
    return terms.where(valid, 0).sum(dim=-1)


def norm_topk_reverse_kl(student_logits, teacher_topk_logp, topk_ids, valid=None):
    """sum_S p' (log p' - log q'), p' = p / sum_S p, q' = q / sum_S q

    student_logits [...,V], teacher_topk_logp and topk_ids [...,K], valid [...,K] bool or None -> nats [...]
    value: reverse KL between student and teacher, both renormalised on S; >= 0. Blind to how much mass lies
          outside S.
    grad: exact for that renormalised KL, not for the full one; no signal at all at K = 1.
    teacher sends: K log-probabilities at the ids it is asked for (any normalisation will do)
    ref: arXiv 2605.11182
    """
    valid = torch.ones_like(topk_ids, dtype=torch.bool) if valid is None else valid
    logits = student_logits.gather(-1, topk_ids).float().clamp(min=-1e9).where(valid, -1e9)
    log_q = teacher_topk_logp.float().clamp(min=-1e9).where(valid, -1e9)
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(log_q, dim=-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.where(valid, 0).sum(dim=-1)


def tail_topk_reverse_kl(student_logits, teacher_topk_logp, topk_ids, valid=None):
    """sum_S p (log p - log q) + p_tail (log p_tail - log q_tail), p_tail = 1 - sum_S p, q_tail = 1 - sum_S q

    student_logits [...,V], teacher_topk_logp and topk_ids [...,K], valid [...,K] bool or None -> nats [...]
    value: reverse KL after merging all tokens outside S into one bucket; 0 <= value <= full reverse KL, as
          long as the teacher's tail is well above 1.2e-7, the resolution of 1 - sum, where it is floored.
    grad: exact for the merged KL, hence zero where student = teacher. It does see mass leave S, not where
          it goes.
    teacher sends: K log-probabilities at the ids it is asked for, normalised over the whole vocabulary
    ref: arXiv 2605.11182
    """
    valid = torch.ones_like(topk_ids, dtype=torch.bool) if valid is None else valid
    log_p_all = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_p = log_p_all.gather(-1, topk_ids)
    log_q = teacher_topk_logp.float().clamp(min=-1e9).where(valid, -1e9)  # q = 0 at what is not in S
    in_support = torch.zeros_like(log_p_all).scatter_add(-1, topk_ids, valid.float()) > 0
    # The student's tail from its logits, not as 1 - sum: exact, with a gradient, down to e^-87.
    log_p_tail = log_p_all.where(~in_support, -1e9).logsumexp(dim=-1).clamp(min=-87.0)
    q_tail = 1 - log_q.exp().sum(dim=-1)
    log_q_tail = q_tail.clamp(min=torch.finfo(torch.float32).eps).log()
    terms = (log_p.exp() * (log_p - log_q)).where(valid, 0)
    return terms.sum(dim=-1) + log_p_tail.exp() * (log_p_tail - log_q_tail)


def topk_forward_kl(student_logits, teacher_topk_logp, topk_ids, valid=None):
    """sum_S q (log q - log p), BIASED: its minimum is not p = q but p = q / sum_S q, everything else emptied

    student_logits [...,V], teacher_topk_logp and topk_ids [...,K], valid [...,K] bool or None -> nats [...]
    value: forward KL truncated to S. Not a divergence: its minimum is m log m < 0, m = sum_S q, reached
          when the student has moved all its mass into S.
    grad: -sum_S q grad(log p): the true forward-KL gradient without the terms outside S; not zero where
          student = teacher.
    teacher sends: its top K log-probabilities and ids, normalised over the whole vocabulary
    ref: arXiv 2605.11182
    """
    valid = torch.ones_like(topk_ids, dtype=torch.bool) if valid is None else valid
    log_p = torch.log_softmax(student_logits.float(), dim=-1).gather(-1, topk_ids).clamp(min=-1e9)
    log_q = teacher_topk_logp.float().clamp(min=-1e9).where(valid, -1e9)  # q = 0 at what is not in S
    terms = log_q.exp() * (log_q - log_p)
    return terms.where(valid, 0).sum(dim=-1)


def norm_topk_forward_kl(student_logits, teacher_topk_logp, topk_ids, valid=None):
    """sum_S q' (log q' - log p'), p' = p / sum_S p, q' = q / sum_S q

    student_logits [...,V], teacher_topk_logp and topk_ids [...,K], valid [...,K] bool or None -> nats [...]
    value: forward KL between teacher and student, both renormalised on S; >= 0. Blind to how much mass lies
          outside S.
    grad: exact for that renormalised KL, not for the full one; no signal at all at K = 1.
    teacher sends: its top K log-probabilities and ids (any normalisation will do)
    ref: arXiv 2605.11182
    """
    valid = torch.ones_like(topk_ids, dtype=torch.bool) if valid is None else valid
    logits = student_logits.gather(-1, topk_ids).float().clamp(min=-1e9).where(valid, -1e9)
    log_q = teacher_topk_logp.float().clamp(min=-1e9).where(valid, -1e9)
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(log_q, dim=-1)
    terms = log_q.exp() * (log_q - log_p)
    return terms.where(valid, 0).sum(dim=-1)


def tail_topk_forward_kl(student_logits, teacher_topk_logp, topk_ids, valid=None):
    """sum_S q (log q - log p) + q_tail (log q_tail - log p_tail), p_tail = 1 - sum_S p, q_tail = 1 - sum_S q

    student_logits [...,V], teacher_topk_logp and topk_ids [...,K], valid [...,K] bool or None -> nats [...]
    value: forward KL after merging all tokens outside S into one bucket; 0 <= value <= full forward KL. A
          teacher tail below 1.2e-7, the resolution of 1 - sum in float32, counts as none.
    grad: exact for the merged KL, hence zero where student = teacher.
    teacher sends: its top K log-probabilities and ids, normalised over the whole vocabulary
    ref: arXiv 2605.11182
    """
    valid = torch.ones_like(topk_ids, dtype=torch.bool) if valid is None else valid
    log_p_all = torch.log_softmax(student_logits.float(), dim=-1).clamp(min=-1e9)
    log_p = log_p_all.gather(-1, topk_ids)
    log_q = teacher_topk_logp.float().clamp(min=-1e9).where(valid, -1e9)  # q = 0 at what is not in S
    in_support = torch.zeros_like(log_p_all).scatter_add(-1, topk_ids, valid.float()) > 0
    # The student's tail from its logits, not as 1 - sum: exact, with a gradient, down to e^-87.
    log_p_tail = log_p_all.where(~in_support, -1e9).logsumexp(dim=-1).clamp(min=-87.0)
    q_tail = 1 - log_q.exp().sum(dim=-1)
    log_q_tail = q_tail.clamp(min=torch.finfo(torch.float32).eps).log()
    q_tail = q_tail.where(q_tail > torch.finfo(torch.float32).eps, 0)
    terms = (log_q.exp() * (log_q - log_p)).where(valid, 0)
    return terms.sum(dim=-1) + q_tail * (log_q_tail - log_p_tail)


# ------------------- sampled: the teacher sends one log-probability, that of the token y ~ p the student drew


def k1(student_logp, teacher_logp):
    """log p(y) - log q(y), BIASED as a loss: E[grad] = E[grad log p] = 0, the teacher is not in the gradient

    value: unbiased for the reverse KL, high variance, often negative.
    grad: zero in expectation, pure noise. To descend the reverse KL use policy_gradient with this number as
          (minus) the advantage.
    teacher sends: log q(y)
    ref: arXiv 2605.11182
    """
    return student_logp.float().clamp(min=-1e9) - teacher_logp.float().clamp(min=-1e9)


def k2(student_logp, teacher_logp):
    """1/2 (log p(y) - log q(y))^2

    value: biased for the reverse KL (right to second order where p is close to q), low variance, >= 0.
    grad: unbiased for grad of the reverse KL, since d k2 = (log p - log q) grad log p.
    teacher sends: log q(y)
    ref: arXiv 2605.11182
    """
    return 0.5 * (student_logp.float().clamp(min=-1e9) - teacher_logp.float().clamp(min=-1e9)) ** 2


def k3(student_logp, teacher_logp):
    """q(y)/p(y) - 1 - log(q(y)/p(y)), BIASED if you want the reverse KL: E[grad] is that of the FORWARD KL

    value: unbiased for the reverse KL (where p > 0 covers q), low variance near p = q, >= 0; heavy-tailed
          far from it.
    grad: unbiased for grad of the forward KL: d k3 = (1 - q/p) grad log p.
    teacher sends: log q(y)
    ref: arXiv 2402.03300
    """
    log_ratio = teacher_logp.float().clamp(min=-1e9) - student_logp.float().clamp(min=-1e9)
    return (
        torch.expm1(log_ratio.clamp(max=80.0)) - log_ratio
    )  # exp(80) = 5e34: a guard against overflow, never met on y ~ p


def policy_gradient(student_logp, advantage, behaviour_logp=None, clip=None):
    """-sg[A] log p(y); stale samples: -min(r sg[A], clamp(r, 1 -+ clip) sg[A]), r = p(y) / p_behaviour(y)

    value: no estimate of anything; watch the KL instead.
    grad: unbiased for grad of the reverse KL at each visited prefix, if A = log q(y) - log p(y) (which is
          reverse_kl_advantage, gamma = 0). With gamma = 1: for grad of the whole sequence's reverse KL. A
          baseline that does not depend on y changes only the variance; an A that does not depend on y at
          all (a full KL!) gives zero. Ratios make stale samples unbiased; clipping them trades that for
          stability.
    teacher sends: log q(y), inside the advantage
    ref: arXiv 2306.08543, 1707.06347
    Raises ValueError if clip is given without behaviour_logp or is not positive.
    """
    if clip is not None and (behaviour_logp is None or not clip > 0):
        raise ValueError(f"clip must be > 0 and comes with behaviour_logp, got clip={clip}")
    student_logp, advantage = student_logp.float().clamp(min=-1e9), advantage.detach().float()
    if behaviour_logp is None:
        return -advantage * student_logp
    ratio = (student_logp - behaviour_logp.detach().float().clamp(min=-1e9)).clamp(max=60.0).exp()
    if clip is None:
        return -ratio * advantage
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


# ---------------------------------------------------------------------------------------------------- helpers


def topk_support(student_logits, teacher_logits, k, source):
    """Choose S for each token, read the teacher there: -> topk_ids, teacher_topk_logp, valid, each [...,K].

    source: whose top k tokens are S: "student" | "teacher" | "union" (K = 2k, the teacher's repeats marked
    invalid) | "intersection" (K = k: the student's, what is not in the teacher's top k marked invalid; S
    may be empty).
    Teacher log-probabilities are normalised over the whole vocabulary and gathered exactly, never guessed
    where they are missing.
    Raises ValueError unless 1 <= k <= V and source is one of the four.
    """
    if not 1 <= k <= student_logits.shape[-1]:
        raise ValueError(f"k must be in 1..{student_logits.shape[-1]} (the vocabulary), got {k}")
    if source not in ("student", "teacher", "union", "intersection"):
        raise ValueError(f"source must be student, teacher, union or intersection, got {source!r}")
    with torch.no_grad():
        teacher_logp = torch.log_softmax(teacher_logits.float(), dim=-1)
        student_ids = student_logits.topk(k, dim=-1).indices if source != "teacher" else None  # [...,k]
        teacher_ids = teacher_logits.topk(k, dim=-1).indices if source != "student" else None  # [...,k]
        if source in ("student", "teacher"):
            topk_ids = student_ids if source == "student" else teacher_ids
            valid = torch.ones_like(topk_ids, dtype=torch.bool)
        else:
            shared = student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)  # [...,k,k]
            if source == "union":
                topk_ids = torch.cat([student_ids, teacher_ids], dim=-1)
                valid = torch.cat(
                    [torch.ones_like(student_ids, dtype=torch.bool), ~shared.any(dim=-2)], dim=-1
                )
            else:
                topk_ids, valid = student_ids, shared.any(dim=-1)
        return topk_ids, teacher_logp.gather(-1, topk_ids), valid


def reverse_kl_advantage(student_logp, teacher_logp, mask=None, gamma=0.0, baseline=None, clip=None):
    """A_t = sum_{s >= t} gamma^(s-t) (log q(y_s) - log p(y_s)) + baseline_t, detached; [B,T], [B,T] -> [B,T].

    gamma = 0 credits each token with its own gap alone (the usual, myopic choice). gamma = 1 adds what it
    does to all later tokens; policy_gradient with it, summed over t, is unbiased for the gradient of the
    sequence-level reverse KL.
    mask [B,T], bool: True at completion tokens; others count as 0 and get 0.
    baseline [B,T]: a number that does not depend on y_t; the expected gradient stays, the variance falls. The
    reverse KL of the prefix is the best at gamma = 0 where the teacher's logits are at hand.
    clip: bounds each gap |log q - log p|, BIASED: the gradient no longer is that of the reverse KL, since the
    largest gaps count too little. It helps where single tokens that the teacher all but forbids dominate a
    batch, and costs the signal to leave them: the pull on such a token no longer grows with its log q.
    ref: arXiv 2306.08543; baseline: 2605.07865; clip: 2603.11137. Raises ValueError unless 0 <= gamma <= 1
    and clip > 0.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    reward = (teacher_logp.float().clamp(min=-1e9) - student_logp.float().clamp(min=-1e9)).detach()  # [B,T]
    reward = reward if clip is None else reward.clamp(-clip, clip)
    if mask is not None:
        reward = reward.where(mask.bool(), 0)
    advantages, later = reward, torch.zeros_like(reward[:, :1])
    if gamma > 0:
        columns = []
        for t in reversed(range(reward.shape[1])):
            later = reward[:, t : t + 1] + gamma * later  # [B,1]
            columns.append(later)
        advantages = torch.cat([reward[:, :0], *columns[::-1]], dim=1)
    if baseline is not None:
        advantages = advantages + baseline.detach().float()
    return advantages if mask is None else advantages.where(mask.bool(), 0)
