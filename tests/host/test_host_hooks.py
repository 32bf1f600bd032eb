"""What the host offers parts beside the strips: routes of attend parts, changed keys, recall."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.cache import LayerCache
from zoo.host.attention import Attention
from zoo.host.routes import Route
from zoo.parts import Attend, Call, Normalize, Select, Strip
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

HERE = __name__


class Mean(Attend):
    """The mean of all values, by two routes."""

    def forward(self, call: Call) -> Tensor:
        return call.v.mean(2, keepdim=True).expand_as(call.q)

    def routes(self) -> tuple[Route, ...]:
        def refuse(host: Attention, call: Call) -> str | None:
            return "there are more than 5 tokens" if call.q.shape[2] > 5 else None

        return (
            Route("short", refuse, lambda host, call: 2 * self(call)),
            Route("odd", lambda host, call: None, lambda host, call: 3 * self(call), auto=False),
        )


class Lagged(Select):
    """Every key is that of the token before; for causal attention."""

    def change_keys(self, k: Tensor, cache: LayerCache | None, cu_seqlens: Tensor | None) -> Tensor:
        last = None if cache is None else cache.get_state("lagged")
        last = torch.zeros_like(k[:, :, :1]) if last is None else last
        if cache is not None:
            cache.set_state("lagged", k[:, :, -1:])
        return torch.cat([last, k[:, :, :-1]], 2)

    def allow(self, strip: Strip) -> Tensor | None:
        return None


class Rolling(Normalize):
    """While decoding, the mean of the values so far, whatever the scores."""

    recalls = True

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.softmax(-1)

    def recall(self, host: Attention, call: Call) -> Tensor:
        assert call.cache is not None
        held = call.cache.extend("held", call.v)
        first = held.shape[2] - call.v.shape[2]
        return torch.stack([held[:, :, : i + 1].mean(2) for i in range(first, held.shape[2])], 2)


def _host(spec: str, **options: Any) -> Attention:
    host = zoo.create(spec, 8, 2, dtype=torch.float64, **options)
    assert isinstance(host, Attention)
    return host


def test_an_attend_part_brings_routes_and_explains_them() -> None:
    host = _host(f"{HERE}:Mean")
    x = draw(2, 4, 8)
    long = draw(2, 7, 8)
    name = host.part_names["attend"]
    assert host.explain(x).route == "short"
    assert host.explain(x).skipped == (name,)
    told = host.explain(long)
    assert (told.route, told.refused["short"]) == (name, "there are more than 5 tokens")
    assert "by itself" in told.refused["sdpa"]
    one = host(x)
    host.route = name
    assert_close(one, 2 * host(x), "route that is taken first")
    host.route = "odd"
    assert_close(3 * one, 2 * host(x), "route asked for by name")
    host.route = "short"
    with pytest.raises(zoo.ZooError, match="more than 5 tokens"):
        host(long)
    with pytest.raises(zoo.ZooError, match="dense"):
        host.route = "dense"


def test_packed_sequences_are_refused_by_routes_that_mix_them() -> None:
    host = _host(f"{HERE}:Mean")
    bounds = torch.tensor([0, 2, 4])
    told = host.explain(draw(1, 4, 8), cu_seqlens=bounds)
    assert told.refused["short"] == "it does not keep packed sequences apart"
    plain = _host("mha", causal=True)
    assert plain.explain(draw(1, 4, 8), cu_seqlens=bounds).route == "sdpa_strips"


def test_keys_are_changed_before_they_are_rotated_and_cached() -> None:
    host = _host(f"{HERE}:Lagged+rope", causal=True)
    plain = _host("rope", causal=True)
    plain.load_state_dict(host.state_dict())
    x = draw(2, 6, 8)
    y = host(x)
    assert not torch.allclose(y, plain(x))
    cache = LayerCache()
    with torch.no_grad():
        steps = [host(x[:, i : i + 1], cache=cache) for i in range(6)]
    assert_close(torch.cat(steps, 1), y, "decoded with changed keys")


def test_a_normalizer_that_recalls_keeps_the_memory_itself() -> None:
    host = _host(f"{HERE}:Rolling+rope", causal=True)
    x = draw(2, 6, 8)
    cache = LayerCache()
    with torch.no_grad():
        steps = torch.cat([host(x[:, :4], cache=cache), host(x[:, 4:], cache=cache)], 1)
        v = host.project(x, None, None)[2]
        means = v.cumsum(2) / torch.arange(1, 7)[:, None]
        assert_close(steps, host.combine(means, x), "recalled")
    assert cache.get("k") is None
    assert "recall" in host.explain(x, cache=cache).route
    with pytest.raises(zoo.ZooError, match="no weights while it recalls"):
        host(x, cache=cache, need_weights=True)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0.0, 4.0]), "dtype"),
        (torch.tensor([[0, 4]]), "rank 1"),
        (torch.tensor([4]), "from 0 to 4"),
        (torch.tensor([1, 4]), "from 0 to 4"),
        (torch.tensor([0, 3]), "from 0 to 4"),
        (torch.tensor([0, 3, 2, 4]), "without decreasing"),
    ],
)
def test_bounds_of_packed_sequences_that_are_none(bounds: Tensor, message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        _host("mha")(draw(1, 4, 8), cu_seqlens=bounds)


def test_packed_sequences_exclude_batches_caches_and_contexts() -> None:
    bounds = torch.tensor([0, 4])
    host = _host("mha")
    with pytest.raises(zoo.ZooError, match="batch 2"):
        host(draw(2, 4, 8), cu_seqlens=bounds)
    with pytest.raises(zoo.ZooError, match="no cache"):
        host(draw(1, 4, 8), cu_seqlens=bounds, cache=LayerCache())
    with pytest.raises(zoo.ZooError, match="no context"):
        host(draw(1, 4, 8), draw(1, 4, 8), cu_seqlens=bounds)


def test_the_number_of_layers_is_a_fact() -> None:
    with pytest.raises(zoo.ZooError, match="depth=2"):
        _host("mha", depth=2, layers=2)
    with pytest.raises(zoo.ZooError, match="layers=0"):
        _host("mha", layers=0)
