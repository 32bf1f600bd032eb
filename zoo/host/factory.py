"""`create`: any mechanism of the zoo, by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from zoo import inputs
from zoo.errors import ZooError, unknown
from zoo.host.attention import Attention
from zoo.host.spec import PartSpec, parse
from zoo.registry import SOCKETS

_SIGNATURE = inspect.signature(Attention)
_HOST = _SIGNATURE.parameters


def create(spec: str, /, *args: Any, **options: Any) -> nn.Module:
    """Build a mechanism by name.

    Names of sockets give an `Attention` with that socket filled and the others at their
    defaults; names of whole modules give the module. Options of the parts may stand in the spec
    (``"sliding_window(window=64)"``) or beside the host's options, as long as only one part of
    the spec has an option of that name.

    Args:
        spec: A registry name, a dotted path ``package.module:Class``, or several joined by ``+``.
        args: Positional arguments of the host (dim, heads) or of the module.
        options: Options of the host, of its parts, or of the module.

    Raises:
        ZooError: Unknown name or option (the nearest is named), or an impossible value.
        CompatibilityError: Parts that cannot work together.
    """
    parts = parse(spec)
    if len(parts) == 1 and parts[0].entry.kind not in SOCKETS:
        return _module(parts[0], args, options)
    host = {name: options.pop(name) for name in list(options) if name in _HOST}
    extra: list[dict[str, Any]] = [{} for _ in parts]
    for name, value in options.items():
        owners = [i for i, part in enumerate(parts) if name in part.entry.options]
        if not owners:
            known = [n for part in parts for n in part.entry.options]
            raise unknown(f"option of {spec!r}", name, [*known, *_HOST])
        if len(owners) > 1:
            names = " and ".join(repr(parts[i].name) for i in owners)
            raise ZooError(f"option {name!r} belongs to {names}; write it into the spec")
        if name in parts[owners[0]].options:
            raise ZooError(f"option {name!r} is given twice, in {spec!r} and beside it")
        extra[owners[0]][name] = value
    full = [
        PartSpec(part.name, {**part.options, **more})
        for part, more in zip(parts, extra, strict=True)
    ]
    try:
        _SIGNATURE.bind(*args, **host)
    except TypeError as error:
        raise ZooError(f"create({spec!r}): {error}") from None
    return Attention(*args, **{"spec": "+".join(map(str, full)), **host})


def _module(part: PartSpec, args: tuple[Any, ...], options: dict[str, Any]) -> nn.Module:
    signature = inspect.signature(part.entry.cls)
    merged = {**part.options, **options}
    for name in merged:
        if name not in signature.parameters:
            raise unknown(f"option of {part.name!r}", name, signature.parameters)
    try:
        signature.bind(*args, **merged)
    except TypeError as error:
        raise ZooError(f"create({part.name!r}): {error}") from None
    inputs.placed(merged.get("device"), merged.get("dtype"))
    return part.entry.cls(*args, **merged)
