"""Recipes: found by name, changed from the command line, checked, and identified by their hash.

    config = load("mqar", ["attention=linear", "seed=1", "lr=1e-3"])

A recipe is a YAML file under recipes/; its `data.name` names a YAML file under data/ (or a data set
itself), whose options the recipe may change. What comes out holds every option of the data set and
of the model, so that it says by itself what was run. A recipe that states a claim has one section
more, which is checked with it and is no part of what is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from zoo import _moved, datasets, models
from zoo.errors import ZooError, unknown
from zoo.host.spec import canonical
from zoo.resources import folder
from zoo.runs.schema import blank, check, data_defaults, model_options
from zoo.tasks import Optim

SHORT = {"lr": "optim.lr", "steps": "trainer.max_steps", "batch": "data.batch_size"}
"""Short names of overrides."""
NAMED = ("data", "model")
"""Sections that an override may replace whole by a name, such as ``model=resnet``."""

# What a figure does not depend on, and what only says where a run takes place.
_COMMENT = ("budget", "description")
_PLACE = {
    "data": ("eval_batch_size", "num_workers", "root"),
    "trainer": ("accelerator", "checkpoint_every", "devices", "strategy"),
}
# Options that came after the first records, with the value that means what was before them: the
# records keep their ids, and stand in one table with new ones.
_LATER: dict[str, dict[str, Any]] = {"data": {"test_lengths": []}, "model": {"head_dim": None}}


@dataclass(frozen=True)
class Identity:
    """What a configuration is known by.

    Args:
        id: Name of the run: recipe, attention, seed and the beginning of the hash.
        group: Hash of what two runs must share to be compared: all but attention, seed, learning
            rate and where they took place.
        config_hash: Hash of the whole configuration.
    """

    id: str
    group: str
    config_hash: str


def recipes() -> list[str]:
    """Names of all recipes in alphabetical order."""
    return sorted(path.stem for path in _files())


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a recipe, change it, and check it.

    Args:
        recipe: Name of a recipe, or path of a YAML file.
        overrides: Changes as ``key=value``, with dotted keys or the short names lr, steps, batch.

    Returns:
        The configuration, with every option of the data set and the model, without the claim.

    Raises:
        ZooError: Unknown recipe, key or name (the nearest is given), or an impossible value.
    """
    path = _find(recipe)
    plain, _ = _plain(path, changed := _assignments(overrides))
    return _resolve(plain, path, changed)


def section(recipe: str | Path) -> tuple[Path, dict[str, Any] | None]:
    """Read the section `claim` of a recipe, which `zoo.claims` understands.

    Args:
        recipe: Name of a recipe, or path of a YAML file.

    Returns:
        The file, and the section as plain data; None where the recipe states no claim.

    Raises:
        ZooError: There is no such recipe, or it is not readable.
    """
    path = _find(recipe)
    return path, _plain(path, {})[1]


def outline(recipe: str | Path) -> tuple[dict[str, Any], bool]:
    """Read what a recipe's file says, unchecked, with its data set by its registered name.

    Args:
        recipe: Name of a recipe, or path of a YAML file.

    Returns:
        The content without the claim, and whether there is one.

    Raises:
        ZooError: There is no such recipe, or it is not readable.
    """
    plain, stated = _plain(_find(recipe), {})
    plain["data"] = {**plain["data"], "name": _data(str(plain["data"]["name"]))["name"]}
    return plain, stated is not None


def contents(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries and lists.

    Args:
        config: A mapping of OmegaConf.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return plain


def settings(config: DictConfig) -> dict[str, Any]:
    """Return what figures may depend on, or where they were made, as plain data.

    Args:
        config: What `load` returned.
    """
    return {key: value for key, value in contents(config).items() if key not in _COMMENT}


def run_id(recipe: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return the id of the run of a recipe, as its folder and its record are called.

    Args:
        recipe: Name of a recipe, or path of a YAML file.
        overrides: Changes as ``key=value``.

    Raises:
        ZooError: The recipe cannot be loaded.
    """
    return identify(load(recipe, overrides)).id


def identify(config: DictConfig) -> Identity:
    """Return what a configuration is known by.

    Args:
        config: What `load` returned.
    """
    full = _known(settings(config))
    whole = _hash(full)
    slug = re.sub(r"[^a-z0-9_.]+", "-", config.attention.lower()).strip("-")[:80]
    name = f"{config.name}-{slug}-s{config.seed}-{whole[:8]}"
    return Identity(name, _group(full), whole)


def group_of(plain: Mapping[str, Any]) -> str | None:
    """Return the group of the configuration that a record holds; None if it is not a whole one.

    Args:
        plain: The configuration as plain data.
    """
    if not {"data", "model", "optim", "trainer", "metrics"} <= set(plain):
        return None
    full = {key: value for key, value in plain.items() if key not in _COMMENT}
    return _group(_known(copy.deepcopy(full)))


def _known(full: dict[str, Any]) -> dict[str, Any]:
    """Leave out the options that came later, where they mean what was before them."""
    for section, options in _LATER.items():
        for key, before in options.items():
            if full[section].get(key, before) == before:
                full[section].pop(key, None)
    return full


def _group(full: dict[str, Any]) -> str:
    for key in ("attention", "seed", "name", "track"):
        full.pop(key, None)
    full["optim"].pop("lr", None)
    for section, keys in _PLACE.items():
        for key in keys:
            full[section].pop(key, None)
    return _hash(full)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _files() -> list[Path]:
    """Return the files of all recipes; those directly under recipes/ are none."""
    root = folder("recipes")
    return sorted(path for path in root.rglob("*.yaml") if path.parent != root)


def _find(recipe: str | Path) -> Path:
    if isinstance(recipe, Path) or recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ZooError(f"recipe file {path} does not exist")
        return path
    root = folder("recipes")
    for path in _files():
        if recipe in (path.stem, path.relative_to(root).with_suffix("").as_posix()):
            return path
    raise unknown("recipe", recipe, recipes())


def _read(path: Path) -> DictConfig:
    try:
        raw = OmegaConf.load(path)
    except OSError as error:
        raise ZooError(f"recipe {path}: {error.strerror or error}") from None
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ZooError(f"recipe {path} is not readable YAML: {_line(error)}") from None
    if not isinstance(raw, DictConfig):
        raise ZooError(f"recipe {path} must be a mapping of keys to values")
    return raw


def _file(path: Path) -> DictConfig:
    """Content of a YAML file, which is not read again before it changes."""
    try:
        found = path.stat()
    except OSError:
        return _read(path)  # which says what is wrong
    key = (str(path.resolve()), found.st_mtime_ns, found.st_size)
    if key not in _contents:
        if len(_contents) >= 256:
            _contents.clear()
        _contents[key] = _read(path)
    return copy.deepcopy(_contents[key])


_contents: dict[tuple[str, int, int], DictConfig] = {}


def _plain(path: Path, changed: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return a recipe with its changes, and apart from it the claim that it states, or None."""
    raw = _file(path)
    try:
        for key, value in changed.items():
            OmegaConf.update(raw, key, value, merge=False)
        plain = contents(raw)
    except OmegaConfBaseException as error:
        raise ZooError(f"recipe {path.name}: {_line(error)}") from None
    stated = "claim" in plain
    section = plain.pop("claim", None)
    if stated and not isinstance(section, dict):
        raise ZooError(f"recipe {path.name}: claim must be a mapping of keys to values")
    return plain, section


def _assignments(overrides: Sequence[str]) -> dict[str, Any]:
    """Read overrides into values by full key."""
    found: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = SHORT.get(key.strip(), key.strip())
        if not equals or not key:
            raise ZooError(f"override {text!r} must be written key=value, such as seed=1")
        if key in found:
            raise ZooError(f"override {text!r}: {key!r} is given twice")
        if key.partition(".")[0] == "claim":
            raise ZooError(f"override {text!r}: a claim is what its file says; change it there")
        if key == "attention":  # a specification is text, whatever YAML would make of it
            found[key] = value
            continue
        try:
            found[key] = OmegaConf.select(OmegaConf.from_dotlist([f"value={value}"]), "value")
            if key in NAMED and isinstance(found[key], str):
                found[key] = {"name": found[key]}
        except (YAMLError, OmegaConfBaseException) as error:
            raise ZooError(f"override {text!r}: cannot read the value: {_line(error)}") from None
    # A section that is replaced whole comes before what is changed in it.
    return dict(sorted(found.items(), key=lambda item: item[0] not in NAMED))


def _resolve(plain: dict[str, Any], path: Path, changed: dict[str, Any]) -> DictConfig:
    """Fill in the options of data and model, and check everything."""
    for section in ("data", "model"):
        if not isinstance(plain.get(section), dict) or "name" not in plain[section]:
            raise ZooError(f"recipe {path.name}: {section} must be a mapping with a name")
    data = _data(str(plain["data"]["name"]))
    model = model_options(str(plain["model"]["name"]))
    config = blank()
    known = [key for key, _ in _leaves(contents(config))]
    known = [key for key in known if key not in ("data", "model", "optim")]
    known += [f"optim.{key}" for key in Optim.__dataclass_fields__]
    known += [f"data.{key}" for key in data] + [f"model.{key}" for key in contents(model)]
    options = [key for key in known if key.startswith(("data.", "model."))]
    for key, _ in _leaves(plain, options):
        if key not in known:
            origin = "override" if _given(key, changed) else f"key in recipe {path.name}"
            names = [*known, *(SHORT if origin == "override" else ["claim"])]
            raise unknown(origin, key, names)
    plain["data"] = {**data, **plain["data"], "name": data["name"]}
    plain["model"] = contents(_merge(model, plain["model"], path, changed, "model."))
    config = _merge(config, plain, path, changed)
    for key, value in _leaves(contents(config)):
        if value == "???":
            raise ZooError(f"recipe {path.name}: {key} is missing; it has no default")
    config.attention = canonical(config.attention)
    models.check_hosted(config.model.name, config.attention)
    OmegaConf.to_object(config.optim)
    module = data_module(config)
    check(config, module.test_names, module.task)
    OmegaConf.set_struct(config, True)
    return config


def _merge(
    config: DictConfig, plain: Any, path: Path, changed: dict[str, Any], prefix: str = ""
) -> DictConfig:
    """Put values into typed keys."""
    try:
        merged = OmegaConf.merge(config, plain)
    except OmegaConfBaseException as error:
        key = f"{prefix}{error.full_key}"
        where = "override" if _given(key, changed) else f"recipe {path.name}"
        raise ZooError(f"{where}: {key}: {_line(error)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _given(key: str, changed: dict[str, Any]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in changed)


def _leaves(
    tree: dict[str, Any], known: Sequence[str] = (), prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; a mapping under a known key is a value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key, value


def _data(name: str) -> dict[str, Any]:
    """Return name and options of the data that a YAML file under data/ or a data set stands for."""
    files = {path.stem: path for path in folder("data").glob("*/*.yaml")}
    if name not in files:
        if name not in datasets.list():
            raise unknown("data set", name, [*files, *datasets.list()])
        return {"name": name, **data_defaults(name)}
    content = contents(_file(files[name]))
    options = data_defaults(content["name"])
    for key in content.get("options") or {}:
        if key not in options:
            raise unknown(f"option in {files[name].name}", key, options)
    return {"name": content["name"], **options, **(content.get("options") or {})}


def data_module(config: DictConfig) -> datasets.DataModule:
    """Build the data module of a configuration.

    Args:
        config: What `load` returned.

    Raises:
        ZooError: An option is impossible.
    """
    options = contents(config.data)
    return datasets.create(options.pop("name"), seed=config.seed, **options)


def _line(error: Exception) -> str:
    """Return what an error says in one line."""
    return " ".join(str(error).split("full_key:")[0].split())


def __getattr__(name: str) -> Any:
    return _moved.function(__name__, name)
