"""What follows from the runs of a claim, by one rule that is written down before they are made.

The criterion is evaluated on each seed by itself, with the figures that all variants have at that
seed; it holds on a seed if all of its comparisons do.

    reproduced                 it holds on every seed
    not reproduced             it holds on no seed
    undecided at this scale    anything else, or a requirement does not hold on the seeds' means
    needs a GPU                the claim says so, and there are no runs

A run that failed, diverged or gave an infinite figure has no figure. A comparison that names such a
figure of the mechanism (the first variant) does not hold; one that names only such figures of other
variants, or that divides by zero, is undecided on that seed, and so is the seed unless another
comparison fails there. A mean over seeds of which one has no figure does not exist, and a
requirement on it does not hold.

A verdict is a YAML file beside the records that it follows from, `<folder>/<claim>/verdict.yaml`;
it holds the claim word for word, with its hash, so that a claim that was changed afterwards shows.
The same records and the same claim give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zoo.claims.expressions import Comparison, Figure
from zoo.claims.schema import COUNTS, TIMES, Claim, read_claim
from zoo.errors import ZooError
from zoo.report.files import replace_text
from zoo.runs import records
from zoo.runs.records import Record
from zoo.statistics import spread as stats
from zoo.statistics.spread import Spread

FILE = "verdict.yaml"
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided at this scale"
NEEDS_GPU = "needs a GPU"
OUTCOMES = (REPRODUCED, NOT_REPRODUCED, UNDECIDED, NEEDS_GPU)


class Incomplete(ZooError):
    """A claim cannot be judged yet: records are missing."""


@dataclass(frozen=True)
class Verdict:
    """What the records of a claim say of it.

    Args:
        name: Name of the recipe that states the claim.
        claim: The claim.
        ids: Ids of the records by variant, in the order of the seeds; none without runs.
        values: Figures by variant and short name, in the order of the seeds; None where the run
            has none.
        statuses: What became of the runs, by variant and in the order of the seeds.
        requires: Whether each requirement holds on the seeds' means; None without runs.
        criterion: Whether each comparison holds, in the order of the seeds; None is undecided.
        outcome: One of `OUTCOMES`.
        why: The reason in one line.
        machine: Devices, versions and commits of the runs.
    """

    name: str
    claim: Claim
    ids: Mapping[str, list[str]]
    values: Mapping[str, Mapping[str, list[float | None]]]
    statuses: Mapping[str, list[str]]
    requires: list[bool | None]
    criterion: list[list[bool | None]]
    outcome: str
    why: str
    machine: Mapping[str, list[str]]

    def spread(self, variant: str, figure: str) -> Spread | None:
        """Return mean and deviation (ddof = 1) of a figure over the seeds that have it.

        Args:
            variant: Name of the variant.
            figure: Short name of the figure.
        """
        return stats.spread(v for v in self.values[variant][figure] if v is not None)

    def text(self) -> str:
        """Return the verdict as YAML, the same text for the same records and claim."""
        claim = self.claim
        content: dict[str, Any] = {
            "claim": {**claim.plain(), "hash": claim.hash, "name": self.name},
            "criterion": [
                {"holds": holds, "text": text}
                for holds, text in zip(self.criterion, claim.criterion, strict=True)
            ],
            "machine": dict(self.machine),
            "requires": [
                {"holds": holds, "text": text}
                for holds, text in zip(self.requires, claim.requires, strict=True)
            ],
            "variants": {name: self._variant(name) for name in self.ids},
            "verdict": self.outcome,
            "why": self.why,
        }
        return yaml.dump(
            content,
            Dumper=_Plain,
            sort_keys=True,
            default_flow_style=None,
            allow_unicode=True,
            width=100,
        )

    def _variant(self, name: str) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for short, values in self.values[name].items():
            found = self.spread(name, short)
            mean, std = (found.mean, found.std) if found else (None, None)
            figures[short] = {"mean": mean, "std": std, "values": values}
        return {"figures": figures, "records": self.ids[name], "status": self.statuses[name]}


class _Plain(yaml.SafeDumper):
    """Writes every value out where it stands, never as a reference to an equal one."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: no value is a reference."""
        return True


def judge(name: str, claim: Claim, ids: Mapping[str, list[str]], folder: str | Path) -> Verdict:
    """Judge a claim by its records.

    Args:
        name: Name of the recipe that states it.
        claim: The claim.
        ids: Ids of the records by variant, in the order of the seeds; empty without runs.
        folder: Folder of the claim's records.

    Raises:
        Incomplete: Records are missing.
        ZooError: A record cannot be read.
    """
    every = [run for runs in ids.values() for run in runs]
    there = [run for run in every if (Path(folder) / f"{run}.json").is_file()]
    if not there and claim.needs:
        unknown: list[bool | None] = [None] * len(claim.requires)
        open_: list[list[bool | None]] = [[] for _ in claim.criterion]
        why = "its runs are out of reach of a processor, and there are none"
        return Verdict(name, claim, {}, {}, {}, unknown, open_, NEEDS_GPU, why, {})
    if lacking := len(every) - len(there) or not every:
        first = next((run for run in every if run not in there), "every one")
        raise Incomplete(
            f"claim {name!r} is incomplete: {lacking} of {len(every)} records are missing in "
            f"{folder}, first {first}; 'zoo claims {name}' makes them"
        )
    found = {v: [records.read(Path(folder) / f"{run}.json") for run in ids[v]] for v in ids}
    values = {
        variant: {short: [_value(run, m) for run in runs] for short, m in claim.figures.items()}
        for variant, runs in found.items()
    }
    requires: list[bool | None] = [_required(Comparison(t), values) for t in claim.requires]
    criterion = [
        [_holds(Comparison(text), values, seed, claim.subject) for seed in range(claim.seeds)]
        for text in claim.criterion
    ]
    outcome, why = _conclude(claim, requires, criterion)
    statuses = {variant: [run.status for run in runs] for variant, runs in found.items()}
    machine = _machine(run for runs in found.values() for run in runs)
    kept = {variant: list(runs) for variant, runs in ids.items()}
    return Verdict(name, claim, kept, values, statuses, requires, criterion, outcome, why, machine)


def _value(record: Record, metric: str) -> float | None:
    """Return a figure of a record; None if the run has none or an infinite one."""
    if record.status != "finished":
        return None
    field = metric in (*COUNTS, *TIMES)
    value = getattr(record, metric) if field else record.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def _holds(
    comparison: Comparison, values: Mapping[str, Any], seed: int, subject: str
) -> bool | None:
    """Return whether a comparison holds on one seed; None if that cannot be said."""
    known: dict[Figure, float] = {}
    lacking = set()
    for variant, short in comparison.figures:
        value = values[variant][short][seed]
        if value is None:
            lacking.add(variant)
        else:
            known[variant, short] = value
    if lacking:
        return False if subject in lacking else None
    return comparison.holds(known)


def _required(comparison: Comparison, values: Mapping[str, Any]) -> bool:
    """Return whether a comparison holds on the means over the seeds."""
    means: dict[Figure, float] = {}
    for variant, short in comparison.figures:
        every = values[variant][short]
        found = None if None in every else stats.spread(every)
        if found is None:
            return False
        means[variant, short] = found.mean
    return comparison.holds(means) is True


def _conclude(
    claim: Claim, requires: list[bool | None], criterion: list[list[bool | None]]
) -> tuple[str, str]:
    if failed := [text for text, holds in zip(claim.requires, requires, strict=True) if not holds]:
        return UNDECIDED, f"required of the means over seeds, and not so: {'; '.join(failed)}"
    seeds = [_all(row[seed] for row in criterion) for seed in range(claim.seeds)]
    held, open_ = seeds.count(True), seeds.count(None)
    why = f"the criterion holds on {held} of {len(seeds)} seeds"
    if open_:
        why += f" and cannot be evaluated on {open_}"
    if held == len(seeds):
        return REPRODUCED, why
    return (NOT_REPRODUCED if not held and not open_ else UNDECIDED), why


def _all(parts: Iterable[bool | None]) -> bool | None:
    """Return whether all hold; one that fails decides, else one that is open leaves it open."""
    found = list(parts)
    if False in found:
        return False
    return None if None in found else True


def _machine(runs: Iterable[Record]) -> dict[str, list[str]]:
    every = list(runs)

    def distinct(text: Callable[[Record], Iterable[str]]) -> list[str]:
        return sorted({item for run in every for item in text(run)})

    return {
        "commits": distinct(lambda run: [run.commit or "unknown"]),
        "devices": distinct(
            lambda run: [
                f"{run.device['name']} ({run.device['type']}, threads {run.device['threads']})"
            ]
        ),
        "versions": distinct(lambda run: [f"{n} {v}" for n, v in run.versions.items()]),
    }


def write(verdict: Verdict, folder: str | Path) -> Path:
    """Write a verdict beside its records.

    Args:
        verdict: The verdict.
        folder: Folder of the claim's records.

    Raises:
        ZooError: The folder cannot be written.
    """
    return replace_text(Path(folder) / FILE, verdict.text())


@dataclass(frozen=True)
class Stated:
    """A verdict as its file states it, not judged again.

    Args:
        name: Name of the recipe.
        claim: The claim as it was judged.
        hash: Its hash, as it stands in the file.
        ids: Ids of the records by variant.
        outcome: The verdict.
        text: All of the file.
    """

    name: str
    claim: Claim
    hash: str
    ids: Mapping[str, list[str]]
    outcome: str
    text: str


def stated(folder: str | Path) -> Stated | None:
    """Return what the verdict of a folder states; None without one.

    Args:
        folder: Folder of the claim's records.

    Raises:
        ZooError: The file cannot be read or is no verdict.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        section = dict(content["claim"])
        name, hash_ = str(section.pop("name")), str(section.pop("hash"))
        section["variants"] = {item["name"]: item["overrides"] for item in section["variants"]}
        held = content["variants"]
        # The file has them sorted by name; the claim knows their order.
        ids = {v: [str(i) for i in held[v]["records"]] for v in section["variants"] if held}
        outcome = str(content["verdict"])
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, ValueError) as error:
        raise ZooError(f"{path} is no verdict: {' '.join(str(error).split())}") from None
    claim = read_claim(section, f"{path}: claim")
    return Stated(name, claim, hash_, ids, outcome, text)


def read(folder: str | Path) -> Verdict:
    """Read the verdict of a folder and judge its records again.

    Args:
        folder: Folder of the claim's records.

    Raises:
        ZooError: There is no verdict, or it is not what its claim and its records give.
    """
    path, found = Path(folder) / FILE, stated(folder)
    if found is None:
        raise ZooError(f"{path} does not exist; 'zoo claims' writes it")
    verdict = judge(found.name, found.claim, found.ids, folder)
    if found.hash != found.claim.hash or found.text != verdict.text():
        raise ZooError(
            f"{path} is not what its claim and records give; 'zoo claims {found.name} "
            "--verdict-only' makes it again"
        )
    return verdict
