"""Which pairs meet: what the pages draw of a mechanism is what it does at that size."""

from __future__ import annotations

import pytest
import torch

from zoo import registry
from zoo.leaderboard.page._html_patterns import BANDS, LENGTH, SOMETIMES, pattern
from zoo.registry import FORMS, SOCKETS


def shades(name):
    found = pattern(registry.info(name))
    return {one.title: torch.tensor(one.shades) for one in found.panels}


ROW = torch.arange(LENGTH)[:, None]
KEY = torch.arange(LENGTH)


def test_nothing_of_chance_is_in_a_pattern():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = [pattern(registry.info(name)) for name in ("moba", "entmax", "t5")]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert [pattern(registry.info(name)) for name in ("moba", "entmax", "t5")] == first


def test_a_window_is_a_band():
    found = shades("sliding_window")
    causal, both = found.values()
    assert list(found) == [f"sliding_window(window=8), {form}" for form in FORMS]
    assert torch.equal(causal == 1, (ROW - KEY >= 0) & (ROW - KEY < 8))
    assert torch.equal(both == 1, (ROW - KEY).abs() <= 4)
    assert set(causal.unique().tolist()) == {0.0, 1.0}


def test_neighbours_on_a_grid_are_those_of_rows_and_columns():
    found = pattern(registry.info("neighborhood"))
    _, grid = (torch.tensor(one.shades) for one in found.panels)
    assert "6 to a row" in found.caption
    # Of a token in the middle: three rows of three.
    wanted = [7, 8, 9, 13, 14, 15, 19, 20, 21]
    assert grid[14].nonzero().flatten().tolist() == wanted


def test_what_contents_decide_is_light():
    (found,) = shades("moba").values()
    own = (ROW // 8 == KEY // 8) & (KEY <= ROW)
    # A query of the second block has one block behind it, and so no choice.
    always = own | ((ROW // 8 == 1) & (KEY < 8))
    assert torch.equal(found == 1, always)
    light = (found - SOMETIMES).abs() < 1e-6
    assert torch.equal(light, (KEY <= ROW) & ~always)
    assert "it depends on what the tokens hold" in pattern(registry.info("moba")).caption
    assert "it depends" not in pattern(registry.info("sliding_window")).caption


def test_a_bias_without_parameters_is_what_it_leaves_of_a_weight():
    found = shades("alibi")
    assert len(found) == 4
    for head, shade in enumerate(found.values(), start=1):
        wanted = torch.exp(-(2.0 ** (-8 * head / 4)) * (ROW - KEY)).masked_fill(KEY > ROW, 0.0)
        torch.testing.assert_close(shade, wanted, rtol=1e-6, atol=1e-6)


def test_pairs_that_share_a_learned_number_are_a_band():
    causal, both = shades("t5").values()
    assert set(causal.unique().tolist()) <= {0.0, *torch.tensor(BANDS).tolist()}
    assert not causal.triu(1).any()
    assert both.all()
    for shade, exact in ((causal, 16), (both, 8)):
        assert all(len(shade.diagonal(-d).unique()) == 1 for d in range(LENGTH))
        last = shade[-1].flip(0)  # by distance
        change = (last[1:] != last[:-1]).tolist()
        # One number for each of the small distances, and one for several of the greater ones.
        assert all(change[: exact - 1])
        assert not all(change[exact - 1 :])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mha", "every key up to itself in a causal layer. Nothing is fixed beforehand"),
        ("rope", "turned by where they stand"),
        ("learned", "added to the embeddings"),
        ("cope", "a query meets every key up to itself. Its bias on the scores depends on what"),
        ("lightning", "forms no weights"),
    ],
)
def test_where_nothing_is_hidden_a_sentence_says_so(name, words):
    found = pattern(registry.info(name))
    assert found.panels == ()
    assert words in found.caption


def test_that_nothing_is_hidden_is_drawn_once():
    causal, both = shades("all").values()
    assert torch.equal(causal == 1, KEY <= ROW)
    assert bool((both == 1).all())


@pytest.mark.parametrize("name", registry.list_names())
def test_every_mechanism_has_a_pattern_or_a_reason(name):
    entry = registry.info(name)
    found = pattern(entry)
    if entry.kind not in SOCKETS:
        assert found is None
        return
    assert found.caption.endswith(".")
    for panel in found.panels:
        shade = torch.tensor(panel.shades)
        assert shade.shape == (LENGTH, LENGTH)
        assert 0 <= shade.min() <= shade.max() <= 1
        if "causal" in panel.title:
            assert not shade.triu(1).any()
