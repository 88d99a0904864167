"""The paths that only a GPU takes: bfloat16 autocast, nccl, timing that waits for the device."""

import math

import pytest
import torch
from conftest import SMALL, run_script

import opd
import opsd

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def cuda(**kwargs):
    return {**SMALL, "device": "cuda", "steps": 2, **kwargs}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["reverse_kl", "sg_topk", "pg"])
def test_opd_takes_real_steps(tiny, tmp_path, loss, dtype):
    rows = opd.train(opd.Args(**tiny, **cuda(loss=loss, dtype=dtype), out=str(tmp_path / "out")))
    assert rows[-1]["step"] == 2 and all(math.isfinite(x) for row in rows for x in row.values())


def test_cpu_and_gpu_agree_in_float32(tiny, tmp_path):
    ours, theirs = (
        opd.train(opd.Args(**tiny, **cuda(device=device, dtype="float32"), out=str(tmp_path / device)))
        for device in ("cpu", "cuda")
    )
    assert ours[1]["reverse_kl"] == pytest.approx(theirs[1]["reverse_kl"], rel=1e-2)  # TF32 has 10 bits


@pytest.mark.parametrize("mode", ["frozen", "ema", "live"])
def test_opsd_takes_real_steps(tiny, tmp_path, mode):
    paths = {name: tiny[name] for name in ("student", "data", "eval_data")}
    args = cuda(pi="solution", teacher_mode=mode, max_prompt_tokens=200)
    rows = opsd.train(opsd.Args(**paths, **args, out=str(tmp_path / "out")))
    assert rows[-1]["step"] == 2 and math.isfinite(rows[-1]["pi_gap"])


def test_nccl_with_one_process(tiny, tmp_path):
    done = run_script("opd.py", ranks=1, **tiny, **cuda(), out=tmp_path / "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("vocab, tolerance", [(50, 1e-5), (151_669, 2e-3)])
@pytest.mark.parametrize("loss", opd.LOSSES)
def test_losses_have_the_values_and_gradients_of_the_cpu(loss, vocab, tolerance):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 16, vocab, generator=generator)
    advantage, behaviour_logp = torch.randn(2, 16, generator=generator)
    inputs = (torch.randint(vocab, (16,), generator=generator), advantage, behaviour_logp)
    args = opd.Args(loss=loss, topk_source="teacher" if loss.endswith("topk_forward") else "student")
    found = []
    for device in ("cpu", DEVICE):
        leaf = student.to(device, copy=True).requires_grad_()
        rest = [x.to(device) for x in (teacher, *inputs)]
        values = opd.token_loss(opd.LOSSES[loss], leaf, *rest, args)
        values.sum().backward()
        found.append((values.detach().cpu(), leaf.grad.cpu()))
    for ours, theirs in zip(*found, strict=True):  # the values, the gradients
        assert (ours - theirs).abs().max() <= tolerance * ours.abs().max()


def test_cudnn_attention_is_off(tiny, tmp_path):
    """It plans anew for each length, which in decoding is each token: three times slower on an H200."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    opd.train(opd.Args(**tiny, **cuda(), out=str(tmp_path / "out")))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
