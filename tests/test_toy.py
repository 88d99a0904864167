"""The toy task: its chains are right, its tokenizer exact, its pair built whole, once, and repeatably."""

import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutorials import toy

TINY = dict(steps=2, n_train=20, n_eval=10)
# no carry, a carry from each column alone, from several, from all, chains of carries, the ends of the range
CASES = [(111, 222), (105, 206), (150, 260), (500, 600), (155, 266), (999, 999), (999, 100), (199, 801)]


def problems():
    rng = random.Random(0)
    return CASES + [(rng.randint(100, 999), rng.randint(100, 999)) for _ in range(300)]


def test_documented_examples():
    assert toy.prompt(345, 678) == "^345+678="
    assert toy.chain(345, 678) == toy.chain(345, 678, "A") == "58013;47112;36110;#1023$"
    assert toy.chain(345, 678, "M") == "58113;47112;36110;#1023$"
    assert toy.chain(345, 678, "B") == "36>09,47>11,58>13,#1023$"


def test_problems_cover_every_carry_pattern():
    def pattern(a, b):  # a carry out of a column, by the remainders alone
        return tuple(a % p + b % p >= p for p in (10, 100, 1000))

    assert len({pattern(a, b) for a, b in problems()}) == 8


@pytest.mark.parametrize("style", ["A", "M"])
def test_units_first_chain_fields(style):
    for a, b in problems():
        *columns, end = toy.chain(a, b, style).split(";")
        assert end == f"#{a + b}$" and len(columns) == 3
        xs, ys = f"{a}"[::-1], f"{b}"[::-1]
        for i, column in enumerate(columns):
            x, y, third, total = re.fullmatch(r"(\d)(\d)(\d)(\d\d)", column).groups()
            low, high = 10**i, 10 ** (i + 1)
            carry_in, carry_out = (a % low + b % low) // low, (a % high + b % high) // high
            assert (x, y) == (xs[i], ys[i]) and int(total) == int(x) + int(y) + carry_in
            assert int(third) == (carry_in if style == "A" else carry_out)
        digits = "".join(column[-1] for column in reversed(columns))
        assert int(columns[-1][-2] + digits) == a + b  # the sum can be read off the columns


def test_hundreds_first_chain_fields():
    for a, b in problems():
        *columns, end = toy.chain(a, b, "B").split(",")
        assert end == f"#{a + b}$"
        parsed = [re.fullmatch(r"(\d)(\d)>(\d\d)", column).groups() for column in columns]
        assert "".join(x for x, _, _ in parsed) == str(a) and "".join(y for _, y, _ in parsed) == str(b)
        assert all(int(total) == int(x) + int(y) for x, y, total in parsed)
        assert sum(int(total) * 10 ** (2 - i) for i, (_, _, total) in enumerate(parsed)) == a + b


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style"):
        toy.chain(100, 100, "Z")


def test_train_and_held_out_are_disjoint():
    train, test = toy.rows(3000), toy.rows(300, held_out=True)
    ours, theirs = {row["prompt"] for row in train}, {row["prompt"] for row in test}
    assert len(ours) == 3000 and len(theirs) == 300 and not ours & theirs
    shown = {toy.styles(A=1)(rng)[0] for rng in [random.Random(1)] for _ in range(3000)}
    assert not shown & theirs  # the models have not seen the held-out problems either
    for row in train[:50] + test[:50]:
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["answer"] == str(a + b) and row["solution"].endswith(f"#{a + b}")


def test_styles_mix():
    rng = random.Random(0)
    chains = [toy.styles(A=1, B=3)(rng)[1] for _ in range(400)]
    assert 0.68 < sum(">" in chain for chain in chains) / 400 < 0.82


def test_accuracy_is_the_probability_of_the_chain():
    model, (row,) = toy.make_model(0), toy.rows(1, held_out=True)
    prompt, ids = len(row["prompt"]), [toy.IDS[c] for c in row["prompt"] + row["solution"] + "$"]
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    expected = 1.0
    for t in range(prompt, len(ids)):
        expected *= p[t - 1, ids[t]].item()
    assert toy.accuracy(model, [row]) == pytest.approx(expected, rel=1e-4)
    short = min(toy.rows(50, held_out=True), key=lambda row: len(row["solution"]))  # padded beside a long one
    mean = (toy.accuracy(model, [row]) + toy.accuracy(model, [short])) / 2
    assert toy.accuracy(model, [row, short]) == pytest.approx(mean, rel=1e-4)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, toy.build(folder=folder, **TINY)


def test_built_tokenizer(built):
    for part in ("student", "teacher"):
        tokenizer = AutoTokenizer.from_pretrained(built[1][part])
        assert len(tokenizer) == len(toy.CHARACTERS) and tokenizer.bos_token is None
        assert tokenizer.eos_token_id == toy.END and tokenizer.pad_token_id == toy.PAD != toy.END
        for text in ["^12+3=", *(toy.chain(999, 101, style) for style in "ABM"), "".join(toy.CHARACTERS[1:])]:
            ids = tokenizer(text).input_ids
            assert ids == [toy.IDS[c] for c in text] and tokenizer.decode(ids) == text
        padded = tokenizer("#1023$").input_ids + [toy.PAD]
        assert tokenizer.decode(padded, skip_special_tokens=True) == "#1023"
        with pytest.raises(Exception, match="UNK"):
            tokenizer("1 2")


def test_built_models_and_data(built):
    _, paths = built
    weights = []
    for part in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(paths[part])
        assert model.generation_config.eos_token_id == toy.END and model.config.vocab_size == len(
            toy.CHARACTERS
        )
        weights.append(model.lm_head.weight)
    assert not torch.equal(*weights)
    for flag, n in (("data", 20), ("eval_data", 10)):
        data = [json.loads(line) for line in open(paths[flag])]
        assert len(data) == n and all(
            set(row) == {"prompt", "answer", "solution", "privileged"} for row in data
        )


def test_complete_pair_is_not_rebuilt(built, monkeypatch, capsys):
    monkeypatch.setattr(toy, "pretrain", None)  # would raise
    assert toy.build(folder=built[0], **TINY) == built[1] and capsys.readouterr().out == ""


@pytest.mark.parametrize("where", ["training", "saving"])
def test_interrupted_build_leaves_nothing_half_made(built, tmp_path, monkeypatch, where):
    real, calls, threads = (
        {"training": toy.pretrain, "saving": toy.save_model}[where],
        [],
        torch.get_num_threads(),
    )

    def stop_in_second(*args, **kwargs):
        calls.append(0)
        if where == "saving":
            real(*args, **kwargs)  # all is written, nothing has its name yet
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs) if where == "training" else None

    with monkeypatch.context() as patch:
        patch.setattr(toy, real.__name__, stop_in_second)
        with pytest.raises(KeyboardInterrupt):
            toy.build(folder=tmp_path, **TINY)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["eval.jsonl", "student", "train.jsonl"]  # no teacher, and no part of one
    assert torch.get_num_threads() == threads
    before = (tmp_path / "student").stat().st_mtime_ns
    paths = toy.build(folder=tmp_path, **TINY)
    assert (tmp_path / "student").stat().st_mtime_ns == before  # kept; only the rest was made
    for part in paths:  # and what came of it is what an undisturbed build gives
        names = ("model.safetensors", "tokenizer.json") if part in ("student", "teacher") else ("",)
        for name in names:
            ours, theirs = (f"{made[part]}/{name}".rstrip("/") for made in (paths, built[1]))
            assert open(ours, "rb").read() == open(theirs, "rb").read()


def test_other_process_was_faster(tmp_path):
    def write(aside):
        for folder, text in ((aside, "ours"), (tmp_path / "model", "theirs")):
            folder.mkdir()
            (folder / "file").write_text(text)

    toy.put_in_place(tmp_path / "model", write)
    assert (tmp_path / "model" / "file").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_same_seed_same_weights():
    state = torch.get_rng_state()
    one, same, other = (toy.pretrain(toy.styles(A=1), seed, steps=3) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs) and not torch.equal(pairs[0][0], pairs[0][2])


def test_training_stops_at_the_threshold():
    steps = []
    write = toy.styles(A=1)
    toy.pretrain(lambda rng: steps.append(0) or write(rng), 0, steps=30, stop=0.0, batch_size=1)
    assert len(steps) == 10  # not before there are ten batches to average


def test_unknown_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="task"):
        toy.build("nonsense", folder=tmp_path)


def test_told_examples_are_in_the_form_of_the_templates_and_right():
    rng, kinds = random.Random(0), set()
    for _ in range(300):
        text, completion = toy.told(rng)
        told, _, bare = text.rpartition("|")
        a, b = map(int, bare.strip("^=").split("+"))
        row = {"prompt": bare, "answer": str(a + b), "solution": toy.chain(a, b)[:-1], "privileged": toy.RULE}
        kind = "none" if not told else next(k for k, t in toy.PI_TEMPLATES.items() if t.format(**row) == text)
        long = completion == toy.chain(a, b)
        assert long or completion == f"#{a + b}$"
        kinds.add((kind, long))
    both = {("none", True), ("none", False)}
    assert kinds == both | {("system", True), ("answer", False), ("solution", False)}


def test_self_distillation_has_a_student_and_no_teacher(tmp_path):
    paths = toy.build("opsd", folder=tmp_path, **TINY)
    assert set(paths) == {"student", "data", "eval_data"}
