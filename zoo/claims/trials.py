"""Claims as experiments: every variant at every seed, then the verdict.

    found = find("cope")
    carry_out(found, "runs/records/claims/cope", jobs=2)
    verdict = conclude(found, "runs/records/claims/cope")

A claim is a recipe with a section `claim` (`zoo.claims.schema`), usually under recipes/claims/.
Its runs are ordinary runs with ordinary records, in a folder of their own, which also holds the
verdict (`zoo.claims.verdicts`). What has a record is not run again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.claims import recipes, verdicts
from zoo.claims.schema import Claim
from zoo.claims.verdicts import Verdict
from zoo.errors import ZooError, unknown
from zoo.resources import folder
from zoo.runs import config
from zoo.runs.records import RecordWarning
from zoo.sweeps.sweep import SweepResult, sweep

FOLDER = "claims"


@dataclass(frozen=True)
class Found:
    """A claim and the runs that decide it.

    Args:
        recipe: Name or path of the recipe, as `zoo run` takes it.
        name: Name that the recipe gives itself.
        claim: The claim.
        ids: Ids of the runs by variant, in the order of the seeds.
    """

    recipe: str
    name: str
    claim: Claim
    ids: Mapping[str, list[str]]

    @property
    def cells(self) -> list[list[str]]:
        """Overrides of every run, all variants of one seed together."""
        seeds = range(self.claim.seeds)
        return [self.claim.overrides(v, seed) for seed in seeds for v in self.claim.variants]


def names() -> list[str]:
    """Names of the claims that ship, in alphabetical order."""
    return sorted(path.stem for path in (folder("recipes") / FOLDER).rglob("*.yaml"))


def find(recipe: str) -> Found:
    """Find a claim and check it, down to the last variant.

    Args:
        recipe: Name of a recipe, or path of a YAML file.

    Raises:
        ZooError: There is no such recipe, it states no claim, or one that cannot be judged.
    """
    by_path = recipe.endswith((".yaml", ".yml"))
    if not by_path and Path(recipe).name not in config.recipes():
        raise unknown("claim", recipe, names())
    name = config.load(recipe, ["seed=0"]).name
    claim, variants = recipes.resolved_claim(recipe)
    rest = range(1, claim.seeds)
    ids = {
        v: [run.id, *(config.run_id(recipe, claim.overrides(v, seed)) for seed in rest)]
        for v, run in variants.items()
    }
    return Found(recipe, name, claim, ids)


def carry_out(
    found: Found,
    records: str | Path,
    *,
    runs: str | Path = "runs",
    jobs: int = 1,
    runner: Sequence[str] | None = None,
    progress: bool = True,
) -> SweepResult:
    """Train every variant at every seed that has no record yet; see `sweep`.

    Args:
        found: The claim.
        records: Folder of the claim's records.
        runs: Folder of the run folders.
        jobs: Number of processes at once.
        runner: Command that trains; `zoo run` if None.
        progress: Whether to show a progress bar.

    Raises:
        ZooError: `jobs` is not positive, or the claim was changed after its verdict.
    """
    refuse_changed(found, records)
    return sweep(
        found.recipe,
        found.cells,
        jobs=jobs,
        records=records,
        runs=runs,
        runner=runner,
        identify=config.run_id,
        progress=progress,
    )


def conclude(found: Found, records: str | Path) -> Verdict:
    """Judge a claim by its records and write the verdict beside them.

    Args:
        found: The claim.
        records: Folder of the claim's records.

    Raises:
        Incomplete: Records are missing.
        ZooError: A record cannot be read, the verdict cannot be written, or the claim was changed
            after an earlier verdict.
    """
    refuse_changed(found, records)
    verdict = verdicts.judge(found.name, found.claim, found.ids, records)
    verdicts.write(verdict, records)
    return verdict


def refuse_changed(found: Found, records: str | Path) -> None:
    """Refuse to go on with a claim that was changed once its verdict was known.

    Args:
        found: The claim.
        records: Folder of the claim's records.

    Raises:
        ZooError: The folder holds a verdict on other words.
    """
    before = verdicts.stated(records)
    if before is not None and before.hash != found.claim.hash:
        path = Path(records) / verdicts.FILE
        raise ZooError(
            f"claim {found.name!r} was changed after its verdict, {before.outcome!r}; remove "
            f"{path} to have it judged anew"
        )


@dataclass(frozen=True)
class Published:
    """A claim with its verdict, as the leaderboard shows it.

    Args:
        verdict: The verdict, judged again from the records.
        stale: Whether the recipe of that name states another claim by now.
    """

    verdict: Verdict
    stale: bool


def published(records: str | Path) -> list[Published]:
    """Return every claim with a verdict in the folder `claims` of a folder, in alphabetical order.

    A folder of records without a verdict is named in a `RecordWarning`.

    Args:
        records: Folder of the records.

    Raises:
        ZooError: A verdict is not what its claim and its records give.
    """
    found = []
    for path in sorted(p for p in (Path(records) / FOLDER).glob("*") if p.is_dir()):
        if verdicts.stated(path) is None:
            warnings.warn(f"{path} has no verdict; 'zoo claims {path.name}'", RecordWarning, 2)
            continue
        verdict = verdicts.read(path)
        found.append(Published(verdict, is_stale(verdict.name, verdict.claim)))
    return sorted(found, key=lambda one: (one.verdict.claim.mechanism, one.verdict.name))


def is_stale(name: str, claim: Claim) -> bool:
    """Return whether the recipe of a name states another claim than the one that was judged.

    Args:
        name: Name of the recipe; one that does not ship is taken to be unchanged.
        claim: The claim as it was judged.
    """
    if name not in config.recipes():
        return False
    now = recipes.claim(name)
    return now is None or now.hash != claim.hash
