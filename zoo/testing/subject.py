"""What contracts are run on: a mechanism by specification, built small and filled with noise."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import zoo
from zoo.host import engine, routes
from zoo.host.fit import common
from zoo.host.spec import DEFAULTS, PartSpec, parse
from zoo.parts import Call, Host, Route
from zoo.registry import SOCKETS, Entry, Traits, constructor

TESTS = Path(__file__).parents[2] / "tests"
# Kinds that the contracts of values can run; the others are held to those of the registry alone.
RUNNABLE = (*SOCKETS, "mixer", "feature", "slots")
FACTS: dict[str, Any] = {"dim": 16, "heads": 4, "max_len": 32}
CHANNELS = 8
SIDE = 6
SLOTS: dict[str, Any] = {"dim_in": 16, "dim": 8, "slots": 4}


@contextmanager
def tiny_strips() -> Iterator[None]:
    """Make the engine cut even tiny passes into many strips of rows and samples."""
    with (
        patch.dict(engine.WHOLE_BYTES, cpu=0),
        patch.dict(engine.STRIP_BYTES, cpu=256),
        patch.object(engine, "MIN_ROWS", 3),
    ):
        yield


@contextmanager
def routes_taken() -> Iterator[list[str]]:
    """Write down the route of every pass inside the block, to run none of them a second time."""
    taken: list[str] = []
    choose = routes.choose

    def note(host: Host, call: Call) -> Route:
        route = choose(host, call)
        taken.append(route.name)
        return route

    with patch.object(routes, "choose", note):
        yield taken


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def largest(x: Tensor) -> float:
    """Largest absolute value."""
    return float(x.detach().abs().max())


@dataclass(frozen=True)
class Build:
    """Builds a mechanism: ``build(causal=True, dtype=...)`` gives the module.

    Parameters are moved away from their start by noise, so that a gate that starts at zero does
    not hide what lies behind it.

    Args:
        spec: Specification as `zoo.create` takes it.
    """

    spec: str

    @property
    def entries(self) -> list[Entry]:
        """Registry entries of the parts that the specification names."""
        return [part.entry for part in parse(self.spec)]

    @property
    def entry(self) -> Entry:
        """Entry of the first part."""
        return self.entries[0]

    @property
    def is_host(self) -> bool:
        """Parts in sockets, not a whole module."""
        return self.entry.kind in SOCKETS

    @property
    def traits(self) -> Traits:
        """What all parts promise together."""
        return common([entry.traits for entry in self.entries])

    @property
    def modes(self) -> list[bool]:
        """Values of `causal` that the mechanism promises to honour."""
        if self.entry.kind in ("feature", "slots"):
            return [False]
        pairs = ((False, self.traits.bidirectional), (True, self.traits.causal))
        return [causal for causal, ok in pairs if ok]

    @property
    def signature(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of what `zoo.create` constructs."""
        return constructor(zoo.Attention if self.is_host else self.entry.cls)

    def takes(self, fact: str) -> bool:
        """The constructor has a parameter of this name."""
        return fact in self.signature

    def __call__(self, *, seed: int = 0, noise: bool = True, **facts: Any) -> nn.Module:
        """Construct the mechanism in its first mode unless told otherwise.

        Facts that the constructor cannot take are left out when they are the defaults of the
        tests, and passed on (to be refused) when a contract asks for them.
        """
        args: tuple[Any, ...] = ()
        given = {**FACTS, "causal": self.modes[0]}
        if self.entry.kind == "feature":
            args, given = (CHANNELS,), {}
        if self.entry.kind == "slots":
            given = SLOTS
        known = {name: value for name, value in given.items() if self.takes(name)}
        torch.manual_seed(seed)
        module = zoo.create(self.spec, *args, **{**known, **facts})
        if noise:
            with torch.no_grad():
                for parameter in module.parameters():
                    if not parameter.is_meta:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        return Started(module) if self.entry.kind == "slots" else module

    def input(
        self, batch: int = 2, length: int = 9, *, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Tensor:
        """Tokens (B, N, C), or feature maps (B, C, H, W) for mechanisms that want these."""
        if self.entry.kind == "feature":
            return draw(batch, CHANNELS, SIDE, max(SIDE, length), seed=seed, dtype=dtype)
        return draw(batch, length, FACTS["dim"], seed=seed, dtype=dtype)


class Started(nn.Module):
    """Slots that start at the same vectors, with the same noise, whatever the batch.

    Their start is random otherwise, so that a sample could not be compared with itself.

    Args:
        inner: The module.

    Attributes:
        own: Let the module start by itself instead, from one seed.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.own = False
        # Drawn here, since a compiled pass cannot make a generator; row i is that of input i.
        self.drawn = draw(SLOTS["slots"], SLOTS["dim"], seed=21)
        self.rows = draw(64, SLOTS["slots"], seed=22)

    def start(self, x: Tensor) -> dict[str, Tensor]:
        """Slots (B, K, D), and noise (B, N, K) where the module takes it."""
        b, n, _ = x.shape
        found = {"slots": self.drawn.to(x).expand(b, -1, -1)}
        if "noise" in inspect.signature(self.inner.forward).parameters:
            found["noise"] = self.rows[:n].to(x).expand(b, -1, -1)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, K, D)."""
        if self.own:
            return self.inner(x, generator=torch.Generator().manual_seed(5))
        return self.inner(x, **self.start(x))


def counts(module: nn.Module) -> bool:
    """Whether a part counts tokens from the first one, so that it refuses padding on the left."""
    return any(getattr(part, "counts", False) is True for part in module.modules())


def settle(module: nn.Module, x: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Output and all gradients of a pass, auxiliary losses included, by name."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = module(x, **inputs)
    loss = (y * draw(*y.shape, seed=7, dtype=y.dtype).to(y.device)).sum()
    for value in zoo.auxiliary_losses(module).values():
        loss = loss + value
    loss.backward()
    found = {"output": y.detach()}
    found.update((n, p.grad) for n, p in module.named_parameters() if p.grad is not None)
    if x.grad is not None:
        found["x"] = x.grad
    return found


def default_modules() -> set[str]:
    """Modules that hold the default parts; tests/test_attention.py covers them."""
    return {PartSpec(name).entry.cls.__module__ for name in DEFAULTS.values()}


def file_of_tests(entry: Entry) -> Path | None:
    """Where the tests of a mechanism of this package belong, or None for anybody else's."""
    package, _, name = entry.cls.__module__.rpartition(".")
    if package.split(".")[0] != "zoo" or entry.cls.__module__ in default_modules():
        return None
    return TESTS.joinpath(*package.split(".")[1:], f"test_{name}.py")


def variants(entry: Entry) -> list[str]:
    """Specifications to hold to the contracts: with the options that the entry's tests declare.

    A test file says ``CONTRACT_OPTIONS = [{"window": 4}]`` where the default options do nothing
    at the tiny sizes of the contracts, or where one set of options would leave code untried; for a
    file with several mechanisms, ``CONTRACT_OPTIONS = {"sliding_window": [{"window": 4}]}``.
    """
    path = file_of_tests(entry)
    found: Any = None
    if path is not None and path.exists():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "CONTRACT_OPTIONS" for t in targets):
                found = ast.literal_eval(node.value)
    if isinstance(found, dict):
        found = found.get(entry.name)
    return [str(PartSpec(entry.name, options)) for options in found or [{}]]
