"""The registry: one decorator per mechanism, and everything else reads from it.

A mechanism is registered where it is written::

    @register("alibi", kind="position", paper=Paper(...), taxonomy=Taxonomy(...))
    class ALiBi(Position): ...

Modules are found by walking the packages named after the sockets and kinds, plug-ins through the
entry-point group ``zoo.plugins``, and single classes by a dotted path ``package.module:Class``.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib import metadata
from typing import Any, TypeVar

from zoo import inputs
from zoo.errors import ZooError, unknown
from zoo.taxonomy import AXES, FAMILY_OF_KIND, Taxonomy
from zoo.taxonomy import KINDS as KINDS
from zoo.taxonomy import SOCKETS as SOCKETS

PLUGIN_GROUP = "zoo.plugins"
FORMS = ("causal", "bidirectional")
_PACKAGES = {"mixer": "mixers", "model": "models", "cache": "caches"}

# What the host knows and hands to any constructor that asks for it by name; never an option.
HOST_FACTS = frozenset(
    (
        *("dim", "heads", "kv_heads", "head_dim", "causal", "max_len", "depth", "dropout"),
        *("bias", "layout", "layers", "device", "dtype"),
    )
)

_FACTS_OF_KIND = {
    **dict.fromkeys((*SOCKETS, "mixer"), HOST_FACTS),
    "feature": frozenset(("channels", "device", "dtype")),
    "slots": frozenset(("dim_in", "dim", "slots", "device", "dtype")),
}
AXES_OF_KIND = {"feature": "batch, channels, height, width", "slots": "batch, inputs, dim_in"}
# A map has no tokens to hide or decode; slots see all inputs that their mask leaves.
TRAITS_OF_KIND = {
    "feature": ("compile", "gradient", "cost"),
    "slots": ("mask", "weights", "compile", "gradient", "cost"),
}


@dataclass(frozen=True)
class Paper:
    """Where a mechanism comes from.

    Args:
        title: Title of the paper or, for common knowledge, of what made it known.
        year: Year of the first public version, 2014 to 2026.
        arxiv: arXiv identifier such as ``"2104.09864"``, or None.
    """

    title: str
    year: int
    arxiv: str | None = None

    def __post_init__(self) -> None:
        if not self.title:
            raise ZooError("paper title is empty; give the title of the paper")
        if not 2014 <= self.year <= 2026:
            raise ZooError(f"paper year {self.year!r} is out of range; allowed: 2014 to 2026")
        if self.arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}", self.arxiv):
            raise ZooError(f"paper arxiv {self.arxiv!r} is not an identifier such as '2104.09864'")

    @property
    def url(self) -> str | None:
        """Address of the paper, or None."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@dataclass(frozen=True)
class Traits:
    """What a part promises; the contract tests hold each part to every promise.

    Args:
        causal: Honours ``causal=True``.
        bidirectional: Honours ``causal=False``.
        cross: Queries and keys may come from different sequences.
        mask: Boolean masks it takes: "any" (B, H, N, M), "keys" (B, 1, 1, M) or "none".
        bias: An additive bias on the scores may be used with it.
        decode: Step by step with a cache equals the parallel form.
        weights: Attention weights can be asked for.
        grouped: Fewer key/value heads than query heads are possible.
        packed: Several sequences in one, by `cu_seqlens`, equal each on its own.
        equivariant: Without positions and causality, permuting tokens permutes the output.
        compile: ``torch.compile(fullgraph=True)`` takes it.
        gradient: Gradients are those of the output; False where the paper counts as a constant
            what is none, so that finite differences differ.
        cost: Time per head in N, M, D and the part's options, e.g. ``"N * window"``.
    """

    causal: bool = True
    bidirectional: bool = True
    cross: bool = True
    mask: str = "any"
    bias: bool = True
    decode: bool = True
    weights: bool = True
    grouped: bool = True
    packed: bool = True
    equivariant: bool = True
    compile: bool = True
    gradient: bool = True
    cost: str = "N * M * D"

    def __post_init__(self) -> None:
        if self.mask not in ("any", "keys", "none"):
            raise unknown("trait mask", self.mask, ("any", "keys", "none"))
        if not (self.causal or self.bidirectional):
            raise ZooError("traits: causal and bidirectional are both False; one must hold")


@dataclass(frozen=True)
class Entry:
    """One registered mechanism: its class and everything known about it.

    Args:
        name: Registry name, snake_case.
        kind: The socket it fills, or the kind of module it is.
        cls: The class.
        paper: Source.
        traits: Promises.
        taxonomy: Survey axes.
        parameters: Parameter count as an expression of the host's facts and the options.
        aliases: Other names it answers to.
        layers: Layout of layers that the paper uses, e.g. ``{"first": "mha", "last": "mha"}``.
        notes: Remarks, e.g. what the taxonomy cannot express.
        contender: Specification under which it stands in comparisons at small sizes, by form of
            the host, "causal" or "bidirectional"; its name where there is none.
    """

    name: str
    kind: str
    cls: type
    paper: Paper | None
    traits: Traits
    taxonomy: Taxonomy
    parameters: str = "0"
    aliases: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    contender: Mapping[str, str] = field(default_factory=dict)

    def contender_in(self, form: str) -> str:
        """Return the specification under which it stands in comparisons at small sizes.

        Args:
            form: Form of the host, "causal" or "bidirectional".
        """
        return self.contender.get(form, self.name)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Constructor parameters that a user sets, by name (the host's facts are left out)."""
        found = constructor(self.cls)
        facts = _FACTS_OF_KIND.get(self.kind, frozenset())
        return {name: item for name, item in found.items() if name not in facts}

    @property
    def promises(self) -> dict[str, Any]:
        """The traits that mean something for this kind of module, with their values."""
        names = TRAITS_OF_KIND.get(self.kind, tuple(item.name for item in fields(Traits)))
        return {name: getattr(self.traits, name) for name in names}

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n")[0]

    @property
    def family(self) -> str:
        """The survey's kind, e.g. token_mixer or positional."""
        return self.taxonomy.family or FAMILY_OF_KIND[self.kind]

    @property
    def causality(self) -> str:
        """The survey's causal field: required, supported, unsupported or na."""
        if self.kind not in (*SOCKETS, "mixer"):
            return "na"
        if not self.traits.causal:
            return "unsupported"
        return "supported" if self.traits.bidirectional else "required"

    def check_options(self, options: Iterable[str]) -> None:
        """Refuse options that the constructor does not have.

        Raises:
            ZooError: An option is unknown; the message names the nearest.
        """
        allowed = self.options
        for option in options:
            if option not in allowed:
                raise unknown(f"option of {self.name!r}", option, allowed)


@lru_cache(maxsize=1024)
def constructor(cls: type) -> Mapping[str, inspect.Parameter]:
    """Parameters of a class's constructor, by name; they are read once."""
    return inspect.signature(cls).parameters


_entries: dict[str, Entry] = {}
_aliases: dict[str, str] = {}
_discovered = False
C = TypeVar("C", bound=type)


def register(
    name: str,
    *,
    kind: str,
    taxonomy: Taxonomy,
    paper: Paper | None = None,
    traits: Traits | None = None,
    parameters: str = "0",
    aliases: tuple[str, ...] = (),
    layers: Mapping[str, str] | None = None,
    notes: str = "",
    contender: str | Mapping[str, str] = "",
) -> Callable[[C], C]:
    """Class decorator that adds a mechanism to the registry.

    Args:
        name: Unique snake_case name.
        kind: A socket (project, position, score, select, normalize, combine, attend) or a kind
            (mixer, feature, slots, cache, parallel, inference, analysis, model).
        taxonomy: Survey axes; every axis is required.
        paper: Source.
        traits: Promises that the contract tests check.
        parameters: Parameter count as an expression of host facts and options.
        aliases: Further names.
        layers: The paper's layout of layers, used by models when none is given: the keys of
            `zoo.host.spec.layout` with "plain" (the default of the socket), "same" (this part) or a
            part for the socket.
        notes: Remarks.
        contender: Specification under which it stands in the leaderboard, whose sequences are
            short and whose images are small, where the defaults would do nothing there; or one
            for each form of the host, "causal" and "bidirectional".

    Raises:
        ZooError: The name is taken or malformed, or the kind or a form is unknown.
    """
    forms = dict.fromkeys(FORMS, contender) if isinstance(contender, str) else dict(contender)
    for form in forms:
        if form not in FORMS:
            raise unknown(f"form of a host in the contender of {name!r}", form, FORMS)
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    for item in {name, *aliases}:
        if (name, *aliases).count(item) > 1:
            raise ZooError(f"registry name {item!r} is given twice in one registration")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", item):
            raise ZooError(f"registry name {item!r} is not snake_case, e.g. 'sliding_window'")

    def add(cls: C) -> C:
        entry = Entry(
            name=name,
            kind=kind,
            cls=cls,
            paper=paper,
            traits=traits or Traits(),
            taxonomy=taxonomy,
            parameters=parameters,
            aliases=aliases,
            layers=dict(layers or {}),
            notes=notes,
            contender={form: spec for form, spec in forms.items() if spec},
        )
        if entry.family in ("sequence_parallel", "kernel"):
            taxonomy.check_exact(entry.family)
        for item in (name, *aliases):
            owner = _entries.get(_aliases.get(item, item))
            if owner is not None:
                where = f"{owner.cls.__module__}.{owner.cls.__qualname__}"
                raise ZooError(f"registry name {item!r} is taken by {where}; choose another name")
        for parameter in constructor(cls).values():
            if parameter.kind is parameter.VAR_KEYWORD:
                raise ZooError(f"{name!r}: a constructor with **{parameter.name} hides options")
        if kind in AXES_OF_KIND:
            inputs.guard(cls, AXES_OF_KIND[kind])  # hosts and mixers have a door of their own
        _entries[name] = entry
        _aliases.update(dict.fromkeys(aliases, name))
        return cls

    return add


def unregister(name: str) -> None:
    """Take an entry and its aliases out again (for tests and notebooks).

    Raises:
        ZooError: No such entry.
    """
    entry = info(name)
    del _entries[entry.name]
    for alias in entry.aliases:
        del _aliases[alias]


def discover() -> None:
    """Import every mechanism module of the package and every plug-in, once."""
    global _discovered
    if _discovered:
        return
    _discovered = True
    for kind in KINDS:
        package_name = f"{__package__}.{_PACKAGES.get(kind, kind)}"
        try:
            package = importlib.import_module(package_name)
        except ModuleNotFoundError as error:
            if error.name != package_name:
                raise
            continue
        if kind == "model":
            continue  # models are hosts with their own registry; they bring heavier imports
        for item in pkgutil.walk_packages(package.__path__, package_name + "."):
            if not item.name.rpartition(".")[2].startswith("_"):
                importlib.import_module(item.name)
    for point in sorted(metadata.entry_points(group=PLUGIN_GROUP), key=lambda p: p.name):
        try:
            loaded = point.load()
            if callable(loaded) and not isinstance(loaded, type):
                loaded()
        except Exception as error:
            # A broken plug-in must not take the zoo down, and must not vanish in silence.
            warnings.warn(
                f"plug-in {point.name!r} ({point.value}) could not be loaded: {error!r}",
                stacklevel=2,
            )


def _by_path(path: str) -> Entry:
    """Entry of a class given as ``package.module:Class``; an unregistered class gets defaults."""
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ZooError(f"dotted path {path!r}: cannot import {module_name!r} ({error})") from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        classes = [n for n, v in vars(module).items() if isinstance(v, type)]
        raise unknown(f"class in {module_name!r}", class_name, classes)
    for entry in _entries.values():
        if entry.cls is cls:
            return entry
    kind = getattr(cls, "kind", None)
    if kind not in KINDS:
        raise ZooError(
            f"dotted path {path!r}: {class_name} is neither registered nor a part; "
            f"subclass one of zoo.parts, or set its attribute kind to one of {', '.join(KINDS)}"
        )
    taxonomy = Taxonomy(
        *("self", "single", "global", "single", "scaled_dot", "inherited", "quadratic")
    )
    return Entry(path, kind, cls, None, getattr(cls, "traits", Traits()), taxonomy)


def info(name: str) -> Entry:
    """Return the entry of a name, an alias or a dotted path ``package.module:Class``.

    Raises:
        ZooError: Unknown name; the message names the nearest.
    """
    discover()
    if ":" in name:
        return _by_path(name)
    key = _aliases.get(name, name)
    if key not in _entries:
        raise unknown("mechanism", name, [*_entries, *_aliases])
    return _entries[key]


def _natural(name: str) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in pieces if p]


def list_names(
    pattern: str | Iterable[str] = "*",
    *,
    kind: str | Iterable[str] | None = None,
    traits: Mapping[str, object] | None = None,
    **axes: str,
) -> list[str]:
    """Names in natural order that match every filter.

    Args:
        pattern: Wildcard or several of them, e.g. ``"*max"``.
        kind: One kind or several.
        traits: Trait values that must hold, e.g. ``{"causal": True, "mask": "any"}``. A kind for
            which a trait means nothing is in no such list.
        axes: Taxonomy axes, e.g. ``positions="local"``, and ``family=``, ``causality=``.

    Raises:
        ZooError: Unknown kind, trait or axis.
    """
    discover()
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    kinds = None if kind is None else {kind} if isinstance(kind, str) else set(kind)
    for item in kinds or ():
        if item not in KINDS:
            raise unknown("kind", item, KINDS)
    wanted = dict(traits or {})
    trait_names = [f.name for f in fields(Traits)]
    for trait in wanted:
        if trait not in trait_names:
            raise unknown("trait", trait, trait_names)
    axis_names = [f.name for f in fields(Taxonomy)] + ["causality"]
    for axis, value in axes.items():
        if axis not in axis_names:
            raise unknown("filter", axis, [*axis_names, "kind", "traits"])
        if axis in AXES and value not in AXES[axis]:
            raise unknown(f"taxonomy {axis}", value, AXES[axis])

    def matches(entry: Entry) -> bool:
        if kinds is not None and entry.kind not in kinds:
            return False
        promises = entry.promises
        if any(name not in promises or promises[name] != v for name, v in wanted.items()):
            return False
        for axis, value in axes.items():
            owner: Any = entry if axis in ("family", "causality") else entry.taxonomy
            found = getattr(owner, axis)
            if value not in found if isinstance(found, tuple) else found != value:
                return False
        names = (entry.name, *entry.aliases)
        return any(fnmatch.fnmatchcase(n, p) for n in names for p in patterns)

    return sorted((e.name for e in _entries.values() if matches(e)), key=_natural)
