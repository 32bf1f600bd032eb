"""Which data there are: drawn or embedded, in local files, or on the hub; and who can run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from zoo import datasets
from zoo.datasets.vision.fashion_mnist import PACKAGE_FOLDER
from zoo.doctor.lines import Line, note, ok, problem, reason
from zoo.doctor.world import World
from zoo.errors import ZooError
from zoo.resources import folder

# Data sets that read what another package brings; the others without needs draw their examples.
_READ = ("bytes_stdlib", "digits", "shadows")
_PACKAGED = {"fashion_mnist": PACKAGE_FOLDER}


@dataclass(frozen=True)
class Availability:
    """Whether data can be had.

    Args:
        level: `ok`, `note` if something is missing that one may do without, or `problem`.
        how: `drawn`, `embedded`, `files`, `hub`, `missing` or `broken`.
        text: Where they are, or where they were looked for.
        todo: How to get them.
    """

    level: str
    how: str
    text: str
    todo: str = ""


def sources(world: World) -> Iterator[Line]:
    """Say of every data file, and every data set without one, whether its data can be had.

    Args:
        world: Tells whether the hub answers.
    """
    named = set()
    for path in sorted(folder("data").glob("*/*.yaml")):
        try:
            content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
            name, options = str(content["name"]), dict(content.get("options") or {})
        except Exception as error:  # YAML, OmegaConf and wrong types each have their own
            text = f"{path.stem}: its file cannot be read: {reason(error)}"
            yield problem(path.stem, text, f"correct data/{path.parent.name}/{path.name}")
            continue
        named.add(name)
        found = _look(name, options, world, try_it=name in _READ)
        label = path.stem if path.stem == name else f"{path.stem} ({name})"
        yield _line(path.stem, label, found, data_set=name)
    for name in datasets.list():
        if name not in named:
            yield _line(name, name, _look(name, {}, world), data_set=name)


def _line(name: str, label: str, found: Availability, **facts: Any) -> Line:
    return Line(
        name, found.level, f"{label}: {found.text}", found.todo, {"how": found.how, **facts}
    )


def _look(
    name: str, options: Mapping[str, Any], world: World, try_it: bool = False
) -> Availability:
    """Find out whether the data of a data set can be had, without fetching any."""
    try:
        known = datasets.info(name)
        place = _place(known, options)
        if place is not None and not place.exists():
            return _missing(known, f"there is no {_shown(place)}")
        module = datasets.create(name, **options)
        if try_it:
            with torch.random.fork_rng(devices=[]):
                module.setup()
                # Some draw from what they read only when an example is taken.
                next(iter(module.val_dataloader()))
    except ZooError as error:
        if name in datasets.list() and datasets.info(name).needs:
            return _missing(datasets.info(name), reason(error))
        todo = "'zoo list --data' names data sets and their options"
        return Availability("problem", "broken", reason(error), todo)
    except Exception as error:  # of the package that brings the data
        text = f"it cannot be read: {type(error).__name__}: {reason(error)}"
        return Availability("problem", "broken", text, "install again what it comes with")
    if not known.needs:
        return _there(name)
    packaged = _PACKAGED.get(name)
    if place is None and packaged is not None and packaged.is_dir():
        return Availability("ok", "files", f"files in {packaged}")
    if place is not None or "hub" not in known.needs:
        where = f"files in {_shown(place)}" if place is not None else "files found"
        return Availability("ok", "files", where)
    if not world.silence:
        return Availability("ok", "hub", f"from the hub, {world.answer}; nothing was fetched")
    looked = f"; nor is there {packaged}" if packaged is not None else ""
    return _missing(known, f"it comes from the hub: {world.silence}{looked}")


def _there(name: str) -> Availability:
    if name in _READ:
        return Availability("ok", "embedded", "embedded, works")
    return Availability("ok", "drawn", "drawn from a seed, needs nothing")


def _place(known: datasets.Info, options: Mapping[str, Any]) -> Path | None:
    """Return the folder that a data set is to read, if its options name one."""
    given = {**known.options, **options}.get("root")
    return Path(str(given)).expanduser() if given is not None else None


def _shown(place: Path) -> str:
    """Write a path as its user gave it; one that is relative is seen from where they are."""
    return f"{str(place)!r}" if place.is_absolute() else f"{str(place)!r} in the current folder"


def _missing(known: datasets.Info, text: str) -> Availability:
    option = next((o for o in ("root", "paths") if o in (*known.required, *known.options)), None)
    ways = [f"say where the files are, data.{option}=FOLDER"] if option else []
    if "Debian" in known.needs:
        ways.append(f"install {known.needs.partition('package ')[2].partition(',')[0]}")
    if "hub" in known.needs:
        ways.append("connect to the network for the hub")
    return Availability("note", "missing", text, ", or ".join(ways) or f"it needs {known.needs}")


def recipes(world: World) -> Iterator[Line]:
    """Say which recipes can run here, and what the others lack.

    Args:
        world: Tells whether the hub answers.
    """
    from zoo.claims import recipes
    from zoo.runs import config

    able, lines = [], []
    names = config.recipes()
    for name in names:
        try:
            loaded = config.contents(config.load(name))
            stated = recipes.claim(name)
        except ZooError as error:
            text = f"{name} cannot be loaded: {reason(error)}"
            lines.append(problem(name, text, "correct the recipe"))
            continue
        options = dict(loaded["data"])
        found = _look(options.pop("name"), options, world)
        if found.level != "ok":
            lines.append(Line(name, found.level, f"{name} cannot run: {found.text}", found.todo))
        elif stated is not None and stated.needs == "gpu" and not torch.cuda.is_available():
            lines.append(note(name, f"{name} cannot run: its claim needs a GPU"))
        elif loaded["budget"].get("needs") == "gpu" and not torch.cuda.is_available():
            lines.append(note(name, f"{name} would take hours: it is meant for a GPU"))
        else:
            able.append(name)
    yield ok("recipes", f"{len(able)} of {len(names)} recipes can run here", able=able)
    yield from lines
