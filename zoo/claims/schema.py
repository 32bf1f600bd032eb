"""What a paper claims, as the section `claim` of a recipe states it, and what is wrong with one.

    claim:
      statement: One sentence of what the paper claims.
      mechanism: cope                       # a name of the registry
      source: Table 2; section 5.1
      variants:                             # overrides of the recipe; the first is the mechanism
        cope: ["attention=mha+cope(npos=64)"]
        absolute: ["attention=mha+learned"]
      seeds: 3                              # 0, 1 and 2
      figures: {ood: test_sparse/loss, id: test/loss, size: parameters}
      requires: ["cope.id < 0.05"]          # without these nothing can be concluded
      criterion: ["cope.ood < 0.5 * absolute.ood"]    # all must hold

Everything is checked when the recipe is loaded as it stands, before anything is trained.
`zoo.claims.verdicts` says what follows from the runs.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo import checks, registry
from zoo.claims.expressions import FUNCTIONS, Comparison
from zoo.errors import ZooError, unknown
from zoo.registry import SOCKETS

COUNTS = ("examples", "flops", "parameters", "peak_memory_bytes", "state_bytes", "steps")
TIMES = ("step_time_cpu", "step_time_wall")
NEEDS = ("gpu",)
# What makes the runs of a claim its runs; a variant that changed it would leave the claim.
_FIXED = ("claim", "metrics", "name", "seed", "track")


class Resolved(NamedTuple):
    """A variant as it would run.

    Args:
        id: Id of its run.
        config: Its whole configuration as plain data.
        metrics: Names of the metrics that its record will hold.
    """

    id: str
    config: dict[str, Any]
    metrics: Collection[str]


@dataclass
class Claim:
    """A paper's headline result and what would show it here.

    Args:
        statement: What the paper claims, in one sentence.
        mechanism: Registry name of the mechanism it is about.
        source: Where the paper says so.
        variants: Overrides of the recipe by name; the first is the mechanism, all others are what
            it is compared with.
        figures: Metric or field of a record by the short name that expressions use.
        criterion: Comparisons that must all hold.
        requires: Comparisons of means without which nothing can be concluded.
        seeds: Number of seeds, counted from 0.
        needs: `gpu` if the runs are out of reach of a processor.
    """

    statement: str = MISSING
    mechanism: str = MISSING
    source: str = MISSING
    variants: dict[str, list[str]] = MISSING
    figures: dict[str, str] = MISSING
    criterion: list[str] = MISSING
    requires: list[str] = field(default_factory=list)
    seeds: int = 3
    needs: str | None = None

    @property
    def subject(self) -> str:
        """Name of the variant that is the mechanism."""
        return next(iter(self.variants))

    @property
    def hash(self) -> str:
        """Hash of every word of the claim, with the variants in their order."""
        text = json.dumps(self.plain(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def plain(self) -> dict[str, Any]:
        """Return the claim as plain data whose mappings may be sorted."""
        pairs = [{"name": name, "overrides": list(o)} for name, o in self.variants.items()]
        return {**asdict(self), "variants": pairs}

    def overrides(self, variant: str, seed: int) -> list[str]:
        """Return what one run changes in the recipe.

        Args:
            variant: Name of the variant.
            seed: The seed.
        """
        return [*self.variants[variant], f"seed={seed}"]


def read_claim(section: Any, where: str) -> Claim:
    """Read the section of a recipe and check all that can be told from itself.

    Args:
        section: The section as plain data.
        where: How errors call it, such as "recipe cope.yaml: claim".

    Raises:
        ZooError: A key is unknown or missing, a value is of the wrong kind, or an expression
            cannot be read or names a variant or figure that the claim lacks.
    """
    if not isinstance(section, dict):
        raise ZooError(f"{where} must be a mapping of keys to values")
    for key in section:
        if key not in Claim.__dataclass_fields__:
            raise unknown(f"key in {where}", key, Claim.__dataclass_fields__)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Claim), section)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ZooError(f"{where}: {missing[0]} is missing; it has no default")
        claim = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        text = " ".join(str(error).split("full_key:")[0].split())
        raise ZooError(f"{where}: {error.full_key}: {text}") from None
    assert isinstance(claim, Claim)
    try:
        _check(claim)
    except ZooError as error:
        raise ZooError(f"{where}: {error}") from None
    return claim


def _check(claim: Claim) -> None:
    for key in ("statement", "source"):
        if not getattr(claim, key).strip():
            raise ZooError(f"{key} is empty; say it in one sentence")
    if registry.info(claim.mechanism).name != claim.mechanism:
        name = registry.info(claim.mechanism).name
        raise ZooError(f"mechanism={claim.mechanism!r} is another name; write {name!r}")
    for key in ("variants", "figures", "criterion"):
        if not getattr(claim, key):
            raise ZooError(f"{key} is empty; a claim needs at least one")
    checks.whole("seeds", claim.seeds)
    if claim.needs is not None and claim.needs not in NEEDS:
        raise unknown("value of needs", claim.needs, NEEDS)
    for key in ("variants", "figures"):
        for name in getattr(claim, key):
            if not name.isidentifier() or keyword.iskeyword(name) or name in FUNCTIONS:
                raise ZooError(f"{key}: {name!r} must be a word that an expression can use")
    for name, overrides in claim.variants.items():
        for text in overrides:
            if text.partition("=")[0].strip().partition(".")[0] in _FIXED:
                raise ZooError(
                    f"variant {name!r}: {text!r} would make it a run of something else; "
                    f"a variant may not change {', '.join(_FIXED)}"
                )
    _check_expressions(claim)


def _check_expressions(claim: Claim) -> None:
    for text in (*claim.requires, *claim.criterion):
        for variant, figure in sorted(Comparison(text).figures):
            if variant not in claim.variants:
                raise unknown(f"variant in {text!r}:", variant, claim.variants)
            if figure not in claim.figures:
                raise unknown(f"figure in {text!r}:", figure, claim.figures)
    named = {variant for text in claim.criterion for variant, _ in Comparison(text).figures}
    if claim.subject not in named:
        raise ZooError(
            f"the criterion says nothing of {claim.subject!r}, the first variant, which is the "
            "mechanism"
        )


def check_variants(
    claim: Claim, where: str, resolve: Callable[[Sequence[str]], Resolved]
) -> dict[str, Resolved]:
    """Check that every variant can be run and will have every figure.

    Args:
        claim: The claim.
        where: How errors call it.
        resolve: Returns what overrides of the recipe come to.

    Returns:
        The variants by name, at seed 0.

    Raises:
        ZooError: A variant cannot be resolved, repeats another, or lacks a figure.
    """
    found: dict[str, Resolved] = {}
    for name in claim.variants:
        try:
            variant = resolve(claim.overrides(name, 0))
            for short, metric in claim.figures.items():
                allowed = (*variant.metrics, *COUNTS, *TIMES)
                if metric not in allowed:
                    raise unknown(f"metric of figure {short!r}:", metric, allowed)
        except ZooError as error:
            raise ZooError(f"{where}: variant {name!r}: {error}") from None
        twin = next((other for other, run in found.items() if run.id == variant.id), None)
        if twin is not None:
            raise ZooError(f"{where}: variants {twin!r} and {name!r} are the same run")
        found[name] = variant
    _check_subject(claim, where, found[claim.subject].config)
    return found


def _check_subject(claim: Claim, where: str, config: Mapping[str, Any]) -> None:
    """Refuse a first variant that does not use the mechanism, where attention is what uses it."""
    if registry.info(claim.mechanism).kind not in (*SOCKETS, "mixer"):
        return
    used = json.dumps([config["attention"], config["model"]])
    if not re.search(rf"\b{re.escape(claim.mechanism)}\b", used):
        raise ZooError(
            f"{where}: the first variant, {claim.subject!r}, does not use {claim.mechanism!r}; "
            f"its attention is {config['attention']!r}"
        )
