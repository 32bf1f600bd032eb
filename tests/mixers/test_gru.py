"""The recurrent ceiling: the equations step by step, decoding, and hidden tokens."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.mixers.gru import gru_reference
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close


def build(**options):
    options = {"dim": 12, "heads": 3, "causal": True, "dtype": torch.float64, **options}
    return zoo.create("gru", **options)


def test_equals_reference():
    mixer = build()
    x = draw(3, 17, 12)
    found = settle(mixer, x)
    weights = mixer.gru.weight_ih_l0, mixer.gru.weight_hh_l0
    mixer.forward = lambda x: mixer.proj(gru_reference(x, *weights))
    for name, value in settle(mixer, x).items():
        assert_close(found[name], value, name, gradient=name != "output")


def test_by_hand():
    x = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    w = torch.tensor([[0.0], [0.0], [2.0]], dtype=torch.float64)  # gates stay at 1/2
    u = torch.tensor([[0.0], [0.0], [4.0]], dtype=torch.float64)
    first = 0.5 * torch.tensor(2.0, dtype=torch.float64).tanh()
    second = 0.5 * (0.5 * 4 * first).tanh() + 0.5 * first
    expected = torch.stack([first, second]).view(1, 2, 1)
    assert_close(gru_reference(x, w, u), expected, "two steps")


@pytest.mark.parametrize("hidden", [[], [0, 1], [4, 5], [8], [0, 3, 8], list(range(9))])
def test_hidden_tokens_are_skipped(hidden):
    mixer = build(bias=True)
    x = draw(1, 9, 12)
    mask = torch.ones(9, dtype=torch.bool)
    mask[hidden] = False
    y = mixer(x, mask=mask[None, None, None])
    if mask.any():
        assert_close(y[:, mask], mixer(x[:, mask]), "tokens read")
    for i in hidden:
        before = y[:, i - 1] if i else mixer.proj(torch.zeros(1, 12, dtype=torch.float64))
        assert_close(y[:, i], before, f"hidden token {i} repeats the state before it")


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9]])
def test_decodes_as_in_parallel_with_hidden_tokens(pieces):
    mixer, cache = build(bias=True), zoo.LayerCache()
    x = draw(2, 9, 12)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., [0, 1, 5, 8]] = False
    rows, done = [], 0
    for piece in x.split(pieces, 1):
        done += piece.shape[1]
        rows.append(mixer(piece, mask=mask[..., :done], cache=cache))
    assert_close(torch.cat(rows, 1), mixer(x, mask=mask), "decoded")
    assert cache.nbytes == 2 * 12 * 8


def test_dropout_falls_on_the_states_in_training():
    mixer = build(dropout=0.5).train()
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(12))
    x = draw(2, 30, 12)
    plain = mixer.gru(x)[0]
    ratio = (mixer(x) / plain).detach().round(decimals=9)
    assert sorted(set(ratio.flatten().tolist())) == [0.0, 2.0]
    assert_close(mixer.eval()(x), plain, "outside training")


def test_order_matters_as_it_does_not_for_the_mean():
    mixer, x = build(), draw(1, 6, 12)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert float((mixer(x)[:, -1] - mixer(swapped)[:, -1]).detach().abs().max()) > 1e-6


def test_only_causal():
    with pytest.raises(zoo.CompatibilityError, match="pass causal=True"):
        build(causal=False)
    with pytest.raises(zoo.CompatibilityError, match="causal=True"):
        zoo.create("gru", 12, 3)


def test_bad_input():
    with pytest.raises(zoo.ZooError, match="heads=7"):
        build(heads=7)
    with pytest.raises(zoo.ZooError, match="gru"):
        build()(draw(2, 5, 12), mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(zoo.ZooError, match="dim=12"):
        build()(draw(2, 5, 3))
