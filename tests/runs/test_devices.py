"""One run on several processes gives what it gives on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import tiny
from torch import nn

from zoo.datasets.base import IGNORE
from zoo.errors import ZooError
from zoo.runs import config, records
from zoo.runs.setting import setting, shared_cores
from zoo.runs.train import run
from zoo.sweeps.sweep import sweep_cells
from zoo.tasks import Optim, find

TWO = {"trainer__devices": 2, "trainer__strategy": "ddp"}


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("ddp_spawn", "trains in processes whose outcome never comes back"),
        ("ddp_fork_find_unused_parameters_true", "trains in processes whose outcome never"),
        ("fsdp", "needs its own code for clipping, checkpoints and costs"),
        ("deepspeed_stage_2", "needs its own code"),
    ],
)
def test_a_strategy_that_gives_no_record_is_refused(strategy, why):
    with pytest.raises(
        ZooError, match=rf"trainer\.strategy='{strategy}' {why}.*allowed: auto, ddp"
    ):
        config.load("mqar", [f"trainer.strategy={strategy}", "trainer.devices=2"])


def test_a_strategy_that_does_not_exist_is_answered_by_one_that_works():
    with pytest.raises(ZooError, match=r"unknown trainer\.strategy 'dpp'; did you mean 'ddp'"):
        config.load("mqar", ["trainer.strategy=dpp"])


def test_a_batch_that_cannot_be_shared_is_refused():
    message = r"data\.batch_size=8 cannot be shared by trainer\.devices=3; allowed: multiples of 3"
    with pytest.raises(ZooError, match=message):
        config.load("mqar", ["batch=8", "trainer.devices=3", "trainer.strategy=ddp"])
    assert config.load("mqar", ["batch=9", "trainer.devices=3"]).trainer.devices == 3


def test_where_a_run_takes_place_does_not_change_what_it_is_compared_with():
    alone, both = config.load("mqar", tiny()), config.load("mqar", tiny(**TWO))
    assert config.identify(alone).group == config.identify(both).group


PARTS = (slice(0, 4), slice(4, 8))


def uneven(name):
    """Outputs and a batch of a task whose first half has fewer targets than its second."""
    draw = torch.Generator().manual_seed(0)
    if name == "classification":
        logits = torch.randn(8, 4, generator=draw)
        return logits, {"label": torch.randint(4, (8,), generator=draw)}
    if name == "regression":
        targets = torch.randn(8, 6, 2, generator=draw)
        targets[:4, 1:] = torch.nan
        return torch.randn(8, 6, 2, generator=draw), {"targets": targets}
    targets = torch.randint(4, (8, 6), generator=draw)
    targets[:4, 1:] = IGNORE
    return torch.randn(8, 6, 4, generator=draw), {"targets": targets}


@pytest.mark.parametrize("name", ["language", "tagging", "regression", "classification"])
def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(name, monkeypatch):
    task = find(name)(nn.Identity(), Optim(lr=1e-3), max_steps=1, test_names=["test"])
    logits, batch = uneven(name)
    halves = [{key: value[part] for key, value in batch.items()} for part in PARTS]
    counts = [torch.as_tensor(task.targets(half), dtype=torch.float32) for half in halves]
    assert task._share(batch) is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.copy_(sum(counts)))
    losses = [
        task.loss(logits[part], half) * task._share(half)
        for part, half in zip(PARTS, halves, strict=True)
    ]
    torch.testing.assert_close(sum(losses) / 2, task.loss(logits, batch))


@pytest.mark.parametrize(("processes", "threads"), [(1, 4), (2, 2), (3, 1), (9, 1)])
def test_processes_share_the_cores(processes, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with shared_cores(processes):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_run_leaves_no_trace_of_its_processes(monkeypatch, tmp_path):
    for name in ("LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NODE_RANK", "0")
    with setting(0):
        os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "3"}
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
        )
    assert not torch.distributed.is_initialized()
    assert os.environ["NODE_RANK"] == "0"
    assert not {"LOCAL_RANK", "MASTER_ADDR"} & set(os.environ)


ZOO = [sys.executable, "-m", "zoo", "run", "mqar"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_the_same_model_as_one(tmp_path):
    alone = run("mqar", tiny(model__dropout=0), records=tmp_path / "one", runs=tmp_path, quiet=True)
    folders = ["--records", str(tmp_path / "two"), "--runs", str(tmp_path)]
    command = [*ZOO, *tiny(model__dropout=0, **TWO), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (both,) = records.read_all(tmp_path / "two")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [both.id]  # said once
    assert (both.status, both.steps, both.examples) == ("finished", 30, alone.examples)
    assert (both.group, both.parameters, both.flops) == (
        *(alone.group, alone.parameters, alone.flops),
    )
    assert both.metrics == pytest.approx(alone.metrics, rel=1e-5)
    for ours, theirs in zip(both.history, alone.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_runs_two_processes_a_run_and_goes_on_where_they_were(tmp_path):
    """Forked from a nursery; one is cut off after some steps, and ends as the other does."""
    overrides = tiny(**TWO, steps=120, trainer__eval_every=60)
    cells, common = [("mqar", overrides)], {"identify": config.run_id}
    whole = sweep_cells(cells, records=tmp_path / "whole", runs=tmp_path / "a", **common)
    assert whole.failed == []
    cut = [*overrides, "--records", str(tmp_path / "cut"), "--runs", str(tmp_path / "b")]
    last = tmp_path / "b" / config.run_id("mqar", overrides) / "checkpoints" / "last.ckpt"
    with subprocess.Popen([*ZOO, *cut, "--quiet"], process_group=0) as process:
        while not last.exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "cut").exists()
    rest = sweep_cells(cells, records=tmp_path / "cut", runs=tmp_path / "b", **common)
    assert rest.failed == []
    (one,), (other,) = (records.read_all(tmp_path / name) for name in ("whole", "cut"))
    assert (one.metrics, one.history, one.steps) == (other.metrics, other.history, other.steps)
