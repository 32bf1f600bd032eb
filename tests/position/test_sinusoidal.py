"""Sinusoidal absolute positions."""

from __future__ import annotations

import math

import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.position.sinusoidal import Sinusoidal, sinusoidal_reference, sinusoidal_table
from zoo.testing.tolerances import assert_close


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("base", [10000.0, 7])
def test_table_equals_the_equation(dim, base):
    positions = torch.tensor([0, 1, 5, 63, 1000])
    expected = sinusoidal_reference(positions, dim, base)
    assert_close(sinusoidal_table(positions, dim, base, torch.float64), expected)
    assert expected.shape == (5, dim)


def test_sines_and_cosines_alternate():
    row = sinusoidal_table(torch.tensor([3]), 4)[0]
    expected = [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]
    assert_close(row, torch.tensor(expected))


def test_products_depend_on_the_distance_alone():
    table = sinusoidal_table(torch.arange(40), 16, dtype=torch.float64)
    products = table @ table.t()
    for gap in (0, 1, 7, 30):
        diagonal = products.diagonal(gap)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert_close(products.diagonal(), torch.full((40,), 8.0, dtype=torch.float64))


def test_positions_of_a_batch_and_of_any_size():
    part = Sinusoidal(6, base=100.0)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2], [5000, 9, 100_000]])
    expected = x + torch.stack([sinusoidal_reference(row, 6, 100.0) for row in positions])
    assert_close(part.embed(x, positions), expected)


def test_angles_are_not_rounded_to_the_type_of_x():
    part = Sinusoidal(8)
    zeros = torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    out = part.embed(zeros, torch.tensor([256, 257]))  # one number in bfloat16
    assert out.dtype == torch.bfloat16
    expected = sinusoidal_reference(torch.tensor([256, 257]), 8)[None]
    assert_close(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_host_equals_attention_over_embedded_tokens(causal):
    attn = zoo.create("sinusoidal", 12, 3, causal=causal, dtype=torch.float64)
    plain = zoo.create("mha", 12, 3, causal=causal, dtype=torch.float64)
    plain.load_state_dict(attn.state_dict())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for positions in (None, torch.arange(50, 57), torch.randint(0, 99, (2, 7))):
        placed = torch.arange(7) if positions is None else positions
        table = torch.stack([sinusoidal_reference(row, 12) for row in placed.expand(2, 7)])
        assert_close(attn(x, positions=positions), plain(x + table))


def test_decoding_equals_parallel():
    attn = zoo.create("sinusoidal", 12, 3, causal=True, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    cache = zoo.LayerCache()
    steps = [attn(x[:, :4], cache=cache)]
    steps += [attn(x[:, i : i + 1], cache=cache) for i in range(4, 9)]
    assert_close(torch.cat(steps, 1), attn(x))


@pytest.mark.parametrize("base", [1, 0.5, -3.0, "high"])
def test_impossible_base_is_refused(base):
    with pytest.raises(ZooError, match=r"base=.* of 'sinusoidal' must be a number above 1"):
        zoo.create("sinusoidal", 8, 2, base=base)
