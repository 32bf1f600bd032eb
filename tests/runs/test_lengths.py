"""Test sets longer than training: what a model is told of the length, and which are refused."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.runs.build import build_task
from zoo.runs.config import data_module, load
from zoo.runs.train import run

SMALL = [
    *("data.seq_len=16", "data.max_bytes=40000", "data.val_windows=2", "data.test_windows=8"),
    *("model.dim=16", "model.heads=2"),
]
LENGTHS = "[16,32,64]"
QUICK = ["steps=2", "trainer.eval_every=1", "batch=4"]


def build(*overrides, lengths=LENGTHS):
    config = load("bytes", [*SMALL, f"data.test_lengths={lengths}", *overrides])
    return build_task(config, data_module(config))


def test_the_model_is_told_the_length_of_training():
    assert build("model.position=rope").model.max_len == 16
    assert build("model.position=rope", "model.max_len=20").model.max_len == 20


def test_a_table_that_ends_before_the_longest_test_set_is_refused_before_training():
    message = (
        r"attention='mha' cannot run the longest test set, of 64 tokens, with model.max_len=16: "
        r"position 63 has no row in 'learned'.*set model.max_len=64, or take .* rope"
    )
    with pytest.raises(ZooError, match=message):
        build("model.position=learned")
    with pytest.raises(ZooError, match=r"of 64 tokens, with model\.max_len=32"):
        build("model.position=learned", "model.max_len=32")
    assert build("model.position=learned", "model.max_len=64").model.position.max_len == 64


def test_trying_the_length_leaves_the_model_and_the_random_state_alone():
    torch.manual_seed(0)
    tried = build("model.position=rope")
    after = torch.rand(3)
    torch.manual_seed(0)
    plain = build("model.position=rope", lengths="[]")
    assert torch.equal(after, torch.rand(3))
    assert tried.model.training
    for a, b in zip(tried.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_reports_every_length(tmp_path):
    report = ["model.position=rope", "metrics.report=test_64/perplexity"]
    report += [f"data.test_lengths={LENGTHS}"]
    record = run(
        "bytes", [*SMALL, *QUICK, *report], records=tmp_path / "r", runs=tmp_path / "w", quiet=True
    )
    for split in ("test", "test_16", "test_32", "test_64"):
        for name in ("bits_per_byte", "perplexity", "loss"):
            assert record.metrics[f"{split}/{name}"] > 0


@pytest.mark.parametrize(
    ("data", "task", "select", "figures"),
    [
        (
            "needle",
            "tagging",
            "val/accuracy",
            ["test/exact", "test_20/exact", "test_20_depth50/exact"],
        ),
        ("delete_and_copy", "regression", "val/r2", ["test/mse", "test/r2"]),
        ("count_ones", "collapse", "val/accuracy", ["test_20/representation_gap", "test/accuracy"]),
    ],
)
def test_the_new_data_sets_run(data, task, select, figures, tmp_path):
    lengths = [] if data == "delete_and_copy" else ["data.test_lengths=[20]"]
    depths = ["data.test_depths=[0.5]"] if data == "needle" else []
    path = tmp_path / "probe.yaml"
    path.write_text(
        f"name: probe\ntrack: probe\ntask: {task}\n"
        f"data: {{name: {data}, seq_len: 12, val_size: 8, test_size: 8}}\n"
        "model: {name: decoder_lm, dim: 16, depth: 1, heads: 1, position: none}\n"
        "optim: {lr: 1.0e-3}\ntrainer: {max_steps: 2, eval_every: 1}\n"
        f"metrics: {{select: {select}, report: {figures[0]}}}\n"
        "budget: {lrs: [1.0e-3], seeds: 3}\n"
    )
    record = run(
        str(path),
        [*lengths, *depths, "batch=4"],
        records=tmp_path / "r",
        runs=tmp_path / "w",
        quiet=True,
    )
    assert record.status == "finished"
    assert set(figures) <= set(record.metrics)
