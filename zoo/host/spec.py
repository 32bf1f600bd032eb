"""Specification strings: ``"sliding_window(window=64)+rope(base=500000)"`` and layer layouts.

Part names are joined by ``+``; options stand in brackets as ``name=value`` with Python literals
(a bare word counts as a string). The canonical form orders the parts by socket and leaves out the
defaults, so that two spellings of one thing share their records.
"""

from __future__ import annotations

import ast
import copy
import keyword
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from zoo import checks, registry
from zoo.errors import CompatibilityError, ZooError, unknown
from zoo.registry import SOCKETS, Entry

DEFAULTS = {
    "project": "mha",
    "position": "none",
    "score": "dot",
    "select": "all",
    "normalize": "softmax",
    "combine": "concat",
}
LAYOUT_KEYS = ("default", "first", "last", "every", "other")
# A spec reads best with what decides it first and where things stand last.
_ORDER = ("attend", "score", "select", "normalize", "project", "combine", "position")


@dataclass(frozen=True)
class PartSpec:
    """A mechanism by name with the options to build it with."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        """What the registry knows of it."""
        return registry.info(self.name)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{k}={_plain(v)}' for k, v in self.options.items())})"


def _plain(value: Any) -> str:
    """Write a value so that it parses back: words stay bare, everything else is a literal."""
    word = isinstance(value, str) and value.isascii() and value.isidentifier()
    return value if word and value not in _WORDS and not keyword.iskeyword(value) else repr(value)


# ``inf`` is what repr writes, but no literal of Python; ``true`` is how YAML and shells say it.
_WORDS = {"inf": math.inf, "true": True, "false": False}


class _Words(ast.NodeTransformer):
    """Reads words that stand for a value."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def split(text: str, separator: str) -> list[str]:
    """Split at a separator outside brackets and quotes.

    Raises:
        ZooError: Brackets do not match.
    """
    pieces, depth, start, quote = [], 0, 0, ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth < 0:
                break
        elif char == separator and not depth:
            pieces.append(text[start:i])
            start = i + 1
    if depth or quote:
        raise ZooError(f"specification {text!r}: brackets or quotes do not match")
    return [piece.strip() for piece in [*pieces, text[start:]]]


def _part(text: str) -> PartSpec:
    name, bracket, _ = text.partition("(")
    name = name.strip()
    if not name:
        raise ZooError(f"specification: empty part in {text!r}; join names with one '+'")
    if not bracket:
        return PartSpec(name)
    # A copy, since values such as lists belong to whoever asked.
    return PartSpec(name, copy.deepcopy(_options(text)))


@lru_cache(maxsize=1024)
def _options(text: str) -> dict[str, Any]:
    """Options of a part as written; each text is read once."""
    rest = text.partition("(")[2]
    try:
        call = _Words().visit(ast.parse(f"_({rest}", mode="eval").body)
    except SyntaxError as error:
        raise ZooError(f"specification {text!r}: cannot read the options ({error.msg})") from error
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
        raise ZooError(f"specification {text!r}: options are written name=value")
    options: dict[str, Any] = {}
    for item in call.keywords:
        if item.arg is None:
            raise ZooError(f"specification {text!r}: options are written name=value")
        if item.arg in options:
            raise ZooError(f"specification {text!r}: option {item.arg!r} is given twice")
        if isinstance(item.value, ast.Name):
            options[item.arg] = item.value.id
            continue
        try:
            options[item.arg] = ast.literal_eval(item.value)
        except ValueError as error:
            raise ZooError(
                f"specification {text!r}: option {item.arg!r} is not a plain value"
            ) from error
    return options


def parse(spec: str) -> list[PartSpec]:
    """Read a specification string into its parts, names resolved and options checked.

    Raises:
        ZooError: Unreadable text, unknown names or options.
        CompatibilityError: Two parts for one socket.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise ZooError(f"specification {spec!r} is empty; give a name such as 'mha'")
    parts = []
    for text in split(spec, "+"):
        part = _part(text)
        entry = part.entry
        own = set(part.options) - ({"kv_heads"} if entry.kind == "project" else set())
        entry.check_options(own)
        parts.append(PartSpec(entry.name, part.options))
    if len(parts) > 1:
        sockets(parts)
    return parts


def sockets(parts: list[PartSpec]) -> dict[str, PartSpec]:
    """Sort parts into sockets.

    Raises:
        CompatibilityError: Two parts want one socket, or a part has no socket.
    """
    filled: dict[str, PartSpec] = {}
    for part in parts:
        kind = part.entry.kind
        if kind not in SOCKETS:
            raise CompatibilityError(
                f"{part.name!r} is a {kind}, a whole module: it fills no socket and cannot be "
                f"combined with {', '.join(repr(p.name) for p in parts if p is not part)}"
            )
        if kind in filled:
            raise CompatibilityError(
                f"{filled[kind].name!r} and {part.name!r} both fill the socket {kind!r}; keep one"
            )
        filled[kind] = part
    if "attend" in filled:
        for kind in ("score", "select", "normalize"):
            if kind in filled:
                raise CompatibilityError(
                    f"{filled['attend'].name!r} computes score, select and normalize in one go, "
                    f"so {filled[kind].name!r} ({kind}) cannot be combined with it"
                )
    return filled


def canonical(spec: str) -> str:
    """One spelling for all equal specifications.

    Options that repeat a default are dropped, so is every default part; what is left of plain
    attention is called ``mha``.
    """
    parts = parse(spec)
    kept = []
    for part in parts:
        known = part.entry.options
        options = {
            name: value
            for name, value in sorted(part.options.items())
            if name not in known or known[name].default != value
        }
        if options or DEFAULTS.get(part.entry.kind) != part.name:
            kept.append(PartSpec(part.name, options))
    if all(part.entry.kind == "position" for part in kept):
        kept.append(PartSpec("mha"))
    rank = {kind: i for i, kind in enumerate(_ORDER)}
    kept.sort(key=lambda part: rank.get(part.entry.kind, len(rank)))
    return "+".join(str(part) for part in kept)


def without(spec: str, kind: str) -> tuple[str, PartSpec | None]:
    """Take the part of one socket out of a specification.

    Returns:
        The rest (``"mha"`` if nothing is left) and the part taken out, or None.
    """
    parts = parse(spec)
    rest = [part for part in parts if part.entry.kind != kind]
    taken = next((part for part in parts if part.entry.kind == kind), None)
    return "+".join(str(part) for part in rest) or "mha", taken


def layout(
    attention: str | Mapping[str, Any], depth: int, layers: Mapping[str, Any] | None = None
) -> list[str]:
    """Specification of each layer of a model.

    Where nothing but the default is given, each part follows the layout that its paper declares:
    in the other layers its socket falls back, and the rest of the specification stays. A model
    too shallow to keep the part in any layer has it in all of them.

    Args:
        attention: One spec for all layers, or a mapping with the keys ``default``, ``first``,
            ``last``, ``every`` (int n) and ``other`` (spec of every n-th layer).
        depth: Number of layers.
        layers: The same keys apart from ``default``; None entries count as absent. The value
            ``"same"`` stands for the default, so ``{"first": "same"}`` switches declared layouts
            off.

    Raises:
        ZooError: Unknown key, ``every`` without ``other`` or the reverse, or ``every`` < 1.
    """
    checks.whole("depth", depth)
    given: dict[str, Any] = dict(attention) if not isinstance(attention, str) else {}
    if isinstance(attention, str):
        given["default"] = attention
    given.update({k: v for k, v in (layers or {}).items() if v is not None})
    if "default" not in given:
        raise ZooError("layers: the key 'default' is missing; it names the spec of most layers")
    specs = _declared(given["default"], depth) if len(given) == 1 else _spread(given, depth)
    specs = [given["default"] if spec == "same" else spec for spec in specs]
    for spec in set(specs):
        parse(spec)
    return specs


def _spread(given: Mapping[str, Any], depth: int) -> list[Any]:
    """Value of each layer, by the keys of a layout."""
    for key in given:
        if key not in LAYOUT_KEYS:
            raise unknown("key of layers", key, LAYOUT_KEYS)
    if ("every" in given) != ("other" in given):
        raise ZooError("layers: 'every' (a number) and 'other' (a spec) go together")
    values = [given["default"]] * depth
    if "every" in given:
        step = checks.whole("layers: every", given["every"])
        for i in range(step - 1, depth, step):
            values[i] = given["other"]
    for key, index in (("first", 0), ("last", -1)):
        if key in given:
            values[index] = given[key]
    return values


def _declared(spec: str, depth: int) -> list[str]:
    """Specification of each layer by what the parts of `spec` declare."""
    parts = parse(spec)
    choices: dict[str, list[str]] = {}
    for part in parts:
        chosen = _spread({"default": "same", **part.entry.layers}, depth)
        if "same" in chosen and set(chosen) != {"same"}:
            choices[part.name] = chosen
    if not choices:
        return [spec] * depth
    specs = []
    for i in range(depth):
        kept = []
        for part in parts:
            choice = choices[part.name][i] if part.name in choices else "same"
            if choice != "plain":
                kept.append(str(part) if choice == "same" else choice)
        specs.append("+".join(kept) or "mha")
    return specs
