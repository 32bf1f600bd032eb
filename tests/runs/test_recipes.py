"""Every recipe that ships: it runs, or says at once what it needs."""

from __future__ import annotations

import math

import pytest

from zoo import models
from zoo.claims.recipes import claim
from zoo.errors import ZooError
from zoo.models.language.decoder_lm import DecoderLM
from zoo.runs.build import build_task
from zoo.runs.config import data_module, load, recipes
from zoo.runs.train import run

# What they train on has to be fetched; all others come with the packages or are generated.
HUB = {
    **dict.fromkeys(("cifar10", "fashion_mnist", "triplet_fashion", "residual_fashion"), "digits"),
    "wikitext103": "bytes_stdlib",
    "istd": "shadows",
}
SHORT = ["steps=2", "trainer.eval_every=1", "batch=4"]
# What makes each model small; a model without an entry is small enough as its recipe has it.
NARROW = {
    "decoder_lm": ["model.dim=16", "model.heads=2"],
    "transnormer": ["model.dim=16", "model.heads=2"],
    "vit": ["model.dim=16", "model.heads=2"],
    "resnet": ["model.width=4", "model.variant=resnet10t"],
    "slot_autoencoder": ["model.dim=8", "model.width=4"],
    "set_prediction": ["model.dim=8", "model.width=4"],
    "set_autoencoder": ["model.dim=8", "model.width=4"],
    "residual_attention": ["model.width=8"],
    "rasm": ["data.height=16", "data.width=16"],
}
SMALL = {
    "tagging": ["data.val_size=8", "data.test_size=8"],
    "regression": ["data.val_size=8", "data.test_size=8"],
    "collapse": ["data.val_size=8", "data.test_size=8"],
    "language": ["data.max_bytes=40000", "data.val_windows=2", "data.test_windows=2"],
    "classification": [],
    "restoration": ["data.val_size=4", "data.test_size=4"],
    "objects": ["data.val_size=8", "data.test_size=8"],
    "object_videos": ["data.val_size=8", "data.test_size=8"],
    "properties": ["data.val_size=8", "data.test_size=8"],
    "sets": ["data.val_size=8", "data.test_size=8"],
}


def quick(config):
    return [*SHORT, *NARROW.get(config.model.name, []), *SMALL[config.task]]


def mixes_tokens(name):
    kinds = models.info(load(name).model.name).kinds
    return "mixer" in kinds and "feature" not in kinds


def out_of_reach(name):
    stated = claim(name)
    return stated is not None and stated.needs is not None


@pytest.mark.parametrize(
    "name", sorted(n for n in recipes() if n not in HUB and not out_of_reach(n))
)
def test_a_recipe_runs(name, tmp_path):
    config = load(name)
    record = run(
        name,
        quick(config),
        records=tmp_path / "records",
        runs=tmp_path / "runs",
        quiet=True,
    )
    assert (record.status, record.steps) == ("finished", 2)
    assert math.isfinite(record.metrics[config.metrics.report])
    assert record.track == config.track


PLAIN = sorted(n for n in recipes() if n not in HUB and claim(n) is None and mixes_tokens(n))


@pytest.mark.parametrize("name", PLAIN)
def test_parts_of_three_sockets_run_in_every_recipe_or_say_why_not(name, tmp_path):
    config = load(name)
    causal = config.model.name == "decoder_lm"
    where = {"records": tmp_path / "records", "runs": tmp_path / "runs", "quiet": True}
    options = quick(config)
    if causal:
        record = run(name, ["attention=cog+cope+moh", *options], **where)
    else:
        with pytest.raises(ZooError, match="causal=False is not possible with 'cope'"):
            run(name, ["attention=cog+cope+moh", *options], **where)
        record = run(name, ["attention=cog+fope+moh", *options], **where)
    assert record.status == "finished"
    assert math.isfinite(record.metrics[config.metrics.report])


@pytest.mark.parametrize(
    "name", sorted(n for n in recipes() if claim(n) is not None and mixes_tokens(n))
)
def test_parts_of_three_sockets_fit_into_the_model_of_every_claim(name):
    causal = load(name).model.name == "decoder_lm"
    parts = "cog+cope+moh" if causal else "cog+fope+moh"
    config = load(name, [f"attention={parts}", "model.heads=2"])
    data = data_module(config)
    data.setup()
    model = build_task(config, data).model
    assert bool(model(*data.example()).isfinite().all())


@pytest.mark.parametrize("name", sorted(HUB))
def test_a_recipe_without_its_data_names_the_embedded_alternative(name, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.datasets.vision.fashion_mnist.PACKAGE_FOLDER", tmp_path / "nothing")
    with pytest.raises(ZooError, match=HUB[name]) as caught:
        run(name, SHORT, records=tmp_path / "records", runs=tmp_path / "runs", quiet=True)
    assert "root=FOLDER" in str(caught.value)


@pytest.mark.parametrize("name", sorted(HUB))
def test_the_model_of_a_recipe_that_cannot_run_here_can_be_built(name):
    config = load(name)
    task = build_task(config, data_module(config))
    assert sum(p.numel() for p in task.parameters()) > 10_000


@pytest.mark.parametrize("name", [n for n in recipes() if load(n).model.name == "decoder_lm"])
def test_every_split_fits_into_the_model(name):
    config = load(name)
    data = data_module(config)
    model = build_task(config, data).model
    assert isinstance(model, DecoderLM)
    assert data.seq_len <= model.max_len
    if config.model.position == "learned":
        assert model.max_len == getattr(data, "max_seq_len", data.seq_len)
    assert bool(model.blocks[0].conv) == (config.model.conv > 0)


def test_every_recipe_states_a_fair_budget():
    for name in recipes():
        config = load(name)
        assert config.optim.lr in config.budget.lrs
        if (stated := claim(name)) is None:
            assert config.metrics.report.startswith(("test/", "test_"))
            assert config.budget.seeds >= 3
            assert len(config.budget.lrs) >= 3
        else:  # its variants and seeds are its own, and its figures are what it reports
            assert stated.seeds >= 3
        assert config.trainer.max_steps % config.trainer.eval_every == 0
        assert len(config.description) > 10
