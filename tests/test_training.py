"""What a run promises: every loss trains, whose samples they are, what an evaluation says, the order of the
data, and that a run that was cut anywhere ends bit for bit where the uncut one does."""

import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import (
    PROMPTS,
    ROOT,
    SMALL,
    VOCAB,
    flags,
    make_args,
    make_model,
    make_tokenizer,
    save,
    train_rows,
    write_rows,
)
from pytest import approx
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import losses
import opd

TIMES = {"tokens_per_s", "sample_s", "teacher_s", "student_s", "peak_mem_gb"}


def numbers(rows):
    """Rows without what differs between two runs of the same thing."""
    return [{name: x for name, x in row.items() if name not in TIMES} for row in rows]


def logged(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def samples(monkeypatch):
    """Every call of opd.sample in a run: (model, prompts, n, key, rollouts)."""
    calls, sample = [], opd.sample

    def recorded(model, prompts, n, stop_ids, key, *rest):
        calls.append((model, prompts, n, key, sample(model, prompts, n, stop_ids, key, *rest)))
        return calls[-1][-1]

    monkeypatch.setattr(opd, "sample", recorded)
    return calls


def writers(calls):
    return ["student" if model.config.hidden_size == 32 else "teacher" for model, *_ in calls]


# ----------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("loss", opd.LOSSES)
def test_every_loss_trains(tiny, tmp_path, loss):
    rows = train_rows(tmp_path, tiny, loss=loss, steps=2)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert all(row["grad_norm"] > 0 for row in rows)
    assert not same_weights(tiny["student"], tmp_path / "final")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """A teacher that a student can come close to in seconds, and what both start from."""
    folder = tmp_path_factory.mktemp("lesson")
    rows = [{"prompt": p, "answer": ""} for p in PROMPTS]
    return {
        "student": save(folder / "student", make_model(0, layers=1, scale=4.0), make_tokenizer()),
        "teacher": save(folder / "teacher", make_model(1, layers=1, scale=4.0), make_tokenizer()),
        "data": write_rows(folder / "train.jsonl", rows[4:]),
        "eval_data": write_rows(folder / "eval.jsonl", rows[:4]),
    }


@pytest.mark.parametrize(
    "loss, flags, left",
    [
        *[(name, {}, 0.6) for name, (family, _) in opd.LOSSES.items() if family == "full"],
        ("sg_topk", dict(topk=20), 0.6),
        ("tail_topk", dict(topk=20), 0.6),
        ("tail_topk_forward", dict(topk=20), 0.6),
        ("k2", {}, 0.9),
        ("k3", {}, 0.9),
        ("pg", {}, 0.9),
        ("pg", dict(updates_per_rollout=2), 0.9),
    ],
)
def test_the_held_out_kl_falls(lesson, tmp_path, loss, flags, left):
    size = dict(batch_size=12, micro_batch_size=12, max_new_tokens=8, chunk_tokens=1000, steps=12, lr=1e-2)
    args = {**SMALL, **lesson, **size, "loss": loss, "out": str(tmp_path), **flags}
    rows = opd.train(opd.Args(**args))
    assert rows[-1]["eval_reverse_kl"] < left * rows[0]["eval_reverse_kl"]


@pytest.mark.parametrize("name", ["topk", "sg_topk", "norm_topk", "tail_topk"])
@pytest.mark.parametrize("direction", ["", "_forward"])
def test_the_whole_vocabulary_as_support_is_the_full_loss(tiny, tmp_path, name, direction):
    if name == "sg_topk" and direction:
        return
    twin = "forward_kl" if direction else "reverse_kl"
    full = train_rows(tmp_path / "full", tiny, loss=twin, steps=2, topk=VOCAB)
    topk = train_rows(tmp_path / "topk", tiny, loss=name + direction, steps=2, topk=VOCAB)
    for a, b in zip(numbers(full), numbers(topk), strict=True):
        assert a == approx(b, rel=1e-3, abs=1e-6)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tiny, tmp_path):
    same = dict(teacher=tiny["student"], steps=3, temperature=1.3, loss_temperature=1.3)
    rows = train_rows(tmp_path / "sg_topk", tiny, same, loss="sg_topk")
    assert [(row["grad_norm"], row["reverse_kl"]) for row in rows] == [(0, 0)] * 3
    assert same_weights(tiny["student"], tmp_path / "sg_topk" / "final")
    for loss in ("reverse_kl", "forward_kl", "jsd", "tail_topk", "norm_topk", "k2", "pg"):
        first = train_rows(tmp_path / loss, tiny, same, loss=loss, steps=1)[0]
        assert first["grad_norm"] < 1e-5 and abs(first["loss"]) < 1e-6


def test_but_the_biased_topk_loss_drives_it_away(tiny, tmp_path):
    rows = train_rows(tmp_path, tiny, loss="topk", teacher=tiny["student"], steps=4)
    assert rows[0]["reverse_kl"] == approx(0, abs=1e-6) and rows[0]["grad_norm"] > 0.1
    kl, loss, mass = ([row[name] for row in rows] for name in ("reverse_kl", "loss", "student_mass"))
    assert kl == sorted(kl) and kl[-1] > 1e-3
    assert loss[-1] < loss[0] and mass[-1] < mass[0]


def test_both_sides_are_divided_by_the_loss_temperature(tiny, tmp_path):
    """Equal models stay equal at any temperature: with one side alone divided there would be a gradient."""
    rows = train_rows(tmp_path, tiny, teacher=tiny["student"], loss="sg_topk", loss_temperature=3.0, steps=1)
    assert rows[0]["grad_norm"] == 0


def test_numbers_that_are_not_finite_stop_the_run_before_the_update(tiny, tmp_path):
    with pytest.raises(opd.UserError, match="step 2: .* not finite"):
        train_rows(tmp_path, tiny, loss="reverse_kl", lr=1e30, warmup_steps=0, save_every=1, weight_decay=1e9)
    assert [folder.name for folder in opd.checkpoints(tmp_path)] == ["step_000001"]
    assert not (tmp_path / "final").exists()


# ---------------------------------------------------------------------------------------------- whose samples


def test_lmbda_says_who_writes(tiny, tmp_path, samples):
    run = dict(loss="reverse_kl", steps=12, batch_size=1, max_new_tokens=2)

    def who(name, **kwargs):
        samples.clear()
        train_rows(tmp_path / name, tiny, run, **kwargs)
        return writers(samples)

    assert who("all", lmbda=1.0) == ["student"] * 12
    assert who("none", lmbda=0.0) == ["teacher"] * 12
    half = who("half", lmbda=0.5)
    assert 2 <= half.count("teacher") <= 10
    assert who("again", lmbda=0.5) == half
    assert who("seed", lmbda=0.5, seed=1) != half
    fewer = who("fewer", lmbda=0.2)
    assert all(b == "teacher" for a, b in zip(half, fewer, strict=True) if a == "teacher")


def test_sft_steps_are_cross_entropy_on_teacher_samples_and_then_the_loss_switches(tiny, tmp_path, samples):
    rows = train_rows(tmp_path, tiny, loss="reverse_kl", sft_steps=2, steps=4, topk=7)
    assert writers(samples) == ["teacher", "teacher", "student", "student"]
    model, total, count = AutoModelForCausalLM.from_pretrained(tiny["student"]), 0.0, 0
    for r in samples[0][-1]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([r.prompt + r.completion])).logits[
                0, len(r.prompt) - 1 : -1
            ]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(r.completion), reduction="sum").item()
        count += len(r.completion)
    assert rows[0]["loss"] == approx(total / count, rel=1e-5)
    for row in rows[:2]:
        assert row["loss"] == approx(-row["student_logp"], rel=1e-5)
    for row in rows[2:]:
        assert row["loss"] == approx(row["reverse_kl"], rel=1e-5)


def test_sampled_log_probs_are_those_of_the_loss_on_policy(tiny, tmp_path, samples):
    row = train_rows(tmp_path, tiny, loss="k1", steps=1)[0]
    drawn = [x for r in samples[0][-1] for x in r.logp]
    assert row["student_logp"] == approx(sum(drawn) / len(drawn), rel=1e-4)
    assert row["loss"] == approx(row["student_logp"] - row["teacher_logp"], rel=1e-4)


def test_rollout_metrics_describe_the_rollouts(tiny, tmp_path, samples):
    row = train_rows(tmp_path, tiny, steps=1, samples_per_prompt=5, max_new_tokens=20)[0]
    model, prompts, n, key, rollouts = samples[0]
    assert len(prompts) == 4 and n == 5 and len(rollouts) == 20
    sizes = [len(r.completion) for r in rollouts]
    assert row["tokens"] == sum(sizes) and row["completion_len"] == approx(sum(sizes) / 20)
    assert row["truncated"] == approx(sum(not r.ended for r in rollouts) / 20)
    assert row["repetition"] == approx(sum(opd.repetition(r.completion) for r in rollouts) / 20)


# --------------------------------------------------------------------------------------------------- evaluate


@pytest.fixture
def evaluation(monkeypatch):
    """opd.evaluate of given texts: texts[i] are the n completions of prompt i."""
    student, teacher, tokenizer = make_model(0), make_model(1), make_tokenizer()

    def evaluate(texts, answers, **kwargs):
        prompts = [tokenizer(f"^{i}=").input_ids for i in range(len(texts))]
        rows = {
            tuple(p): [tokenizer(t).input_ids for t in some] for p, some in zip(prompts, texts, strict=True)
        }
        args = make_args(eval_samples=len(texts[0]), **kwargs)
        rollouts = [opd.Rollout(p, y, [0.0] * len(y), True) for p in prompts for y in rows[tuple(p)]]
        monkeypatch.setattr(
            opd,
            "sample",
            lambda model, asked, *_: [r for p in asked for r in rollouts if r.prompt == p],
        )
        examples = [opd.Example(p, p, answer) for p, answer in zip(prompts, answers, strict=True)]
        scores, _ = opd.evaluate(student, teacher, examples, tokenizer, [1], args)
        return scores, (student, teacher, rollouts)

    return evaluate


def test_accuracy_is_the_mean_over_samples_and_pass_needs_one(evaluation):
    texts = [["46$", "so 46$", "47$", "46"], ["1$", "2$", "3$", "4$"], ["x$", "7", "8", "9$"]]
    scores, _ = evaluation(texts, ["46", "5", "9"])
    assert scores["eval_accuracy"] == approx((3 / 4 + 0 + 1 / 4) / 3)
    assert scores["eval_pass"] == approx(2 / 3)
    assert scores["eval_len"] == approx(sum(len(t) for some in texts for t in some) / 12)


def test_rows_without_an_answer_count_for_kl_and_length_only(evaluation):
    texts = [["46$", "6$"], ["abcdef$", "abc$"], ["9$", "9$"]]
    scores, (student, teacher, rollouts) = evaluation(texts, ["46", "", "9"], batch_size=2)
    assert scores["eval_accuracy"] == approx(3 / 4) and scores["eval_pass"] == 1
    kl, tokens = 0.0, 0
    for r in rollouts:
        ids = torch.tensor([r.prompt + r.completion])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, len(r.prompt) - 1 : -1] for m in (student, teacher))
        kl, tokens = kl + losses.reverse_kl(p, q).sum().item(), tokens + len(r.completion)
    assert scores["eval_reverse_kl"] == approx(kl / tokens, rel=1e-5)
    assert scores["eval_len"] == approx(tokens / 6)


def test_without_any_answer_there_is_no_accuracy(evaluation):
    scores, _ = evaluation([["1$"], ["2$"]], ["", ""])
    thirds = {f"eval_reverse_kl_{name}" for name in ("first", "middle")}  # of completions of two tokens
    assert set(scores) == {"eval_reverse_kl", "eval_len", *thirds}


def test_evaluations_draw_the_same_numbers_each_time(tiny, tmp_path, samples):
    args = {
        **SMALL,
        **tiny,
        "steps": 3,
        "lr": 1e-30,
        "eval_every": 1,
        "eval_samples": 3,
        "out": str(tmp_path),
    }
    rows = opd.train(opd.Args(**args))
    scores = [{name: x for name, x in row.items() if name.startswith("eval_")} for row in rows]
    assert len(scores) == 4 and scores[0] == scores[1] == scores[2] == scores[3]
    drawn = [tuple(r.completion) for _, _, _, key, rollouts in samples if key[0] < 0 for r in rollouts]
    assert drawn == drawn[:12] * 4  # 4 prompts, 3 samples, 4 evaluations
    assert len(set(drawn)) > 6


@pytest.mark.parametrize(
    "batch_size,samples_per_prompt,micro_batch_size,prompts",
    [(1, 1, 4, [2, 2]), (4, 2, 2, [4]), (1, 1, 1, [1] * 4), (4, 1, 1, [2, 2])],
)
def test_an_evaluation_samples_as_many_rows_at_once_as_training_scores_or_samples(
    batch_size, samples_per_prompt, micro_batch_size, prompts, tiny, tmp_path, samples
):
    """Two completions of each of 4 prompts; one prompt is the least."""
    sizes = dict(batch_size=batch_size, samples_per_prompt=samples_per_prompt)
    sizes |= dict(micro_batch_size=micro_batch_size, eval_samples=2, eval_every=1, steps=1)
    opd.train(opd.Args(**{**SMALL, **tiny, **sizes, "out": str(tmp_path)}))
    assert [len(asked) for _, asked, n, key, _ in samples if key[0] < 0] == prompts * 2


def test_an_answer_may_be_the_number_zero(tiny, tmp_path):
    data = write_rows(
        tmp_path / "eval.jsonl", [{"prompt": "^1=", "answer": 0}, {"prompt": "^2=", "answer": 0}]
    )
    rows = opd.train(
        opd.Args(**{**SMALL, **tiny, "eval_data": data, "steps": 1, "out": str(tmp_path / "out")})
    )
    assert "eval_accuracy" in rows[0]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("", None),
        ("no number here", None),
        ("first 3, then 4", "4"),
        ("it is -7.", "-7"),
        ("1,024.5 in all", "1,024.5"),
        ("#### 12", "12"),
        ("7 #### 12 #### 13 apples", "13 apples"),
        ("#### Step 3: add\n17 + 25 = **42**", "42"),  # a heading in Markdown
        ("#### 12\n\nHope this helps!", "12"),
        (r"\boxed{42}", "42"),
        (r"\boxed{1} or rather \boxed{ 2 }, 3", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} #### 5", r"\frac{1}{\sqrt{2}}"),
        (r"cut off: \boxed{4", "4"),
    ],
)
def test_extract_answer(text, answer):
    assert opd.extract_answer(text) == answer


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        ("46", "46", True),
        ("46", "47", False),
        ("it is 46.0", "46", True),
        ("$1,024.0", "1024", True),
        ("1024", "$1,024", True),
        ("-7", "7", False),
        ("-7.50", "-7.5", True),
        ("0.5", ".5", True),
        ("", "46", False),
        ("no idea", "46", False),
        ("46 then 47", "46", False),
        (r"so \boxed{46}, from 45 + 1", "46", True),
        ("#### 46", "thus 46 #### 46", True),
        (r"\boxed{Paris.}", "paris", True),
        (r"\boxed{London}", "paris", False),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),  # an answer that holds numbers and is none
        ("it is 2", r"\frac{1}{2}", False),
        (r"\boxed{x+1}", "x+1", True),
        (r"\boxed{1}", "x+1", False),
    ],
)
def test_is_correct(completion, answer, right):
    assert opd.is_correct(completion, answer) == right


# ---------------------------------------------------------------------------------- data, learning rate, seed


def test_every_epoch_is_a_permutation_of_the_data():
    epochs = [[opd.row_at(epoch * 7 + i, 7, seed=3) for i in range(7)] for epoch in range(5)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert len(set(map(tuple, epochs))) == 5
    assert epochs != [[opd.row_at(epoch * 7 + i, 7, seed=4) for i in range(7)] for epoch in range(5)]


def test_row_at_does_not_depend_on_what_was_asked_before():
    in_order = [opd.row_at(i, 9, 0) for i in range(60)]
    opd.epoch_order.cache_clear()
    assert [opd.row_at(i, 9, 0) for i in reversed(range(60))][::-1] == in_order


def test_a_run_reads_each_row_once_an_epoch_across_the_ends_of_batches(tiny, tmp_path, samples):
    train_rows(tmp_path, tiny, batch_size=4, steps=5, max_new_tokens=1)
    read = [tuple(p) for call in samples for p in call[1]]  # 20 prompts of 10 rows: the third batch has both
    assert set(Counter(read[:10]).values()) == set(Counter(read[10:]).values()) == {1}
    assert len(set(read)) == 10 and read[:10] != read[10:]


def test_another_seed_reads_in_another_order_and_draws_other_numbers(tiny, tmp_path, samples):
    for seed in (1, 2):
        train_rows(tmp_path / f"order{seed}", tiny, seed=seed, steps=1, max_new_tokens=1)
    assert samples[0][1] != samples[1][1]
    samples.clear()
    one_row = write_rows(tmp_path / "data.jsonl", [{"prompt": PROMPTS[0]}])
    for seed in (1, 2):
        train_rows(tmp_path / f"draws{seed}", tiny, seed=seed, steps=2, lr=1e-30, data=one_row)
    drawn = [tuple(r.completion) for call in samples for r in call[-1]]
    assert len(set(drawn)) == len(drawn) == 16  # of 2 runs, 2 steps, 4 prompts that are the same


def test_learning_rate_schedules():
    def rates(schedule, **kwargs):
        args = opd.Args(lr=1.0, lr_schedule=schedule, **kwargs)
        return [opd.lr_at(step, args) for step in range(1, args.steps + 1)]

    assert rates("constant", steps=6, warmup_steps=3) == approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates("constant", steps=3, warmup_steps=0) == [1, 1, 1]
    assert rates("linear", steps=7, warmup_steps=2) == approx([1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2])
    half = math.sqrt(0.5)
    assert rates("cosine", steps=5, warmup_steps=1) == approx([0.5, 1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert rates("linear", steps=2, warmup_steps=4) == approx([0.2, 0.4])  # a warm-up longer than the run


def test_the_log_has_the_rate_of_the_schedule(tiny, tmp_path):
    rows = train_rows(tmp_path, tiny, steps=3, lr=0.01, warmup_steps=1, lr_schedule="linear")
    assert [row["lr"] for row in rows] == approx([0.005, 0.01, 0.005])


def test_the_rate_of_the_schedule_moves_the_weights(tiny, tmp_path):
    """AdamW's first step is lr * sign(gradient): the largest change of a weight is the rate itself."""
    for warmup, rate in ((0, 0.01), (3, 0.0025)):
        out = tmp_path / str(warmup)
        train_rows(out, tiny, steps=1, lr=0.01, warmup_steps=warmup)
        before, after = weights(tiny["student"]), weights(out / "final")
        moved = max((after[name] - before[name]).abs().max().item() for name in before)
        assert moved == approx(rate, rel=1e-2)


def test_weight_decay_is_adamws(tiny, tmp_path):
    """Without a gradient each weight shrinks by the rate times the decay, and nothing else happens."""
    still = dict(teacher=tiny["student"], loss="sg_topk", steps=1, warmup_steps=0)
    train_rows(tmp_path, tiny, still, lr=0.01, weight_decay=0.1)
    before, after = weights(tiny["student"]), weights(tmp_path / "final")
    assert all(torch.allclose(after[name], before[name] * (1 - 0.001), rtol=1e-6, atol=0) for name in before)
    state = torch.load(tmp_path / "step_000001" / "trainer.pt", weights_only=True)
    assert tuple(state["optimizer"]["param_groups"][0]["betas"]) == (0.9, 0.98)


def test_repetition_is_the_share_of_ngrams_said_before():
    assert opd.repetition([]) == opd.repetition([1, 1, 1]) == opd.repetition([1, 2, 3, 4, 5]) == 0
    assert opd.repetition([1] * 8) == approx(4 / 5)
    assert opd.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == approx(1 / 5)
    assert opd.repetition([1, 2, 1, 2, 1], n=2) == approx(2 / 4)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tiny, tmp_path):
    first, again, other = (train_rows(tmp_path / str(i), tiny, seed=seed) for i, seed in enumerate([5, 5, 6]))
    assert numbers(first) == numbers(again)
    assert same_weights(tmp_path / "0" / "final", tmp_path / "1" / "final")
    assert all(a["loss"] != b["loss"] for a, b in zip(first, other, strict=True))


# ------------------------------------------------------------------------------------------ save and continue


class Killed(BaseException):
    """Nothing in a run may catch it, as nothing catches kill -9."""


def killed_after(step, monkeypatch, out, *flags, **kwargs):
    """A run that dies once it has logged a step and before it saves anything more."""
    record = opd.record

    def record_and_die(history, row, *rest):
        record(history, row, *rest)
        if row["step"] == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(opd, "record", record_and_die)
        train_rows(out, *flags, **kwargs)


def same_state(a, b):
    """Optimizer and step of two trainer.pt."""
    a, b = (torch.load(Path(folder) / "trainer.pt", weights_only=True) for folder in (a, b))
    assert a["step"] == b["step"]
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    a, b = a["optimizer"]["state"], b["optimizer"]["state"]
    return a.keys() == b.keys() and all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def assert_same_run(a, b, last):
    assert numbers(logged(a)) == numbers(logged(b))
    assert [row["step"] for row in logged(a)][-last:] == list(range(1, last + 1))
    assert same_weights(a / "final", b / "final")
    assert same_state(a / f"step_{last:06d}", b / f"step_{last:06d}")


RUNS = {
    "sg_topk": {},
    "lmbda": dict(loss="reverse_kl", lmbda=0.5, weight_decay=0.1),
    "pg": dict(loss="pg", updates_per_rollout=2, gamma=1.0),
    "samples": dict(loss="jsd", samples_per_prompt=2, top_p=0.9),
    "sft": dict(loss="forward_kl", sft_steps=2),
}


@pytest.mark.parametrize("name", RUNS)
def test_half_a_run_and_its_continuation_are_the_whole_run_bitwise(tiny, tmp_path, name):
    train_rows(tmp_path / "whole", tiny, RUNS[name], steps=4)
    train_rows(tmp_path / "halves", tiny, RUNS[name], steps=2)
    rows = train_rows(tmp_path / "halves", tiny, RUNS[name], steps=4, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves", 4)
    assert numbers(rows) == numbers(logged(tmp_path / "halves"))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_killed_between_checkpoints_repeats_the_steps_since(tiny, tmp_path, monkeypatch, schedule):
    run = dict(steps=5, save_every=2, lr_schedule=schedule, warmup_steps=2)
    train_rows(tmp_path / "whole", tiny, run)
    killed_after(3, monkeypatch, tmp_path / "killed", tiny, run)
    assert [row["step"] for row in logged(tmp_path / "killed")] == [1, 2, 3]
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn in the middle of a row
    train_rows(tmp_path / "killed", tiny, run, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 5)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny, tmp_path, monkeypatch):
    train_rows(tmp_path / "whole", tiny)
    killed_after(2, monkeypatch, tmp_path / "killed", tiny)
    train_rows(tmp_path / "killed", tiny, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 4)


def test_evaluation_rows_survive_a_resume_once(tiny, tmp_path):
    args = {**SMALL, **tiny, "eval_every": 1, "out": str(tmp_path)}
    opd.train(opd.Args(**{**args, "steps": 2}))
    opd.train(opd.Args(**{**args, "steps": 3, "resume": True}))
    assert [row["step"] for row in logged(tmp_path)] == [0, 1, 2, 3]
    assert all("eval_accuracy" in row for row in logged(tmp_path))


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    rows = train_rows(tmp_path, tiny)
    shutil.copytree(tmp_path / "final", tmp_path / "was")
    assert numbers(train_rows(tmp_path, tiny, resume=True)) == numbers(rows)
    assert same_weights(tmp_path / "was", tmp_path / "final")


@pytest.fixture(scope="module")
def unfinished(tiny, tmp_path_factory):
    """A run of 4 of 6 steps with three checkpoints, and the folder of the same run in one go."""
    folder = tmp_path_factory.mktemp("unfinished")
    train_rows(folder / "run", tiny, steps=4, save_every=1, keep=3)
    train_rows(folder / "whole", tiny, steps=6, save_every=1, keep=3)
    return folder


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "weights cut": lambda folder: halve(folder / "model.safetensors"),
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "state cut": lambda folder: halve(folder / "trainer.pt"),
    "state empty": lambda folder: (folder / "trainer.pt").write_bytes(b""),
    "state gone": lambda folder: (folder / "trainer.pt").unlink(),
    "state foreign": lambda folder: torch.save({"model": torch.zeros(3)}, folder / "trainer.pt"),
    "state without optimizer": lambda folder: torch.save({"step": 4, "args": {}}, folder / "trainer.pt"),
    "config cut": lambda folder: halve(folder / "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_checkpoint_is_named_and_the_one_before_taken(tiny, unfinished, tmp_path, capsys, damage):
    shutil.copytree(unfinished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    DAMAGE[damage](tmp_path / "run" / "step_000004")
    train_rows(tmp_path / "run", tiny, steps=6, save_every=1, keep=3, resume=True)
    assert "step_000004: not a whole checkpoint" in capsys.readouterr().err
    assert_same_run(unfinished / "whole", tmp_path / "run", 6)


def test_with_every_checkpoint_torn_nothing_is_overwritten(tiny, unfinished, tmp_path, capsys):
    shutil.copytree(unfinished / "run", tmp_path / "run")
    for folder in opd.checkpoints(tmp_path / "run"):
        halve(folder / "trainer.pt")
    with pytest.raises(opd.UserError, match="none of its checkpoints is whole"):
        train_rows(tmp_path / "run", tiny, steps=6, save_every=1, keep=3, resume=True)
    assert capsys.readouterr().err.count("not a whole checkpoint") == 3
    assert logged(tmp_path / "run") == logged(unfinished / "run")


def test_what_a_dying_save_leaves_is_no_checkpoint(tiny, unfinished, tmp_path, monkeypatch):
    shutil.copytree(unfinished / "run", tmp_path / "run")

    def die(state, path):
        Path(path).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", die)
        train_rows(tmp_path / "run", tiny, steps=6, save_every=1, keep=3, resume=True)
    assert [folder.name for folder in opd.checkpoints(tmp_path / "run")][0] == "step_000004"
    train_rows(tmp_path / "run", tiny, steps=6, save_every=1, keep=3, resume=True)
    assert_same_run(unfinished / "whole", tmp_path / "run", 6)
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.parametrize("error", [OSError(), RuntimeError("no\nroom")])
def test_what_cannot_be_written_is_one_line(tmp_path, error):
    with pytest.raises(opd.UserError) as refused, opd.writing(tmp_path):
        raise error
    assert f"--out {tmp_path}: cannot be written ({'no' if str(error) else 'OSError'});" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_disk_with_no_room_for_a_row_of_metrics_is_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes
        with pytest.raises(opd.UserError, match="cannot be written"):
            opd.record([], {"step": 1, "loss": "9" * 200}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kilobytes", [1, 60, 150], ids=["config", "weights", "optimizer"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(tiny, tmp_path, kilobytes):
    """A quota on the size of a file stands for the disk: writing fails in the middle, as it does there."""
    whole = train_rows(tmp_path / "whole", tiny, steps=4, save_every=2)
    train_rows(tmp_path / "run", tiny, steps=2, save_every=2)
    sizes = [f.stat().st_size for f in (tmp_path / "run" / "step_000002").iterdir()]
    assert min(sizes) < kilobytes * 1024 < max(sizes)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
        with pytest.raises(
            opd.UserError, match="cannot be written .*; what was saved before stands: make room"
        ):
            train_rows(tmp_path / "run", tiny, steps=4, save_every=2, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run").glob(".step*")), "what was half written still takes up room"
    train_rows(tmp_path / "run", tiny, steps=4, save_every=2, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run", len(whole))


@pytest.mark.parametrize(
    "change",
    [
        dict(lr=2e-3),
        dict(loss="reverse_kl"),
        dict(seed=1),
        dict(batch_size=2),
        dict(temperature=0.9),
        dict(lmbda=0.5),
        dict(topk=6),
        dict(max_new_tokens=13),
    ],
)
def test_a_changed_flag_is_refused_on_resume(tiny, unfinished, tmp_path, change):
    shutil.copytree(unfinished / "run", tmp_path / "run")
    with pytest.raises(opd.UserError, match=f"--{next(iter(change))} "):
        train_rows(tmp_path / "run", tiny, steps=6, resume=True, **change)


def test_flags_that_enter_no_arithmetic_may_change_on_resume(tiny, unfinished, tmp_path):
    shutil.copytree(unfinished / "run", tmp_path / "elsewhere")
    free = dict(micro_batch_size=2, chunk_tokens=5, gradient_checkpointing=True, keep=1, save_every=0)
    free["max_prompt_tokens"] = opd.Args(**SMALL).max_prompt_tokens + 1
    rows = train_rows(tmp_path / "elsewhere", tiny, steps=6, resume=True, **free)
    for a, b in zip(numbers(rows), numbers(logged(unfinished / "whole")), strict=True):
        assert a == approx(b, rel=1e-3)


def test_ranks_that_find_different_checkpoints_are_refused(tiny, unfinished, tmp_path, monkeypatch):
    """On two nodes without a common --out, gradients of different weights would be summed in silence."""
    shutil.copytree(unfinished / "run", tmp_path / "run")
    resume = opd.resume

    def beside_a_rank_that_found_none(*inputs):  # it would add 0 to the sum of the steps
        with monkeypatch.context() as patch:
            patch.setattr(opd, "ranks", lambda: (0, 2))
            return resume(*inputs)

    monkeypatch.setattr(opd, "resume", beside_a_rank_that_found_none)
    with pytest.raises(opd.UserError, match="not all ranks find step .* all nodes must share the folder"):
        train_rows(tmp_path / "run", tiny, steps=6, resume=True)


def test_the_steps_of_a_falling_learning_rate_may_not_change_on_resume(tiny, tmp_path):
    train_rows(tmp_path, tiny, steps=2, lr_schedule="linear")
    with pytest.raises(opd.UserError, match="--steps 4"):
        train_rows(tmp_path, tiny, steps=4, lr_schedule="linear", resume=True)


def test_a_folder_with_a_run_is_not_overwritten(tiny, unfinished):
    with pytest.raises(opd.UserError, match="already holds a run"):
        train_rows(unfinished / "run", tiny)


@pytest.mark.parametrize("keep, left", [(1, [5]), (2, [5, 4]), (3, [5, 4, 2])])
def test_keep_is_the_number_of_newest_checkpoints_that_stay(tiny, tmp_path, keep, left):
    train_rows(tmp_path, tiny, steps=5, save_every=2, keep=keep, max_new_tokens=1)
    assert [folder.name for folder in opd.checkpoints(tmp_path)] == [f"step_{step:06d}" for step in left]


def test_without_save_every_only_the_last_step_is_kept(tiny, tmp_path):
    train_rows(tmp_path, tiny)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "metrics.jsonl", "step_000004"]


def test_final_is_a_folder_that_loads_anywhere(tiny, tmp_path):
    train_rows(tmp_path, tiny)
    final = tmp_path / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny["student"]).get_vocab()
    more = model.generate(**tokenizer("^1+1=", return_tensors="pt"), max_new_tokens=3)[0]
    assert tokenizer.decode(more).startswith("^1+1=")
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 1
    assert same_weights(final, tmp_path / "step_000004")
    assert not (final / "trainer.pt").exists()


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_finish_and_saves(tiny, tmp_path, monkeypatch, number):
    before, update = signal.getsignal(number), opd.update
    calls = []

    def signalled(*inputs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return update(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(opd, "update", signalled)
        rows = train_rows(tmp_path / "run", tiny)
    assert [row["step"] for row in rows] == [1, 2] and signal.getsignal(number) == before
    assert [folder.name for folder in opd.checkpoints(tmp_path / "run")] == ["step_000002"]
    assert not (tmp_path / "run" / "final").exists()
    train_rows(tmp_path / "run", tiny, resume=True)
    train_rows(tmp_path / "whole", tiny)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)


@pytest.mark.parametrize("number, kills", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_second_ctrl_c_kills_and_a_second_sigterm_does_not(number, kills):
    """Slurm signals every process, and torchrun, which it signals too, passes the signal on once more."""
    before = signal.getsignal(number)
    with opd.deferred_signals() as noted:
        os.kill(os.getpid(), number)
        assert noted == [number]
        assert (signal.getsignal(number) == signal.SIG_DFL) == kills
    assert signal.getsignal(number) == before


def test_a_terminated_process_exits_with_0_and_can_be_continued_bitwise(tiny, tmp_path):
    run = {**SMALL, **{name: tiny[name] for name in ("student", "teacher", "data")}, "steps": 100_000}
    command = [sys.executable, str(ROOT / "opd.py"), *flags(**run, out=tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 120
    try:
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    done = logged(tmp_path / "run")[-1]["step"]
    assert f"stopped after step {done} and saved" in output and "Traceback" not in errors
    assert opd.checkpoints(tmp_path / "run")[0].name == f"step_{done:06d}"
    train_rows(tmp_path / "run", tiny, steps=done + 1, resume=True)
    train_rows(tmp_path / "whole", tiny, steps=done + 1)
    assert_same_run(tmp_path / "whole", tmp_path / "run", done + 1)


def test_on_cpu_freed_memory_is_kept_for_the_next_tensor():
    """set_up tells glibc so; without it each large tensor gets pages from the kernel anew, a fault each."""
    if "glibc" not in platform.libc_ver():
        pytest.skip("another libc")
    program = """
import resource, sys, torch, opd
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] == "set_up":
    opd.set_up(opd.Args(out=sys.argv[2], device="cpu"))
for _ in range(6):  # the last: two places take turns
    before = faults()
    torch.ones(2**25)  # 128 MB
print(faults() - before, all(torch.empty(2**20 + n).data_ptr() % 4096 == 0 for n in range(5)))
"""

    def measure(*words):  # -> page faults, whether large tensors begin on a page of their own
        command = [sys.executable, "-c", program, *words]
        env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=env)
        faults, aligned = run.stdout.split()
        return int(faults), aligned

    (few, aligned), (many, not_aligned) = measure("set_up", "nowhere"), measure("plain")
    assert few < 1000 < 10_000 < many
    assert (aligned, not_aligned) == ("True", "False")


def test_a_bad_row_that_is_found_in_mid_run_loses_no_step(tiny, tmp_path):
    """The first 1,000 rows are checked at the start, later ones when they are read."""
    prompts = [f"^{i % 9}+1=" for i in range(1010)]
    prompts[1005] = "^" + "1+" * 8 + "1="  # 19 tokens; --max_prompt_tokens is 16
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in prompts])
    order = [opd.row_at(i, 1010, 0) for i in range(1010)]
    size = 1 + order.index(1005) // 3  # it is read in step 3
    flags = {**SMALL, **tiny, "data": data, "batch_size": size, "micro_batch_size": 400, "max_new_tokens": 2}
    del flags["eval_data"]
    with pytest.raises(opd.UserError, match="row 1005: .* 19 tokens.*; step 2 is saved: .* --resume"):
        opd.train(opd.Args(**flags, out=str(tmp_path / "out")))
    assert [x.name for x in opd.checkpoints(tmp_path / "out")] == ["step_000002"]
    flags["max_prompt_tokens"] = 24
    opd.train(opd.Args(**flags, out=str(tmp_path / "out"), resume=True))
    opd.train(opd.Args(**flags, out=str(tmp_path / "whole")))
    one, other = (load_file(tmp_path / x / "final" / "model.safetensors") for x in ("out", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
