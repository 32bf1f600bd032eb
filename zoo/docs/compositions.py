"""Which parts work together: every pair from two sockets, tried; the page docs/compositions.md.

``python -m zoo.docs.compositions docs/compositions.md`` writes the page from the registry. A pair
is tried by building a host of it, in each of the modes (causal, bidirectional) that both parts
promise on their own; the tests train one step of every pair that can be built.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from zoo import registry
from zoo.errors import CompatibilityError, ZooError
from zoo.host.attention import Attention
from zoo.host.spec import DEFAULTS
from zoo.registry import SOCKETS

SIZES: dict[str, Any] = {"dim": 64, "heads": 4, "max_len": 16}
"""Facts of the hosts that are built."""
TRIPLES = 60
"""Size of the sample of triples."""
_FILLED_BY_ATTEND = ("score", "select", "normalize")
MODES = {"causal": True, "bidirectional": False}

_HEAD = """\
# Which parts work together

Written by `make docs` from the registry; the tests keep it up to date and train one step of every
combination that is listed as working.

A specification joins parts by `+`, one for each socket: `cog+cope+moh`. The default of a socket
({defaults}) works with everything that its neighbours take and is not listed."""


@dataclass(frozen=True)
class Composition:
    """Some parts in one host.

    Args:
        names: Their registry names.
        modes: Modes in which they can be built together.
        reason: Why they cannot, in a mode that all of them promise; None if they can.
    """

    names: tuple[str, ...]
    modes: tuple[str, ...]
    reason: str | None

    @property
    def spec(self) -> str:
        """The specification."""
        return "+".join(self.names)


def parts() -> dict[str, list[str]]:
    """Every part by socket, the defaults left out; `attend` parts fill three sockets."""
    return {
        kind: [name for name in registry.list_names(kind=kind) if name != DEFAULTS.get(kind)]
        for kind in SOCKETS
    }


def promised(names: Sequence[str]) -> list[str]:
    """Modes that all of the parts promise on their own."""
    traits = [registry.info(name).traits for name in names]
    return [mode for mode in MODES if all(getattr(t, mode) for t in traits)]


def build(names: Sequence[str], mode: str) -> Attention:
    """Host of some parts.

    Args:
        names: Parts of different sockets.
        mode: "causal" or "bidirectional".

    Raises:
        ZooError: They cannot work together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention(spec="+".join(names), causal=MODES[mode], **SIZES)


def compose(*names: str) -> Composition:
    """Try some parts together."""
    modes, reason = [], None
    wanted = promised(names)
    if not wanted:
        reason = f"{names[0]!r} and {names[-1]!r} share no mode: one is causal only, one never is"
    for mode in wanted:
        try:
            build(names, mode)
            modes.append(mode)
        except CompatibilityError as error:
            reason = str(error)
    return Composition(names, tuple(modes), reason)


def pairs() -> Iterator[Composition]:
    """Every two parts of different sockets."""
    for (_, first), (_, second) in combinations(parts().items(), 2):
        for a in first:
            for b in second:
                yield compose(a, b)


def triples(count: int = TRIPLES, seed: int = 0) -> Iterator[Composition]:
    """Sample parts of three different sockets, always the same ones for a seed.

    An attend part leaves no room for the sockets that it fills; the pairs say so already.
    """
    free = {kind: names for kind, names in parts().items() if kind != "attend"}
    whole = {kind: names for kind, names in parts().items() if kind not in _FILLED_BY_ATTEND}
    found = {
        (a, b, c)
        for sockets in (free, whole)
        for first, second, third in combinations(sockets.values(), 3)
        for a in first
        for b in second
        for c in third
    }
    for names in sorted(random.Random(seed).sample(sorted(found), min(count, len(found)))):
        yield compose(*names)


def _partners(name: str, kind: str, known: dict[frozenset[str], Composition]) -> str:
    """Parts of a socket that a part works with, as a table cell."""
    if registry.info(name).kind == kind:
        return ""
    every = parts()[kind]
    works = [other for other in every if known[frozenset((name, other))].reason is None]
    if not every:
        return ""
    if works == every:
        return "all"
    return ", ".join(f"`{other}`" for other in works) or "none"


def page() -> str:
    """Text of docs/compositions.md."""
    found = list(pairs())
    known = {frozenset(item.names): item for item in found}
    sample = list(triples())
    kinds = [kind for kind, names in parts().items() if names]
    defaults = ", ".join(f"`{name}`" for name in DEFAULTS.values())
    lines = [_HEAD.format(defaults=defaults), ""]
    lines += [
        f"Of {len(found)} pairs of {sum(map(len, parts().values()))} parts, "
        f"{sum(item.reason is None for item in found)} work; of a fixed sample of {len(sample)} "
        f"triples, {sum(item.reason is None for item in sample)} work. A pair with a causal-only "
        "part is causal only.",
        "",
        f"| part | socket | modes | {' | '.join(f'with {kind}' for kind in kinds)} |",
        "|---" * (3 + len(kinds)) + "|",
    ]
    for kind in kinds:
        for name in parts()[kind]:
            cells = [f"`{name}`", kind, ", ".join(promised([name]))]
            cells += [_partners(name, other, known) for other in kinds]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What does not, and why", "", "| parts | reason |", "|---|---|"]
    lines += [f"| `{i.spec}` | {i.reason} |" for i in found if i.reason is not None]
    lines += ["", "## The triples that were tried", ""]
    lines += [f"- `{i.spec}`" + (f": no, {i.reason}" if i.reason else "") for i in sample]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m zoo.docs.compositions docs/compositions.md")
    try:
        Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    except (OSError, ZooError) as problem:
        raise SystemExit(f"error: {problem}") from None
