"""What scoring promises: the right position is scored, chunks and micro-batches change memory but no number,
and what a model does between its body and its logits is done."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    FAMILIES,
    SMALL,
    VOCAB,
    make_args,
    make_family,
    make_model,
    make_tokenizer,
    save,
    train_rows,
    write_rows,
)
from pytest import approx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import losses
import opd

EOS = 1
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [3], [30, EOS, 0, 31], [22, 23], [9] * 7]
HEAT = 1.5  # of loss and sampling: a temperature that is forgotten on one side shows


@pytest.fixture(scope="module")
def student():
    return make_model(0)


@pytest.fixture(scope="module")
def teacher():
    return make_model(1, width=48).requires_grad_(False)


@pytest.fixture(scope="module")
def rollouts(student):
    """Ragged, some ended and some cut, with behaviour log-probs a little stale, as after an update."""
    found = opd.sample(student, PROMPTS, 1, [EOS, 7, 20, 30, 31, 40], (4, 1), range(6), 14, HEAT)
    sizes = [len(r.completion) for r in found]
    assert len(set(sizes)) >= 4 and {r.ended for r in found} == {True, False}
    noise = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)).split(sizes)
    for r, x in zip(found, noise, strict=True):
        r.logp = [logp + 0.3 * y for logp, y in zip(r.logp, x.tolist(), strict=True)]
    return found


@pytest.fixture(autouse=True)
def no_gradients_left(student):
    student.zero_grad()


# ---------------------------------------------------------------------------------------------- the reference

TOPK = {
    "topk": losses.topk_reverse_kl,
    "sg_topk": losses.sg_topk_reverse_kl,
    "norm_topk": losses.norm_topk_reverse_kl,
    "tail_topk": losses.tail_topk_reverse_kl,
    "topk_forward": losses.topk_forward_kl,
    "norm_topk_forward": losses.norm_topk_forward_kl,
    "tail_topk_forward": losses.tail_topk_forward_kl,
}
KEYWORDS = {
    **{"jsd": dict(beta=0.3), "skew_forward_kl": dict(alpha=0.2), "skew_reverse_kl": dict(alpha=0.2)},
    **{"mixed_kl": dict(weight=0.2), "adaptive_kl": dict(mu=0.3)},
    "entropy_aware_kl": dict(tau=2.5, eta=0.7),
}


def all_logits(model, rollouts):
    """[B,T,V]: the model's own logits at the completion tokens, one row after another, no padding inside."""
    longest = max(len(r.completion) for r in rollouts)
    rows = []
    for r in rollouts:
        logits = model(input_ids=torch.tensor([r.prompt + r.completion])).logits[0]
        mine = logits[len(r.prompt) - 1 : -1]
        rows.append(torch.cat([mine, mine.new_zeros(longest - len(mine), mine.shape[1])]))
    return torch.stack(rows)


def reference(student, teacher, rollouts, args, name):
    """loss as the textbook has it, [B,T,V] in full -> its mean over all completion tokens; fills .grad."""
    student.zero_grad()
    longest = max(len(r.completion) for r in rollouts)
    pad = lambda rows: torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # noqa: E731
    tokens, behaviour = pad([r.completion for r in rollouts]), pad([r.logp for r in rollouts])  # [B,T]
    mask = pad([[1] * len(r.completion) for r in rollouts]).bool()  # [B,T]
    p = all_logits(student, rollouts) / args.loss_temperature  # [B,T,V]
    with torch.no_grad():
        q = all_logits(teacher, rollouts) / args.loss_temperature  # [B,T,V]
    if name in TOPK:
        topk_ids, teacher_topk_logp, valid = losses.topk_support(p, q, args.topk, args.topk_source)
        loss = TOPK[name](p, teacher_topk_logp, topk_ids, valid)
    elif name in ("k1", "k2", "k3", "pg", "sft"):
        log_p, log_q = (x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (p, q))
        if name == "pg":
            baseline = losses.reverse_kl(p, q) if args.pg_baseline == "kl" else None
            options = (mask, args.gamma, baseline, args.pg_clip_reward)
            advantage = losses.reverse_kl_advantage(log_p, log_q, *options)
            loss = losses.policy_gradient(log_p, advantage, behaviour, args.ratio_clip)
        else:
            loss = -log_p if name == "sft" else getattr(losses, name)(log_p, log_q)
    else:
        loss = getattr(losses, name)(p, q, **KEYWORDS.get(name, {}))
    loss = (loss * mask).sum() / mask.sum()
    loss.backward()
    return loss.item(), gradients(student)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def close(found, expected, rtol=2e-4):
    """All gradients alike, each relative to the largest entry of its tensor."""
    assert found.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        assert torch.allclose(found[name], expected[name], rtol=0, atol=rtol * scale + 1e-9), name


def score(student, teacher, rollouts, args, name=None, total=None):
    """opd.distill -> its metrics, as means, and the gradients it leaves."""
    student.zero_grad()
    total = total or sum(len(r.completion) for r in rollouts)
    loss = opd.SFT if name == "sft" else opd.LOSSES[name or args.loss]
    metrics, _ = opd.distill(student, teacher, rollouts, [r.prompt for r in rollouts], loss, args, total)
    means = metrics.sum(1) / total
    return dict(zip(opd.TOKEN_METRICS, means.tolist(), strict=True)), gradients(student)


def arguments(name, **kwargs):
    heat = dict(temperature=HEAT, loss_temperature=HEAT)
    name = "k1" if name == "sft" else name
    settings = dict(beta=0.3, alpha=0.2, kl_weight=0.2, mu=0.3, tau=2.5, eta=0.7)
    return make_args(loss=name, **{**settings, **heat, **kwargs})


ALL = [*opd.LOSSES, "sft"]


# ------------------------------------------------------------------------------------------- the causal shift


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "mistral", "gemma2", "qwen3_moe"])
def test_token_t_is_scored_by_the_state_before_it(family):
    """THE shift: completion token t of a prompt of P tokens is predicted at position P + t - 1."""
    model, generator = make_family(family), torch.Generator().manual_seed(0)
    sizes = [4, 1, 9, 3, 6, 2]
    completions = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in sizes]
    with torch.no_grad():
        packed = opd.completion_hidden(model, PROMPTS, completions).split(sizes)
        for prompt, completion, states in zip(PROMPTS, completions, packed, strict=True):
            alone = model.base_model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
            for t in range(len(completion)):
                assert torch.allclose(states[t], alone[len(prompt) + t - 1], rtol=1e-4, atol=1e-4)


def test_every_completion_token_is_scored_and_no_prompt_token(student, teacher, rollouts, monkeypatch):
    scored, project = [], opd.project

    def recorded(model, hidden):
        scored.append((model, len(hidden)))
        return project(model, hidden)

    monkeypatch.setattr(opd, "project", recorded)
    score(student, teacher, rollouts, arguments("reverse_kl"))
    for model in (student, teacher):
        assert sum(n for m, n in scored if m is model) == sum(len(r.completion) for r in rollouts)


def test_the_end_token_teaches(student, teacher, rollouts):
    """Without its last token a row gives another gradient: the end of a text is learnt as well."""
    ended = [r for r in rollouts if r.ended and len(r.completion) > 1]
    cut = [copy.copy(r) for r in ended]
    for r in cut:
        r.completion, r.logp = r.completion[:-1], r.logp[:-1]
    args, total = arguments("sft"), sum(len(r.completion) for r in ended)
    whole, _ = score(student, teacher, ended, args, "sft", total)
    without, _ = score(student, teacher, cut, args, "sft", total)
    hidden = opd.completion_hidden(student, [r.prompt for r in ended], [r.completion for r in ended])
    last = torch.tensor([len(r.completion) for r in ended]).cumsum(0) - 1
    logp = (opd.project(student, hidden[last]) / HEAT).log_softmax(-1)
    ends = -sum(logp[i, r.completion[-1]].item() for i, r in enumerate(ended)) / total
    assert whole["loss"] - without["loss"] == approx(ends, rel=1e-4)


def test_what_is_in_the_padding_does_not_matter(student):
    """Right padding repeats id 0: whatever its embedding is, no state of a row without it changes."""
    prompts, completions = [[5, 6, 7], [8] * 12, [3]], [[9, 1, 1], [4] * 5, [2, 1]]
    twin = copy.deepcopy(student)
    with torch.no_grad():
        twin.model.embed_tokens.weight[0] = 1e3
        before = opd.completion_hidden(student, prompts, completions)
        assert torch.equal(opd.completion_hidden(twin, prompts, completions), before)


def test_row_order_and_longer_rows_do_not_matter(student):
    prompts, completions = [[5, 6, 7], [EOS, 0, 8], [3]], [[9, 0, 1], [0, 0], [0, EOS, EOS]]
    with torch.no_grad():
        states = opd.completion_hidden(student, prompts, completions).split([3, 2, 3])
        backwards = opd.completion_hidden(student, prompts[::-1], completions[::-1]).split([3, 2, 3])
        longer = opd.completion_hidden(student, [*prompts, [7] * 30], [*completions, [2]]).split([3, 2, 3, 1])
    for i in range(3):
        assert torch.allclose(states[i], backwards[2 - i], atol=1e-5)
        assert torch.allclose(states[i], longer[i], atol=1e-5)


# ------------------------------------------------------------------------ completions that share their prompt


@pytest.fixture
def fed():
    """The shape [rows, tokens] of every scoring pass of a model that is watched."""
    shapes = []

    def watch(model):
        def note(_, args, kwargs):
            if kwargs.get("input_ids") is not None and not kwargs.get("use_cache", True):
                shapes.append((model, tuple(kwargs["input_ids"].shape)))

        handles.append(model.base_model.register_forward_pre_hook(note, with_kwargs=True))
        return shapes

    handles = []
    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture
def sharing(student, teacher, monkeypatch):
    for model in (student, teacher):
        monkeypatch.setattr(model, "shares_prompts", True, raising=False)


@pytest.fixture(scope="module")
def groups(student):
    """Ragged completions, three of each prompt."""
    found = opd.sample(student, PROMPTS[:4], 3, [EOS, 7, 20, 30, 31, 40], (4, 1), range(4), 14, HEAT)
    assert len({len(r.completion) for r in found}) >= 4 and min(len(r.completion) for r in found) == 1
    return found


SHARING = ["llama", "qwen3", "gpt2", "granite", "cohere", "mixtral", "qwen3_moe", "falcon"]


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_in_one_row_have_the_states_that_they_have_alone(family, fed):
    model, generator = make_family(family), torch.Generator().manual_seed(0)
    model.vocab_in_use = VOCAB
    model.shares_prompts = opd.can_share_prompts(model)
    assert model.shares_prompts == (family in SHARING)  # the others look back through windows
    sizes, prompts = [4, 1, 9, 3, 6, 2, 1], [PROMPTS[i] for i in (0, 0, 0, 1, 2, 2, 2)]
    completions = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in sizes]
    with torch.no_grad():
        shapes = fed(model)
        states = opd.completion_hidden(model, prompts, completions)
        assert [shape[0] for _, shape in shapes] == [3 if model.shares_prompts else 7]
        for prompt, completion, some in zip(prompts, completions, states.split(sizes), strict=True):
            alone = model.base_model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
            for t in range(len(completion)):
                assert torch.allclose(some[t], alone[len(prompt) + t - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["reverse_kl", "sg_topk", "pg", "sft"])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 12])  # 4: a prompt's completions in two micro-batches
def test_shared_prompts_give_the_reference(student, teacher, groups, sharing, fed, name, micro_batch_size):
    args = arguments(name, gamma=0.5, micro_batch_size=micro_batch_size, max_grad_norm=math.inf)
    expected_loss, expected = reference(student, teacher, groups, args, name)
    loss, prompts = opd.SFT if name == "sft" else opd.LOSSES[name], [r.prompt for r in groups]
    still, shapes = torch.optim.SGD(student.parameters(), lr=0.0), fed(student)
    row = opd.update(student, teacher, groups, prompts, loss, still, args, 1)
    assert row["loss"] == approx(expected_loss, rel=1e-5, abs=1e-6)
    close(gradients(student), expected)
    assert sum(shape[0] for _, shape in shapes) == {1: 12, 4: 6, 12: 4}[micro_batch_size]


def test_a_teacher_with_prompts_of_its_own_shares_those(student, teacher, groups, sharing, fed):
    longer = [[11, 12, 13] * (i + 1) + groups[3 * i].prompt for i in range(4) for _ in range(3)]
    theirs = [longer[3 * (i // 3)] for i in range(12)]  # one list for each three, as opsd.py has them
    args, loss = arguments("reverse_kl"), opd.LOSSES["reverse_kl"]
    apart, _ = opd.distill(student, teacher, groups, longer, loss, args, None)
    shapes = fed(teacher)
    shared, _ = opd.distill(student, teacher, groups, theirs, loss, args, None)
    assert [shape[0] for _, shape in shapes] == [4]
    assert torch.allclose(shared, apart, rtol=1e-4, atol=1e-6)


def test_equal_prompts_that_are_not_one_list_keep_their_own_rows(student, sharing):
    prompt, completions = [5, 6, 7], [[8, 9], [10], [11, 12]]
    assert opd.shared_rows(student, [prompt, prompt, [*prompt]], completions) == [[0, 1], [2]]


def test_a_row_takes_at_most_1024_completion_tokens(student, sharing):
    sizes = [1000, 24, 1, 600, 500, 2000, 3, 1021]
    rows = opd.shared_rows(student, [[5]] * len(sizes), [[8] * n for n in sizes])
    assert rows == [[0, 1], [2, 3], [4], [5], [6, 7]]


def test_rows_of_like_length_are_scored_together(student, teacher, groups, sharing, fed):
    """Sorted by all that a row holds, so that a micro-batch has little padding."""
    args, still = arguments("reverse_kl", micro_batch_size=3), torch.optim.SGD(student.parameters(), lr=0.0)
    shapes = fed(student)
    loss, prompts = opd.LOSSES["reverse_kl"], [r.prompt for r in groups]
    opd.update(student, teacher, groups, prompts, loss, still, args, 1)
    size = [
        len(groups[3 * i].prompt) + sum(len(r.completion) - 1 for r in groups[3 * i :][:3]) for i in range(4)
    ]
    assert [shape for _, shape in shapes] == [(1, n) for n in sorted(size)] and sorted(size) != size


@pytest.mark.parametrize("family, config", [
    ("mistral", dict(sliding_window=200)),
    ("gpt_neo", dict(window_size=200)),
    ("qwen3", dict(layer_types=["sliding_attention", "full_attention"], sliding_window=200)),
    ("qwen3", dict(layer_types=["full_attention", "linear_attention"])),
])  # fmt: skip
def test_models_with_windows_do_not_share_however_long_the_window(family, config):
    """A mask of our own would take its place, and in short rows no number would tell."""
    model = make_family(family, **{k: v for k, v in config.items() if k != "layer_types"})
    if "layer_types" in config:
        model.config.layer_types = config["layer_types"]
    model.vocab_in_use = VOCAB
    assert not opd.can_share_prompts(model)


def test_a_model_that_ignores_or_refuses_our_mask_does_not_share(student, monkeypatch):
    monkeypatch.setattr(student, "vocab_in_use", VOCAB, raising=False)
    forward = student.base_model.forward
    assert opd.can_share_prompts(student)

    def ignores(**inputs):
        return forward(**{name: x for name, x in inputs.items() if name != "attention_mask"})

    def refuses(attention_mask=None, **inputs):
        if attention_mask is not None:
            raise ValueError("masks of two dimensions only")
        return forward(**inputs)

    for other in (ignores, refuses):
        monkeypatch.setattr(student, "shares_prompts", False)
        monkeypatch.setattr(student.base_model, "forward", other)
        assert not opd.can_share_prompts(student)


def test_a_run_shares_its_prompts_in_both_models_and_in_evaluation(tiny, tmp_path, monkeypatch):
    calls, hidden = [], opd.completion_hidden

    def counted(model, prompts, completions):
        calls.append(
            (len(opd.shared_rows(model, prompts, completions)), len(set(map(id, prompts))), len(prompts))
        )
        return hidden(model, prompts, completions)

    monkeypatch.setattr(opd, "completion_hidden", counted)
    run = {**SMALL, **tiny, "steps": 1, "samples_per_prompt": 3, "eval_samples": 2, "eval_every": 1}
    run["micro_batch_size"] = 6
    together = opd.train(opd.Args(**{**run, "out": str(tmp_path / "together")}))
    assert all(rows == prompts for rows, prompts, _ in calls)
    assert calls.count((2, 2, 6)) == 4 and calls.count((3, 3, 6)) >= 4  # training, evaluation: both models
    calls.clear()
    monkeypatch.setattr(opd, "can_share_prompts", lambda *_: False)
    apart = opd.train(opd.Args(**{**run, "out": str(tmp_path / "apart")}))
    assert all(rows == completions for rows, _, completions in calls)
    for some, others in zip(together, apart, strict=True):
        for name in {"loss", "reverse_kl", "grad_norm", "eval_reverse_kl"} & set(some):
            assert some[name] == approx(others[name], rel=1e-4), name


# ----------------------------------------------------------------------- chunks, micro-batches, the reference


@pytest.mark.parametrize("name", ALL)
def test_chunks_of_any_size_give_the_reference(student, teacher, rollouts, name):
    expected_loss, expected = reference(student, teacher, rollouts, arguments(name), name)
    metrics = []
    for chunk_tokens in (1, 3, 7, 100_000):
        args = arguments(name, chunk_tokens=chunk_tokens)
        some, found = score(student, teacher, rollouts, args, name)
        assert some["loss"] == approx(expected_loss, rel=1e-5, abs=1e-6)
        close(found, expected)
        metrics.append(some)
    for some in metrics:
        assert some == approx(metrics[-1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("source", ["student", "teacher", "union", "intersection"])
def test_every_support_gives_the_reference(student, teacher, rollouts, source):
    args = arguments("tail_topk", topk_source=source)
    loss, expected = reference(student, teacher, rollouts, args, "tail_topk")
    some, found = score(student, teacher, rollouts, args)
    assert some["loss"] == approx(loss, rel=1e-5)
    close(found, expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_policy_gradient_that_looks_ahead_gives_the_reference(student, teacher, rollouts, gamma):
    args = arguments("pg", gamma=gamma, chunk_tokens=3)
    loss, expected = reference(student, teacher, rollouts, args, "pg")
    some, found = score(student, teacher, rollouts, args)
    assert some["loss"] == approx(loss, rel=1e-5)
    close(found, expected)


@pytest.mark.parametrize("options", [dict(pg_baseline="kl"), dict(pg_clip_reward=0.5)], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_policy_gradient_with_a_baseline_or_clipped_gaps_gives_the_reference(
    student, teacher, rollouts, gamma, options
):
    args = arguments("pg", gamma=gamma, chunk_tokens=3, **options)
    loss, expected = reference(student, teacher, rollouts, args, "pg")
    some, found = score(student, teacher, rollouts, args)
    assert some["loss"] == approx(loss, rel=1e-5)
    close(found, expected)
    plain, _ = score(student, teacher, rollouts, arguments("pg", gamma=gamma, chunk_tokens=3))
    assert some["loss"] != approx(plain["loss"], rel=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_of_any_size_are_one_batch(student, teacher, rollouts, name):
    """Rows of unequal length: a mean per micro-batch would weigh tokens unequally."""
    expected_loss, expected = reference(student, teacher, rollouts, arguments(name), name)
    loss, prompts = opd.SFT if name == "sft" else opd.LOSSES[name], [r.prompt for r in rollouts]
    still = torch.optim.SGD(student.parameters(), lr=0.0)
    for micro_batch_size in (1, 2, 4, 6):
        args = arguments(name, micro_batch_size=micro_batch_size, max_grad_norm=math.inf)
        row = opd.update(student, teacher, rollouts, prompts, loss, still, args, 1)
        close(gradients(student), expected)
        assert row["loss"] == approx(expected_loss, rel=1e-5, abs=1e-6)
        assert row["tokens"] == sum(len(r.completion) for r in rollouts)
        norm = math.sqrt(sum(g.square().sum().item() for g in expected.values()))
        assert row["grad_norm"] == approx(norm, rel=1e-4)


def test_gradients_above_the_norm_are_scaled_to_it(student, teacher, rollouts):
    _, expected = reference(student, teacher, rollouts, arguments("reverse_kl"), "reverse_kl")
    norm = math.sqrt(sum(g.square().sum().item() for g in expected.values()))
    args, still = (
        arguments("reverse_kl", max_grad_norm=norm / 4),
        torch.optim.SGD(student.parameters(), lr=0.0),
    )
    row = opd.update(
        student, teacher, rollouts, [r.prompt for r in rollouts], opd.LOSSES["reverse_kl"], still, args, 1
    )
    assert row["grad_norm"] == approx(norm, rel=1e-4)  # as it was before
    close(gradients(student), {name: g / 4 for name, g in expected.items()})


def test_an_update_forgets_the_gradients_of_the_one_before(student, teacher, rollouts):
    args, still = arguments("reverse_kl"), torch.optim.SGD(student.parameters(), lr=0.0)
    inputs = (
        student,
        teacher,
        rollouts,
        [r.prompt for r in rollouts],
        opd.LOSSES["reverse_kl"],
        still,
        args,
        1,
    )
    assert opd.update(*inputs)["grad_norm"] == approx(opd.update(*inputs)["grad_norm"])


def test_the_teacher_reads_its_own_prompt(student, teacher, rollouts):
    """Prompts of other lengths for the teacher (privileged information) score the same completion tokens."""
    longer = [[11, 12, 13] * (i + 1) + r.prompt for i, r in enumerate(rollouts)]
    args, total = arguments("reverse_kl", loss_temperature=1.0), sum(len(r.completion) for r in rollouts)
    metrics, _ = opd.distill(student, teacher, rollouts, longer, opd.LOSSES["reverse_kl"], args, None)
    expected = 0.0
    with torch.no_grad():
        for r, prompt in zip(rollouts, longer, strict=True):
            read = SimpleNamespace(prompt=prompt, completion=r.completion)
            expected += losses.reverse_kl(all_logits(student, [r]), all_logits(teacher, [read])).sum().item()
    assert metrics[0].sum().item() == approx(expected, rel=1e-5)
    assert metrics[0].sum().item() != approx(
        total * score(student, teacher, rollouts, args)[0]["loss"], rel=0.01
    )


def test_measuring_leaves_no_gradient(student, teacher, rollouts):
    student.zero_grad()
    args, prompts = arguments("reverse_kl"), [r.prompt for r in rollouts]
    metrics, _ = opd.distill(student, teacher, rollouts, prompts, opd.LOSSES["reverse_kl"], args, None)
    assert all(p.grad is None for p in student.parameters())
    expected, _ = score(student, teacher, rollouts, args)
    total = sum(len(r.completion) for r in rollouts)
    means = (metrics.sum(1) / total).tolist()
    assert dict(zip(opd.TOKEN_METRICS, means, strict=True)) == approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("source", ["student", "teacher", "union", "intersection"])
def test_metrics_equal_a_float64_computation(student, teacher, rollouts, source):
    """Exact, at temperature 1 and over the full vocabulary, whatever the loss is."""
    found, _ = score(student, teacher, rollouts, arguments("sg_topk", topk_source=source))
    k, total, sums = SMALL["topk"], 0, {}
    with torch.no_grad():
        student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
        for r in rollouts:
            logp, logq = (all_logits(m, [r])[0].log_softmax(-1).tolist() for m in (student, teacher))
            for log_p, log_q, y in zip(logp, logq, r.completion, strict=True):
                best_p, best_q = (set(sorted(range(VOCAB), key=lambda v: -x[v])[:k]) for x in (log_p, log_q))
                support = dict(student=best_p, teacher=best_q, union=best_p | best_q)
                support["intersection"] = best_p & best_q
                here = dict(
                    reverse_kl=sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)),
                    forward_kl=sum(math.exp(b) * (b - a) for a, b in zip(log_p, log_q, strict=True)),
                    student_entropy=-sum(math.exp(a) * a for a in log_p),
                    teacher_entropy=-sum(math.exp(b) * b for b in log_q),
                    student_mass=sum(math.exp(log_p[v]) for v in support[source]),
                    teacher_mass=sum(math.exp(log_q[v]) for v in support[source]),
                    student_logp=log_p[y],
                    teacher_logp=log_q[y],
                    overlap=len(best_p & best_q) / k,
                )
                total, sums = total + 1, {name: sums.get(name, 0) + x for name, x in here.items()}
    del found["loss"]
    assert found == approx({name: x / total for name, x in sums.items()}, rel=1e-4, abs=1e-6)


ROW = (
    "step loss reverse_kl forward_kl student_entropy teacher_entropy student_mass teacher_mass overlap "
    "grad_norm lr completion_len truncated repetition tokens tokens_per_s sample_s teacher_s student_s "
    "peak_mem_gb"
).split()
EVALUATION = "eval_accuracy eval_pass eval_reverse_kl eval_len".split()
EVALUATION += [f"eval_reverse_kl_{part}" for part in ("first", "middle", "last")]


def test_every_row_of_the_log_has_every_metric(tiny, tmp_path):
    args = {**SMALL, **tiny, "steps": 3, "eval_every": 2, "out": str(tmp_path)}
    opd.train(opd.Args(**args))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert set(rows[0]) == {"step", *EVALUATION}
    for row in rows[1:]:
        assert set(ROW) <= set(row) and all(math.isfinite(x) for x in row.values())
        assert all((name in row) == (row["step"] != 1) for name in EVALUATION)
        assert row["tokens"] == row["completion_len"] * SMALL["batch_size"]
        assert row["tokens_per_s"] > 0 and row["peak_mem_gb"] > 0


# ------------------------------------------------------------------------------ from the last state to logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_project_gives_the_models_own_logits(family, tied):
    model, ids = make_family(family, tied=tied), torch.tensor([PROMPTS[1]])
    model.vocab_in_use = VOCAB
    with torch.no_grad():
        own, hidden = model(input_ids=ids).logits[0], model.base_model(input_ids=ids).last_hidden_state[0]
        plain = model.get_output_embeddings()(hidden)
        assert torch.allclose(opd.project(model, hidden), own, rtol=1e-5, atol=1e-5)
    assert torch.allclose(plain, own, atol=1e-3) == (family not in ("gemma2", "granite", "cohere"))
    opd.check_model(model, VOCAB)
    assert torch.equal(model(input_ids=ids).logits[0], own)  # the body is back in its place


def test_a_model_whose_logits_are_not_made_from_its_last_state_is_refused():
    class Biased(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            if input_ids is not None:  # an n-gram model mixed in, say
                output.logits = output.logits + torch.nn.functional.one_hot(input_ids, VOCAB)
            return output

    model = Biased(make_model(0).config)
    with pytest.raises(opd.UserError, match="Biased .* more than hidden states"):
        opd.check_model(model, VOCAB)


def test_padded_vocabularies_change_nothing(tiny, tmp_path):
    """Five rows too many in the student, eleven in the teacher, all of them likelier than any token."""

    def padded(model, rows):
        wide = make_model(0, vocab=VOCAB + rows, width=model.config.hidden_size)
        weights = model.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], 10 * weights[name][:rows] + 1])
        wide.load_state_dict(weights)
        return wide

    models = make_model(0), make_model(1, width=48)
    for seed, (name, rows) in enumerate([("student", 5), ("teacher", 11)]):
        save(tmp_path / name, padded(models[seed], rows), make_tokenizer())
    wide = {name: str(tmp_path / name) for name in ("student", "teacher")}
    for loss in ("reverse_kl", "sg_topk", "pg"):
        runs = []
        for flags in (tiny, {**tiny, **wide}):
            runs.append(train_rows(tmp_path / f"{loss}{len(runs)}", flags, loss=loss, steps=2))
        for cut, uncut in zip(*runs, strict=True):
            for name in ROW[:14]:
                assert uncut[name] == approx(cut[name], rel=1e-3, abs=1e-5), name
            assert uncut["tokens"] == cut["tokens"]


def padding_with(token, tiny, folder):
    """The tiny pair again, with this pad token in tokenizers and configs."""
    paths = {}
    for name in ("student", "teacher"):
        model = LlamaForCausalLM.from_pretrained(tiny[name])
        tokenizer = make_tokenizer(pad=token)
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        paths[name] = save(folder / str(token) / name, model, tokenizer)
    return paths


def test_pad_token_equal_to_eos_changes_nothing(tiny, tmp_path):
    """Masks come from lengths: padding with the end token or with nothing is the same run."""
    runs = [
        train_rows(
            tmp_path / f"out_{token}", tiny, padding_with(token, tiny, tmp_path), steps=3, batch_size=8
        )
        for token in (None, "$")
    ]
    assert min(row["truncated"] for row in runs[0]) < 1  # some row has ended
    for plain, same in zip(*runs, strict=True):
        assert {name: same[name] for name in ROW[:14]} == {name: plain[name] for name in ROW[:14]}


def test_the_pad_token_learns_where_it_is_read(tiny, tmp_path):
    """A pad token equal to the end token stands between the turns of a chat: a weight like others."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"^{i}$1+{i}="} for i in range(4)])
    paths = padding_with("$", tiny, tmp_path)
    train_rows(tmp_path / "out", tiny, paths, data=data, steps=1)
    before, after = (
        LlamaForCausalLM.from_pretrained(path).model.embed_tokens.weight[EOS]
        for path in (paths["student"], tmp_path / "out" / "final")
    )
    assert not torch.equal(before, after)


# ----------------------------------------------------------------------------------- precision, memory, modes


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_trains_two_steps_with_finite_numbers(tiny, tmp_path, tied):
    paths = {}
    for seed, name in enumerate(["student", "teacher"]):
        paths[name] = save(tmp_path / name, make_family("llama", seed, tied), make_tokenizer())
    for row in train_rows(tmp_path / "out", tiny, paths, steps=2, dtype="bfloat16"):
        assert all(math.isfinite(x) for x in row.values())
        assert row["reverse_kl"] > 0 and row["forward_kl"] > 0


def test_bfloat16_projects_in_float32(student, teacher, rollouts, monkeypatch):
    """Student = teacher up to a hair: with logits of 8 bits the KLs would be noise of either sign."""
    near = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        near.lm_head.weight.add_(1e-4 * torch.randn(near.lm_head.weight.shape))
    made, project = [], opd.project

    def recorded(model, hidden):
        made.append((model, hidden.detach().float(), project(model, hidden)))
        return made[-1][2]

    monkeypatch.setattr(opd, "project", recorded)
    args = arguments("reverse_kl", dtype="bfloat16", loss_temperature=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        metrics, _ = score(student, near, rollouts, args)
    for model, hidden, logits in made:
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, hidden @ model.lm_head.weight.T, rtol=1e-5, atol=1e-5)
    assert 0 <= metrics["reverse_kl"] < 1e-5 and 0 <= metrics["forward_kl"] < 1e-5


@pytest.mark.parametrize("name", ["reverse_kl", "sg_topk", "tail_topk_forward", "k3", "pg"])
def test_no_more_logits_exist_than_those_of_a_chunk(name):
    """The largest tensor of a whole forward and backward, in numbers."""
    vocab, chunk, length = 3000, 4, 40
    student, teacher = (make_model(seed, vocab=vocab, layers=1, width=16) for seed in (0, 1))
    row = opd.Rollout([5, 6, 7], list(range(8, 8 + length)), [-5.0] * length, False)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    args = make_args(loss=name, chunk_tokens=chunk, gamma=1.0)
    with Watch():
        score(student, teacher, [row, row], args)
    weights = student.lm_head.weight.numel()
    assert largest == max(weights, chunk * vocab) < length * vocab / 2


@pytest.mark.parametrize("name", ["reverse_kl", "topk", "k2", "pg"])
def test_project_never_sees_more_than_a_chunk(student, teacher, rollouts, name, monkeypatch):
    shapes, project = [], opd.project

    def recorded(model, hidden):
        shapes.append(tuple(project(model, hidden).shape))
        return project(model, hidden)

    monkeypatch.setattr(opd, "project", recorded)
    score(student, teacher, rollouts, arguments(name, chunk_tokens=5))
    assert max(shapes) == (5, VOCAB)


def test_gradient_checkpointing_changes_no_gradient(student, teacher, rollouts, monkeypatch):
    plain, checkpointed = copy.deepcopy(student), copy.deepcopy(student)
    args = arguments("reverse_kl", gradient_checkpointing=True)
    layers, mlp = [], type(student.model.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: (layers.append(0), forward(self, x))[1])
    metrics, expected = score(plain, teacher, rollouts, arguments("reverse_kl"))
    once = len(layers)
    some, found = score(checkpointed, teacher, rollouts, args)
    assert len(layers) == 2 * once + 2  # two layers of the student ran again
    assert some == metrics
    close(found, expected, rtol=1e-6)
    assert not any(module.training for module in checkpointed.modules())
    assert not any("forward" in vars(module) for module in checkpointed.modules())  # wrapped for this alone


def test_gradient_checkpointing_still_samples_with_a_cache(student, teacher, rollouts, monkeypatch):
    model = copy.deepcopy(student)
    args = arguments("reverse_kl", gradient_checkpointing=True)
    score(model, teacher, rollouts, args)
    lengths, body = [], type(model.model)
    forward = body.forward
    monkeypatch.setattr(
        body, "forward", lambda self, **k: (lengths.append(k["input_ids"].shape[1]), forward(self, **k))[1]
    )
    again = opd.sample(model, PROMPTS, 1, [EOS], (4, 1), range(6), 14, HEAT)
    assert lengths[0] == 11 and set(lengths[1:]) == {1}
    assert again == opd.sample(student, PROMPTS, 1, [EOS], (4, 1), range(6), 14, HEAT)


DROPOUT = {
    "llama": dict(attention_dropout=0.5),
    "gpt2": dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "falcon": dict(hidden_dropout=0.5, attention_dropout=0.5),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_in_a_config_is_never_active(tiny, tmp_path, family, checkpointing):
    runs = []
    for name, config in [("without", {}), ("with", DROPOUT[family])]:
        path = save(tmp_path / name, make_family(family, **config), make_tokenizer())
        recompute = dict(gradient_checkpointing=checkpointing)
        rows = train_rows(tmp_path / f"out_{name}", tiny, recompute, student=path, steps=2)
        runs.append([[row[metric] for metric in ROW[:14]] for row in rows])
    assert runs[0] == runs[1]


# -------------------------------------------------------------------------------------------- policy gradient


@pytest.fixture
def policy_gradient_calls(monkeypatch):
    """What losses.policy_gradient was given: lists of (student_logp, advantage, behaviour_logp, clip)."""
    calls, policy_gradient = [], losses.policy_gradient

    def recorded(*inputs):
        calls.append([x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs])
        return policy_gradient(*inputs)

    monkeypatch.setattr(losses, "policy_gradient", recorded)
    return calls


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_advantages_sum_what_follows_in_the_same_row(
    student, teacher, rollouts, policy_gradient_calls, gamma
):
    """A_t = sum over s >= t of gamma^(s-t) (log q - log p): with gamma 0 the token's own gap alone."""
    score(student, teacher, rollouts, arguments("pg", gamma=gamma, chunk_tokens=5))
    found = torch.cat([advantage for _, advantage, _, _ in policy_gradient_calls]).tolist()
    expected = []
    for r in rollouts:
        log_p, log_q = ((all_logits(m, [r])[0] / HEAT).log_softmax(-1) for m in (student, teacher))
        gap = [(log_q[t, y] - log_p[t, y]).item() for t, y in enumerate(r.completion)]
        expected += [sum(gamma ** (s - t) * gap[s] for s in range(t, len(gap))) for t in range(len(gap))]
    assert found == approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_update_on_the_same_rollouts_weighs_by_clipped_ratios(
    tiny, tmp_path, policy_gradient_calls, dtype
):
    one_pass = dict(micro_batch_size=4, chunk_tokens=1000, updates_per_rollout=2, dtype=dtype, ratio_clip=0.1)
    train_rows(tmp_path, tiny, one_pass, loss="pg", steps=1, lr=0.02, warmup_steps=0)
    (first_logp, _, drawn, clip), (second_logp, _, drawn_again, _) = policy_gradient_calls
    assert clip == 0.1
    assert torch.allclose(first_logp, drawn, atol=1e-4 if dtype == "float32" else 0.05)  # still on policy
    assert torch.equal(drawn, drawn_again)
    ratio = (second_logp - drawn_again).exp()
    assert (ratio < 0.9).any() and (ratio > 1.1).any()


def test_a_second_update_sees_the_weights_that_the_first_one_left(
    tiny, tmp_path, policy_gradient_calls, monkeypatch
):
    """Autocast keeps its bfloat16 copies of the weights until it is left: the body must not stay behind."""
    scored, update = [], opd.update

    def recorded(student, teacher, rollouts, *rest):
        fresh = copy.deepcopy(student)  # of which no copy is kept
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
            logp = opd.project(fresh, opd.completion_hidden(fresh, prompts, completions)).log_softmax(-1)
        tokens = torch.tensor([y for completion in completions for y in completion])
        scored.append(logp.gather(-1, tokens[:, None])[:, 0])
        return update(student, teacher, rollouts, *rest)

    monkeypatch.setattr(opd, "update", recorded)
    run = dict(micro_batch_size=4, chunk_tokens=1000, updates_per_rollout=2, dtype="bfloat16", steps=1)
    train_rows(tmp_path, tiny, run, loss="pg", lr=0.02, warmup_steps=0)
    used = [student_logp for student_logp, *_ in policy_gradient_calls]
    assert len(scored) == len(used) == 2 and not torch.allclose(scored[0], scored[1], atol=0.1)
    for mine, theirs in zip(scored, used, strict=True):  # a micro-batch is sorted by length
        assert torch.allclose(mine.sort().values, theirs.sort().values, atol=1e-3)
