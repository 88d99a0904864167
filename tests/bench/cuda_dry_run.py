"""A GPU run without a GPU, on fake tensors: they have a shape, a dtype and a device (cuda:0), but no values.

    pip install -c constraints.txt "torch===2.13.0" -e ".[dev]"  # the CUDA wheel, 5 GB (=== excludes +cpu)
    python tests/bench/cuda_dry_run.py

It prints one line for each check, ok or the error (2 minutes; exit code 1 if one failed). It finds tensors on
the wrong device and shapes that do not fit: in each part of a step, in an update (scoring, backward, AdamW)
with every loss, and in whole runs; in float32 and under bfloat16 autocast.

It cannot show the numerics of CUDA kernels, or which dtypes they take; memory; synchronisation and streams;
autograd's own engine (see backward); nccl and several ranks; loading, saving and --resume; or branches that
depend on values, such as the routing of experts. A value that the code reads is made up: 0, 1, 2, ... for a
list of integers, otherwise 0, 0.5 or False. A mask that is used as an index selects everything.
"""

import contextlib
import io
import sys
import tempfile
import traceback
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses import fake_tensor
from torch.optim import optimizer as optimizers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import SMALL, VOCAB, make_args, make_family, make_tokenizer, write_rows  # noqa: E402

import opd  # noqa: E402
import opsd  # noqa: E402

GPU, PROMPTS, failed = torch.device("cuda:0"), [[5, 6, 7], [8, 9, 10, 11, 12]], []


class FakeValues(fake_tensor.FakeTensorMode):
    """FakeTensorMode with made-up values, where FakeTensorMode itself raises."""

    def dispatch(self, func, types, args=(), kwargs=None):
        try:
            return super().dispatch(func, types, args, kwargs or {})
        except fake_tensor.DataDependentOutputException:  # item(), bool()
            return 0.5 if args[0].is_floating_point() else 0
        except fake_tensor.DynamicOutputShapeException:  # nonzero(), which x[mask] calls
            return args[0].new_zeros(args[0].numel(), args[0].ndim, dtype=torch.long)


@torch.no_grad()
def backward(tensor, gradient=None):
    """Tensor.backward without autograd's engine, which needs a driver: calls the nodes, the latest first."""
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    gradients = {tensor.grad_fn: {tensor.output_nr: gradient}}
    while gradients:
        node = max(gradients, key=lambda node: node._sequence_nr())
        given = gradients.pop(node)
        passed = node(*(given.get(i) for i in range(len(node._input_metadata))))
        passed = passed if isinstance(passed, tuple) else (passed,)
        for (target, i), x in zip(node.next_functions, passed, strict=bool(node.next_functions)):
            if target is not None and x is not None:
                expected, sums = target._input_metadata[i], gradients.setdefault(target, {})
                assert x.device == expected.device, f"{node.name()}: gradient on {x.device}"
                x = x.sum_to_size(expected.shape).to(expected.dtype)
                sums[i] = sums[i] + x if i in sums else x


def pretend():
    """Replace what needs a driver, a file or a value."""
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda: True
    torch.cuda.set_device = torch.cuda.synchronize = torch.cuda.max_memory_allocated = lambda *_: 0
    fake_tensor.FakeTensorMode.avoid_device_init = True  # needed because of is_available above
    torch.Tensor.backward = backward
    fake_tensor.FakeTensor.tolist = lambda x: [0.5] * len(x) if x.is_floating_point() else [*range(len(x))]
    weakref.getweakrefs = lambda x: []  # Module.to refuses a tensor that has any; fake tensors do
    for module in (optimizers, torch.utils._foreach_utils):  # so that foreach kernels run, as on a GPU
        module._foreach_supported_types.append(fake_tensor.FakeTensor)
    made = lambda family, dtype, **_: (make_family(family).to(dtype), {"missing_keys": []})  # noqa: E731
    opd.AutoModelForCausalLM.from_pretrained, opd.save_model = made, lambda *_, **__: None
    opd.AutoTokenizer.from_pretrained = lambda *_, **__: make_tokenizer()
    fake_tensor.log.disabled = True  # it logs the traceback of an error


def check(name, function, *inputs):
    """Print whether the function raises -> what it returns, or None."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = function(*inputs)
        print(f"ok      {name}", flush=True)
        return result
    except Exception as error:
        cause = error.__cause__ or error  # of a UserError
        at = [x for x in traceback.extract_tb(cause.__traceback__) if Path(x.filename).parent == ROOT][-1]
        print(f"FAILED  {name}: {at.filename}:{at.lineno}: {cause!r}", flush=True)
        failed.append(name)


def check_parts(family, args, names):
    """The parts of a step one by one, and updates with the losses of these names."""
    kind = f"{family} {args.dtype}:"
    student, teacher, *_ = check(f"{kind} load_pair", opd.load_pair, family, family, args, GPU) or sys.exit(1)
    # Completions of equal length: the mask of pg's advantages must select everything (see the docstring).
    rollouts = [opd.Rollout(prompt, [5] * 6, [0.5] * 6, False) for prompt in PROMPTS for _ in range(2)]
    prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
    logits, tokens = torch.zeros(24, VOCAB, device=GPU), torch.zeros(24, dtype=torch.long, device=GPU)
    with torch.autocast("cuda", torch.bfloat16, enabled=args.dtype == "bfloat16"):
        check(f"{kind} sample", opd.sample, student, PROMPTS, 3, [0], (0, 1), [0, 1], 6, 0.7, 0.9)
        for name, student.shares_prompts in (("a row each", False), ("shared rows", True)):
            check(f"{kind} completion_hidden, {name}", opd.completion_hidden, student, prompts, completions)
        check(f"{kind} project", opd.project, student, logits[:, :32].to(getattr(torch, args.dtype)))
        for source in ("student", "teacher", "union", "intersection"):
            inputs = (logits, logits, tokens, replace(args, topk_source=source))
            check(f"{kind} token_metrics, {source}", opd.token_metrics, *inputs)
        for name in names:
            optimizer = torch.optim.AdamW(student.parameters())
            chosen = replace(args, gradient_checkpointing=name == "pg")  # once is enough
            inputs = (student, teacher, rollouts, prompts, opd.LOSSES[name], optimizer, chosen, 1)
            check(f"{kind} update, {name}", opd.update, *inputs)


def check_runs(folder, dtype):
    """Whole runs, with each kind of teacher."""
    rows = [{"prompt": f"^{i}+2=", "answer": "1", "privileged": "a;b"} for i in range(10)]
    data = write_rows(folder / "rows.jsonl", rows)
    flags = {**SMALL, "device": "cuda", "dtype": dtype, "student": "llama", "data": data, "eval_data": data}
    flags.update(steps=2, batch_size=2, samples_per_prompt=2, max_new_tokens=3, eval_every=2)
    kinds = ({}, {"refresh_every": 1}, {"teacher_mode": "ema"}, {"teacher_mode": "live"})
    runs = [(opd, dict(teacher="gemma2", sft_steps=1, updates_per_rollout=2)), *((opsd, x) for x in kinds)]
    for i, (module, more) in enumerate(runs):
        args = module.Args(**flags, **more, out=str(folder / f"{i}"))
        check(f"{dtype}: {module.__name__}.train, {more}", module.train, args)


def main():
    torch.version.cuda or sys.exit("this torch is not a CUDA build: install one, as the docstring says")
    pretend()
    more = dict(gamma=0.5, pg_baseline="kl", pg_clip_reward=2.0, loss_temperature=2.0, micro_batch_size=4)
    for dtype in ("float32", "bfloat16"):
        args = make_args(device="cuda", dtype=dtype, topk_source="union", **more)
        with FakeValues(), tempfile.TemporaryDirectory() as folder:
            check_parts("llama", args, opd.LOSSES)
            check_parts("gemma2", args, ("reverse_kl", "sg_topk", "pg"))
            check_runs(Path(folder), dtype)
    sys.exit(f"{len(failed)} failed" if failed else 0)


if __name__ == "__main__":
    main()
