"""Learned absolute positions."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.position.learned import Learned, learned_reference
from zoo.testing.tolerances import assert_close


def test_adds_the_row_of_each_position():
    part = Learned(6, max_len=10, dtype=torch.float64)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    for positions in (torch.arange(7), torch.arange(3, 10), torch.randint(0, 10, (2, 7))):
        expected = learned_reference(x, part.table.weight, positions)
        assert_close(part.embed(x, positions), expected)
        for b in range(2):
            for i in range(7):
                t = positions.expand(2, 7)[b, i]
                assert torch.equal(part.embed(x, positions)[b, i], x[b, i] + part.table.weight[t])


def test_only_the_rows_in_use_get_a_gradient():
    part = Learned(4, max_len=9)
    part.embed(torch.randn(2, 3, 4), torch.tensor([1, 5, 5])).sum().backward()
    expected = torch.zeros(9)
    expected[1], expected[5] = 2.0, 4.0
    assert torch.equal(part.table.weight.grad[:, 0], expected)


def test_table_starts_normal_and_init_weights_draws_it_again():
    attn = zoo.create("abs", 64, 4, max_len=512)
    assert attn.part_names["position"] == "learned"
    table = attn.position.table.weight.detach()
    assert abs(float(table.std()) - 0.02) < 0.001
    table.fill_(5.0)
    attn.init_weights()
    assert abs(float(table.std()) - 0.02) < 0.001
    assert abs(float(table.mean())) < 0.001


def test_table_on_meta_loads_its_state():
    plain = Learned(6, max_len=10)
    moved = Learned(6, max_len=10, device="meta")
    assert moved.embed(torch.randn(1, 4, 6, device="meta"), torch.arange(4, device="meta")).is_meta
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(plain.state_dict())
    x = torch.randn(1, 10, 6)
    assert torch.equal(moved.embed(x, torch.arange(10)), plain.embed(x, torch.arange(10)))


@pytest.mark.parametrize("causal", [False, True])
def test_host_equals_attention_over_embedded_tokens(causal):
    attn = zoo.create("learned", 12, 3, max_len=11, causal=causal, dtype=torch.float64)
    plain = zoo.create("mha", 12, 3, causal=causal, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in attn.state_dict().items() if "position" not in k})
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    each = torch.stack([torch.randperm(11)[:7] for _ in range(2)])
    for positions in (torch.arange(2, 9), each):
        expected = plain(learned_reference(x, attn.position.table.weight, positions))
        assert_close(attn(x, positions=positions), expected)


def test_cross_attention_places_queries_and_context():
    attn = zoo.create("learned", 8, 2, max_len=9)
    plain = zoo.create("mha", 8, 2)
    plain.load_state_dict({k: v for k, v in attn.state_dict().items() if "position" not in k})
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    table = attn.position.table.weight
    expected = plain(
        learned_reference(x, table, torch.arange(3)),
        learned_reference(context, table, torch.arange(4, 9)),
    )
    assert_close(attn(x, context, context_positions=torch.arange(4, 9)), expected)


def test_decoding_equals_parallel():
    attn = zoo.create("learned", 12, 3, max_len=9, causal=True, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    cache = zoo.LayerCache()
    steps = [attn(x[:, :4], cache=cache)]
    steps += [attn(x[:, i : i + 1], cache=cache) for i in range(4, 9)]
    assert_close(torch.cat(steps, 1), attn(x))
    with pytest.raises(ZooError, match=r"position 9 has no row"):
        attn(x[:, :1], cache=cache)


@pytest.mark.parametrize("positions", [[0, 10], [-1, 3], [[0, 1], [3, 12]]])
def test_position_without_a_row_is_refused(positions):
    part = Learned(4, max_len=10)
    with pytest.raises(ZooError, match=r"has no row in 'learned'; allowed: 0 to 9 \(max_len=10\)"):
        part.embed(torch.randn(2, 2, 4), torch.tensor(positions))


def test_sequence_longer_than_the_table_is_refused():
    with pytest.raises(ZooError, match="position 5 has no row"):
        zoo.create("learned", 8, 2, max_len=5)(torch.randn(1, 6, 8))


def test_max_len_is_required_and_checked():
    with pytest.raises(ZooError, match="give max_len, or use 'sinusoidal'"):
        zoo.create("learned", 8, 2)
    for wrong in (0, 2.5, True):
        with pytest.raises(ZooError, match=r"max_len=.* whole number"):
            zoo.create("learned", 8, 2, max_len=wrong)
