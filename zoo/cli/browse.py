"""`zoo list` and `zoo info`: what there is."""

from __future__ import annotations

import fnmatch
import inspect
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer
from rich.markup import escape

from zoo import registry
from zoo.cli.output import console, plain, print_json, table
from zoo.errors import ZooError, unknown
from zoo.registry import Entry, Taxonomy, Traits


def list_(
    pattern: Annotated[
        list[str] | None, typer.Argument(help="Wildcards such as '*max'; all by default.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Socket or kind, e.g. position; may be repeated.")
    ] = None,
    trait: Annotated[
        list[str] | None,
        typer.Option(help="causal, no-bias, mask=any ...; may be repeated, all must hold."),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(help="Taxonomy, e.g. positions=local; may be repeated, all must hold."),
    ] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="List recipes instead.")] = False,
    data: Annotated[bool, typer.Option("--data", help="List data sets instead.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List mechanisms, recipes or data sets."""
    if recipes or data:
        if recipes and data:
            raise ZooError("--recipes and --data are two lists; ask for one of them")
        for name, value in (("--kind", kind), ("--trait", trait), ("--axis", axis)):
            if value:
                raise ZooError(f"{name} filters mechanisms, not recipes or data sets")
        found = _recipes(pattern or ["*"]) if recipes else _data(pattern or ["*"])
    else:
        names = registry.list_names(
            pattern or "*", kind=kind or None, traits=_traits(trait or []), **_axes(axis or [])
        )
        found = [_row(registry.info(name)) for name in names]
    if json:
        print_json(found)
        return
    if not found:
        raise ZooError("nothing matches; 'zoo list' without filters lists everything")
    rows = [[_cell(key, value) for key, value in item.items()] for item in found]
    console().print(table(*found[0], rows=rows))


def _traits(words: list[str]) -> dict[str, object]:
    """Read ``causal``, ``no-bias`` and ``mask=any`` into trait values."""
    kinds = {item.name: item.type for item in fields(Traits)}
    found: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        wanted: object = value
        if not equals:
            name, wanted = (name[3:], False) if name.startswith("no-") else (name, True)
        if name not in kinds:
            raise unknown("trait", name, kinds)
        if (kinds[name] == "bool") == bool(equals):
            form = f"{name} or no-{name}" if kinds[name] == "bool" else f"{name}=VALUE"
            raise ZooError(f"trait {word!r} must be written {form}")
        if name in found:
            raise ZooError(f"trait {name!r} is asked for twice")
        found[name] = wanted
    return found


def _axes(words: list[str]) -> dict[str, Any]:
    """Read ``positions=local`` into a taxonomy axis."""
    kinds = {**{item.name: item.type for item in fields(Taxonomy)}, "causality": "str"}
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise ZooError(f"axis {word!r} must be written NAME=VALUE, e.g. positions=local")
        if name not in kinds:
            raise unknown("axis", name, kinds)
        if name in found:
            raise ZooError(f"axis {name!r} is asked for twice")
        if kinds[name] == "bool" and value not in ("true", "false"):
            raise ZooError(f"axis {word!r} must be written {name}=true or {name}=false")
        found[name] = value == "true" if kinds[name] == "bool" else value
    return found


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "year": entry.paper.year if entry.paper else None,
        "summary": entry.summary,
        "cost": entry.traits.cost,
        "traits": entry.promises,
    }


def _limits(traits: dict[str, Any]) -> str:
    """What does not hold, in the words of ``--trait``: most mechanisms promise nearly all."""
    words = [f"no-{name}" for name, value in traits.items() if value is False]
    words += [f"mask={traits['mask']}"] if traits.get("mask", "any") != "any" else []
    return " ".join(words) or "all"


def _cell(key: str, value: Any) -> str:
    """Value as a cell of a table."""
    if isinstance(value, dict):
        return _limits(value) if key == "traits" else _pairs(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _recipes(patterns: list[str]) -> list[dict[str, Any]]:
    from zoo.claims import recipes
    from zoo.runs import config

    found = []
    for name in _matching(config.recipes(), patterns):
        recipe = recipes.load(name)
        found.append(
            {
                "name": name,
                "track": recipe.track,
                "task": recipe.task,
                "data": recipe.data.name,
                "model": recipe.model.name,
                "steps": recipe.trainer.max_steps,
                "reports": recipe.metrics.report,
                "description": recipe.description,
            }
        )
    return found


def _data(patterns: list[str]) -> list[dict[str, Any]]:
    from zoo import datasets

    shared = {item.name for item in fields(datasets.DataModule)}
    found = []
    for name in _matching(datasets.list(), patterns):
        known = datasets.info(name)
        options = {**dict.fromkeys(known.required, "required"), **known.options}
        own = {key: plain(value) for key, value in options.items() if key not in shared}
        found.append({"name": name, "task": known.task, "summary": known.summary, "options": own})
    return found


def info(
    name: Annotated[str, typer.Argument(help="Registry name, alias or package.module:Class.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show everything known about one mechanism."""
    entry = registry.info(name)
    known = _everything(entry)
    if json:
        print_json(known)
        return
    out = console()
    out.print(f"[bold]{escape(entry.name)}[/] ({entry.kind}): {escape(entry.summary)}")
    if entry.paper:
        link = f"  {entry.paper.url}" if entry.paper.url else ""
        out.print(f"{escape(entry.paper.title)} ({entry.paper.year}){link}", soft_wrap=True)
    for text in (known["equations"], known["description"]):
        if text:
            out.print()
            out.print(text, markup=False, soft_wrap=True)
    out.print()
    facts = {
        "aliases": ", ".join(entry.aliases),
        "options": ", ".join(
            key if "default" not in value else f"{key}={value['default']}"
            for key, value in known["options"].items()
        ),
        "traits": _pairs(known["traits"]),
        "cost": entry.traits.cost,
        "parameters": entry.parameters,
        "taxonomy": _pairs({k: v for k, v in known["taxonomy"].items() if v not in (None, [])}),
        "family": f"{entry.family}, causality {entry.causality}",
        "layers": _pairs(known["layers"]),
        "notes": entry.notes,
        "file": known["file"],
    }
    for key, value in facts.items():
        if value:
            out.print(f"[bold]{key}[/]: {escape(value)}", soft_wrap=True)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={'none' if v is None else _cell(key, v)}" for key, v in values.items())


def _everything(entry: Entry) -> dict[str, Any]:
    module = inspect.getmodule(entry.cls)
    options: dict[str, dict[str, Any]] = {}
    for key, item in entry.options.items():
        options[key] = {"type": str(item.annotation)} if item.annotation is not item.empty else {}
        if item.default is not item.empty:
            options[key]["default"] = plain(item.default)
    return {
        **_row(entry),
        "paper": {**asdict(entry.paper), "url": entry.paper.url} if entry.paper else None,
        "equations": inspect.getdoc(module) if module else None,
        "description": inspect.getdoc(entry.cls),
        "options": options,
        "taxonomy": plain(asdict(entry.taxonomy)),
        "family": entry.family,
        "causality": entry.causality,
        "parameters": entry.parameters,
        "aliases": list(entry.aliases),
        "layers": dict(entry.layers),
        "notes": entry.notes,
        "file": inspect.getsourcefile(entry.cls),
    }
