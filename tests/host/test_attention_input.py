"""What the host takes and refuses: gates, masks, biases, positions, and wrong values of each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.cache import Cache
from zoo.host.attention import Attention
from zoo.parts import Normalize, Position, Strip, mask_scores
from zoo.registry import Traits
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close


def test_a_gate_of_zero_removes_a_head() -> None:
    host = zoo.create("mha", 16, 4, dtype=torch.float64)
    x = draw(2, 7, 16)
    removed = copy.deepcopy(host)
    with torch.no_grad():
        removed.combine.proj.weight[:, 4:8] = 0
    gate = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert_close(host(x, head_gate=gate), removed(x))
    kept = host(x)
    host.head_gate = gate
    assert_close(host(x), removed(x))
    assert_close(host(x, head_gate=torch.ones_like(gate)), kept)


def test_gates_for_samples_and_tokens() -> None:
    host = zoo.create("mha", 16, 4, dtype=torch.float64)
    x, gate = draw(2, 7, 16), draw(2, 4, 7, seed=1)
    with host.capture() as passes:
        y = host(x, head_gate=gate)
    assert_close(y, host.combine(passes[0].heads, x))
    with host.capture() as plain:
        host(x)
    assert_close(passes[0].heads, plain[0].heads * gate[..., None])
    constant = gate[:, :, :1].expand(2, 4, 7)
    assert_close(host(x, head_gate=constant), host(x, head_gate=gate[:, :, 0]))


def test_a_gate_gets_its_gradient() -> None:
    host = zoo.create("mha", 16, 4)
    gate = torch.ones(4, requires_grad=True)
    host(torch.randn(1, 3, 16), head_gate=gate).square().sum().backward()
    assert gate.grad is not None
    assert bool((gate.grad != 0).all())


@pytest.mark.parametrize("shape", [(3,), (1, 4), (4, 2), (2, 4, 6), (2, 4, 7, 1), (2, 1, 7), ()])
def test_gates_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    host = zoo.create("mha", 16, 4)
    with pytest.raises(zoo.ZooError, match=r"head_gate of shape .*\(4,\), \(2, 4\), \(2, 4, 7\)"):
        host(torch.randn(2, 7, 16), head_gate=torch.ones(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10}, "dim=10 is not divisible by heads=4; nearest allowed heads=5"),
        ({"dim": 0}, "dim=0 must be a whole number"),
        ({"dim": True}, "dim=True must be a whole number"),
        ({"dim": 16.0}, "dim=16.0 must be a whole number"),
        ({"heads": 0}, "heads=0 must be a whole number"),
        ({"heads": -2}, "heads=-2 must be a whole number"),
        ({"heads": "4"}, "heads='4' must be a whole number"),
        ({"head_dim": 0}, "head_dim=0 must be a whole number"),
        ({"head_dim": 2.5}, "head_dim=2.5 must be a whole number"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"kv_heads": 0}, "kv_heads=0 must divide heads=4"),
        ({"kv_heads": 8}, "kv_heads=8 must divide heads=4"),
        ({"kv_heads": 2.0}, "kv_heads=2.0"),
        ({"dropout": 1.0}, r"dropout=1.0 must be a number in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1 must be a number in \[0, 1\)"),
        ({"spec": "mha(kv_heads=3)"}, "kv_heads=3 must divide heads=4"),
        ({"spec": "mqa", "kv_heads": 2}, "mqa has kv_heads=1, not 2"),
        ({"spec": "mha+gqa"}, "both fill the socket 'project'"),
        ({"spec": "sofmax"}, "unknown mechanism 'sofmax'.*'softmax'"),
    ],
)
def test_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        Attention(**{"dim": 16, "heads": 4, **arguments})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_len", 0),
        ("max_len", -1),
        ("depth", -1),
        ("scale", "big"),
        ("scale", True),
        ("scale", float("nan")),
        ("causal", "no"),
        ("bias", "no"),
        ("qk_norm", "no"),
    ],
)
def test_facts_are_checked_at_construction(name: str, value: Any) -> None:
    with pytest.raises(zoo.ZooError, match=name):
        Attention(16, 4, **{name: value})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": torch.zeros(2, 7, 12)}, r"x of shape \(2, 7, 12\) must be \(batch, tokens, dim=16"),
        ({"x": torch.zeros(7, 16)}, r"x of shape \(7, 16\)"),
        ({"context": torch.zeros(2, 5, 12)}, r"context of shape \(2, 5, 12\)"),
        ({"context": torch.zeros(3, 5, 16)}, "context has batch 3, but x has batch 2"),
        ({"mask": torch.zeros(7, 7)}, "mask has dtype torch.float32; allowed: torch.bool.*'bias'"),
        ({"mask": torch.zeros(7, 7, dtype=torch.int64)}, "mask has dtype torch.int64"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, "mask has rank 1; allowed: 2"),
        ({"mask": torch.ones(2, 7, 7, dtype=torch.bool)}, "mask has rank 3"),
        (
            {"mask": torch.ones(2, 7, dtype=torch.bool)},
            r"mask of shape \(2, 7\) does not fit.*mask\[:, None, None, :\]",
        ),
        ({"mask": torch.ones(7, 5, dtype=torch.bool)}, r"mask of shape \(7, 5\)"),
        ({"mask": torch.ones(3, 1, 1, 7, dtype=torch.bool)}, r"mask of shape \(3, 1, 1, 7\)"),
        ({"mask": torch.ones(2, 2, 7, 7, dtype=torch.bool)}, r"mask of shape \(2, 2, 7, 7\)"),
        ({"mask": torch.ones(2, 4, 6, 7, dtype=torch.bool)}, r"mask of shape \(2, 4, 6, 7\)"),
        ({"bias": torch.zeros(7, 7, dtype=torch.bool)}, "bias of dtype torch.bool"),
        ({"bias": torch.zeros(7)}, "bias .*rank 1"),
        ({"bias": torch.zeros(2, 7, 7)}, "bias .*rank 3"),
        ({"bias": torch.zeros(5, 7)}, r"bias of shape \(5, 7\) does not fit"),
        ({"positions": torch.arange(6)}, "positions of shape"),
        ({"positions": torch.arange(7.0)}, "positions .*int64"),
        ({"positions": torch.zeros(3, 7, dtype=torch.int64)}, "positions of shape"),
        ({"context_positions": torch.arange(7)}, "context_positions"),
    ],
)
def test_refused_inputs(inputs: dict[str, Tensor], message: str) -> None:
    host = zoo.create("mha", 16, 4)
    with pytest.raises(zoo.ZooError, match=message):
        host(**{"x": torch.zeros(2, 7, 16), **inputs})


def test_causal_attention_refuses_a_context() -> None:
    host = zoo.create("mha", 16, 4, causal=True)
    with pytest.raises(zoo.ZooError, match="context given to causal attention"):
        host(torch.zeros(1, 3, 16), torch.zeros(1, 3, 16))


@pytest.mark.parametrize(
    "shape", [(7, 7), (1, 1, 7, 7), (2, 1, 1, 7), (1, 4, 7, 7), (2, 4, 7, 7), (1, 1, 1, 1)]
)
def test_masks_and_biases_of_every_allowed_shape(shape: tuple[int, ...]) -> None:
    host = zoo.create("mha", 16, 4, dtype=torch.float64)
    x, mask, bias = draw(2, 7, 16), draw(*shape, seed=1) > -0.5, draw(*shape, seed=2)
    full = (2, 4, 7, 7)
    expected = host(x, mask=mask.expand(full), bias=bias.expand(full))
    assert_close(host(x, mask=mask, bias=bias), expected)


class Limited(Normalize):
    """A softmax that promises next to nothing."""

    traits = Traits(
        causal=False,
        cross=False,
        mask="keys",
        bias=False,
        decode=False,
        weights=False,
        grouped=False,
    )

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return mask_scores(scores, mask).softmax(-1)


class Maskless(Limited):
    """Takes no mask at all, and is causal only."""

    traits = Traits(mask="none", bidirectional=False)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"context": torch.zeros(2, 5, 16)}, "context"),
        ({"mask": torch.ones(7, 7, dtype=torch.bool)}, "can hide keys only"),
        ({"mask": torch.ones(2, 4, 1, 7, dtype=torch.bool)}, "can hide keys only"),
        ({"bias": torch.zeros(7, 7)}, "bias"),
        ({"need_weights": True}, "need_weights"),
        ({"cache": zoo.LayerCache()}, "cache|decode"),
    ],
)
def test_what_a_part_does_not_promise_is_refused(inputs: dict[str, Any], message: str) -> None:
    host = zoo.create(f"{__name__}:Limited", 16, 4)
    with pytest.raises(zoo.ZooError, match=message):
        host(torch.zeros(2, 7, 16), **inputs)
    host(torch.zeros(2, 7, 16), mask=zoo.padding_mask(torch.tensor([7, 3])))


def test_what_a_part_does_not_promise_is_refused_at_construction() -> None:
    limited, maskless = (f"{__name__}:{name}" for name in ("Limited", "Maskless"))
    with pytest.raises(zoo.CompatibilityError, match=r"Limited.*cannot be causal"):
        zoo.create(limited, 16, 4, causal=True)
    with pytest.raises(zoo.CompatibilityError, match=r"Maskless.*causal attention only"):
        zoo.create(maskless, 16, 4)
    with pytest.raises(zoo.CompatibilityError, match=r"Limited.*kv_heads=2 < heads=4"):
        zoo.create(limited, 16, 4, kv_heads=2)
    with pytest.raises(zoo.CompatibilityError, match=r"Seen.*adds a bias.*Limited"):
        zoo.create(f"{limited}+{SEEN}", 16, 4)
    host = zoo.create(maskless, 16, 4, causal=True)
    with pytest.raises(zoo.ZooError, match="takes no mask"):
        host(torch.zeros(2, 7, 16), mask=torch.ones(2, 1, 1, 7, dtype=torch.bool))


def test_the_host_promises_what_all_parts_promise() -> None:
    host = zoo.create(f"{__name__}:Limited+gqa(kv_heads=4)", 16, 4)
    assert host.traits == Limited.traits


class Seen(Position):
    """Remembers the positions that it was given."""

    rotates = True
    biases = True
    embeds = True

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        self.embedded = positions
        return x

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        self.rotated = (q_pos, k_pos)
        return q, k

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        assert scores is not None
        self.distance = strip.distance()
        return scores


SEEN = f"{__name__}:Seen"


def test_positions_count_on_from_the_cache() -> None:
    host, cache = zoo.create(SEEN, 8, 2, causal=True), zoo.LayerCache()
    with torch.no_grad():
        host(torch.randn(1, 4, 8), cache=cache)
        host(torch.randn(1, 2, 8), cache=cache)
    part = host.position
    assert part.embedded.tolist() == [4, 5]
    assert [p.tolist() for p in part.rotated] == [[4, 5], [4, 5]]
    assert part.distance.tolist() == [[4, 3, 2, 1, 0, -1], [5, 4, 3, 2, 1, 0]]


def test_positions_given_reach_the_parts() -> None:
    host = zoo.create(SEEN, 8, 2)
    given, others = torch.tensor([[3, 1], [7, 7]]), torch.tensor([5, 6, 9])
    x, context = torch.randn(2, 2, 8), torch.randn(2, 3, 8)
    host(x, context, positions=given, context_positions=others)
    assert torch.equal(host.position.rotated[0], given)
    assert torch.equal(host.position.rotated[1], others)
    assert host.position.distance.shape == (2, 1, 2, 3)
    assert host.position.distance[0, 0].tolist() == [[-2, -3, -6], [-4, -5, -8]]
    host(x, context)
    assert host.position.rotated[1].tolist() == [0, 1, 2]


def test_positions_of_samples_are_cached() -> None:
    host, cache = zoo.create(SEEN, 8, 2, causal=True), zoo.LayerCache()
    steps = torch.tensor([[0, 1, 2], [5, 6, 7]])
    with torch.no_grad():
        host(torch.randn(2, 2, 8), positions=steps[:, :2], cache=cache)
        host(torch.randn(2, 1, 8), positions=steps[:, 2:], cache=cache)
        assert host.position.distance.tolist() == [[[[2, 1, 0]]], [[[2, 1, 0]]]]
        cache.select(torch.tensor([1]))
        host(torch.randn(1, 1, 8), positions=torch.tensor([[8]]), cache=cache)
    assert host.position.distance.tolist() == [[[[3, 2, 1, 0]]]]


def test_the_cache_of_all_layers_is_refused() -> None:
    host = zoo.create("mha", 16, 4, causal=True)
    for ask in (host, host.explain):
        with pytest.raises(zoo.ZooError, match="cache is of type Cache; allowed: the LayerCache"):
            ask(torch.zeros(2, 7, 16), cache=Cache())
