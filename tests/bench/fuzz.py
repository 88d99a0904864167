"""Random flags: valid ones run for two steps with finite numbers; invalid ones end in one line, exit code 2.

    python tests/bench/fuzz.py --valid 300 --invalid 300 --seed 0     # about ten minutes
    python tests/bench/fuzz.py --only valid:17 --seed 0               # repeats one case

Each case is a function of the seed and its number. Combinations that opd.py rejects, such as a sampled loss
with --top_p below 1, are never drawn as valid. Each invalid case sets one flag to a value that no run
can use.
"""

import argparse
import contextlib
import io
import json
import math
import random
import re
import sys
import tempfile
from pathlib import Path

from flags import positive

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import PROMPTS, make_model, make_tokenizer, save, write_rows  # noqa: E402

import opd  # noqa: E402
import opsd  # noqa: E402

INVALID = {  # flag -> values that no run can use
    **{flag: ("0", "-1", "2.5", "many", "") for flag in "topk steps batch_size samples_per_prompt".split()},
    **{flag: ("0", "-3", "x") for flag in "micro_batch_size max_prompt_tokens max_new_tokens keep".split()},
    **{flag: ("0", "-2", "1e3") for flag in "updates_per_rollout chunk_tokens eval_samples".split()},
    **{flag: ("-1", "0.5", "no") for flag in "warmup_steps sft_steps seed eval_every save_every".split()},
    **{
        flag: ("0", "-1", "nan", "inf", "hot")
        for flag in "temperature loss_temperature lr ratio_clip".split()
    },
    **{flag: ("-0.1", "1.1", "nan", "?") for flag in "gamma lmbda".split()},
    **{flag: ("0", "1", "-1", "nan", "1.5") for flag in "beta alpha mu".split()},
    **{"kl_weight": ("-0.1", "1.1", "nan"), "tau": ("-1", "nan"), "eta": ("-1", "inf")},
    **{"pg_baseline": ("mean", ""), "pg_clip_reward": ("0", "-1", "nan"), "show_samples": ("-1", "9", "x")},
    **{"chat_template_kwargs": ("{", "[]", "1"), "teacher_template": ("mine", ""), "dry_run": ("maybe",)},
    **{
        "top_p": ("0", "1.1", "nan", "-0.5"),
        "max_grad_norm": ("0", "-1", "nan"),
        "weight_decay": ("-1", "nan"),
    },
    **{"loss": ("kl", "", "TOPK"), "topk_source": ("both", "Student"), "lr_schedule": ("exp", "")},
    **{"dtype": ("float16", "int8"), "device": ("tpu", "cuda:99"), "data": ("no.jsonl", "no_folder")},
    **{"student": ("no_model",), "teacher": ("no_model",), "eval_data": ("no.parquet",), "nonsense": ("1",)},
}
INVALID_OPSD = {
    **{"pi": ("hints", "", "Answer"), "teacher_mode": ("old", ""), "ema_decay": ("0", "1", "nan", "-1")},
    **{"mask_ratio": ("-0.1", "1.1", "nan"), "refresh_every": ("-1", "x")},
    **{"pi_template": ("nothing", "{", "{prompt", "{prompt.x}", "{unknown} {prompt}")},
}


def valid(rng):
    """-> script and flags of a run that should succeed."""
    script = rng.choice((opd, opsd))
    loss = rng.choice(list(opd.LOSSES))
    sampled = opd.LOSSES[loss][0] == "sampled"
    temperature = rng.choice((0.3, 1.0, 1.7))
    flags = {
        "loss": loss,
        "steps": 2,
        "topk": rng.choice((1, 2, 5, 20, 40)),
        "beta": rng.uniform(0.01, 0.99),
        "alpha": rng.uniform(0.01, 0.99),
        "kl_weight": rng.random(),
        "mu": rng.uniform(0.01, 0.99),
        "tau": rng.uniform(0, 4),
        "eta": rng.uniform(0, 2),
        "pg_baseline": rng.choice(("none", "kl")),
        "pg_clip_reward": rng.choice((0.5, 5.0)),
        "teacher_template": rng.choice(("student", "own")),
        "chat_template_kwargs": '{"enable_thinking": false}',
        "show_samples": rng.randint(0, 2),
        "gamma": rng.choice((0, 0.5, 1)),
        "temperature": temperature,
        "loss_temperature": temperature if sampled else rng.choice((0.5, 1.0, 2.0)),
        "top_p": 1.0 if sampled else rng.choice((0.2, 0.9, 1.0)),
        "batch_size": rng.randint(1, 6),
        "samples_per_prompt": rng.randint(1, 3),
        "micro_batch_size": rng.randint(1, 9),
        "max_prompt_tokens": 64,
        "max_new_tokens": rng.choice((1, 2, 9, 30)),
        "lr": 10 ** rng.uniform(-6, -2),
        "lr_schedule": rng.choice(("constant", "linear", "cosine")),
        "warmup_steps": rng.randint(0, 3),
        "weight_decay": rng.choice((0.0, 0.1)),
        "max_grad_norm": rng.choice((0.1, 1.0, math.inf)),
        "lmbda": 1.0 if sampled else rng.choice((0.0, 0.5, 1.0)),
        "sft_steps": rng.randint(0, 2),
        "updates_per_rollout": rng.randint(1, 3) if loss == "pg" or not sampled else 1,
        "ratio_clip": rng.uniform(0.05, 0.5),
        "chunk_tokens": rng.choice((1, 7, 512)),
        "gradient_checkpointing": rng.random() < 0.3,
        "dtype": rng.choice(("float32", "float32", "bfloat16")),
        "seed": rng.randrange(10**6),
        "eval_every": rng.randint(0, 2),
        "eval_samples": rng.randint(1, 3),
        "save_every": rng.randint(0, 2),
        "keep": rng.randint(1, 3),
        "device": "cpu",
    }
    if rng.random() < 0.5:
        flags["topk_source"] = rng.choice(("student", "teacher", "union", "intersection"))
    if script is opsd:
        flags["pi"] = rng.choice(list(opsd.TEMPLATES))
        flags["teacher_mode"] = rng.choice(("frozen", "ema", "live"))
        flags["ema_decay"], flags["mask_ratio"] = rng.uniform(0.01, 0.999), rng.random()
        flags["refresh_every"] = rng.randint(0, 2) if flags["teacher_mode"] == "frozen" else 0
    return script, flags


def invalid(rng):
    """-> script, the valid flags, the name of the invalid flag and its possible values."""
    script = rng.choice((opd, opsd))
    table = {**INVALID, **(INVALID_OPSD if script is opsd else {})}
    flag = rng.choice(list(table))
    return (
        script,
        {"steps": 2, "max_new_tokens": 4, "max_prompt_tokens": 64, "device": "cpu"},
        flag,
        table[flag],
    )


def run(kind, number, seed, paths, folder):
    """One case -> None, or a description of the failure."""
    rng, out = random.Random(f"{kind} {number} {seed}"), folder / f"{kind}{number}"
    said, words = io.StringIO(), []
    if kind == "valid":
        script, flags = valid(rng)
    else:
        script, flags, flag, values = invalid(rng)
        flags = {**flags, flag: rng.choice(values)}
    given = {name: path for name, path in paths.items() if name != "teacher" or script is opd}
    flags = {**given, "out": str(out), **flags}
    for name, value in flags.items():
        words += [f"--{name}"] * (value is True) if isinstance(value, bool) else [f"--{name}", str(value)]
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *words]
    code = 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            opd.main(script.Args, script.train)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        sys.argv = argv
    if kind == "invalid":
        lines = [
            line
            for line in said.getvalue().splitlines()
            if "step/s" not in line and "s/step" not in line and line.strip()
        ]
        good = code == 2 and len(lines) == 1 and not out.exists() and (flag in lines[0])
        return None if good else f"--{flag} {flags[flag]!r}: exit code {code}, {lines[-3:]}"
    if code:
        return said.getvalue().splitlines()[-1]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    bad = {k for row in rows for k, v in row.items() if not math.isfinite(v)}
    return f"not finite: {sorted(bad)}" if bad or rows[-1]["step"] != 2 else None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--valid", type=positive, default=300)
    parser.add_argument("--invalid", type=positive, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="repeat one case, as kind:number")
    args = parser.parse_args()
    if args.only and not re.fullmatch(r"(in)?valid:\d+", args.only):
        parser.error(f"--only {args.only}: write valid:NUMBER or invalid:NUMBER")
    cases = [("valid", i) for i in range(args.valid)] + [("invalid", i) for i in range(args.invalid)]
    if args.only:
        kind, number = args.only.split(":")
        cases = [(kind, int(number))]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        more = {"privileged": "be brief"}
        data = [{"prompt": p, "answer": str(i), "solution": f"{p}{i}", **more} for i, p in enumerate(PROMPTS)]
        tokenizer = make_tokenizer()
        paths = {
            "student": save(folder / "student", make_model(0), tokenizer),
            "teacher": save(folder / "teacher", make_model(1, width=48), tokenizer),
            "data": write_rows(folder / "train.jsonl", data),
            "eval_data": write_rows(folder / "eval.jsonl", data[:3]),
        }
        for kind, number in cases:
            wrong = run(kind, number, args.seed, paths, folder)
            if wrong:
                failed.append(f"--only {kind}:{number} --seed {args.seed}: {wrong}")
                print(failed[-1], flush=True)
    print(f"seed {args.seed}: {len(cases)} cases, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
