"""Every registered mechanism is held to every promise that it makes."""

from __future__ import annotations

import functools
import random

import pytest

import zoo
from zoo.host.spec import DEFAULTS, parse
from zoo.registry import SOCKETS, Traits
from zoo.testing.contract import CONTRACTS, JOINT, owed
from zoo.testing.subject import Build, variants

SPECS = [spec for name in zoo.list() for spec in variants(zoo.info(name))]
CASES = [(spec, name) for spec in SPECS for name in owed(Build(spec))]


def _compositions(each: int = 1) -> list[str]:
    """Hosts with several sockets filled at random, every part in at least `each` of them."""
    entries = {spec: Build(spec).entry for spec in SPECS}
    by_kind = {
        kind: [s for s, e in entries.items() if e.kind == kind and e.name not in DEFAULTS.values()]
        for kind in SOCKETS
    }
    found: set[str] = set()
    for kind, specs in by_kind.items():
        for spec in specs:
            chance = random.Random(spec)
            made = 0
            for _ in range(20):
                others = [chance.choice(s) for k, s in by_kind.items() if s and k != kind]
                kept = [s for s in others if chance.random() < 0.6]
                name = _possible("+".join([spec, *kept])) if kept else None
                if name is not None:
                    found.add(name)
                    made += 1
                if made == each:
                    break
    return sorted(found)


def _possible(spec: str) -> str | None:
    try:
        Build(spec)()
    except zoo.CompatibilityError:
        return None
    return zoo.canonical(spec)


# What these find depends on the module and the traits alone, not on which of its parts is meant.
OF_MODULES = frozenset(
    (
        *("shape", "gradients", "batch", "gradcheck", "half", "large", "compile", "vmap"),
        *("state_dict", "copy", "device", "causal", "padding", "additive", "pairs", "empty_rows"),
        *("decode", "decode_mask", "packed", "cross", "bias", "weights", "strips"),
    )
)


@functools.cache
def _hold(spec: str, traits: Traits, contract: str) -> None:
    """Check a module once: `softmax`, `dot`, `all`, `none` and `concat` make the same as `mha`."""
    build = Build(spec)
    assert build.traits == traits
    CONTRACTS[contract].check(build)


@pytest.mark.parametrize(("spec", "contract"), CASES, ids=[f"{s}-{c}" for s, c in CASES])
def test_contract(spec: str, contract: str) -> None:
    build = Build(spec)
    if contract in OF_MODULES and build.is_host:
        _hold(zoo.canonical(spec), build.traits, contract)
    else:
        CONTRACTS[contract].check(build)


TOGETHER = [(spec, c) for spec in _compositions() for c in owed(Build(spec)) if c in JOINT]


@pytest.mark.parametrize(("spec", "contract"), TOGETHER, ids=[f"{s}-{c}" for s, c in TOGETHER])
def test_composition(spec: str, contract: str) -> None:
    CONTRACTS[contract].check(Build(spec))


def test_every_mechanism_is_held_to_something() -> None:
    assert {part.name for spec, _ in CASES for part in parse(spec)} == set(zoo.list())
    assert {contract for _, contract in CASES} == set(CONTRACTS), "a contract that nobody owes"
