"""A training run: its record, its folder, and every way in which it can end."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from tiny import outcome, tiny

import zoo
from zoo.datasets import IGNORE
from zoo.errors import CompatibilityError, ZooError
from zoo.models.language.decoder_lm import DecoderLM
from zoo.runs import records, training
from zoo.runs.build import restore
from zoo.runs.callbacks import Keeper
from zoo.runs.config import identify, load
from zoo.runs.train import resume, run
from zoo.tasks import TokenTagging


def train(folder, overrides=None, recipe="mqar", **options):
    overrides = tiny() if overrides is None else overrides
    options = {"quiet": True, **options}
    return run(recipe, overrides, records=folder / "records", runs=folder / "runs", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture(scope="module")
def finished(folder):
    return train(folder)


def test_the_record_says_what_was_run(finished):
    config = load("mqar", tiny())
    identity = identify(config)
    assert (finished.id, finished.group, finished.config_hash) == (
        identity.id,
        identity.group,
        identity.config_hash,
    )
    assert (finished.recipe, finished.track, finished.status) == ("mqar", "recall", "finished")
    assert (finished.attention, finished.seed, finished.lr) == ("mha", 0, 1e-2)
    assert finished.metric == {
        "select": "val/accuracy",
        "report": "test/accuracy",
        "mode": "max",
        "solved": 0.99,
    }
    assert finished.config["model"]["dim"] == 16
    assert {"budget", "description"}.isdisjoint(finished.config)  # no figure depends on them
    assert (finished.steps, finished.examples, finished.conv) == (30, 240, True)
    assert finished.data["name"] == "mqar"
    assert len(finished.data["fingerprint"]) == 64
    assert torch.__version__.startswith(finished.versions["torch"])
    assert finished.device["type"] == "cpu"


def test_the_record_says_what_it_cost(finished):
    model = DecoderLM(32, dim=16, depth=2, heads=2, conv=3, mlp=2.0, max_len=16)
    assert finished.parameters == sum(p.numel() for p in model.parameters())
    # Matrix products of the linear layers, of the attention, and of the short convolutions.
    linear = 16 * (16 * 32 + 2 * (4 * 16 * 16 + 3 * 16 * 32))
    attention = 2 * 2 * 2 * 16 * 16 * 8
    conv = 2 * 16 * 3 * (16 + 2)
    assert finished.flops == pytest.approx(2 * (linear + attention + conv), rel=0.02)
    # Per layer: keys, values and positions, and the last two inputs of the short convolution.
    assert finished.state_bytes == 2 * (4 * 2 * 16 * 16 + 8 * 16 + 4 * 2 * 16)
    assert 0 < finished.step_time_cpu < 60
    assert 0 < finished.step_time_wall < 600
    assert 2**20 < finished.peak_memory_bytes < 2**40


def test_the_history_has_every_validation_and_the_last_step(finished):
    assert [row["step"] for row in finished.history] == [8, 16, 24, 30]
    assert all(
        set(row) == {"step", "train/loss", "val/accuracy", "val/exact", "val/loss"}
        for row in finished.history
    )


def test_the_folder_has_configuration_log_and_checkpoints(finished, folder):
    run_folder = folder / "runs" / finished.id
    assert identify(load(run_folder / "config.yaml")).id == finished.id
    log = (run_folder / "log" / "version_0" / "metrics.csv").read_text()
    assert "val/accuracy" in log.splitlines()[0]
    assert len(log.splitlines()) > 5
    assert {path.name.split("-")[0] for path in (run_folder / "checkpoints").iterdir()} == {
        "best",
        "last.ckpt",
    }
    assert records.read(folder / "records" / f"{finished.id}.json") == finished


def test_the_best_checkpoint_on_validation_is_the_one_that_is_reported(finished, folder):
    best = max(finished.history, key=lambda row: row["val/accuracy"])
    assert {k: v for k, v in finished.metrics.items() if k.startswith("val/")} == {
        k: v for k, v in best.items() if k.startswith("val/")
    }
    found = restore(folder / "runs" / finished.id)
    assert found.step == best["step"]
    found.data.setup()
    (loader,) = found.data.test_dataloader()
    right = asked = 0
    with torch.no_grad():
        for batch in loader:
            marked = batch["targets"] != IGNORE
            guess = found.task.model(batch["tokens"]).argmax(-1)
            right += int((guess == batch["targets"])[marked].sum())
            asked += int(marked.sum())
    assert finished.metrics["test/accuracy"] == pytest.approx(right / asked)


def test_the_same_seed_gives_the_same_figures_and_another_one_others(finished, tmp_path):
    assert outcome(train(tmp_path)) == outcome(finished)
    assert outcome(train(tmp_path, tiny(seed=1)))[1] != finished.history


def test_a_finished_run_is_not_repeated(finished, folder, monkeypatch):
    monkeypatch.setattr(training.Training, "run", lambda *_, **__: pytest.fail("trained again"))
    assert train(folder) == finished
    assert train(folder, resume_if_possible=True) == finished
    assert resume(folder / "runs" / finished.id, records=folder / "records") == finished


def test_the_test_sets_are_evaluated_once_after_all_training(tmp_path, monkeypatch):
    seen = []
    for name in ("on_validation_epoch_end", "on_test_epoch_end"):
        before = getattr(TokenTagging, name)

        def note(self, before=before, name=name):
            seen.append(name)
            before(self)

        monkeypatch.setattr(TokenTagging, name, note)
    train(tmp_path, tiny(steps=16))
    assert seen == ["on_validation_epoch_end", "on_validation_epoch_end", "on_test_epoch_end"]


def test_every_test_set_is_in_the_record(tmp_path):
    changes = {"data.vocab_size": None, "data.pairs": None, "steps": 4}
    record = train(tmp_path, tiny(**changes), recipe="flip_flop")
    names = {name.split("/")[0] for name in record.metrics}
    assert names == {"val", "test", "test_sparse", "test_dense"}


def test_a_vision_run_has_no_decoding_state(tmp_path):
    record = train(
        tmp_path,
        ["steps=4", "trainer.eval_every=2", "batch=8", "model.dim=8", "model.heads=2"],
        recipe="digits",
    )
    assert record.state_bytes is None
    assert not record.conv
    assert record.metrics["test_noise/accuracy"] <= 1


def test_training_stops_when_the_figure_is_reached(tmp_path):
    record = train(tmp_path, tiny(trainer__stop_at=0.0))
    assert (record.steps, record.status) == (8, "finished")
    assert [row["step"] for row in record.history] == [8]
    smaller = tiny(trainer__stop_at=100.0, metrics__select="val/loss", metrics__mode="min", seed=1)
    assert train(tmp_path, smaller).steps == 8
    assert train(tmp_path, tiny(trainer__stop_at=1.5, steps=10)).steps == 10


def test_training_stops_when_time_is_up(tmp_path):
    record = train(tmp_path, tiny(trainer__max_minutes=1e-6))
    assert record.status == "finished"
    assert record.steps == 1
    assert [row["step"] for row in record.history] == [1]


def test_a_loss_that_explodes_ends_the_run_at_once(tmp_path):
    overrides = tiny(lr="1e25", optim__clip="null")
    record = train(tmp_path, overrides)
    assert record.status == "nan"
    assert 0 < record.steps < 8
    assert f"after {record.steps} steps" in record.error
    assert record.parameters > 0
    assert not record.metrics
    assert train(tmp_path, overrides) == record


def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    forward = DecoderLM.forward

    def broken(self, tokens, **options):
        return forward(self, tokens, **options) * (1 if self.training else math.nan)

    monkeypatch.setattr(DecoderLM, "forward", broken)
    record = train(tmp_path)
    assert record.status == "nan"
    assert record.error == "validation loss is nan after 8 steps"
    assert [row["step"] for row in record.history] == [8]
    assert math.isnan(record.history[0]["val/loss"])


def test_an_error_leaves_a_record_and_the_run_can_be_repeated(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out\nof luck")

    with monkeypatch.context() as patch:
        patch.setattr(TokenTagging, "loss", broken)
        with pytest.raises(RuntimeError, match="luck"):
            train(tmp_path, tiny(steps=4))
    (path,) = (tmp_path / "records").glob("*.json")
    record = records.read(path)
    assert (record.status, record.error) == ("failed", "out of luck")
    assert record.data["fingerprint"]
    assert train(tmp_path, tiny(steps=4)).status == "finished"


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"model__max_len": 8}, ZooError, "model.max_len=8 is shorter than the data's sequences"),
        ({"model__heads": 3}, ZooError, "dim=16 is not divisible by heads=3"),
        ({"optim__warmup": 100}, ZooError, "optim.warmup=100 steps is longer than trainer.max"),
        ({"attention": "mha+gru"}, CompatibilityError, "whole module"),
    ],
)
def test_the_users_mistakes_are_errors_of_one_line(tmp_path, changes, kind, said):
    with pytest.raises(kind) as caught:
        train(tmp_path, tiny(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_longer_table_of_positions_may_be_asked_for(tmp_path):
    record = train(tmp_path, tiny(model__max_len=40, steps=2))
    model = DecoderLM(32, dim=16, depth=2, heads=2, conv=3, mlp=2.0, max_len=40)
    assert record.parameters == sum(p.numel() for p in model.parameters())


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="file") as caught:
        run("mqar", tiny(), records=tmp_path / "records", runs=tmp_path / "file", quiet=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match="file"):
        run("mqar", tiny(steps=2), records=tmp_path / "file", runs=tmp_path / "runs", quiet=True)


def test_a_full_disk_is_an_error_of_one_line_and_the_run_goes_on_later(
    tmp_path, monkeypatch, finished
):
    fsync, count = os.fsync, []

    def full(descriptor):
        if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            count.append(1)
            if len(count) > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ZooError, match="No space left on device") as caught:
            train(tmp_path)
    assert "\n" not in str(caught.value)
    (path,) = (tmp_path / "records").glob("*.json")
    assert records.read(path).status == "failed"
    assert outcome(train(tmp_path, resume_if_possible=True)) == outcome(finished)


@pytest.fixture
def interrupt(monkeypatch):
    """Make something happen once when a step of some number begins."""

    def arrange(step, action):
        start, done = Keeper.on_train_batch_start, []

        def begin(self, trainer, *args):
            if trainer.global_step == step and not done:
                done.append(1)
                action()
            start(self, trainer, *args)

        monkeypatch.setattr(Keeper, "on_train_batch_start", begin)

    return arrange


def stop_by_keyboard():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("action", "ending"),
    [
        (stop_by_keyboard, KeyboardInterrupt),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit),
    ],
    ids=["keyboard", "terminated"],
)
def test_an_interrupted_run_goes_on_where_it_was(action, ending, tmp_path, interrupt, finished):
    interrupt(13, action)
    with pytest.raises(ending) as caught:
        train(tmp_path)
    if ending is SystemExit:
        assert caught.value.code == 143
    assert not list(tmp_path.glob("records/*"))
    with pytest.raises(ZooError, match="holds an interrupted run: go on with --resume"):
        train(tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    record = resume(folder, records=tmp_path / "records", quiet=True)
    assert outcome(record) == outcome(finished)


def test_what_cannot_be_resumed_says_why(tmp_path, interrupt):
    with pytest.raises(ZooError, match="holds no interrupted run to resume"):
        train(tmp_path, resume=True)
    with pytest.raises(ZooError, match=r"the run folder .* does not exist"):
        resume(tmp_path / "nowhere")
    with pytest.raises(ZooError, match="is not a run folder: it has no"):
        resume(tmp_path)
    interrupt(2, stop_by_keyboard)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    with pytest.raises(ZooError, match="has no checkpoint yet; start the run again"):
        resume(folder, records=tmp_path / "records")


@pytest.fixture
def halted(tmp_path, interrupt):
    """Folder of a run that was interrupted in its middle."""
    interrupt(13, stop_by_keyboard)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_a_checkpoint_that_is_none_is_refused(halted, tmp_path):
    last = halted / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    for broken, said in (
        (b"", "not a readable checkpoint"),
        (b"no checkpoint", "not a readable checkpoint"),
        (content[: len(content) // 2], "not a readable checkpoint"),
    ):
        last.write_bytes(broken)
        with pytest.raises(ZooError, match=said) as caught:
            resume(halted, records=tmp_path / "records", quiet=True)
        assert "\n" not in str(caught.value)
    for foreign in ({"weights": 1}, [1], {"state_dict": {}, "global_step": 3}):
        torch.save(foreign, last)
        with pytest.raises(ZooError, match="is not a checkpoint of a run of the zoo"):
            resume(halted, records=tmp_path / "records", quiet=True)
    assert not list(tmp_path.glob("records/*"))


def test_a_changed_recipe_is_refused(halted, tmp_path):
    config = halted / "config.yaml"
    config.write_text(config.read_text().replace("weight_decay: 0.1", "weight_decay: 0.2"))
    with pytest.raises(ZooError, match="was made with another configuration"):
        resume(halted, records=tmp_path / "records", quiet=True)
    with pytest.raises(ZooError, match="was made with another configuration"):
        restore(halted)


def test_a_run_without_a_validation_has_no_best_weights(tmp_path, interrupt):
    interrupt(5, stop_by_keyboard)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    with pytest.raises(ZooError, match="has no best checkpoint yet"):
        restore(folder)


def test_quiet_prints_nothing(tmp_path, capfd):
    train(tmp_path, tiny(steps=2), quiet=True)
    assert capfd.readouterr() == ("", "")
    train(tmp_path, tiny(steps=2, seed=1), quiet=False, progress=False)
    assert capfd.readouterr() == ("", "")


def test_the_bar_counts_the_steps_of_the_run(tmp_path, capfd):
    record = train(tmp_path, tiny(steps=12), quiet=False)
    out, err = capfd.readouterr()
    assert not out
    assert "12/12" in err
    assert record.id[:20] in err


def test_a_run_leaves_the_process_as_it_was(tmp_path):
    handler = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    level = logging.getLogger("lightning.pytorch").level
    environment = dict(os.environ)
    torch.manual_seed(7), np.random.seed(7), random.seed(7)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(7), np.random.seed(7), random.seed(7)  # noqa: NPY002
    train(tmp_path, tiny(steps=2))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected  # noqa: NPY002
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handler
    assert logging.getLogger("lightning.pytorch").level == level
    assert dict(os.environ) == environment
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_device_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ZooError, match=r"trainer.accelerator='cuda': this machine has none"):
        train(tmp_path, tiny(trainer__accelerator="cuda"))


def test_auxiliary_losses_reach_the_log(tmp_path, monkeypatch):
    original = DecoderLM.forward

    def forward(self, tokens, **options):
        self.aux_losses = {"balance": self.embedding.weight.square().mean()}
        return original(self, tokens, **options)

    monkeypatch.setattr(DecoderLM, "forward", forward)
    record = train(tmp_path, tiny(steps=12))
    log = tmp_path / "runs" / record.id / "log" / "version_0" / "metrics.csv"
    assert "train/aux_balance" in log.read_text().splitlines()[0]


def test_the_parts_that_the_host_takes_are_the_ones_that_are_trained(tmp_path):
    record = train(tmp_path, tiny(attention="rope", steps=2))
    assert record.attention == zoo.canonical("rope")
    with pytest.raises(ZooError, match="did you mean"):
        train(tmp_path, tiny(attention="ropee"))


def test_parts_are_told_how_much_of_the_training_is_done(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(zoo.parts.Part, "advance", lambda self, done: told.append(done))
    record = train(tmp_path)
    best = max(record.history, key=lambda row: (row["val/accuracy"], -row["step"]))["step"]
    each = [share for i, share in enumerate(told) if i == 0 or share != told[i - 1]]
    assert each[:30] == [step / 30 for step in range(30)]
    assert told[-1] == best / 30, "the checkpoint that is evaluated has an age of its own"
