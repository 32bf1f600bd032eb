"""What to measure of modules that are no token mixers, and of whole timm models with any of them.

Three sorts of contenders, by the kind that the registry knows: modules on feature maps
(B, C, H, W), slots on (B, N, C), and, with a host, whatever fits into a model of timm on images.
``NAME@ROUTE`` takes a class by one of its `routes`, such as ``triplet@reference``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.bench.contenders import split_route
from zoo.bench.settings import DTYPES, Common
from zoo.errors import ZooError, unknown
from zoo.host.attention import Attention
from zoo.host.factory import create
from zoo.host.spec import canonical, parse
from zoo.registry import SOCKETS, Entry

PLAIN = "plain"
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "feature": [(8, 64, 56, 56), (8, 256, 28, 28), (8, 512, 14, 14)],
    "slots": [(8, 196, 64)],
    "host": [(8, 3, 64, 64)],
}
AXES = {
    "feature": "batch, channels, height, width",
    "slots": "batch, inputs, channels",
    "host": "batch, channels, height, width",
}


def sort_of(specs: list[str]) -> str | None:
    """Tell whether the first contender is of kind "feature" or "slots"; None for token mixers.

    Raises:
        ZooError: Unknown name.
    """
    for spec in specs:
        try:
            kind = parse(split_route(spec)[0])[0].entry.kind
        except ZooError:
            return None  # the measurement of token mixers knows more names, and says what is wrong
        return kind if kind in SHAPES else None
    return None


@dataclass(kw_only=True)
class ShapeSetting(Common):
    """What to measure on inputs of given shapes, and how; `Common` has the rest.

    Args:
        specs: Specifications of one kind, SPEC or SPEC@ROUTE; with a host also ``plain``, the
            model as timm makes it.
        shapes: Shapes of the input: (B, C, H, W), or (B, N, C) for slots.
        host: Name of a timm model: a ViT or Swin for token mixers, a ResNet for feature modules.
        slots: Number of slots K, for slots.
        baseline: What the others are compared with; default ``plain`` in a host, else the first
            contender that is forced to its route ``reference``, else the first.

    Raises:
        ZooError: A value is out of range, a name is unknown or given twice, or kinds are mixed.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    host: str | None = None
    slots: int = 7
    baseline: str | None = None

    def __post_init__(self) -> None:
        self._check("slots")
        if self.host is not None:
            _check_host(self.host)
        named = [*self.specs, *([self.baseline] if self.baseline else [])]
        kinds = {name: self._kind(name) for name in named if name != PLAIN or not self.host}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{name!r} is of kind {kind!r}" for name, kind in kinds.items())
            raise ZooError(f"contenders of one measurement are of one kind, but {found}")
        self.sort = "host" if self.host else next(iter(kinds.values()), "feature")
        if self.slots != 7 and self.sort != "slots":
            raise ZooError(f"slots={self.slots} is for slots, but these are of kind {self.sort!r}")
        self.shapes = list(dict.fromkeys(self.shapes)) or SHAPES[self.sort]
        rank = AXES[self.sort].count(",") + 1
        for shape in self.shapes:
            checks.wholes("shape", shape, rank, also=f"the axes {AXES[self.sort]}")
        self.baseline = self._choose_baseline()
        self.specs = self._resolve(self._canonical, self.baseline)

    def _kind(self, name: str) -> str:
        parts = parse(split_route(name)[0])
        kind = parts[0].entry.kind
        tokens = (*SOCKETS, "mixer")
        if self.host is not None and (kind == "feature" or kind in tokens):
            return "feature" if kind == "feature" else "tokens"
        if self.host is not None or kind not in SHAPES:
            what = "token mixers and feature modules" if self.host else "feature modules and slots"
            raise ZooError(f"{name!r} is a {kind}; this measurement takes {what}")
        return kind

    def _canonical(self, name: str) -> str:
        if self.host is not None and name == PLAIN:
            return name
        spec, at, route = split_route(name)
        entry = parse(spec)[0].entry
        if at and entry.kind not in SOCKETS:
            _check_route(entry, route)
        return (canonical(spec) if entry.kind in SOCKETS else str(parse(spec)[0])) + at + route

    def _choose_baseline(self) -> str:
        if self.baseline is not None:
            return self._canonical(self.baseline)
        if self.host is not None:
            return PLAIN
        if not self.specs:
            raise ZooError("specs=[] is empty; give a contender such as 'triplet'")
        names = [self._canonical(spec) for spec in self.specs]
        return next((n for n in names if split_route(n)[2] == "reference"), names[0])

    @property
    def cases(self) -> list[tuple[int, ...]]:
        """Shapes of the input."""
        return self.shapes

    @property
    def give_up(self) -> None:
        """Shapes have no order in which one could give up."""
        return None

    def label(self, case: tuple[int, ...]) -> str:
        """Name of a case in a table."""
        return "x".join(map(str, case))

    def build(self, spec: str, case: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
        """Make a contender and its input."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.host is not None:
                module = self._model(spec, case)
            else:
                module = _module(spec, case, self.slots)
        module = module.to(device=self.device, dtype=DTYPES[self.dtype])
        return module, self.input(case)

    def _model(self, spec: str, case: tuple[int, ...]) -> nn.Module:
        """The host with a contender in every block."""
        import timm

        from zoo.timm import feature, init_special, swap

        assert self.host is not None
        name, _, route = split_route(spec)
        options: dict[str, Any] = {"in_chans": case[1]}
        tokens = spec == PLAIN or parse(name)[0].entry.kind != "feature"
        if not tokens:
            options["block_args"] = {"attn_layer": feature(name)}
        try:
            model = timm.create_model(self.host, img_size=case[2:], **options)
        except TypeError:  # models of convolutions take any size
            model = timm.create_model(self.host, **options)
        if spec != PLAIN and tokens:
            swap(model, name)
        init_special(model)
        for module in model.modules():
            if route and (isinstance(module, Attention) or hasattr(module, "routes")):
                module.route = route  # type: ignore[assignment]
        return model


def _check_route(entry: Entry, route: str) -> None:
    routes = getattr(entry.cls, "routes", ())
    if not routes:
        raise ZooError(f"{entry.name!r} has no routes to choose from")
    if route not in routes:
        raise unknown(f"route of {entry.name!r}", route, routes)


def _check_host(host: str) -> None:
    import timm

    if not timm.is_model(host):
        raise unknown("model of timm", host, timm.list_models())


def _module(spec: str, case: tuple[int, ...], slots: int) -> nn.Module:
    """A module for inputs of a shape."""
    name, _, route = split_route(spec)
    entry = parse(name)[0].entry
    if entry.kind == "feature":
        module = create(name, case[1])
    else:
        known = inspect.signature(entry.cls).parameters
        facts = {"dim_in": case[2], "slots": slots}
        module = create(name, **{k: v for k, v in facts.items() if k in known})
    if route:
        module.route = route  # type: ignore[assignment]
    return module
