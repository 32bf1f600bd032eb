"""Contracts on promises: what is not promised is refused, and what is there is documented."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import zoo
from zoo.errors import ZooError
from zoo.host.attention import Attention
from zoo.host.spec import DEFAULTS, PartSpec, parse
from zoo.testing.subject import CHANNELS, Build, Started, draw, file_of_tests, largest
from zoo.testing.values import flag


@dataclass
class Refusal:
    """What was said when something was refused."""

    text: str = ""


@contextmanager
def refused(pattern: str, kind: type[Exception] = ZooError) -> Iterator[Refusal]:
    """Assert that the block raises an error of this kind whose text has the pattern in it."""
    found = Refusal()
    try:
        yield found
    except kind as error:
        found.text = str(error)
        assert re.search(pattern, found.text), f"{found.text!r} does not speak of {pattern!r}"
    else:
        raise AssertionError(f"nothing was refused; expected: {pattern!r}")


def check_refusals(build: Build) -> None:
    """Whatever a trait does not promise raises when it is asked for."""
    traits = build.traits
    if not traits.causal:
        with refused("causal"):
            build(causal=True)
    if not traits.bidirectional:
        with refused("causal"):
            build(causal=False)
    if not traits.grouped and build.is_host:
        with refused("kv_heads"):
            build(kv_heads=2)
    module = build(dtype=torch.float64)
    x = build.input(2, 7)
    keys = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    if traits.mask == "none":
        _refuses(module, x, "mask", mask=keys)
    if traits.mask == "keys":
        _refuses(module, x, "mask", mask=torch.ones(7, 7, dtype=torch.bool))
        _refuses(module, x, "mask", mask=keys.expand(2, 1, 7, 7))
        _refuses(module, x, "mask", mask=keys.expand(2, 4, 1, 7))
    if not traits.bias:
        _refuses(module, x, "bias", bias=torch.zeros(7, 7, dtype=torch.float64))
    if not traits.weights:
        _refuses(module, x, "weights", need_weights=True)
    if not traits.cross and traits.bidirectional:
        module = build(dtype=torch.float64, **flag(build, False))
        _refuses(module, x, "context", context=draw(2, 5, 16))
    if not traits.packed:
        bounds = torch.tensor([0, 3, 7])
        _refuses(module, x[:1], "packed", cu_seqlens=bounds)
    if not traits.decode:
        _refuses(module, x, "cache|decode", cache=zoo.LayerCache())


def _refuses(module: torch.nn.Module, x: torch.Tensor, named: str, **inputs: Any) -> None:
    """Assert a readable refusal, or a forward that has no such argument at all."""
    (name,) = inputs
    if name not in inspect.signature(module.forward).parameters:
        with refused(name, TypeError):
            module(x, **inputs)
        return
    with refused(named):
        module(x, **inputs)


def check_door(build: Build) -> None:
    """Inputs that are no tensors, or of another type, rank or device, are refused by name."""
    module = build(dtype=torch.float64)
    inner = module.inner if isinstance(module, Started) else module
    x = build.input(2, 7)
    for wrong in ("x", 3.5, [1.0], None):
        with refused(r"^x is of type"):
            inner(wrong)
    with refused("^x has dtype torch.int64"):
        inner(x.long())
    with refused("^x of shape"):
        inner(x[0])
    if next(inner.parameters(), None) is not None:
        with refused("^x has dtype torch.float32, but the weights"):
            inner(x.float())
        with refused("^x is on meta"):
            inner(x.to("meta"))
    taken = inspect.signature(inner.forward).parameters
    for name in ("mask", "bias", "positions", "cu_seqlens", "cache"):
        if name in taken:
            with refused(name):
                inner(x, **{name: "x"})
    given: dict[str, Any]
    for given in ({"dtype": "float33"}, {"dtype": torch.int64}, {"device": "nowhere"}):
        with refused(f"^{next(iter(given))}="):
            build(**given)


def check_options(build: Build) -> None:
    """An unknown option is refused, and the error names the nearest there is."""
    for option in [*build.entry.options, "unheard_of"]:
        wrong = f"{option}_"
        given: dict[str, Any] = {wrong: 1}
        spec = str(PartSpec(build.entry.name, given))
        with refused(re.escape(wrong)) as caught:
            zoo.create(spec, *((CHANNELS,) if build.entry.kind == "feature" else (16, 4)))
        if option in build.entry.options:
            assert repr(option) in caught.text, f"{caught.text} does not name {option!r}"
        with refused(re.escape(wrong)):
            build(**given)
    assert not any(
        p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        for p in inspect.signature(build.entry.cls).parameters.values()
    ), "the constructor takes *args or **kwargs"
    if build.is_host or build.entry.kind in ("feature", "slots"):
        lacking = [n for n, p in build.entry.options.items() if p.default is p.empty]
        assert not lacking, f"options without a default: {lacking}"


def check_documented(build: Build) -> None:
    """The class and its module say what it is and where it comes from."""
    entry = build.entry
    module = inspect.getdoc(inspect.getmodule(entry.cls)) or ""
    assert re.match(r"\S.{8,}[.!)`]$", entry.summary), f"summary {entry.summary!r}"
    assert len(module) > 30, "the module has no docstring"
    assert entry.paper is not None, "no paper"
    text = module + (inspect.getdoc(entry.cls) or "")
    assert re.search(r"(19|20)\d\d", text), "the docstrings cite no year"
    documented = inspect.getdoc(entry.cls) or ""
    for option in entry.options:
        assert re.search(rf"^\s+{option}: \S", documented, re.M), f"option {option!r} undocumented"
    for value in entry.layers.values():
        if isinstance(value, str) and value not in ("plain", "same"):
            assert [part.entry.kind for part in parse(value)] == [entry.kind], f"layers: {value}"


def check_tested(build: Build) -> None:
    """The mechanism has its own test file with tests in it."""
    path = file_of_tests(build.entry)
    if path is None:
        return
    assert path.exists(), f"missing: tests/{path.relative_to(path.parents[1])}"
    assert re.search(r"^def test_", path.read_text(encoding="utf-8"), re.M), f"{path}: no test"


def check_bites(build: Build) -> None:
    """At the sizes of the contracts the mechanism differs from the default it replaces.

    Otherwise the other contracts would only try the default again.
    """
    entry = build.entry
    if entry.name in DEFAULTS.values():
        return
    module = build(dtype=torch.float64)
    assert isinstance(module, Attention)
    plain = Build("mha")(dtype=torch.float64, causal=module.causal)
    state = plain.state_dict()
    shared = {name: value for name, value in module.state_dict().items() if name in state}
    if any(state[name].shape != value.shape for name, value in shared.items()):
        return
    plain.load_state_dict({**state, **shared})
    x = build.input(2, 13)
    assert largest(module(x) - plain(x)) > 1e-9, (
        f"{build.spec!r} equals plain attention at these sizes; "
        f"give CONTRACT_OPTIONS in {file_of_tests(entry)}"
    )
