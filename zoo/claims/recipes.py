"""Recipes that state a claim: the recipe, its section `claim`, and the variants it compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from zoo.claims.schema import Claim, Resolved, check_variants, read_claim
from zoo.errors import ZooError
from zoo.runs import config as configs
from zoo.runs.schema import metric_names


def load(recipe: str | Path) -> DictConfig:
    """Read a recipe as it stands and check it together with the claim that it may state.

    Args:
        recipe: Name of a recipe, or path of a YAML file.

    Raises:
        ZooError: As `zoo.runs.config.load`, or the claim cannot be judged.
    """
    loaded = configs.load(recipe)
    if claim(recipe) is not None:
        resolved_claim(recipe)
    return loaded


def claim(recipe: str | Path) -> Claim | None:
    """Read the claim of a recipe, checked as far as it goes without its variants.

    Args:
        recipe: Name of a recipe, or path of a YAML file.

    Raises:
        ZooError: There is no such recipe, or the claim is malformed.
    """
    path, section = configs.section(recipe)
    return None if section is None else read_claim(section, _where(path))


def resolved_claim(recipe: str | Path) -> tuple[Claim, dict[str, Resolved]]:
    """Read the claim of a recipe and resolve its variants.

    Args:
        recipe: Name of a recipe, or path of a YAML file.

    Returns:
        The claim, and its variants at seed 0 by name.

    Raises:
        ZooError: The recipe states no claim, or one that cannot be judged.
    """
    path, _ = configs.section(recipe)
    found = claim(path)
    if found is None:
        raise ZooError(f"recipe {str(recipe)!r} states no claim; 'zoo claims' lists those that do")

    def resolve(overrides: Sequence[str]) -> Resolved:
        config = configs.load(path, overrides)
        tests = configs.data_module(config).test_names
        names = metric_names(config.task, tests)
        return Resolved(configs.identify(config).id, configs.contents(config), names)

    return found, check_variants(found, _where(path), resolve)


def _where(path: Path) -> str:
    return f"recipe {path.name}: claim"
