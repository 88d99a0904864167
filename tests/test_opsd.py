"""What opsd.py promises: the teacher reads the privileged information (PI), in the words shown below; the
student never does; both score the same tokens; and each kind of teacher has the weights that it should."""

import functools
import gc
import json
import re
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import CHAT, SMALL, flags, make_model, make_tokenizer, run_script, save, write_rows
from pytest import approx
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import opd
import opsd

# Printable text, one token a character; and tokens that no encoder ever makes of a text, though a model may
# write them: whoever decodes a completion and encodes it anew has other ids in his hands.
PRINTABLE = ["<pad>", "$", "\n"] + [chr(i) for i in range(32, 127) if chr(i) != "$"]
CHARACTERS = PRINTABLE + ["is", "12", "th", "e ", "+3"]
MODES = "answer solution masked_solution hidden_think system instruction demonstration shuffled_solution none"
MODES = MODES.split()
SMALL = {**SMALL, "max_prompt_tokens": 64}
TIMES = {"sample_s", "teacher_s", "student_s", "tokens_per_s", "peak_mem_gb"}  # what no two runs share
TEACHERS = {
    "frozen": dict(teacher_mode="frozen"),
    "refreshed": dict(teacher_mode="frozen", refresh_every=2),
    "ema": dict(teacher_mode="ema", ema_decay=0.9),
    "live": dict(teacher_mode="live"),
}


@functools.lru_cache
def characters_tokenizer(chat_template=None):
    return make_tokenizer(CHARACTERS, chat_template)


# ------------------------------------------------------------------------------------- what the teacher reads

RAW = [
    {"prompt": "Q: 2+3?\nA:", "answer": "5", "solution": "2+3 is 5.", "privileged": "Say it in French."},
    {"prompt": "Q: 4+4?\nA:", "answer": "8", "solution": "4+4 is 8.", "privileged": "Say it in French."},
]
USER = [{**row, "prompt": [{"role": "user", "content": row["prompt"][3:7]}]} for row in RAW]
SYSTEM = [{**row, "prompt": [{"role": "system", "content": "Be brief."}, *row["prompt"]]} for row in USER]
OPENING = CHAT.replace("assistant: ", "assistant: <think>\n")  # a template that opens the think block itself

# What the teacher reads for the first row of USER and of RAW; the other row is the other problem.
GOLDEN_CHAT = {
    "answer": """\
user: 2+3?

The final answer is known to be 5. Work out how to get there.
assistant: """,
    "solution": """\
user: 2+3?

Here is a reference solution:
2+3 is 5.

Solve the problem in your own words.
assistant: """,
    "masked_solution": """\
user: 2+3?

Here is a reference solution, with parts of it hidden (_):
_+3 i_ 5.

Solve the problem in your own words.
assistant: """,
    "hidden_think": """\
user: 2+3?
assistant: <think>
2+3 is 5.
</think>

""",
    "system": """\
system: Say it in French.
user: 2+3?
assistant: """,
    "instruction": """\
user: Say it in French.

2+3?
assistant: """,
    "demonstration": """\
user: Here is a solved example.

Problem:
4+4?

Solution:
4+4 is 8.

Now solve this problem.

2+3?
assistant: """,
    "shuffled_solution": """\
user: 2+3?

Here is a reference solution:
4+4 is 8.

Solve the problem in your own words.
assistant: """,
    "none": """\
user: 2+3?
assistant: """,
}
GOLDEN_RAW = {
    "answer": """\
Q: 2+3?
A:

The final answer is known to be 5. Work out how to get there.""",
    "solution": """\
Q: 2+3?
A:

Here is a reference solution:
2+3 is 5.

Solve the problem in your own words.""",
    "masked_solution": """\
Q: 2+3?
A:

Here is a reference solution, with parts of it hidden (_):
_+3 i_ 5.

Solve the problem in your own words.""",
    "hidden_think": """\
Q: 2+3?
A:<think>
2+3 is 5.
</think>

""",
    "system": """\
Say it in French.

Q: 2+3?
A:""",
    "instruction": """\
Say it in French.

Q: 2+3?
A:""",
    "demonstration": """\
Here is a solved example.

Problem:
Q: 4+4?
A:

Solution:
4+4 is 8.

Now solve this problem.

Q: 2+3?
A:""",
    "shuffled_solution": """\
Q: 2+3?
A:

Here is a reference solution:
4+4 is 8.

Solve the problem in your own words.""",
    "none": """\
Q: 2+3?
A:""",
}


def read_by_teacher(rows, i=0, chat_template=CHAT, **kwargs):
    """The text of the ids that the teacher is given for row i."""
    tokenizer = characters_tokenizer(chat_template)
    args = opsd.Args(**kwargs)
    opsd.check_args(args)
    rows = datasets.Dataset.from_list(rows)
    return tokenizer.decode(opsd.encode_teacher_prompt(tokenizer, rows, i, args, 10_000))


def test_every_mode_has_its_golden_text():
    assert list(opsd.TEMPLATES) == list(GOLDEN_CHAT) == list(GOLDEN_RAW) == MODES


@pytest.mark.parametrize("mode", MODES)
def test_prompt_of_a_chat(mode):
    assert read_by_teacher(USER, pi=mode) == GOLDEN_CHAT[mode]


@pytest.mark.parametrize("mode", MODES)
def test_prompt_of_a_chat_with_a_system_message(mode):
    if mode == "system":  # the rule stands before what is there
        golden = "system: Say it in French.\n\nBe brief.\nuser: 2+3?\nassistant: "
    else:
        golden = "system: Be brief.\n" + GOLDEN_CHAT[mode]
    assert read_by_teacher(SYSTEM, pi=mode) == golden


@pytest.mark.parametrize("mode", MODES)
def test_prompt_of_a_raw_string(mode):
    assert read_by_teacher(RAW, pi=mode) == GOLDEN_RAW[mode]


def test_pi_stands_in_the_last_turn_of_the_user():
    turns = [("user", "Hello."), ("assistant", "Hi!"), ("user", "2+3?"), ("assistant", "Hm."), ("tool", "ok")]
    rows = [{**RAW[0], "prompt": [{"role": role, "content": text} for role, text in turns]}]
    golden = """\
user: Hello.
assistant: Hi!
user: Say it in French.

2+3?
assistant: Hm.
tool: ok
assistant: """
    assert read_by_teacher(rows, pi="instruction") == golden


@pytest.mark.parametrize("opening", ["assistant: <think>\n", "assistant: <think>\n\n", "assistant: <think>"])
def test_hidden_think_goes_on_inside_a_block_that_the_template_opens(opening):
    template = CHAT.replace("assistant: ", opening)
    golden = "system: Be brief.\nuser: 2+3?\n" + opening + "2+3 is 5.\n"
    assert read_by_teacher(SYSTEM, chat_template=template, pi="hidden_think") == golden
    # The student's completion goes on in that block too: what it writes is a thought on both sides.
    tokenizer = characters_tokenizer(template)
    bare = tokenizer.decode(opd.encode_prompt(tokenizer, SYSTEM[0]["prompt"], 999))
    assert bare == "system: Be brief.\nuser: 2+3?\n" + opening


def test_hidden_think_takes_the_place_of_an_empty_block():
    template = CHAT.replace("assistant: ", "assistant: <think>\n\n</think>\n\n")
    golden = "system: Be brief.\nuser: 2+3?\nassistant: <think>\n2+3 is 5.\n</think>\n\n"
    assert read_by_teacher(SYSTEM, chat_template=template, pi="hidden_think") == golden
    rows = [{**RAW[0], "prompt": "Q: 2+3?\n<think></think>"}]
    assert read_by_teacher(rows, pi="hidden_think") == "Q: 2+3?\n<think>\n2+3 is 5.\n</think>\n\n"


def test_hidden_think_of_a_raw_string_that_opens_the_block_itself():
    rows = [{**RAW[0], "prompt": "Q: 2+3?\n<think>\n"}]
    assert read_by_teacher(rows, pi="hidden_think") == "Q: 2+3?\n<think>\n2+3 is 5.\n"


def test_hidden_think_holds_the_answer_where_there_is_no_solution():
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in USER]
    golden = "user: 2+3?\nassistant: <think>\n5\n</think>\n\n"
    assert read_by_teacher(rows, pi="hidden_think") == golden
    assert read_by_teacher(rows, pi="hidden_think", chat_template=OPENING) == golden.split("</think>")[0]


@pytest.mark.parametrize(
    "mode, template, golden",
    [
        ("answer", "{prompt} (It is {answer}.)", "user: 2+3? (It is 5.)\nassistant: "),
        ("answer", "{{{answer}}} {prompt}", "user: {5} 2+3?\nassistant: "),
        ("solution", "{solution} {answer} {privileged} {prompt}",
         "user: 2+3 is 5. 5 Say it in French. 2+3?\nassistant: "),
        ("shuffled_solution", "{prompt} {answer}: {solution}", "user: 2+3? 5: 4+4 is 8.\nassistant: "),
        ("demonstration", "{example_prompt} {example_solution} {prompt} {solution}",
         "user: 4+4? 4+4 is 8. 2+3? 2+3 is 5.\nassistant: "),
        ("system", "Rule: {privileged}", "system: Rule: Say it in French.\nuser: 2+3?\nassistant: "),
        ("hidden_think", "It is {answer}: {solution}",
         "user: 2+3?\nassistant: <think>\nIt is 5: 2+3 is 5.\n</think>\n\n"),
        ("none", "Please: {prompt}", "user: Please: 2+3?\nassistant: "),
    ],
)  # fmt: skip
def test_pi_template_replaces_the_text_of_the_mode(mode, template, golden):
    assert read_by_teacher(USER, pi=mode, pi_template=template) == golden


def test_pi_template_of_a_raw_system_rule_may_place_the_prompt():
    found = read_by_teacher(RAW, pi="system", pi_template="{prompt} [{privileged}]")
    assert found == "Q: 2+3?\nA: [Say it in French.]"


def test_braces_in_the_data_are_text():
    rows = [{"prompt": "{x} + {answer}", "answer": "{prompt}"}]
    assert (
        read_by_teacher(rows, pi="answer", pi_template="{prompt} = {answer}") == "{x} + {answer} = {prompt}"
    )


@pytest.mark.parametrize("mode", ["answer", "solution", "masked_solution", "hidden_think"])
def test_numbers_in_the_data_are_pi_too_even_zero(mode):
    rows = [{"prompt": "2-2=", "answer": 0, "solution": 0}]
    assert "0" in read_by_teacher(rows, pi=mode, mask_ratio=0.0)


@pytest.mark.parametrize("mode", ["system", "hidden_think"])
def test_a_chat_without_a_user_may_have_pi_where_the_user_is_not_needed(mode):
    rows = [{**RAW[0], "prompt": [{"role": "system", "content": "2+3?"}]}]
    golden = {
        "system": "system: Say it in French.\n\n2+3?\nassistant: ",
        "hidden_think": "system: 2+3?\nassistant: <think>\n2+3 is 5.\n</think>\n\n",
    }
    assert read_by_teacher(rows, pi=mode) == golden[mode]


# ----------------------------------------------------------------------------- masked, shuffled, demonstrated

PROBLEMS = [
    {"prompt": f"What is {i}+{i}?", "solution": f"{i}+{i} makes {2 * i}, of course."} for i in range(10, 40)
]


def masked(i=0, rows=PROBLEMS, **kwargs):
    text = read_by_teacher(rows, i, pi="masked_solution", pi_template="{prompt}{solution}", **kwargs)
    return text.removeprefix(rows[i]["prompt"])


def test_masked_solution_hides_tokens_with_the_given_probability():
    assert masked(mask_ratio=0.0) == "10+10 makes 20, of course."
    assert masked(mask_ratio=1.0) == "_" * len("10+10 makes 20, of course.")
    for ratio in (0.2, 0.5):
        hidden = [masked(i, mask_ratio=ratio).count("_") / 26 for i in range(len(PROBLEMS))]
        assert sum(hidden) / len(hidden) == approx(ratio, abs=0.06)  # 780 draws: 3.4 standard errors
    shown = masked(3)
    assert all(m in (c, "_") for m, c in zip(shown, PROBLEMS[3]["solution"], strict=True))


def test_masked_solution_is_a_function_of_seed_and_row():
    rows = [PROBLEMS[0]] * 8  # the same solution: what differs is the mask
    texts = [masked(i, rows) for i in range(8)]
    assert texts == [masked(i, rows) for i in range(8)]
    assert len(set(texts)) == 8
    assert not set(texts) & {masked(i, rows, seed=1) for i in range(8)}


def words_tokenizer(kind):
    """Small trained tokenizers as models have them, with bytes for what they have not seen."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    special = ["<s>"] + [f"<0x{i:02X}>" for i in range(256) if kind == "sentencepiece"]
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        mark, unmark = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), mark])
        ends = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence([unmark, *ends])
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(["so the answer is one more than the number of the others"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_masked_solution_shows_the_others_as_they_were(kind):
    """Spaces and letters that are no token of their own survive: the tokens are hidden in the text itself."""
    tokenizer, text = words_tokenizer(kind), "so  the answer is é → 5 × 3.\n the end"
    assert opsd.mask_solution(tokenizer, text, 0.0, (0, -3, 0)) == text
    for row in range(20):
        shown = opsd.mask_solution(tokenizer, text, 0.5, (0, -3, row))
        assert re.fullmatch(".*".join(map(re.escape, shown.split("_"))), text, re.DOTALL), shown
        assert 3 <= shown.count("_") <= len(text)
    assert set(opsd.mask_solution(tokenizer, text, 1.0, (0, -3, 0))) == {"_"}


def test_shuffled_solution_is_never_the_own_one():
    """Nor the same text from another row; and any other may come."""
    solutions = ["a", "a", "b", "a", "c", "b", "a", "d"]
    rows = [{"prompt": f"Q{i}", "solution": solution} for i, solution in enumerate(solutions)]
    shown = {i: Counter() for i in range(len(rows))}
    for seed in range(30):
        for i in shown:
            text = read_by_teacher(
                rows, i, pi="shuffled_solution", pi_template="{prompt}:{solution}", seed=seed
            )
            prompt, solution = text.split(":")
            assert prompt == f"Q{i}" and solution in "abcd" and solution != solutions[i]
            shown[i][solution] += 1
    assert all(set(shown[i]) == set("abcd") - {solutions[i]} for i in shown)


def test_demonstration_is_never_the_same_problem():
    users = ["x", "x", "y", "x", "z", "y"]
    for prompts in (
        users,
        [[{"role": "user", "content": text}] for text in users],
        # The same question behind another system message is the same problem.
        [
            [{"role": "system", "content": f"{i}"}, {"role": "user", "content": x}]
            for i, x in enumerate(users)
        ],
    ):
        rows = [{"prompt": p, "solution": f"solved {x}"} for p, x in zip(prompts, users, strict=True)]
        for i, seed in ((i, seed) for i in range(len(rows)) for seed in range(8)):
            text = read_by_teacher(
                rows,
                i,
                pi="demonstration",
                seed=seed,
                pi_template="{example_prompt}|{example_solution}|{prompt}",
            )
            example, solution, own = re.search(r"(\w)\|solved (\w)\|(\w)", text).groups()
            assert own == users[i] and example == solution != own


def test_partners_are_drawn_by_seed_and_row():
    found = {
        seed: tuple(read_by_teacher(PROBLEMS, i, pi="shuffled_solution", seed=seed) for i in range(6))
        for seed in (0, 1)
    }
    again = tuple(read_by_teacher(PROBLEMS, i, pi="shuffled_solution", seed=0) for i in range(6))
    assert found[0] == again != found[1]
    number = [int(re.search(r"\n(\d+)\+", text)[1]) - 10 for text in found[0]]
    assert len({(n - i) % 30 for i, n in enumerate(number)}) > 3  # not the next row, nor any fixed offset


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Flags of a run on a tiny random model: {"student", "data", "eval_data"} -> path."""
    folder = tmp_path_factory.mktemp("opsd")
    tokenizer = characters_tokenizer(CHAT)
    sums = [(12, 34), (5, 6), (100, 200), (7, 7), (99, 1), (123, 456), (8, 80), (31, 4), (2, 2), (64, 36)]
    rows = [
        {
            "prompt": f"^{a}+{b}=", "answer": str(a + b), "privileged": "Be short.",
            "solution": f"{a}+{b} is {a + b}." + " Yes." * (a % 3),
        }
        for a, b in sums
    ]  # fmt: skip
    return {
        "student": save(folder / "student", make_model(0, vocab=len(CHARACTERS)), tokenizer),
        "data": write_rows(folder / "train.jsonl", rows),
        "eval_data": write_rows(folder / "eval.jsonl", rows[:4]),
    }


@pytest.fixture
def run(files, tmp_path):
    """run(**flags) -> rows of opsd.train's metrics; .out is where the last run wrote."""

    def run(train=opsd.train, args_class=opsd.Args, evaluate=False, **kwargs):
        run.count += 1
        run.out = tmp_path / kwargs.pop("out", f"run{run.count}")
        paths = {name: path for name, path in files.items() if evaluate or name != "eval_data"}
        return train(args_class(**{**SMALL, **paths, **kwargs, "out": str(run.out)}))

    run.count = 0
    return run


@pytest.fixture
def seen(monkeypatch):
    """What a run did: the models that it loaded, what was written and scored, by whom, behind what."""
    seen = SimpleNamespace(models=[], sampled=[], scored=[], evaluated=[], fed=[])

    def watch(name, note):
        real = getattr(opd, name)

        def watched(*args, **kwargs):
            result = real(*args, **kwargs)
            note(result, *args)
            return result

        monkeypatch.setattr(opd, name, watched)

    def feed(body, args, kwargs):
        if kwargs.get("input_ids") is not None and not kwargs.get("use_cache", True):
            seen.fed.append((body, kwargs["input_ids"].tolist()))

    def loaded(result, *_):
        seen.models.append(result[1])
        result[1].base_model.register_forward_pre_hook(feed, with_kwargs=True)

    watch("load_model", loaded)
    watch("load_pair", lambda *_: (seen.scored.clear(), seen.fed.clear()))  # what was tried out at the start
    watch("sample", lambda out, model, prompts, *_: seen.sampled.append((model, prompts, list(out))))
    watch("completion_hidden", lambda _, *call: seen.scored.append(call))
    watch("evaluate", lambda _, *call: seen.evaluated.append(call))
    return seen


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def untimed(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def teacher_at(out, step):
    return torch.load(out / f"step_{step:06d}" / "trainer.pt", weights_only=True)["teacher"]


def token_logp(model, prompt, completion):
    """Log-probabilities [T] of a completion behind a prompt, by the model's own forward on this row alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("mode", MODES)
def test_the_student_never_reads_the_pi(mode, run, seen):
    """In no mode, and the teacher always, in training and in evaluation."""
    run(pi=mode, steps=2, evaluate=True, mask_ratio=0.2)
    student, teacher = seen.models
    tokenizer = characters_tokenizer()
    texts = {student: [], teacher: []}
    for model, prompts, *_ in seen.sampled + seen.scored:
        texts[model] += [tokenizer.decode(prompt) for prompt in prompts]
    assert len(texts[student]) > 16 and all(re.fullmatch(r"\^\d+\+\d+=", text) for text in texts[student])
    if mode == "none":
        assert set(texts[teacher]) == set(texts[student])
    else:
        assert len(texts[teacher]) > 16
        assert not any(re.fullmatch(r"\^\d+\+\d+=", text) for text in texts[teacher])


BARE = "system: Be brief.\nuser: 2+3?\nassistant: "


@pytest.mark.parametrize(
    "mode, template, student_reads, teacher_reads",
    [
        ("system", CHAT, BARE, "system: Say it in French.\n\n" + BARE.removeprefix("system: ")),
        ("hidden_think", CHAT, BARE, BARE + "<think>\n2+3 is 5.\n</think>\n\n"),
        ("hidden_think", OPENING, BARE + "<think>\n", BARE + "<think>\n2+3 is 5.\n"),
    ],
)
def test_a_run_on_chats_has_these_very_texts(
    mode, template, student_reads, teacher_reads, run, seen, tmp_path
):
    tokenizer = characters_tokenizer(template)
    student = save(tmp_path / "student", make_model(0, vocab=len(CHARACTERS)), tokenizer)
    run(student=student, data=write_rows(tmp_path / "rows.jsonl", SYSTEM[:1]), pi=mode, steps=1)
    read = {model: set() for model in seen.models}
    for model, prompts, _ in seen.scored:
        read[model] |= {tokenizer.decode(ids) for ids in prompts}
    assert list(read.values()) == [{student_reads}, {teacher_reads}]


# -------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("teacher_mode", ["frozen", "live"])
def test_both_score_the_very_ids_that_were_sampled(teacher_mode, run, seen):
    """Behind prompts of different length; and the bodies are fed those ids and no others."""
    run(pi="solution", teacher_mode=teacher_mode, samples_per_prompt=2, steps=2)
    student, teacher = seen.models[0], seen.models[-1]
    written = [(r.prompt, r.completion) for _, _, rollouts in seen.sampled[-2:] for r in rollouts]
    assert len(written) == 16
    scored = (
        seen.scored[1:-1] if teacher_mode == "live" else seen.scored
    )  # the first and last are the drift's
    calls = list(zip(scored[::2], scored[1::2], strict=True))
    ours = [pair for _, (_, *call) in calls for pair in zip(*call, strict=True)]
    theirs = [pair for (_, *call), _ in calls for pair in zip(*call, strict=True)]
    assert all(a is teacher and b is student for (a, *_), (b, *_) in calls)
    assert Counter((tuple(p), tuple(y)) for p, y in ours) == Counter((tuple(p), tuple(y)) for p, y in written)
    assert [y for _, y in ours] == [y for _, y in theirs]
    tokenizer = characters_tokenizer()
    for (bare, _), (told, _) in zip(ours, theirs, strict=True):
        bare, told = tokenizer.decode(bare), tokenizer.decode(told)
        assert told.startswith(f"{bare}\n\nHere is a reference solution:\n{bare[1:-1]} is ")
    assert len({len(told) - len(bare) for (bare, _), (told, _) in zip(ours, theirs, strict=True)}) > 2

    fed = [row for body, ids in seen.fed for row in ids if body is teacher.base_model]
    shared = 0
    for (_, prompts, completions), _ in calls:  # the completions of one prompt share a row
        for _, group in groupby(zip(prompts, completions, strict=True), key=lambda pair: id(pair[0])):
            (prompt, *_), texts = zip(*group, strict=True)
            row, shared = prompt + [i for text in texts for i in text[:-1]], shared + (len(texts) == 2)
            assert any(ids[: len(row)] == row and not any(ids[len(row) :]) for ids in fed)
    assert shared >= 4
    # Text in between would have been seen: what was written is not what its text encodes to.
    assert any(tokenizer(tokenizer.decode(y)).input_ids != y for _, y in ours)


def blindfold(model, start):
    """The model attends to nothing before the start token of a row, and counts positions from there."""

    def hide(body, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is not None:
            begun = (ids == start).cumsum(1) > 0  # [B,L]
            kwargs["attention_mask"] = begun.long()
            kwargs["position_ids"] = (begun.long().cumsum(1) - 1).clamp(min=0)
        return args, kwargs

    return model.base_model.register_forward_pre_hook(hide, with_kwargs=True)


def test_a_teacher_that_cannot_see_the_pi_scores_like_the_student(run, monkeypatch):
    """Everything but the attention to the PI is in place: its tokens, the shifted positions, the padding."""
    flags = dict(pi="solution", pi_template="{solution} {prompt}", steps=1, micro_batch_size=4, batch_size=8)
    start = CHARACTERS.index("^")
    seeing = run(**flags)[0]
    assert seeing["reverse_kl"] > 0.01 and abs(seeing["pi_gap"]) > 0.001
    load_pair = opd.load_pair

    def load(*args):
        student, teacher, *rest = load_pair(*args)
        blindfold(teacher, start)
        return student, teacher, *rest

    monkeypatch.setattr(opd, "load_pair", load)
    blind = run(**flags)[0]
    assert blind["tokens"] == seeing["tokens"]
    assert blind["reverse_kl"] == approx(0, abs=1e-7) and blind["pi_gap"] == approx(0, abs=1e-6)
    assert blind["teacher_entropy"] == approx(blind["student_entropy"], rel=1e-5)


def test_hidden_states_behind_unseen_pi_are_the_students(files):
    """Token by token, rows of unequal length on both sides, in one batch."""
    tokenizer, model = opd.load_model(files["student"], "student", torch.float32, "cpu")
    rows = datasets.load_dataset("json", data_files=files["data"])["train"]
    args = opsd.Args(pi="solution", pi_template="{solution} {prompt}")
    ours = [tokenizer(row["prompt"]).input_ids for row in rows]
    theirs = [opsd.encode_teacher_prompt(tokenizer, rows, i, args, 999) for i in range(len(rows))]
    completions = [r.completion for r in opd.sample(model, ours, 1, [1], (0, 1), range(len(ours)), 12)]
    with torch.no_grad():
        alone = opd.completion_hidden(model, ours, completions)  # [N,D]
        told = opd.completion_hidden(model, theirs, completions)
        hook = blindfold(model, CHARACTERS.index("^"))
        blind = opd.completion_hidden(model, theirs, completions)
        hook.remove()
    assert alone.shape == told.shape == blind.shape == (sum(map(len, completions)), 32)
    torch.testing.assert_close(blind, alone, rtol=1e-4, atol=1e-5)
    assert (told - alone).abs().amax(1).min() > 1e-3


def test_pi_gap_is_what_the_teacher_gives_more_to_what_was_said(run, seen, files):
    """mean log q(y | PI) - log p(y), at temperature 1 whatever the loss has."""
    row = run(pi="solution", steps=1, loss_temperature=2.0, samples_per_prompt=2)[0]
    model = AutoModelForCausalLM.from_pretrained(files["student"])
    tokenizer, (_, _, rollouts) = characters_tokenizer(), seen.sampled[0]
    data = {r["prompt"]: r["solution"] for r in map(json.loads, open(files["data"]))}
    template = "{}\n\nHere is a reference solution:\n{}\n\nSolve the problem in your own words."
    log_p, log_q = [], []
    for r in rollouts:
        text = tokenizer.decode(r.prompt)
        log_p.append(token_logp(model, r.prompt, r.completion))
        told = tokenizer(template.format(text, data[text])).input_ids
        log_q.append(token_logp(model, told, r.completion))
    log_p, log_q = torch.cat(log_p), torch.cat(log_q)
    assert len(log_p) == row["tokens"]
    assert row["pi_gap"] == approx((log_q - log_p).mean().item(), rel=1e-4)
    assert row["student_logp"] == approx(log_p.mean().item(), rel=1e-5)


# -------------------------------------------------------------------------------------- without PI: plain OPD


@pytest.mark.parametrize(
    "options",
    [
        dict(loss="sg_topk", lmbda=0.5),
        dict(loss="pg", updates_per_rollout=2, gamma=0.5),
        dict(loss="k2", samples_per_prompt=2),
        dict(loss="jsd", beta=0.3, loss_temperature=1.5),
        dict(loss="reverse_kl", lmbda=0.5, temperature=0.8, lr_schedule="cosine", eval_every=2),
    ],
    ids=lambda options: options["loss"],
)
def test_without_pi_it_is_opd_with_the_initial_student_as_teacher(options, run, files):
    """Bit for bit: the weights, and every metric that both have. (SFT steps first, or nothing would move.)"""
    options = dict(steps=4, sft_steps=1, evaluate=True, lr=3e-3, **options)
    ours = untimed(run(pi="none", **options))
    final = weights(run.out / "final")
    theirs = untimed(run(opd.train, opd.Args, teacher=files["student"], **options))
    assert same(final, weights(run.out / "final")) and theirs[-1]["reverse_kl"] > 1e-4
    new = {"pi_gap", "eval_with_pi_accuracy", "eval_with_pi_len"}
    assert [{name: value for name, value in row.items() if name not in new} for row in ours] == theirs
    assert not same(final, weights(Path(files["student"])))


@pytest.mark.parametrize("loss", ["reverse_kl", "sg_topk"])
def test_a_teacher_that_knows_no_more_moves_nothing(loss, run, files):
    """The control is a control: not even rounding, which AdamW would scale up to full steps."""
    rows = run(pi="none", loss=loss, topk=3, steps=3, lr=1e-2)
    assert same(weights(run.out / "final"), weights(Path(files["student"])))
    assert [row["grad_norm"] for row in rows] == [0, 0, 0]


# ------------------------------------------------------------------------------------- weights of the teacher


def models_alive():
    gc.collect()
    return {id(x): x for x in gc.get_objects() if type(x) is LlamaForCausalLM}


@pytest.mark.parametrize("kind", TEACHERS)
def test_only_a_live_teacher_needs_no_second_copy_of_the_weights(kind, run, seen, monkeypatch):
    before, counted, update = models_alive(), [], opd.update

    def count(student, teacher, *args):
        new = [model for key, model in models_alive().items() if key not in before]
        storages = {p.data_ptr(): p.numel() for model in new for p in model.parameters()}
        counted.append((len(new), sum(storages.values()) / student.num_parameters(), teacher is student))
        return update(student, teacher, *args)

    monkeypatch.setattr(opd, "update", count)
    run(**TEACHERS[kind], steps=1)
    copies = 1 if kind == "live" else 2
    assert len(seen.models) == copies
    assert counted == [(copies, copies, kind == "live")]


def test_a_frozen_teacher_never_changes(run, seen, files):
    run(pi="solution", steps=4, save_every=2, updates_per_rollout=2)
    student, teacher = seen.models
    initial = AutoModelForCausalLM.from_pretrained(files["student"]).state_dict()
    assert same(teacher.state_dict(), initial)
    assert not any(torch.equal(p, initial[name]) for name, p in student.named_parameters())
    assert "teacher" not in torch.load(run.out / "step_000004" / "trainer.pt", weights_only=True)


def test_a_frozen_teacher_may_be_another_model(run, seen, tmp_path):
    other = save(tmp_path / "other", make_model(3, vocab=len(CHARACTERS), width=48), characters_tokenizer())
    row = run(pi="solution", steps=1, teacher=other)[0]
    assert seen.models[1].config.hidden_size == 48 and row["reverse_kl"] > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_ema_teacher_follows_its_formula(dtype, run, files):
    """teacher = decay * teacher + (1 - decay) * student after each step, from the initial student on."""
    run(
        teacher_mode="ema",
        ema_decay=0.9,
        pi="solution",
        save_every=1,
        keep=9,
        updates_per_rollout=2,
        dtype=dtype,
    )
    expected = {name: w.double() for name, w in weights(Path(files["student"])).items()}
    for step in range(1, 5):
        student, teacher = weights(run.out / f"step_{step:06d}"), teacher_at(run.out, step)
        for name, w in student.items():
            expected[name] = 0.9 * expected[name] + 0.1 * w.double()
            assert teacher[name].dtype == torch.float32
            torch.testing.assert_close(teacher[name].double(), expected[name], rtol=3e-7, atol=3e-8)
            assert (teacher[name] - w).abs().max() > 1e-4  # a step apart, by far more than those tolerances


def test_a_refreshed_teacher_becomes_the_student_at_the_stated_steps_and_no_other(run, files):
    run(refresh_every=2, pi="solution", steps=5, save_every=1, keep=9)
    student = {step: weights(run.out / f"step_{step:06d}") for step in range(1, 6)}
    student[0] = weights(Path(files["student"]))
    for step, source in {1: 0, 2: 2, 3: 2, 4: 4, 5: 4}.items():
        teacher = teacher_at(run.out, step)
        assert [s for s in student if same(teacher, student[s])] == [source], step


def test_refreshing_is_what_teaches_from_then_on(run, seen):
    """The student's next target is the copy: refreshed after every step it scores as a live teacher does."""
    live, refreshed = (
        untimed(run(pi="solution", **kind, steps=3)) for kind in (TEACHERS["live"], dict(refresh_every=1))
    )
    assert live == refreshed


@pytest.mark.parametrize("kind", TEACHERS)
def test_drift_is_the_kl_of_the_current_teacher_to_the_initial_one(kind, run, files):
    rows = run(pi="solution", **TEACHERS[kind], steps=3, eval_every=1, save_every=1, keep=9, lr=3e-3)
    if kind == "frozen":
        assert not any("teacher_drift" in row for row in rows)
        return
    drift = [row["teacher_drift"] for row in rows]
    if kind == "refreshed":
        assert drift[0] == 0 and 0 < drift[1] == drift[2]
    else:
        assert 0 < drift[0] < drift[1] < drift[2]

    # Directly: the initial teacher writes behind the first eight prompts, the current one is compared there.
    tokenizer, initial = opd.load_model(files["student"], "student", torch.float32, "cpu")
    current = AutoModelForCausalLM.from_pretrained(run.out / "step_000003")
    if kind != "live":
        current.load_state_dict(teacher_at(run.out, 3))
    data = datasets.load_dataset("json", data_files=files["data"])["train"]
    prompts = [
        opsd.encode_teacher_prompt(tokenizer, data, i, opsd.Args(pi="solution"), 999) for i in range(8)
    ]
    kls = []
    for r in opd.sample(initial, prompts, 1, [1], (~0, 1), range(8), SMALL["max_new_tokens"]):
        with torch.no_grad():
            ids = torch.tensor([r.prompt + r.completion])
            now, then = (
                model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (current, initial)
            )
        kls += (now.exp() * (now - then)).sum(-1)[len(r.prompt) - 1 : -1].tolist()
    assert drift[2] == approx(sum(kls) / len(kls), rel=1e-3)


def test_drift_is_nothing_at_the_start_and_measured_on_few_tokens():
    model, prompts = make_model(0), [[5, 6, 7]] * 8
    args = SimpleNamespace(seed=0, max_new_tokens=12)
    for limit in (256, 30):
        rollouts, logp = anchors = opsd.drift_anchors(model, prompts, [], args, limit)
        assert sum(len(r.completion) for r in rollouts) == len(logp) == min(96, limit)
        assert opsd.teacher_drift(model, anchors) == 0
        assert opsd.teacher_drift(make_model(1), anchors) > 0.1


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["ema", "live", "refreshed"])
def test_drift_is_measured_on_data_of_few_rows(rows, kind, run, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", RAW[:1] * rows)
    found = run(pi="solution", data=data, **TEACHERS[kind], steps=2, eval_every=1)
    assert found[-1]["teacher_drift"] >= 0


# ------------------------------------------------------------------------------------------------- evaluation


def copy_what_is_told(model, prompts, n, stop_ids, key, prompt_keys, *limits):
    """Stands for opd.sample: a model that answers what its prompt tells it, and 0 where that is nothing."""
    tokenizer = characters_tokenizer()
    told = [re.search(r"It is (\d+)", tokenizer.decode(prompt)) for prompt in prompts]
    answers = [tokenizer(match[1] if match else "0").input_ids + [1] for match in told]
    pairs = zip(prompts, answers, strict=True)
    return [opd.Rollout(p, y, [0.0] * len(y), True) for p, y in pairs for _ in range(n)]


@pytest.mark.parametrize("kind", TEACHERS)
def test_accuracy_with_pi_is_the_teachers_and_without_the_students(kind, run, tmp_path, monkeypatch):
    monkeypatch.setattr(opd, "sample", copy_what_is_told)
    rows = [
        {"prompt": f"{i}?", "answer": str(i), "privileged": f"It is {i if i < 7 else 9}."}
        for i in range(1, 9)
    ]
    told = dict(data=write_rows(tmp_path / "rows.jsonl", rows), pi="instruction", eval_samples=2)
    rows = run(**TEACHERS[kind], **told, eval_data=str(tmp_path / "rows.jsonl"), steps=2, eval_every=1)
    assert [row["eval_accuracy"] for row in rows] == [0, 0, 0]
    assert [row["eval_with_pi_accuracy"] for row in rows] == [0.75, 0.75, 0.75]


def test_an_answer_of_zero_is_an_answer(run, tmp_path, monkeypatch):
    """Also as a number in the file; an empty one is none, and such a row is not asked."""
    monkeypatch.setattr(opd, "sample", copy_what_is_told)
    for answers, accuracy in (([0, 0, 0, 5], 0.75), (["0", "", None, "5"], 0.5)):
        data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "?", "answer": answer} for answer in answers])
        assert run(pi="none", data=data, eval_data=data, steps=1)[0]["eval_accuracy"] == accuracy


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_ceiling_is_measured_anew_only_where_the_teacher_moves(kind, run, seen, files):
    rows = run(pi="solution", evaluate=True, **TEACHERS[kind], steps=2, eval_every=1)
    student, teacher = seen.models[0], seen.models[-1]
    pupils = [call for call in seen.evaluated if call[1] is not None]
    ceilings = [call for call in seen.evaluated if call[1] is None]
    assert len(pupils) == 3 and len(ceilings) == (1 if kind == "frozen" else 3)
    assert all(call[0] is student and call[1] is teacher for call in pupils)
    assert all(call[0] is teacher for call in ceilings)
    tokenizer = characters_tokenizer()
    held_out, with_pi = pupils[0][2], ceilings[0][2]
    bare, told = ([tokenizer.decode(x[k]) for x in held_out] for k in (0, 1))
    assert bare == ["^12+34=", "^5+6=", "^100+200=", "^7+7="]
    assert [tokenizer.decode(x.prompt) for x in with_pi] == told
    assert all("reference solution" in text for text in told)
    assert all("eval_with_pi_accuracy" in row for row in rows)

    # The rows say what an evaluation of these models says; the last of the current teacher's.
    args = opd.set_up(opsd.Args(**{**SMALL, **files, "out": "no/such/folder"}))[0]
    assert [x.answer for x in held_out] == ["46", "11", "300", "14"]
    last, _ = opd.evaluate(student, teacher, held_out, tokenizer, [1], args)
    assert {name: rows[-1][name] for name in last} == last
    ceiling, _ = opd.evaluate(teacher, None, with_pi, tokenizer, [1], args)
    assert rows[-1]["eval_with_pi_len"] == ceiling["eval_len"]
    assert rows[-1]["eval_with_pi_accuracy"] == ceiling["eval_accuracy"]


@pytest.mark.parametrize("mode", ["solution", "system"], ids=["instance-specific", "shared"])
def test_a_run_logs_what_is_promised(mode, run):
    rows = run(pi=mode, evaluate=True, teacher_mode="ema", steps=4, eval_every=2)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows == [json.loads(line) for line in open(run.out / "metrics.jsonl")]
    every = "loss reverse_kl forward_kl pi_gap completion_len truncated tokens student_entropy lr".split()
    evaluated = "eval_accuracy eval_with_pi_accuracy eval_reverse_kl eval_len eval_with_pi_len".split()
    for row in rows:
        expected = (every if row["step"] else []) + (evaluated if row["step"] % 2 == 0 else [])
        expected += ["teacher_drift"] if row["step"] in (2, 4) else []
        values = [row[name] for name in expected]
        assert all(isinstance(value, int | float) and value == value for value in values)
        assert not set(every + evaluated + ["teacher_drift"]) - set(expected) & set(row)
    assert rows[1]["reverse_kl"] > 0.001 and rows[1]["pi_gap"] != 0
    assert (run.out / "final" / "model.safetensors").is_file()


# ----------------------------------------------------------------------------------------- the teacher writes


@pytest.mark.parametrize("options", [dict(lmbda=0.0), dict(sft_steps=1)], ids=["lmbda", "sft"])
def test_what_the_teacher_writes_is_learned_behind_the_bare_prompt(options, run, seen):
    row = run(pi="solution", steps=1, samples_per_prompt=2, loss="forward_kl", **options)[0]
    student, teacher = seen.models
    (writer, prompts, rollouts), tokenizer = seen.sampled[0], characters_tokenizer()
    assert writer is teacher and len(seen.sampled) == 1 and len(rollouts) == 8
    assert all("reference solution" in tokenizer.decode(p) for p in prompts)
    wrote = {id(model): [] for model in (student, teacher)}
    for model, prompts, completions in seen.scored:
        wrote[id(model)] += [(tokenizer.decode(p), y) for p, y in zip(prompts, completions, strict=True)]
    pairs = [(tokenizer.decode(r.prompt), r.completion) for r in rollouts]
    assert sorted(wrote[id(teacher)]) == sorted(pairs)
    assert sorted(wrote[id(student)]) == sorted((text.split("\n")[0], y) for text, y in pairs)
    # What the teacher wrote it finds likelier; SFT's loss is what the student finds.
    assert row["pi_gap"] > 0
    assert row["loss"] == approx(
        -row["student_logp"] if "sft_steps" in options else row["forward_kl"], rel=1e-5
    )


# -------------------------------------------------------------------------------------- resume, ranks, dtypes


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_resumed_run_is_the_same_run(kind, run):
    """4 steps = 2 steps, what was saved, 2 steps: bit for bit, the teacher's weights and drift as well."""
    options = dict(pi="masked_solution", evaluate=kind == "frozen", eval_every=1, **TEACHERS[kind])
    whole = untimed(run(steps=4, out="whole", **options))
    final, state = weights(run.out / "final"), torch.load(run.out / "step_000004" / "trainer.pt")
    run(steps=2, out="halves", **options)
    halves = untimed(run(steps=4, out="halves", resume=True, **options))
    assert halves == whole and same(weights(run.out / "final"), final)
    resumed = torch.load(run.out / "step_000004" / "trainer.pt")
    assert ("teacher" in state) == ("teacher" in resumed) == (kind in ("ema", "refreshed"))
    assert "teacher" not in state or same(resumed["teacher"], state["teacher"])


def test_a_refreshed_teacher_survives_a_resume(run):
    """Stopped between two refreshes: its copy of step 2 is neither the initial nor the current student."""
    options = dict(pi="solution", refresh_every=2, eval_every=1)
    whole = untimed(run(out="whole", steps=4, **options))
    run(out="parts", steps=3, **options)
    assert untimed(run(out="parts", steps=4, resume=True, **options)) == whole


def test_two_ranks_are_one_process(run, files, tmp_path):
    options = dict(
        pi="masked_solution", teacher_mode="ema", ema_decay=0.8, eval_every=2, samples_per_prompt=2
    )
    one = untimed(run(evaluate=True, **options))
    final, teacher = weights(run.out / "final"), teacher_at(run.out, 4)
    out = tmp_path / "two"
    done = run_script("opsd.py", ranks=2, **{**SMALL, **files, **options, "out": out})
    assert done.returncode == 0, done.stderr[-2000:]
    two = untimed(json.loads(line) for line in open(out / "metrics.jsonl"))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == approx(b, rel=1e-3, abs=1e-6)
    for found, expected in ((weights(out / "final"), final), (teacher_at(out, 4), teacher)):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_masks_do_not_depend_on_the_batch(run, seen):
    """A row's masked solution is the same in whatever batch it comes."""
    shown = []
    for batch_size in (2, 5):
        seen.scored.clear()
        run(pi="masked_solution", batch_size=batch_size, steps=20 // batch_size, max_new_tokens=2)
        texts = {characters_tokenizer().decode(p) for _, prompts, _ in seen.scored for p in prompts}
        shown.append({text for text in texts if "reference" in text})
    assert shown[0] == shown[1] and len(shown[0]) == 10


def test_updates_in_bfloat16_see_the_updates_before_them(run, monkeypatch):
    """The second update on the same rollouts scores with the weights that the first one left."""
    options = dict(
        teacher_mode="live", loss="forward_kl", updates_per_rollout=3, steps=2, lr=1e-2, dtype="bfloat16"
    )
    found, update = run(**options)[-1], opd.update

    def with_fresh_casts(*args):
        torch.clear_autocast_cache()
        return update(*args)

    monkeypatch.setattr(opd, "update", with_fresh_casts)
    assert found["loss"] == run(**options)[-1]["loss"]


# -------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(files, tmp_path, monkeypatch, capsys):
    """refused(**flags) -> the one line that `opsd.py` says before it leaves with code 2, nothing written."""

    def refused(out="out", **kwargs):
        before = sorted(tmp_path.rglob("*"))
        options = {**SMALL, **{k: v for k, v in files.items() if k != "eval_data"}, **kwargs}
        switches = [f"--{name}" for name in [n for n, value in options.items() if value is True]]
        options = {name: value for name, value in options.items() if value is not True}
        monkeypatch.setattr(sys, "argv", ["opsd.py", *flags(**options, out=tmp_path / out), *switches])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            opd.main(opsd.Args, opsd.train)
        line, *more = capsys.readouterr().err.splitlines()
        assert not more and line.startswith("opsd.py: error: ") and stopped.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before
        return line.removeprefix("opsd.py: error: ")

    return refused


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pi="hint"), "--pi hint: unknown; choose one of answer solution masked_solution"),
        (dict(teacher_mode="moving"), "--teacher_mode moving: unknown; choose one of frozen ema live"),
        (dict(teacher_mode="ema", ema_decay=0), "--ema_decay 0.0: must be in (0,1)"),
        (dict(teacher_mode="ema", ema_decay=1), "--ema_decay 1.0: must be in (0,1)"),
        (dict(teacher_mode="ema", ema_decay="nan"), "--ema_decay nan: must be in (0,1)"),
        (dict(mask_ratio=2), "--mask_ratio 2.0: must be in [0,1]"),
        (dict(mask_ratio="nan"), "--mask_ratio nan: must be in [0,1]"),
        (dict(refresh_every=-1), "--refresh_every -1: must be in [0,inf)"),
        (dict(refresh_every=5, teacher_mode="live"), "--refresh_every 5: goes with frozen, not live"),
        (dict(refresh_every=5, teacher_mode="ema"), "--refresh_every 5: goes with frozen, not ema"),
        (
            dict(teacher="x", teacher_mode="live"),
            "--teacher x: goes with frozen; live starts from the student",
        ),
        (dict(teacher="x", teacher_mode="ema"), "--teacher x: goes with frozen; ema starts from the student"),
    ],
)
def test_flags_out_of_range(options, message, refused):
    assert refused(**options).startswith(message)


@pytest.mark.parametrize(
    "pi, template, message",
    [
        ("answer", "{prompt} Think!", "--pi answer needs {answer} in it"),
        ("solution", "{prompt} {answer}", "--pi solution needs {solution} in it"),
        ("system", "A rule.", "--pi system needs {privileged} in it"),
        ("instruction", "", "--pi instruction needs {privileged} in it"),
        ("hidden_think", "Hm.", "--pi hidden_think needs {solution} or {answer} in it"),
        ("demonstration", "{prompt} {example_prompt}", "--pi demonstration needs {example_solution} in it"),
        ("answer", "It is {answer}.", "needs {prompt} in it, or the teacher would not see the problem"),
        (
            "answer",
            "{prompt} {answer} {hint}",
            "no field {hint}; there are prompt answer solution privileged",
        ),
        ("answer", "{prompt.x} {answer}", "no field {prompt.x}"),
        ("answer", "{prompt[0]} {answer}", "no field {prompt[0]}"),
        ("answer", "{0} {prompt} {answer}", "no field {0}"),
        ("answer", "{} {prompt} {answer}", "no field {}"),
        ("answer", "{prompt} {answer", "expected '}' before end of string); write {{ for a brace"),
        ("answer", "} {prompt} {answer}", "Single '}' encountered in format string); write {{ for a brace"),
        # Python's format knows more than names; none of that may reach the data.
        ("answer", "{prompt} {answer!x}", "--pi_template"),
        ("answer", "{prompt} {answer:d}", "--pi_template"),
        ("answer", "{prompt:{hint}} {answer}", "--pi_template"),
        # Another problem is shown by one mode only.
        ("answer", "{prompt} {answer} {example_prompt}", "--pi_template"),
        # One line, also where the template has two.
        ("answer", "Look:\n{prompt}", "--pi answer needs {answer} in it"),
    ],
)
def test_templates_that_would_not_do(pi, template, message, refused):
    line = refused(pi=pi, pi_template=template)
    assert line.startswith("--pi_template") and message in line


COLUMN = {
    **{"answer": "answer", "solution": "solution", "masked_solution": "solution", "system": "privileged"},
    **{"instruction": "privileged", "demonstration": "solution", "shuffled_solution": "solution"},
}


@pytest.mark.parametrize("pi, flag", [*((pi, "data") for pi in COLUMN), ("solution", "eval_data")])
def test_a_missing_column_is_named(pi, flag, refused, tmp_path):
    rows = [{"prompt": row["prompt"], "answer": "5", "unused": "x"} for row in RAW]
    path = write_rows(
        tmp_path / "rows.jsonl", [{k: v for k, v in r.items() if k != COLUMN[pi]} for r in rows]
    )
    line = refused(pi=pi, **{flag: path})
    assert line.startswith(f"--{flag} {path}: no column '{COLUMN[pi]}', only prompt, ")


@pytest.mark.parametrize("flag", ["data", "eval_data"])
def test_hidden_think_needs_one_of_two_columns(flag, refused, tmp_path):
    rows = [{"prompt": row["prompt"], "answer": ""} for row in RAW]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert refused(pi="hidden_think", **{flag: path}).startswith(
        f"--{flag} {path}, row 0: --pi hidden_think needs 'answer', missing or empty there"
    )


@pytest.mark.parametrize(
    "pi, flag",
    [
        *((pi, "data") for pi in [*COLUMN, "hidden_think"]),
        ("answer", "eval_data"),
        ("demonstration", "eval_data"),
    ],
)
def test_the_first_row_with_empty_pi_is_named(pi, flag, refused, tmp_path):
    """Also where the row would have been shown to another one before."""
    column = COLUMN.get(pi, "solution")
    values = [{"prompt": f"{i}?", "answer": f"{i}", "solution": f"a{i}", "privileged": "x"} for i in range(6)]
    values[3][column], values[5][column] = "", None
    path = write_rows(tmp_path / "rows.jsonl", values)
    line = refused(pi=pi, **{flag: path})
    assert line.startswith(f"--{flag} {path}, row 3: --pi {pi} needs '{column}', missing or empty there")


def test_pi_longer_than_the_context(refused, tmp_path):
    rows = [{**RAW[0]}, {**RAW[1], "solution": "4" * 1100}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for flag in ("data", "eval_data"):
        line = refused(pi="solution", pi_template="{prompt}{solution}", **{flag: path})
        assert line.startswith(
            f"--{flag} {path}, row 1: the prompt with its PI has 1110 tokens; the model has room for"
        )
        assert "1012 before --max_new_tokens 12" in line


def test_pi_that_just_fits(run, tmp_path):
    rows = [{**RAW[0], "solution": "4" * (1024 - 12 - 10)}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run(data=path, pi="solution", pi_template="{prompt}{solution}", steps=1)


@pytest.mark.parametrize("pi", ["shuffled_solution", "demonstration"])
@pytest.mark.parametrize("flag", ["data", "eval_data"])
def test_a_row_without_a_partner(pi, flag, refused, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", RAW[:1])
    assert refused(pi=pi, **{flag: path}).startswith(f"--{flag} {path}, row 0: no other row has another ")


@pytest.mark.parametrize("pi", ["answer", "instruction", "demonstration"])
def test_a_chat_without_a_user_has_no_place_for_pi(pi, refused, tmp_path):
    chats = [[{"role": "user", "content": "2+3?"}], [{"role": "system", "content": "4+4?"}]]
    path = write_rows(tmp_path / "rows.jsonl", [{**RAW[0], "prompt": chat} for chat in chats])
    line = refused(pi=pi, data=path).removeprefix(f"--data {path}, row ")
    assert line[0] in "01" and "user" in line


def test_a_chat_template_that_refuses_a_system_message(refused, tmp_path):
    """As Gemma's does."""
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role!') }}{% endif %}"
    tokenizer = characters_tokenizer(refuses + CHAT)
    student = save(tmp_path / "student", make_model(0, vocab=len(CHARACTERS)), tokenizer)
    path = write_rows(tmp_path / "rows.jsonl", USER)
    line = refused(pi="system", student=student, data=path)
    assert line.startswith(f"--data {path}, row 0: ") and "No system role!" in line


def test_a_teacher_of_another_shape_cannot_be_refreshed(refused, tmp_path):
    """Refreshing would copy the student's weights into it."""
    other = save(tmp_path / "other", make_model(3, vocab=len(CHARACTERS), width=48), characters_tokenizer())
    assert refused(teacher=other, refresh_every=1).startswith(("--refresh_every 1: ", f"--teacher {other}: "))


@pytest.mark.parametrize(
    "change",
    [
        dict(pi="answer"),
        dict(teacher_mode="live"),
        dict(ema_decay=0.5),
        dict(pi_template="{privileged}"),
        dict(seed=1),
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_is_not_continued_as_another(change, run, refused):
    run(teacher_mode="ema", steps=1, out="out")
    (name, value), *_ = change.items()
    line = refused(**{"teacher_mode": "ema", "steps": 2, "resume": True, **change})
    assert line.startswith(f"--{name} {value}: the run in --out {run.out} was made with ")


def test_a_run_of_opd_is_not_continued_as_self_distillation(run, refused, files):
    run(opd.train, opd.Args, teacher=files["student"], steps=1, out="out")
    assert "--out" in refused(teacher=files["student"], steps=2, resume=True)


def test_help_explains_every_mode(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opsd.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        opd.main(opsd.Args, opsd.train)
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    modes = text[text.index("--pi S ") : text.index("--pi_template ", text.index("--pi S "))]
    for mode in MODES:
        assert re.search(rf"\b{mode}(:| \(control)", modes), mode
    for words in ("frozen: initial weights", "ema: moving average", "live: the student's own"):
        assert words in text
    for flag in "mask_ratio ema_decay refresh_every pi_template loss lmbda sft_steps".split():
        assert f"--{flag} " in text
