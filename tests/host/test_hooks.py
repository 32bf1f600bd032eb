"""What parts may do beyond their socket: look at the host, share, lay out keys, finish outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.cache import LayerCache
from zoo.combine.concat import Concat
from zoo.errors import ZooError
from zoo.host import engine
from zoo.host.attention import Attention
from zoo.host.routes import Route
from zoo.models.language.decoder_lm import DecoderLM
from zoo.parts import Call, Part
from zoo.project.mha import MQA
from zoo.registry import Taxonomy
from zoo.score.dot import Dot
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

TAXONOMY = Taxonomy("self", "single", "global", "single", "none", "none", "na")


class OneKey(MQA):
    """One key head in the cache, negated keys and doubled values for each head on reading."""

    seen: list[tuple[str, str]]

    def read(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return -k.expand(-1, self.layout.score_heads, -1, -1), 2 * v

    def finish(self, y: Tensor) -> Tensor:
        return y / 2

    def attach(self, host: Attention) -> None:
        self.seen = sorted(host.part_names.items())


class Routed(Concat):
    """Doubles the heads by what it prepared."""

    def prepare(self, call: Call) -> Mapping[str, Any]:
        return {"gate": call.x.new_full((), 2.0)}

    def forward(
        self, y: Tensor, x: Tensor, prepared: Mapping[str, Any] = MappingProxyType({})
    ) -> Tensor:
        return super().forward(y * prepared["gate"], x)


class Shared(Dot):
    """Has a temperature that all layers share, and a route that nobody takes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, strip: Any) -> Tensor:
        return super().forward(strip) * self.temperature

    def tie(self, first: Part) -> None:
        assert isinstance(first, Shared)
        self.temperature = first.temperature

    def routes(self) -> tuple[Route, ...]:
        def refuse(host: Attention, call: Call) -> str | None:
            return "the sequence is long" if call.q.shape[2] > 8 else None

        def run(host: Attention, call: Call) -> Tensor:
            return engine.run(host.parts, call, whole=True)

        return (Route("reference", refuse, run, auto=False),)


@pytest.fixture(autouse=True, scope="module")
def _parts() -> Iterator[None]:
    for name, kind, cls in (
        ("one_key_t", "project", OneKey),
        ("routed_t", "combine", Routed),
        ("shared_t", "score", Shared),
    ):
        zoo.register(name, kind=kind, taxonomy=TAXONOMY)(cls)
    yield
    for name in ("one_key_t", "routed_t", "shared_t"):
        zoo.registry.unregister(name)


@pytest.mark.parametrize("spec", ["one_key_t", "one_key_t+linear"])
def test_a_projection_gives_the_heads_their_keys_behind_the_cache(spec: str) -> None:
    host = zoo.create(spec, 16, 4, causal=True, dtype=torch.float64)
    plain = zoo.create(spec.replace("one_key_t", "mqa"), 16, 4, causal=True, dtype=torch.float64)
    state = host.state_dict()
    state["project.qkv.weight"] = state["project.qkv.weight"].clone()
    state["project.qkv.weight"][16:20] *= -1
    plain.load_state_dict(state)
    x = draw(2, 7, 16)
    assert_close(host(x), plain(x))
    cache = LayerCache()
    steps = [host(x[:, i : i + 1], cache=cache) for i in range(7)]
    assert_close(torch.cat(steps, 1), plain(x))
    if spec == "one_key_t":
        assert cache.get("k").shape[1] == 1


def test_parts_see_their_host() -> None:
    host = zoo.create("one_key_t+rope", 16, 4)
    assert ("position", "rope") in host.project.seen
    assert ("combine", "concat") in host.project.seen


def test_a_combination_is_handed_what_it_prepared() -> None:
    host = zoo.create("routed_t", 16, 4, dtype=torch.float64)
    plain = zoo.create("mha", 16, 4, dtype=torch.float64)
    plain.load_state_dict(host.state_dict())
    x = draw(2, 5, 16)
    assert_close(host(x), 2 * plain(x))


@pytest.mark.parametrize("name", ["decoder_lm", "vit"])
def test_models_let_layers_share(name: str) -> None:
    if name == "decoder_lm":
        model: nn.Module = DecoderLM(7, dim=16, depth=3, heads=2, attention="shared_t")
        found = [block.attn.score for block in model.blocks]
    else:
        options: dict[str, Any] = {"image_shape": (1, 8, 8), "num_classes": 3, "depth": 3}
        model = zoo.models.create("vit", attention="shared_t", dim=16, heads=2, **options)
        found = [module for module in model.modules() if isinstance(module, Shared)]
    assert len(found) == 3
    assert all(part.temperature is found[0].temperature for part in found)


def test_a_straightforward_form_is_taken_only_by_name() -> None:
    host = zoo.create("shared_t", 16, 4, dtype=torch.float64)
    x = draw(2, 8, 16)
    assert host.explain(x).route == "engine"
    assert "reference" not in host.explain(x).refused
    expected = host(x)
    host.route = "reference"
    assert host.explain(x).route == "reference"
    assert_close(host(x), expected)
    with pytest.raises(ZooError, match=r"route=.reference. cannot take .*: the sequence is long"):
        host(draw(2, 9, 16))
