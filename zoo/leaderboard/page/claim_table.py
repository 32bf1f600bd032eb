"""The section of the leaderboard that says which papers' claims were reproduced here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from zoo.claims.schema import COUNTS, TIMES
from zoo.claims.trials import Published
from zoo.claims.verdicts import OUTCOMES, Verdict
from zoo.leaderboard.page.standings import spread
from zoo.report.markdown import NONE, code, milliseconds, quantity, table, words

STALE = "stale: the claim was changed after this verdict"

RULE = """\
Each claim is a paper's headline result with a criterion fixed before the verdict; `zoo claims NAME`
trains its variants and judges it. The criterion is evaluated on each seed with the figures of all
variants at that seed: *reproduced* if it holds on every seed, *not reproduced* if on none, else
*undecided at this scale*, as also where a requirement does not hold on the means over the seeds. A
run of the mechanism (the first variant) without a figure counts against it; one of another variant
leaves the seed undecided. Figures are mean ± standard deviation (ddof = 1) and the number of seeds.
"""


def section(found: Sequence[Published]) -> str:
    """Return heading, rule and table of the claims.

    Args:
        found: The claims with their verdicts, in the order of the rows.
    """
    counted = Counter(STALE if one.stale else one.verdict.outcome for one in found)
    total = ", ".join(
        f"{counted[o]} {o.partition(':')[0]}" for o in (*OUTCOMES, STALE) if counted[o]
    )
    header = ["mechanism", "claim", "criterion", "figures", "verdict", "again by"]
    rows = [_row(one) for one in found]
    return f"## Claims\n\n{RULE}\n{total}.\n\n{table(header, rows, left=len(header))}"


def _row(one: Published) -> list[str]:
    verdict, claim = one.verdict, one.verdict.claim
    criterion = [*map(code, claim.criterion)]
    criterion += [f"requires {code(text)}" for text in claim.requires]
    lines = [
        f"{code(variant)} {', '.join(figure_texts(verdict, variant))}" for variant in verdict.ids
    ]
    return [
        code(claim.mechanism),
        f"{code(verdict.name)}: {words(claim.statement)} ({words(claim.source)})",
        "<br>".join(criterion),
        "<br>".join(lines) or NONE,
        STALE if one.stale else f"**{verdict.outcome}**: {words(verdict.why)}",
        code(f"zoo claims {verdict.name}"),
    ]


def figure_texts(verdict: Verdict, variant: str) -> list[str]:
    """Return each figure of a variant as its short name and its mean and deviation.

    Args:
        verdict: The verdict.
        variant: Name of the variant.
    """
    return [f"{short} {figure_text(verdict, variant, short)}" for short in verdict.claim.figures]


def figure_text(verdict: Verdict, variant: str, short: str) -> str:
    """Return one figure of a variant: mean and deviation, or the mean alone of a count or a time.

    Args:
        verdict: The verdict.
        variant: Name of the variant.
        short: Short name of the figure.
    """
    metric, found = verdict.claim.figures[short], verdict.spread(variant, short)
    if metric in COUNTS and found is not None:
        return quantity(found.mean)
    if metric in TIMES and found is not None:
        return f"{milliseconds(found.mean)} ms"
    return spread(found, verdict.claim.seeds)
