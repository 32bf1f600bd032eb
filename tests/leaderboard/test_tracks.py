from __future__ import annotations

import re

import pytest
import torch

import zoo
from zoo.claims import recipes as stated
from zoo.errors import ZooError
from zoo.host.spec import canonical
from zoo.leaderboard import tracks
from zoo.runs import config


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Put another file of tracks in the place of the one that ships."""
    monkeypatch.setattr(tracks, "folder", lambda name: tmp_path)
    tracks.tracks.cache_clear()

    def write(text):
        (tmp_path / tracks.FILE).write_text(text)

    yield write
    tracks.tracks.cache_clear()


def test_every_recipe_that_ships_belongs_to_a_track():
    known = {track.name for track in tracks.tracks()}
    plain = [name for name in config.recipes() if stated.claim(name) is None]
    assert {config.load(name).track for name in plain} <= known
    assert sorted(r for track in tracks.tracks() for r in tracks.recipes_of(track.name)) == plain


def test_what_a_track_is_measured_against_can_be_hosted_by_its_recipes():
    for track in tracks.tracks():
        for recipe in tracks.recipes_of(track.name):
            specs = {canonical(spec) for spec in (track.baseline, *track.floors)}
            found = tracks.contenders(recipe, lambda one, specs=specs: one.spec in specs)
            there = {one.spec: one.reason for one in found}
            for spec in specs:
                assert there[spec] is None, (recipe, spec)


def test_baseline_floors_and_ceiling_come_first():
    names = [one.name for one in tracks.contenders("mqar")]
    assert names[:4] == ["mha", "no_mixing", "uniform_mean", "gru"]
    assert names[4:] == sorted(names[4:])


def test_a_mechanism_stands_under_the_specification_of_its_registration():
    causal = {one.name: one.spec for one in tracks.contenders("mqar")}
    images = {one.name: one.spec for one in tracks.contenders("digits")}
    assert causal["neighborhood"] == "neighborhood(kernel=8)"
    assert images["neighborhood"] == "neighborhood(kernel=3, ndim=2)"
    assert causal["rope"] == "mha+rope"
    # The default of each socket is plain softmax attention, which stands there once.
    assert sum(spec == "mha" for spec in causal.values()) == 1


def test_whoever_cannot_be_hosted_is_named_with_the_reason():
    images = {one.name: one.reason for one in tracks.contenders("digits")}
    assert "earlier tokens only" in images["gru"]
    assert images["linear"] is None
    maps = {one.name for one in tracks.contenders("shadows")}
    assert {"identity", "triplet", "regional", "cog"} <= maps
    assert "slot" not in maps


@pytest.mark.parametrize(
    ("recipe", "name", "reason"),
    [
        ("needle", "learned", r"cannot run the longest test set, of 512 tokens"),
        ("shadows", "learned", r"'learned' has a row for each position"),
        ("shadows", "fope", r"train_len=None of 'fope'"),
        ("digits", "landmark", r"earlier tokens only"),
        ("digits", "learned", None),
        ("digits", "sinusoidal", None),
        ("needle", "sinusoidal", None),
    ],
)
def test_what_the_model_of_the_recipe_says_decides(recipe, name, reason):
    state = torch.get_rng_state()
    (found,) = [one.reason for one in tracks.contenders(recipe) if one.name == name]
    assert found is None if reason is None else re.search(reason, found)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_contender_of_the_registry_is_a_specification():
    for name in zoo.list():
        for form, spec in zoo.info(name).contender.items():
            assert form in ("causal", "bidirectional")
            assert canonical(spec).split("(")[0] == name


def test_recipes_that_need_more_than_this_library_are_not_published(monkeypatch):
    assert "wikitext103" not in tracks.published()
    assert tracks.needs("wikitext103") == "files or the hub"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tracks.needs("bytes_large") == "a GPU"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert tracks.needs("bytes_large") == ""
    assert "bytes_large" in tracks.published()


def test_an_unknown_track_has_softmax_as_its_baseline():
    track = tracks.track("my_track")
    assert (track.title, track.baseline, track.ceiling) == ("My track", "mha", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recall: {title: R, description: D, basline: mha}", "basline.*baseline"),
        ("recall: {title: R, description: D}", "baseline"),
        ("recall: {title: R, description: D, baseline: nonesuch}", "nonesuch"),
        ("recall: {title: R, description: D, baseline: mha, size: 0.5}", "size=0.5"),
    ],
)
def test_a_wrong_file_is_refused(file, text, message):
    file(text)
    with pytest.raises(ZooError, match=message):
        tracks.tracks()
