"""One process, two ranks and two nodes are the same run to rounding: rollouts, metrics, weights."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, flags, run_script, train_rows
from pytest import approx
from safetensors.torch import load_file

import opd

EXACT = {"step", "tokens", "completion_len", "truncated", "repetition", "lr", "eval_len", "eval_accuracy"}
TIMES = {"tokens_per_s", "sample_s", "teacher_s", "student_s", "peak_mem_gb"}
RUN = {**SMALL, "loss": "pg", "gamma": 0.5, "samples_per_prompt": 2, "eval_every": 3, "save_every": 2}
RUN["max_grad_norm"] = 0.5  # always clipped: by the norm over all ranks


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The run in one process -> its folder."""
    out, halves, sample = tmp_path_factory.mktemp("alone") / "out", [], opd.sample

    def recorded(*inputs):
        rollouts = sample(*inputs)
        sizes = [len(r.completion) for r in rollouts]
        halves.append((sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :])))
        return rollouts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "sample", recorded)
        opd.train(opd.Args(**{**RUN, **tiny, "out": str(out)}))
    # Two ranks will have unequal shares of the tokens: a mean of their means would be another number.
    assert sum(max(half) > 1.1 * min(half) for half in halves) > len(halves) / 2
    return out


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(out, alone):
    assert [row["step"] for row in rows(out)] == [row["step"] for row in rows(alone)] == [0, 1, 2, 3, 4]
    for found, expected in zip(rows(out), rows(alone), strict=True):
        assert found.keys() == expected.keys()
        for name in expected.keys() - TIMES:
            assert found[name] == approx(expected[name], rel=1e-12 if name in EXACT else 1e-4), name
    found, expected = (load_file(folder / "final" / "model.safetensors") for folder in (out, alone))
    gaps = torch.cat([(found[name] - expected[name]).abs().flatten() for name in expected])
    # AdamW turns any gradient into a step of about lr: where it is all rounding, the sign is chance.
    assert gaps.mean() < 1e-3 * RUN["lr"] and (gaps > 0.1 * RUN["lr"]).float().mean() < 1e-3


def test_two_ranks_are_one_process(tiny, alone, tmp_path):
    result = run_script("opd.py", ranks=2, **{**RUN, **tiny, "out": tmp_path / "out"})
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "out", alone)
    assert result.stdout.count("model in") == 1  # one rank speaks

    # What two ranks have saved, one process continues.
    shutil.rmtree(tmp_path / "out" / "step_000004")
    opd.train(opd.Args(**{**RUN, **tiny, "out": str(tmp_path / "out"), "resume": True}))
    assert_same_run(tmp_path / "out", alone)


def test_two_nodes_are_one_process(tiny, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launcher += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"localhost:{port}",
        "--local_addr",
        "localhost",
    ]
    command = [*launcher, str(ROOT / "opd.py"), *flags(**{**RUN, **tiny, "out": tmp_path / "out"})]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = [subprocess.Popen(command, env={**os.environ}, **pipes) for _ in range(2)]
    try:
        for node in nodes:
            output, _ = node.communicate(timeout=120)
            assert node.returncode == 0, output
    finally:
        for node in nodes:
            node.kill()
    assert_same_run(tmp_path / "out", alone)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(opd.UserError, match="--batch_size 4: must be a multiple of the 3 ranks"):
        train_rows(tmp_path / "out", tiny)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_ranks(tiny, tmp_path):
    """A torchrun of two ranks in its own process group, three steps into a long run -> process, folder."""
    run = {**SMALL, **{name: tiny[name] for name in ("student", "teacher", "data")}}
    run.update(
        steps=100_000, max_new_tokens=200, batch_size=8, out=tmp_path / "out"
    )  # no step is over at once
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen([*command, str(ROOT / "opd.py"), *flags(**run)], **pipes)
    log, deadline = tmp_path / "out" / "metrics.jsonl", time.time() + 120
    try:
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(0.05)
        yield process, tmp_path / "out"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_lets_both_ranks_finish_the_step_and_save(two_ranks, number):
    """As Ctrl-C in a terminal, to the group; the ranks, in groups of their own, get it from torchrun."""
    process, out = two_ranks
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert output.count("and saved: continue with --resume") == 1, errors
    last = rows(out)[-1]["step"]
    assert [folder.name for folder in opd.checkpoints(out)] == [f"step_{last:06d}"]
    state = torch.load(out / f"step_{last:06d}" / "trainer.pt", weights_only=True)
    opd.train(opd.Args(**{**state["args"], "steps": last + 1, "resume": True}))
    assert [row["step"] for row in rows(out)] == list(range(1, last + 2))


def ranks_of(process):
    """The process ids of torchrun's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "opd.py" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(two_ranks, rank):
    """Whichever it comes to, and at whatever moment of the step: they agree before either leaves the loop."""
    process, out = two_ranks
    os.kill(ranks_of(process)[rank], signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("and saved: continue with --resume") == 1, errors
    assert [folder.name for folder in opd.checkpoints(out)] == [f"step_{rows(out)[-1]['step']:06d}"]


def test_a_rank_that_is_killed_ends_the_job(two_ranks):
    process, out = two_ranks
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)  # not a hang
    assert process.returncode != 0 and "SIGKILL" in errors


def test_tensors_are_summed_in_place_and_all_calls_begin_before_the_first_is_waited_for(monkeypatch):
    events, tensors = [], [torch.full(shape, 1.0) for shape in ((2, 3), (), (5,))]

    class Work:
        def wait(self):
            events.append("wait")

    def begin(tensor, async_op):
        events.append("begin")
        tensor.mul_(3)
        return Work()

    monkeypatch.setattr(opd.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(opd.dist, "all_reduce", begin)
    assert opd.all_reduce(*tensors) is tensors[0]
    assert events == ["begin"] * 3 + ["wait"] * 3 and all((x == 3).all() for x in tensors)
