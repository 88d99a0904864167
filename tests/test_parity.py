"""losses.py against other people's code, on the same logits, on the CPU.

Each test asserts the whole relation: equal where the peer computes the same thing, and otherwise the peer's
own convention, factor, clamp or failure, so that it breaks when either side changes. The versions that these
relations describe are pinned in pyproject.toml, extra `parity`.
"""

import math
import os
from types import SimpleNamespace

import pytest
import torch

import losses

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

B, T, V, K = 2, 4, 11, 3


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="needs TRL: pip install -e .[parity]")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.gold.gold_trainer import GOLDTrainer
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
    from trl.experimental.sdft import loss_utils as sdft
    from trl.experimental.server_distillation import server_distillation_trainer as server
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return SimpleNamespace(
        gkd=GKDTrainer.generalized_jsd_loss,
        gold=GOLDTrainer.generalized_jsd_loss,
        iw_opd=IWOPDTrainer._compute_iw_opd_loss,
        sdft=sdft,
        server=server,
        chunked=_chunked_divergence_loss,
    )


@pytest.fixture(scope="module")
def liger():
    pytest.importorskip("liger_kernel", reason="needs Liger-Kernel: pip install -e .[parity]")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss, grpo_loss

    return SimpleNamespace(
        jsd=LigerFusedLinearJSDLoss,
        k3=grpo_loss.k3_loss_fn,
        ppo=grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn,
    )


def logits(seed, *shape, scale=2.0):
    shape = shape or (B, T, V)
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def gradient(loss, z):
    return torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]


def same(theirs, ours, z, tol=2e-6):
    """Equal in value and in gradient with respect to z."""
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=tol)
    torch.testing.assert_close(gradient(theirs, z), gradient(ours, z), rtol=1e-5, atol=tol)


def ours_at(beta):
    """What a peer's beta (or alpha) in [0, 1] stands for in losses.py: at its ends, the pure KLs."""
    if beta in (0, 1):
        return losses.forward_kl if beta == 0 else losses.reverse_kl
    return lambda s, t: losses.jsd(s, t, beta=beta)


BETAS = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])

# --------------------------------------------------------------------------------------- TRL: full vocabulary


@BETAS
@pytest.mark.parametrize("peer", ["gkd", "gold"])
def test_trl_generalized_jsd_is_jsd_with_the_same_beta(trl, peer, beta):
    # Same convention: beta weighs the teacher in the mixture. Unreduced, theirs keeps the vocabulary axis.
    s, t = logits(1), logits(2).detach()
    same(getattr(trl, peer)(s, t, beta=beta, reduction="none").sum(-1), ours_at(beta)(s, t), s)


def test_trl_temperature_divides_both_logits_and_does_not_multiply_the_loss_by_its_square(trl):
    s, t = logits(1), logits(2).detach()
    same(trl.gkd(s, t, temperature=3.0, reduction="none").sum(-1), losses.jsd(s / 3, t / 3), s)


def test_trl_batchmean_means_tokens_with_labels_but_sequences_without(trl):
    s, t = logits(1), logits(2).detach()
    labels = torch.tensor([[1, 1, -100, 1], [-100, 1, -100, -100]])
    per_token = losses.jsd(s, t)
    same(trl.gkd(s, t, labels=labels), per_token[labels != -100].sum() / 4, s)
    same(trl.gkd(s, t, labels=labels, num_items_in_batch=9), per_token[labels != -100].sum() / 9, s)
    same(trl.gkd(s, t), losses.jsd(s, t).sum() / B, s)  # not / (B * T)


def test_trl_jsd_jumps_at_the_ends_of_beta(trl):
    # Just inside, the loss has shrunk by the factor beta; at the end it is the whole KL. Ours refuses it.
    s, t = logits(1, scale=1.0), logits(2, scale=1.0).detach()
    inside, end = trl.gkd(s, t, beta=1e-3), trl.gkd(s, t, beta=0.0)
    torch.testing.assert_close(inside, 1e-3 * end, rtol=0.02, atol=0)
    with pytest.raises(ValueError):
        losses.jsd(s, t, beta=0.0)


def test_trl_computes_in_the_dtype_of_the_logits_and_ours_in_float32(trl):
    s, t = logits(1, 64, 1000).detach().bfloat16(), logits(2, 64, 1000).detach().bfloat16()
    s = (t + 0.05 * s).bfloat16()  # close to the teacher: the divergence is small, bf16 rounding is not
    exact = losses.jsd(s.double(), t.double())
    theirs = trl.gkd(s, t, reduction="none").sum(-1)
    assert theirs.dtype == torch.bfloat16 and (theirs - exact).abs().max() > 0.1 * exact.max()
    assert (losses.jsd(s, t) - exact).abs().max() < 1e-5


@BETAS
def test_trl_is_nan_where_the_vocabulary_is_masked_in_both(trl, beta):
    s, t = logits(1).detach(), logits(2).detach()
    s[..., 3] = t[..., 3] = -math.inf
    assert trl.gkd(s, t, beta=beta, reduction="none").sum(-1).isnan().all()
    rest = [i for i in range(V) if i != 3]
    torch.testing.assert_close(ours_at(beta)(s, t), ours_at(beta)(s[..., rest], t[..., rest]))


def test_gold_given_probabilities_floors_them_at_1e_8_so_a_forgotten_token_has_a_capped_cost_and_no_gradient(
    trl,
):
    p, q = torch.tensor([[1 - 1e-12, 1e-12]], requires_grad=True), torch.tensor([[0.5, 0.5]])
    theirs = trl.gold(p, q, beta=0.0, logits_are_probs=True, reduction="none").sum(-1)
    torch.testing.assert_close(theirs, 0.5 * torch.tensor([math.log(0.5) * 2 - math.log(1e-8)]))
    assert gradient(theirs, p)[0, 1] == 0
    z = p.detach().log().requires_grad_()
    ours = losses.forward_kl(z, q.log())
    torch.testing.assert_close(ours, 0.5 * torch.tensor([math.log(0.5) * 2 - math.log(1e-12)]))
    assert gradient(ours, z)[0, 1] < -0.4


@BETAS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl_tiled_divergence_over_hidden_states_is_the_same_number(trl, beta, temperature):
    h_s, h_t = logits(1, B, T, 5), logits(2, B, T, 6).detach()
    w_s, w_t = logits(3, V, 5), logits(4, V, 6).detach()
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]])
    theirs, entropy, count = trl.chunked(h_s, h_t, w_s, w_t, mask, beta, temperature=temperature)
    z = h_s @ w_s.T / temperature
    ours = (ours_at(beta)(z, h_t @ w_t.T / temperature) * mask).sum() / 4
    same(theirs, ours, w_s, tol=2e-5)
    assert (
        count == 4
    )  # it also returns the student's entropy summed over tokens: a KL to the uniform plus log V
    uniform = math.log(V) - losses.reverse_kl(z, torch.zeros_like(z))
    torch.testing.assert_close(entropy, (uniform * mask).sum())


# ------------------------------------------------------------------------------------- TRL: supports, samples


@pytest.mark.parametrize("way, alpha", [("forward", 0.0), ("reverse", 1.0)])
@pytest.mark.parametrize("kind, add_tail", [("tail", True), ("norm", False)])
@pytest.mark.parametrize("k", [1, K, V])
def test_sdft_topk_losses_are_ours_on_the_students_support(trl, way, alpha, kind, add_tail, k):
    # At k = V its tail is 1e-7 on both sides where ours is nothing: the same to that precision.
    s, t = logits(1), logits(2).detach()
    theirs = trl.sdft.compute_topk_self_distillation_loss(
        s, t, distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=add_tail
    )
    ids, logp, valid = losses.topk_support(s, t, k, "student")
    same(theirs, getattr(losses, f"{kind}_topk_{way}_kl")(s, logp, ids, valid), s, tol=5e-6)


def test_sdft_floors_the_students_tail_at_1e_7_and_loses_its_gradient(trl):
    # Its tail is 1 - sum, floored; ours is summed from the logits of the tail.
    s, t = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0, 0.0]])
    theirs = trl.sdft.compute_topk_self_distillation_loss(
        s, t, distillation_topk=1, distillation_alpha=0.0, distillation_add_tail=True
    )
    ids, logp, _ = losses.topk_support(s, t, 1, "student")
    ours = losses.tail_topk_forward_kl(s, logp, ids)
    q_tail, log_p_tail = 1 - logp.exp().item(), math.log(2) - 30
    assert (ours - theirs).item() == pytest.approx(q_tail * (math.log(1e-7) - log_p_tail), rel=1e-2)
    assert gradient(theirs, s)[0, 1].abs() < 1e-6 and gradient(ours, s)[0, 1] < -0.2


@pytest.mark.parametrize("kind, add_tail", [("tail", True), ("norm", False)])
def test_server_forward_kl_is_ours_on_the_teachers_support_with_missing_entries_invalid(trl, kind, add_tail):
    # The server marks a missing entry by -inf, ours by `valid`.
    s, t = logits(1), logits(2).detach()
    ids, logp, valid = losses.topk_support(s, t, K, "teacher")
    valid[0, :, 2] = False
    labels = torch.tensor([[1, 1, -100, 1], [-100, 1, -100, -100]])
    trainer = SimpleNamespace(
        loss_add_tail=add_tail,
        _reduce_divergence_loss=trl.server.ServerDistillationTrainer._reduce_divergence_loss,
    )
    theirs = trl.server.ServerDistillationTrainer._compute_server_forward_kl_loss(
        trainer,
        {"topk_logprobs": logp.where(valid, -math.inf), "topk_token_ids": ids},
        s.log_softmax(-1),
        labels,
    )
    ours = getattr(losses, f"{kind}_topk_forward_kl")(s, logp, ids, valid)
    same(theirs, ours[labels != -100].sum() / 4, s)


@pytest.mark.parametrize("way, beta", [("forward", 0), ("reverse", 1)])
def test_server_divergence_without_tail_or_normalisation_is_the_biased_truncation(trl, way, beta):
    s, t = logits(1), logits(2).detach()
    ids, logp, valid = losses.topk_support(s, t, K, "intersection")
    theirs = trl.server._jsd_divergence(
        s.log_softmax(-1).gather(-1, ids), logp, beta, support_mask=valid
    ).sum(-1)
    same(theirs, getattr(losses, f"topk_{way}_kl")(s, logp, ids, valid), s)


@pytest.mark.parametrize("add_tail", [True, False])
def test_server_reverse_kl_is_the_tail_loss_on_the_sampled_token_alone_and_zero_without_the_tail(
    trl, add_tail
):
    s, t, y = logits(1), logits(2).detach(), torch.arange(B * T).view(B, T)
    logp = t.log_softmax(-1).gather(-1, y[..., None])
    cls = trl.server.ServerDistillationTrainer
    trainer = SimpleNamespace(
        beta=1, loss_add_tail=add_tail, _reduce_divergence_loss=cls._reduce_divergence_loss
    )
    theirs = cls._compute_sparse_top_1_divergence_loss(
        trainer, s.log_softmax(-1), y, logp[..., 0], y, logp[..., 0], labels=y
    )
    ours = losses.tail_topk_reverse_kl if add_tail else losses.norm_topk_reverse_kl
    same(theirs, ours(s, logp, y[..., None]).mean(), s)
    assert add_tail or not gradient(ours(s, logp, y[..., None]), s).any()


def sampled(seed_s=1, seed_t=2, seed_y=3):
    s, t = logits(seed_s), logits(seed_t).detach()
    y = logits(seed_y).argmax(-1)
    log_p, log_q = (z.log_softmax(-1).gather(-1, y[..., None])[..., 0] for z in (s, t))
    return s, t, y, log_p, log_q


def test_sdft_sampled_token_loss_is_policy_gradient_with_the_token_gap(trl):
    s, t, y, log_p, log_q = sampled()
    theirs = trl.sdft.compute_sampled_token_self_distillation_loss(s, t, y, distillation_alpha=1.0)
    same(theirs, losses.policy_gradient(log_p, losses.reverse_kl_advantage(log_p, log_q)), s)


def test_sdft_truncates_a_detached_ratio_where_ours_clips_as_ppo_does(trl):
    # Below the bound the two have one gradient (not one value). Above it theirs keeps the bound as a weight;
    # ours stops where the step would move further away, and keeps the whole ratio where the step comes back.
    s, t, y, log_p, log_q = sampled()
    old = (log_p + torch.linspace(-1, 1, B * T).view(B, T)).detach()
    A, ratio = losses.reverse_kl_advantage(log_p, log_q), (log_p - old).exp().detach()
    theirs = trl.sdft.compute_sampled_token_self_distillation_loss(s, t, y, distillation_alpha=1.0)
    theirs = gradient(trl.sdft.apply_importance_sampling_clipping(theirs, log_p, old, 1.2), s)
    whole, clipped = (gradient(losses.policy_gradient(log_p, A, old, clip), s) for clip in (None, 0.2))
    high = ratio > 1.2
    assert all((high & side).any() for side in (A > 0, A < 0)) and (~high).any()
    torch.testing.assert_close(theirs[~high], whole[~high])
    torch.testing.assert_close(theirs[high], gradient(-1.2 * A * log_p, s)[high])
    assert not clipped[high & (A > 0)].any()
    torch.testing.assert_close(clipped[high & (A < 0)], whole[high & (A < 0)])


@pytest.mark.parametrize("iw_gamma", [0.0, 1.0])
def test_iw_opd_is_policy_gradient_and_its_gamma_is_a_weight_not_a_discount(trl, iw_gamma):
    s, t, y, log_p, log_q = sampled()
    trainer = SimpleNamespace(temperature=1.0, iw_opd_gamma=iw_gamma, iw_opd_epsilon=1e-8)
    trainer.model, trainer._metrics = SimpleNamespace(training=True), {"train": DefaultList()}
    A = losses.reverse_kl_advantage(log_p, log_q)
    # weight: 2 for the first token of a sequence, falling to 1 as |A| is used up
    weight = 1 + iw_gamma * (1 - (A.abs().cumsum(1) - A.abs()) / A.abs().sum(1, keepdim=True))
    theirs = trl.iw_opd(trainer, s, y, labels=y, teacher_actual_logprobs=log_q)
    same(theirs, losses.policy_gradient(log_p, weight * A).mean(), s)


class DefaultList(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


# ------------------------------------------------------------------------------------------------------ Liger


def liger_loss(liger, h_s, w_s, h_t, w_t, labels, **kw):
    kw = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False, "chunk_size": 3, **kw}
    return liger.jsd(**kw)(h_s, w_s, h_t, w_t, labels)


@BETAS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger_jsd_is_jsd_with_the_same_beta_averaged_over_labelled_tokens(liger, beta, temperature):
    # Logits over temperature, the loss not times its square; the ends of beta are the pure KLs, as in TRL.
    h_s, h_t, w_s, w_t = logits(1, 8, 5), logits(2, 8, 6).detach(), logits(3, V, 5), logits(4, V, 6).detach()
    labels = torch.tensor([1, 1, -100, 1, -100, 1, -100, -100])
    theirs = liger_loss(liger, h_s, w_s, h_t, w_t, labels, beta=beta, temperature=temperature)
    ours = ours_at(beta)(h_s @ w_s.T / temperature, h_t @ w_t.T / temperature)[labels != -100].mean()
    same(theirs, ours, h_s, tol=2e-5)


def test_liger_by_default_adds_cross_entropy_and_halves_both(liger):
    h_s, h_t, w_s, w_t = logits(1, 8, 5), logits(2, 8, 6).detach(), logits(3, V, 5), logits(4, V, 6).detach()
    labels = torch.arange(8)
    theirs = liger.jsd(compiled=False)(h_s, w_s, h_t, w_t, labels)
    z = h_s @ w_s.T
    hard = torch.nn.functional.cross_entropy(z, labels)
    same(theirs, 0.5 * losses.jsd(z, h_t @ w_t.T).mean() + 0.5 * hard, h_s, tol=2e-5)


def test_liger_pads_a_smaller_student_vocabulary_with_logits_of_zero_which_take_probability(liger):
    h_s, h_t, w_s = logits(1, 8, 5), logits(2, 8, 6).detach(), logits(3, V, 5)
    w_t = logits(4, V + 2, 6).detach()
    theirs = liger_loss(liger, h_s, w_s, h_t, w_t, torch.arange(8))
    z, t = h_s @ w_s.T, h_t @ w_t.T
    same(theirs, losses.jsd(torch.nn.functional.pad(z, (0, 2)), t).mean(), h_s, tol=2e-5)
    assert (theirs - losses.jsd(z, t[:, :V]).mean()).abs() > 1e-3  # what cutting the padding off would give


def test_liger_k3_takes_the_teacher_first(liger):
    s, _, _, log_p, log_q = sampled()
    same(liger.k3(log_q, log_p), losses.k3(log_p, log_q), s)


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_liger_grpo_surrogate_with_one_token_per_row_is_our_clipped_policy_gradient(liger, clip):
    # Its advantage belongs to a whole sequence, so a sequence here is one token.
    log_p = (-logits(1, 40).abs()).detach().view(40, 1).requires_grad_()
    old = (log_p + 0.4 * logits(2, 40).view(40, 1)).detach()
    A, mask = logits(3, 40).detach(), torch.ones(40, 1)
    theirs, _ = liger.ppo(
        log_p,
        mask,
        A,
        mask,
        old_per_token_logps=old,
        epsilon_low=clip,
        epsilon_high=clip,
        beta=0.0,
        loss_type="bnpo",
    )
    same(theirs, losses.policy_gradient(log_p, A[:, None], old, clip).mean(), log_p)
