"""Tracks of the leaderboard: which tables stand together, and what each is measured against.

A track is an entry of recipes/tracks.yaml; a recipe says by its key `track` where it belongs. Who
stands in its table follows from the registry: every mechanism of a kind that the recipe's model
hosts, under the specification that its registration names for short sequences (`contender`). One
that the model cannot host is named with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import zoo
from zoo import checks, datasets, models
from zoo.datasets import DataModule
from zoo.errors import ZooError, unknown
from zoo.host.spec import canonical
from zoo.registry import SOCKETS, Entry
from zoo.resources import folder
from zoo.runs import config as configs
from zoo.runs.build import build_task

FILE = "tracks.yaml"


@dataclass(frozen=True)
class Track:
    """What the tables of one kind have in common.

    Args:
        name: Name, as recipes give it.
        title: Heading.
        description: What its tasks ask for, in one sentence.
        baseline: What every row is compared with.
        floors: What the host reaches without the mechanism.
        ceiling: What is known to do such tasks well; None if there is no such thing.
        size: Parameters allowed, as a multiple of the baseline's.
    """

    name: str
    title: str
    description: str
    baseline: str
    floors: tuple[str, ...] = ()
    ceiling: str | None = None
    size: float = 1.25

    @property
    def fixed(self) -> tuple[str, ...]:
        """What every table of the track must have: baseline, floors and ceiling."""
        return (self.baseline, *self.floors, *([self.ceiling] if self.ceiling else []))


@dataclass(frozen=True)
class Contender:
    """A mechanism in the table of a recipe.

    Args:
        name: Its registered name.
        spec: The specification under which it stands there, in canonical form.
        reason: Why the recipe's model cannot host it; None if it can.
    """

    name: str
    spec: str
    reason: str | None = None


@functools.cache
def tracks() -> tuple[Track, ...]:
    """Return the tracks in their order.

    Raises:
        ZooError: The file of the tracks is not what it should be.
    """
    path = folder("recipes") / FILE
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    found = []
    for name, entry in content.items():
        known = Track.__dataclass_fields__
        for key in entry:
            if key not in known:
                raise unknown(f"key of track {name!r} in {FILE}", key, known)
        try:
            track = Track(name=name, **{**entry, "floors": tuple(entry.get("floors", ()))})
        except TypeError as error:
            raise ZooError(f"track {name!r} in {FILE}: {error}") from None
        for spec in track.fixed:
            canonical(spec)
        checks.number(f"track {name!r} in {FILE}: size", track.size, 1)
        found.append(track)
    return tuple(found)


def track(name: str) -> Track:
    """Return the track of a name; for one that is not among them, softmax is the baseline.

    Args:
        name: Name, as recipes and records have it.
    """
    known = {one.name: one for one in tracks()}
    plain = name.replace("_", " ").capitalize()
    return known.get(name) or Track(name, plain, "", "mha", ("no_mixing",))


def recipes_of(name: str) -> list[str]:
    """Return the recipes of a track that ship and state no claim, in alphabetical order.

    Args:
        name: Name of a track.
    """
    return [recipe for recipe, of in _recipes() if of == name]


def published() -> list[str]:
    """Return the recipes of all tracks that need nothing that may be missing here."""
    names = [name for one in tracks() for name in recipes_of(one.name)]
    return [name for name in names if not needs(name)]


def needs(recipe: str) -> str:
    """Return what a recipe needs that this machine may not have; nothing is empty.

    Args:
        recipe: Name of a recipe.
    """
    plain, _ = configs.outline(recipe)
    if plain.get("budget", {}).get("needs") == "gpu" and not torch.cuda.is_available():
        return "a GPU"
    return datasets.info(plain["data"]["name"]).needs


@functools.cache
def _recipes() -> list[tuple[str, str]]:
    outlines = [(name, *configs.outline(name)) for name in configs.recipes()]
    return [(name, str(plain["track"])) for name, plain, claims in outlines if not claims]


def contenders(
    recipe: str | DictConfig, ask: Callable[[Contender], bool] = lambda one: True
) -> list[Contender]:
    """Return every mechanism that might stand in the table of a recipe, baselines first.

    Whether the recipe's model can host one is found out by building it.

    Args:
        recipe: Name of a recipe, or a configuration.
        ask: Tells of which mechanisms to build the model; the others are taken at their word.

    Raises:
        ZooError: The recipe cannot be loaded.
    """
    config = configs.load(recipe) if isinstance(recipe, str) else recipe
    hosted, data = models.info(config.model.name), configs.data_module(config)
    kinds = set(hosted.kinds)
    entries = [e for e in map(zoo.info, zoo.list()) if e.kind in kinds and e.kind != "model"]
    fixed = track(config.track).fixed
    found: dict[str, Contender] = {}
    for entry in sorted(entries, key=lambda e: (_place(e.name, fixed), e.name)):
        spec = canonical(entry.contender_in("causal" if hosted.causal else "bidirectional"))
        if spec not in found:
            one = Contender(entry.name, spec, _reason(entry, hosted.causal))
            if one.reason is None and ask(one):
                one = replace(one, reason=_refusal(spec, config, data))
            found[spec] = one
    return list(found.values())


def _place(name: str, fixed: Iterable[str]) -> int:
    order = list(fixed)
    return order.index(name) if name in order else len(order)


def _reason(entry: Entry, causal: bool) -> str | None:
    """Say why a mechanism is out of place among others, whatever the model."""
    if causal and not entry.traits.causal:
        return "it sees later tokens, which the model has to predict"
    if not causal and not entry.traits.bidirectional and entry.kind in (*SOCKETS, "mixer"):
        return "it sees earlier tokens only, and an image has no order"
    return None


def _refusal(spec: str, config: DictConfig, data: DataModule) -> str | None:
    """Return what the model of a recipe says against a mechanism; None if it can be built."""
    asked = config.copy()
    asked.attention = spec
    try:
        with torch.random.fork_rng(devices=[]):
            build_task(asked, data)
    except ZooError as error:
        return " ".join(str(error).split())
    return None
