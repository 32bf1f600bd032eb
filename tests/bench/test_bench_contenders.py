from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from zoo import registry
from zoo.bench import contenders
from zoo.bench.contenders import HANDWRITTEN, Handwritten, build, resolve, route
from zoo.errors import ZooError
from zoo.registry import Taxonomy, Traits, register, unregister

FACTS = {
    "dim": 16,
    "heads": 2,
    "causal": True,
    "max_len": 8,
    "device": "cpu",
    "dtype": torch.float32,
}


@pytest.mark.parametrize("causal", [False, True])
def test_handwritten_equals_the_host(causal: bool) -> None:
    host = zoo.create("mha", dim=16, heads=4, causal=causal)
    plain = Handwritten(16, 4, causal)
    plain.qkv.load_state_dict(host.project.qkv.state_dict())
    plain.proj.load_state_dict(host.combine.proj.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(plain(x), host(x))


def test_resolve_gives_one_spelling() -> None:
    assert resolve("softmax+mha+rope(base=10000.0)") == zoo.canonical("rope")
    assert resolve(HANDWRITTEN) == HANDWRITTEN
    assert resolve("gru") == "gru"


@pytest.mark.parametrize(
    ("name", "nearest"), [("mhaa", "mha"), ("handwriten", HANDWRITTEN), ("mha+rop", "rope")]
)
def test_unknown_names_get_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ZooError, match=f"did you mean .*'{nearest}'"):
        resolve(name)


def test_a_contender_may_name_its_route() -> None:
    assert resolve("softmax+rope@engine") == f"{zoo.canonical('rope')}@engine"
    x = torch.randn(1, 8, 16)
    free, forced = build("mha", FACTS), build("mha@engine", FACTS)
    assert (route(free, x), route(forced, x)) == ("sdpa", "engine")
    torch.testing.assert_close(forced.load_state_dict(free.state_dict()) and forced(x), free(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mha@engin", "unknown route 'engin'.*'engine'"),
        ("mha@", "SPEC@ROUTE"),
        ("mha@engine@dense", "SPEC@ROUTE"),
        ("gru@engine", "no routes"),
    ],
)
def test_wrong_routes_are_refused(name: str, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        build(resolve(name), FACTS)


def test_other_kinds_are_refused() -> None:
    taxonomy = Taxonomy("self", "single", "global", "single", "none", "none", "na")
    register("bench_slots", kind="slots", taxonomy=taxonomy)(nn.Flatten)
    try:
        with pytest.raises(ZooError, match="'bench_slots' is a slots; bench takes token mixers"):
            resolve("bench_slots")
    finally:
        unregister("bench_slots")


@pytest.mark.parametrize(
    "name",
    ["mha", "sliding_window(window=4)+learned", "linear", HANDWRITTEN, *zoo.list(kind="mixer")],
)
def test_every_kind_of_contender_mixes_tokens(name: str) -> None:
    x = torch.randn(1, 8, 16)
    assert build(resolve(name), FACTS)(x).shape == x.shape


def test_a_mixer_that_cannot_be_causal_is_refused() -> None:
    taxonomy = Taxonomy("self", "single", "global", "single", "none", "none", "na")

    class Both(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()

    for name, traits in (
        ("bench_both", Traits(causal=False)),
        ("bench_past", Traits(bidirectional=False)),
    ):
        register(name, kind="mixer", taxonomy=taxonomy, traits=traits)(Both)
        try:
            causal = not traits.causal
            with pytest.raises(ZooError, match=f"'{name}' .*causal"):
                build(name, {**FACTS, "causal": causal})
            assert isinstance(build(name, {**FACTS, "causal": not causal}), Both)
        finally:
            unregister(name)


def test_handwritten_refuses_an_impossible_size() -> None:
    with pytest.raises(ZooError, match="dim=16 is not divisible by heads=3"):
        build(HANDWRITTEN, {**FACTS, "heads": 3})


def test_route_is_what_the_host_explains() -> None:
    x = torch.randn(1, 8, 16)
    assert route(build("mha", FACTS), x) == "sdpa"
    assert route(build("sparsemax", FACTS), x) == "engine"
    assert route(build(HANDWRITTEN, FACTS), x) == "-"


def test_the_name_of_the_special_contender_is_free() -> None:
    assert HANDWRITTEN not in [*registry._entries, *registry._aliases]
    assert contenders.HANDWRITTEN == HANDWRITTEN
