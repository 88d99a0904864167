"""What opd.sample promises: it reports the distribution that it draws from, it ends a row where the row ends,
and a completion does not depend on what else is in the batch."""

import copy
import math
import random

import pytest
import torch
from conftest import VOCAB, make_family, make_model, make_tokenizer, save
from pytest import approx

import opd

EOS = 1
STOPS = [EOS, 7, 20]  # as of a tokenizer and a generation config that differ
RAGGED = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [3], [30, EOS, 31, 31]]  # a stop id in one


@pytest.fixture(scope="module")
def model():
    return make_model(0)


def draw(model, prompts=RAGGED, n=2, stop_ids=STOPS, key=(0, 1), prompt_keys=None, length=16, **kwargs):
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    return opd.sample(model, prompts, n, stop_ids, key, keys, length, **kwargs)


def completions(rollouts):
    return [r.completion for r in rollouts]


def flat(rows):
    return torch.tensor([x for row in rows for x in row])


def logits_alone(model, ids):
    """Logits after each token of one row, by the model's own forward: no batch, padding or cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def p_value(counts, probabilities):
    """Of Pearson's chi-square test; cells that expect fewer than 5 are pooled."""
    expected = torch.as_tensor(probabilities, dtype=torch.float64) * sum(counts)
    counts, small = torch.as_tensor(counts, dtype=torch.float64), expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    used = expected > 0
    assert counts[~used].sum() == 0
    chi2 = ((counts - expected)[used] ** 2 / expected[used]).sum()
    return torch.special.gammaincc((used.sum() - 1) / 2, chi2 / 2).item()


def nucleus(logits, temperature, top_p):
    """Plain Python: the fewest tokens, best first, whose probability reaches top_p, renormalised."""
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    p = [w / math.fsum(weights) for w in weights]
    kept, mass = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass < top_p:
            kept, mass = [*kept, i], mass + p[i]
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


# ------------------------------------------------------------------------------ it reports what it draws from


@pytest.mark.parametrize(
    "n, options",
    [
        (1, {}),
        (3, {}),
        (2, dict(temperature=0.6)),
        (2, dict(temperature=1.7)),
        (2, dict(top_p=0.7)),
        (2, dict(temperature=1.3, top_p=0.9)),
        (3, dict(stop_ids=[EOS])),
        (1, dict(stop_ids=[])),
    ],
)
def test_reported_logp_is_the_scorers(model, n, options):
    rollouts = draw(model, n=n, **options)
    with torch.no_grad():
        hidden = opd.completion_hidden(model, [r.prompt for r in rollouts], completions(rollouts))
        logits = opd.project(model, hidden)
    logp = opd.sampling_logp(logits, options.get("temperature", 1.0), options.get("top_p", 1.0))
    scored = logp.gather(-1, flat(completions(rollouts))[:, None])[:, 0]
    assert [len(r.logp) for r in rollouts] == [len(r.completion) for r in rollouts]
    assert torch.allclose(flat([r.logp for r in rollouts]), scored, rtol=0, atol=3e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "mistral", "gemma2", "qwen3_moe"])
def test_reported_logp_is_that_of_each_row_alone(family):
    """Absolute positions, sliding windows, experts: left padding and cache change nothing."""
    model = make_family(family)
    for r in draw(model, n=2, stop_ids=[EOS]):
        logp = logits_alone(model, r.prompt + r.completion).log_softmax(-1)
        alone = [logp[len(r.prompt) - 1 + t, y].item() for t, y in enumerate(r.completion)]
        assert r.logp == approx(alone, abs=5e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_sampling_logp_is_the_tempered_nucleus(temperature, top_p):
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)) * 2
    found = opd.sampling_logp(logits, temperature, top_p).exp()
    for row, p in zip(logits.tolist(), found.tolist(), strict=True):
        assert p == approx(nucleus(row, temperature, top_p), abs=1e-6)


def test_the_token_that_crosses_top_p_stays():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    kept = [(opd.sampling_logp(logits, 1.0, p) > -math.inf).tolist() for p in (0.4, 0.6, 0.8)]
    assert [sum(k) for k in kept] == [1, 2, 3] and all(k[0] and (k[1] or sum(k) == 1) for k in kept)


# ------------------------------------------------------------------------------------------- where a row ends


def test_a_row_ends_at_the_first_of_several_stop_ids_and_keeps_it(model):
    rollouts = draw(model, n=60, length=12)
    assert {r.completion[-1] for r in rollouts if r.ended} == set(STOPS)
    for r in rollouts:
        assert not set(r.completion[:-1]) & set(STOPS)
        assert r.ended == (r.completion[-1] in STOPS)
        assert r.ended or len(r.completion) == 12


def test_a_stop_token_at_the_last_position_is_an_end_not_a_cut(model):
    rollouts = draw(model, n=60, length=3)
    full = [r for r in rollouts if len(r.completion) == 3]
    assert {r.ended for r in full} == {True, False}
    assert all(r.ended == (r.completion[-1] in STOPS) for r in full)


def test_one_token_is_the_least(model):
    rollouts = draw(model, n=2, length=1)
    assert [len(r.completion) for r in rollouts] == [1] * 8


def test_the_end_token_is_scored(model):
    ended = next(r for r in draw(model, n=20) if r.ended and len(r.completion) > 2)
    with torch.no_grad():
        hidden = opd.completion_hidden(model, [ended.prompt], [ended.completion])
    logp = opd.project(model, hidden).log_softmax(-1)
    assert len(logp) == len(ended.completion)
    assert logp[-1, ended.completion[-1]].item() == approx(ended.logp[-1], abs=3e-5)
    assert opd.project(model, hidden[-1:])[0].tolist() == approx(
        logits_alone(model, ended.prompt + ended.completion[:-1])[-1].tolist(), abs=3e-5
    )


def test_pad_equal_to_eos_is_harmless(model):
    twin = copy.deepcopy(model)
    twin.config.pad_token_id = twin.generation_config.pad_token_id = EOS
    assert draw(twin, n=8) == draw(model, n=8)


def test_what_is_in_the_padding_does_not_matter(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight[0] = 1e3  # of the id that fills up on the left; no row may have it
    assert draw(twin, n=4, stop_ids=[0, EOS]) == draw(model, n=4, stop_ids=[0, EOS])


def test_stop_ids_are_those_of_both_tokenizers_and_both_generation_configs(tmp_path):
    tokenizer, student, teacher = make_tokenizer(), make_model(0), make_model(1)
    student.generation_config.eos_token_id = [1, 5]
    teacher.generation_config.eos_token_id = 9
    paths = save(tmp_path / "student", student, tokenizer), save(tmp_path / "teacher", teacher, tokenizer)
    args = opd.set_up(opd.Args(data="x", device="cpu", out=str(tmp_path / "out")))[0]
    assert opd.load_pair(*paths, args, torch.device("cpu"))[3] == [1, 5, 9]


# -------------------------------------------------------------------------- the same whatever is in the batch


def reversed_order(model):
    keys = [3, 2, 1, 0]
    found = draw(model, [RAGGED[k] for k in keys], 3, prompt_keys=keys)
    return [r for k in keys for r in found[k * 3 : k * 3 + 3]]


def one_by_one(model):
    return [r for k in range(4) for r in draw(model, [RAGGED[k]], 3, prompt_keys=[k])]


def two_halves(model):  # what two ranks do
    return draw(model, RAGGED[:2], 3, prompt_keys=range(2)) + draw(
        model, RAGGED[2:], 3, prompt_keys=range(2, 4)
    )


def three_and_one(model):
    return draw(model, RAGGED[:3], 3, prompt_keys=range(3)) + draw(model, RAGGED[3:], 3, prompt_keys=[3])


def among_longer_prompts(model):
    return draw(model, [*RAGGED, [12] * 40, [9]], 3)[:12]


def of_five_samples_the_first_three(model):
    found = draw(model, n=5)
    return [r for k in range(4) for r in found[k * 5 : k * 5 + 3]]


@pytest.mark.parametrize(
    "batch",
    [
        reversed_order,
        one_by_one,
        two_halves,
        three_and_one,
        among_longer_prompts,
        of_five_samples_the_first_three,
    ],
)
def test_rollouts_do_not_depend_on(model, batch):
    expected, found = draw(model, n=3), batch(model)
    assert [(r.prompt, r.completion, r.ended) for r in found] == [
        (r.prompt, r.completion, r.ended) for r in expected
    ]
    assert flat([r.logp for r in found]).tolist() == approx(
        flat([r.logp for r in expected]).tolist(), abs=3e-5
    )


def test_a_longer_limit_only_continues_what_a_shorter_one_cut(model):
    for short, long in zip(draw(model, n=4, length=6), draw(model, n=4, length=16), strict=True):
        assert long.completion[:6] == short.completion


def test_rollouts_differ_between_samples_prompts_steps_and_seeds(model):
    twice = [[5, 6, 7]] * 2
    first = completions(draw(model, twice, n=2, stop_ids=[]))
    others = completions(draw(model, twice, n=2, stop_ids=[], key=(0, 2)))
    others += completions(draw(model, twice, n=2, stop_ids=[], key=(1, 1)))
    assert len(set(map(tuple, first + others))) == 12


# ----------------------------------------------------------------------------------------- the random numbers


def test_uniforms_are_splitmix64s():
    """The published first outputs of the generator, seed 1234567."""
    golden, known = 0x9E3779B97F4A7C15, (6457827717110365317, 3203168211198807973, 9817491932198370423)
    for i, output in enumerate(known):
        state = (1234567 + i * golden + 2**63) % 2**64 - 2**63
        assert opd.uniforms(state).item() == (output >> 11) / 2**53


KEY = (0, 1, 5, 2, 7)  # seed, step, prompt, sample, position
PARTS = ["seed", "step", "prompt", "sample", "position"]


def along(part, n):
    """The draws of n neighbouring values of one part of the key, the others fixed."""
    return opd.uniforms(*[torch.arange(n) if name == part else k for name, k in zip(PARTS, KEY, strict=True)])


@pytest.mark.parametrize("part", PARTS)
def test_uniforms_are_uniform_and_uncorrelated_along(part):
    n = 100_000
    u = along(part, n)
    assert 0 <= u.min() and u.max() < 1
    assert p_value((u * 200).long().bincount(minlength=200).tolist(), [1 / 200] * 200) > 1e-3
    steps = torch.arange(n) / n
    assert max((u.sort().values - steps).abs().max(), 1 / n) * math.sqrt(n) < 1.95  # Kolmogorov, p = 0.001
    for lag in (1, 2, 16):
        pairs = torch.stack([u[:-lag], u[lag:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(n)
    cells = (u[:-1] * 10).long() * 10 + (u[1:] * 10).long()  # neighbours fill the unit square, too
    assert p_value(cells[::2].bincount(minlength=100).tolist(), [1 / 100] * 100) > 1e-3


def test_uniforms_of_neighbours_in_different_parts_are_uncorrelated():
    draws = torch.stack([along(part, 20_000) for part in PARTS])
    off_diagonal = torch.corrcoef(draws) - torch.eye(5)
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(20_000)


def test_no_two_keys_share_a_draw():
    grids = torch.meshgrid(*[torch.arange(size) for size in (4, 6, 16, 6, 40)], indexing="ij")
    draws = opd.uniforms(*grids).flatten()
    assert len(draws.unique()) == len(draws) == 92_160
    assert opd.uniforms(0, 1) != opd.uniforms(1, 0)
    assert opd.uniforms(~0, 0, 5, 2, 7) not in draws  # evaluation's key


def test_a_draw_is_keyed_by_prompt_then_sample_then_position(monkeypatch):
    """The order is part of what makes a run reproducible: with it changed, all draws change."""
    keys, uniforms = [], opd.uniforms
    monkeypatch.setattr(opd, "uniforms", lambda *key: keys.append(key) or uniforms(*key))
    draw(make_model(0), RAGGED[:2], n=3, stop_ids=[], key=(4, 5), prompt_keys=[7, 9], length=2)
    for t, (seed, step, prompt, sample, position) in enumerate(keys):
        assert (seed, step, position) == (4, 5, t)
        assert prompt.tolist() == [7, 7, 7, 9, 9, 9] and sample.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(keys) == 2


def test_uniforms_are_the_same_for_numbers_and_tensors():
    one_by_one = [opd.uniforms(0, 1, i, 2 * i, 7).item() for i in range(6)]
    at_once = opd.uniforms(0, torch.tensor(1), torch.arange(6), torch.arange(6) * 2, 7)
    assert at_once.tolist() == one_by_one and at_once.dtype == torch.float64


# -------------------------------------------------------------------------------------- it draws what it says


@pytest.mark.parametrize(
    "options", [{}, dict(temperature=0.6), dict(top_p=0.8), dict(temperature=1.5, top_p=0.6)]
)
def test_first_tokens_come_as_often_as_they_should(options):
    model = make_model(3, scale=3.0)
    tokens = [r.completion[0] for r in draw(model, [RAGGED[1]], n=8000, length=1, **options)]
    logits = logits_alone(model, RAGGED[1])[-1].tolist()
    p = nucleus(logits, options.get("temperature", 1.0), options.get("top_p", 1.0))
    counts = [tokens.count(i) for i in range(VOCAB)]
    assert p_value(counts, p) > 1e-3
    assert not any(count for count, x in zip(counts, p, strict=True) if x == 0)


def test_sequences_come_as_often_as_they_should():
    """Joint frequencies of two tokens: positions are independent but for what the model says."""
    model = make_model(5, vocab=6, scale=2.0)
    prompt, n = [2, 3, 4], 6000
    drawn = [tuple(r.completion) for r in draw(model, [prompt], n=n, stop_ids=[], length=2)]
    first = logits_alone(model, prompt)[-1].softmax(-1)
    joint = {
        (a, b): (first[a] * logits_alone(model, [*prompt, a])[-1].softmax(-1)[b]).item()
        for a in range(6)
        for b in range(6)
    }
    assert p_value([drawn.count(pair) for pair in joint], list(joint.values())) > 1e-3
    across = [6 * drawn[i][0] + drawn[i + 1][0] for i in range(0, n - 1, 2)]  # and so are samples
    independent = (first[:, None] * first).flatten().tolist()
    assert p_value([across.count(i) for i in range(36)], independent) > 1e-3


@pytest.mark.parametrize("u, token", [(0.0, 2), (1 - 2**-53, 7)])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_tokens_of_probability_zero_are_never_drawn(model, monkeypatch, u, token, top_p):
    logits = torch.zeros(10)
    logits[[0, 1, 5, 8, 9]] = -math.inf
    monkeypatch.setattr(opd, "project", lambda model, hidden: logits.expand(len(hidden), -1))
    monkeypatch.setattr(opd, "uniforms", lambda *key: torch.full(key[-2].shape, u, dtype=torch.float64))
    rollouts = draw(model, n=3, stop_ids=[], length=4, top_p=top_p)
    assert all(r.completion == [token] * 4 for r in rollouts)
    assert rollouts[0].logp == approx([-math.log(5)] * 4)


@pytest.mark.parametrize("first", [0.0, 30.0])
def test_a_large_vocabulary_is_drawn_from_exactly(model, monkeypatch, first):
    """150,000 probabilities, or one near 1 and a tail of which float32 cannot hold the sum."""
    logits = torch.randn(150_000, generator=torch.Generator().manual_seed(0))
    logits[0], logits[-100:] = first, -math.inf
    cdf = logits.double().softmax(-1).cumsum(-1)
    after = cdf[0].item()  # all of these draws are beyond the first token
    u = torch.tensor([*(after + (1 - after) * i / 31 for i in range(1, 31)), 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(opd, "project", lambda model, hidden: logits.expand(len(hidden), -1))
    monkeypatch.setattr(opd, "uniforms", lambda *key: u)
    tokens = [r.completion[0] for r in draw(model, [[3]], n=len(u), stop_ids=[], length=1)]
    expected = torch.searchsorted(cdf, u[:-1], right=True).tolist()
    assert tokens[:-1] == approx(expected, abs=2)  # log-probabilities of -40 are rounded to 4e-6
    assert len(set(tokens)) == len(u) and tokens[-1] < 150_000 - 100


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "mistral", "gemma2"])
def test_at_a_tiny_temperature_it_is_greedy_generation(family):
    model = make_family(family)
    model.generation_config.update(eos_token_id=STOPS, pad_token_id=0)
    width = max(map(len, RAGGED))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in RAGGED])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in RAGGED])
    greedy = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    for r, row in zip(draw(model, n=1, length=24, temperature=1e-4), greedy[:, width:].tolist(), strict=True):
        assert row[: len(r.completion)] == r.completion
        assert r.ended or len(r.completion) == 24
        assert not any(row[len(r.completion) :])  # generate, too, had ended there


# ------------------------------------------------------------------------------------------- what is computed


@pytest.fixture
def forwards(model, monkeypatch):
    """Shapes of the token ids of each forward of the model's body."""
    shapes, forward = [], type(model.base_model).forward

    def recorded(self, *args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", recorded)
    return shapes


def test_rows_that_have_ended_leave_the_batch(model, forwards):
    rollouts = draw(model, n=3, length=16)
    sizes = [len(r.completion) for r in rollouts]
    assert len(set(sizes)) > 3
    alive = [sum(size > t for size in sizes) for t in range(1, 16)]
    assert forwards[1:] == [(rows, 1) for rows in alive if rows]


@pytest.mark.parametrize("n", [1, 7])
def test_a_prompt_is_prefilled_once_for_all_its_samples(model, forwards, n):
    draw(model, n=n)
    assert forwards[0] == (4, 11) and all(length == 1 for _, length in forwards[1:])


def test_no_forward_follows_the_last_token(model, forwards):
    draw(model, n=2, stop_ids=[], length=5)
    assert forwards == [(4, 11)] + [(8, 1)] * 4


def test_pad_tokens_beyond_the_vocabulary_in_use_are_never_drawn():
    model = make_model(0, vocab=VOCAB + 11)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 10 * model.lm_head.weight[:11]  # the likeliest of all
    assert max(map(max, completions(draw(model, n=4)))) >= VOCAB
    model.vocab_in_use = VOCAB
    assert max(map(max, completions(draw(model, n=8)))) < VOCAB


def test_sampling_touches_no_global_random_state(model):
    torch.manual_seed(0), random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    draw(model)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
