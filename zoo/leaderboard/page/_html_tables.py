"""Tables of the page: places by track, standings of a recipe, claims, records of a mechanism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from zoo.claims.trials import Published
from zoo.leaderboard.board import Standing, TableBoard
from zoo.leaderboard.page import claim_table
from zoo.leaderboard.page._html_grid import Cell, Column, Grid, Ids, Line, coded, lines, linked
from zoo.leaderboard.page._html_mechanisms import Mechanism, parts
from zoo.leaderboard.page.standings import arrow, extra_figures, failures, place, spread
from zoo.leaderboard.summary import Summary
from zoo.leaderboard.tracks import Track
from zoo.report.markdown import NONE, figures, milliseconds, quantity, size
from zoo.statistics import spread as stats
from zoo.statistics.spread import OUTCOMES

_EMPTY = Cell(NONE)


@dataclass(frozen=True)
class Mention:
    """A row of a table, as the page of a mechanism in it shows it."""

    track: str
    recipe: str
    spec: str
    row: str
    place: str
    figure: Cell
    difference: Cell
    outcome: str
    stale: bool


@dataclass
class Tables:
    """Makes tables, and remembers who stands where.

    Args:
        mechanisms: Every mechanism that has a page, by name.
        ids: Names that are taken on the leaderboard.
        home: Address of the leaderboard, as seen from a mechanism's page.
        mentions: Rows by mechanism, filled by `standings`.
        claims: Claims by mechanism, filled by `ledger`, each with the name of its row.
    """

    mechanisms: Mapping[str, Mechanism]
    ids: Ids
    home: str
    mentions: dict[str, list[Mention]] = field(default_factory=dict)
    claims: dict[str, list[tuple[str, Published]]] = field(default_factory=dict)

    def places(self, summary: Summary) -> Grid:
        """Return the summary of the tracks of one baseline.

        Args:
            summary: What is shown.
        """
        tracks = [one.track for one in summary.tracks]
        columns = [Column("attention", "attention", number=False)]
        columns += [Column(f"place-{track.name}", track.title) for track in tracks]
        columns += [Column(kind, kind, down=kind == "win") for kind in OUTCOMES]
        made = []
        for line in summary.lines:
            places = [Cell(place(one), one.mean) if one else _EMPTY for one in line.places]
            counts = line.outcomes
            outcomes = [_count(counts[kind]) if counts else _EMPTY for kind in OUTCOMES]
            cells = [self._name(line.attention), *places, *outcomes]
            made.append(self._line("", line.attention, cells))
        id = self.ids.new("t-places", summary.baseline)
        title = f"Mean place by track, against {summary.baseline}"
        return Grid(id, title, tuple(columns), tuple(made))

    def standings(self, board: TableBoard, track: Track) -> Grid:
        """Return the table of a recipe.

        Args:
            board: The table.
            track: Its track.
        """
        key = board.key
        extra = extra_figures(board)
        up = key.mode == "max"
        versus = "softmax" if stats.is_softmax(track.baseline) else track.baseline
        marks = any(one.faults for one in board.standings)
        columns = [
            Column("place", "place", initial=True),
            Column("attention", "attention", number=False),
            Column("mean", Markup("{} {}").format(coded(key.report), arrow(key)), down=up),
        ]
        columns += [Column("solved", "solved", down=True)] * (key.solved is not None)
        columns += [
            Column("difference", f"vs {versus}", down=up),
            Column("outcome", "outcome", number=False),
            *(Column(name.replace("/", "."), coded(name)) for name in extra),
            Column("lr", "lr (tried)"),
            Column("parameters", "parameters"),
            Column("flops", "FLOPs"),
            Column("state", "state"),
            Column("step", "step CPU / wall, ms"),
            Column("memory", "peak memory"),
            Column("runs", "runs"),
            Column("failures", "failures"),
        ]
        columns += [Column("reasons", "no place because of", number=False)] * marks
        id = self.ids.new("t", key.recipe, key.group[:8])
        made = []
        for one in board.standings:
            row, line = one.row, self.ids.new(id, one.row.attention)
            rank = Cell(NONE) if one.rank is None else Cell(str(one.rank), float(one.rank))
            figure = Cell(spread(row.spread, row.attempts), row.spread and row.spread.mean)
            difference = _difference(one, board)
            cells = [rank, self._name(row.attention, _role(row.attention, track)), figure]
            if key.solved is not None:
                solved = None if row.solved is None else row.solved / max(1, row.attempts)
                cells.append(Cell(f"{row.solved}/{row.attempts}", solved))
            cells += [difference, Cell(_badge(one.outcome))]
            for name in extra:
                found = row.extra.get(name)
                cells.append(Cell(spread(found, row.attempts), found and found.mean))
            cells += _costs(one)
            cells += [Cell("; ".join(one.faults) or NONE)] * marks
            made.append(self._line(line, row.attention, cells))
            mention = Mention(
                *(track.title, key.recipe, row.attention, line, str(rank.shown)),
                Cell(Markup("{} {}").format(coded(key.report), figure.shown), figure.value),
                *(difference, _badge(one.outcome), board.stale),
            )
            for name in dict.fromkeys(name for _, name in parts(row.attention)):
                self.mentions.setdefault(name, []).append(mention)
        return Grid(id, f"{key.recipe}: {key.report}", tuple(columns), tuple(made))

    def ledger(self, claims: Sequence[Published]) -> Grid:
        """Return the table of the claims; how each was judged stands on its mechanism's page.

        Args:
            claims: The claims with their verdicts.
        """
        columns = [Column(one, one, number=False) for one in ("mechanism", "claim", "verdict")]
        made = []
        for one in claims:
            verdict, claim = one.verdict, one.verdict.claim
            row = self.ids.new("c", verdict.name)
            self.claims.setdefault(claim.mechanism, []).append((row, one))
            address = f"{self.mechanisms[claim.mechanism].address}#{row}"
            said = Markup("{}: {}").format(linked(address, coded(verdict.name)), claim.statement)
            cells = [self._name(claim.mechanism), Cell(said, verdict.name), _verdict(one)]
            made.append(self._line(row, claim.mechanism, cells, verdict.name, claim.statement))
        return Grid(self.ids.new("t-claims"), "Claims", tuple(columns), tuple(made))

    def judged(self, name: str) -> Grid | None:
        """Return the claims on a mechanism and how they were judged; None without any.

        Args:
            name: Its name.
        """
        found = self.claims.get(name)
        if not found:
            return None
        titles = ("claim", "verdict", "criterion", "figures", "again")
        columns = [Column(title, title, number=False) for title in titles]
        made = []
        for row, one in found:
            verdict, claim = one.verdict, one.verdict.claim
            criterion = [coded(text) for text in claim.criterion]
            criterion += [Markup("requires {}").format(coded(text)) for text in claim.requires]
            measured = [_measured(v, claim_table.figure_texts(verdict, v)) for v in verdict.ids]
            said = Markup("{}: {} <small>({})</small>").format(
                coded(verdict.name), claim.statement, claim.source
            )
            cells = [
                Cell(said, verdict.name),
                _verdict(one),
                Cell(lines(criterion)),
                Cell(lines(measured) or NONE),
                Cell(coded(f"zoo claims {verdict.name}")),
            ]
            made.append(Line(row, tuple(cells)))
        return Grid("t-claims", f"Claims on {name}", tuple(columns), tuple(made))

    def records(self, name: str) -> Grid | None:
        """Return the rows of a mechanism in all tables; None without any.

        Args:
            name: Its name.
        """
        found = self.mentions.get(name)
        if not found:
            return None
        titles = ("track", "table", "attention")
        columns = [Column(title, title, number=False) for title in titles]
        columns += [Column("place", "place"), Column("figure", "figure")]
        columns += [Column("difference", "vs baseline"), Column("outcome", "outcome", number=False)]
        made = []
        for one in found:
            recipe = Markup("{}{}").format(one.recipe, " (stale)" if one.stale else "")
            cells = [
                Cell(one.track),
                Cell(linked(f"{self.home}#{one.row}", recipe)),
                Cell(coded(one.spec)),
            ]
            cells += [Cell(one.place, None if one.place == NONE else float(one.place))]
            cells += [one.figure, one.difference, Cell(one.outcome)]
            made.append(Line("", tuple(cells)))
        return Grid("t-records", f"Records of {name}", tuple(columns), tuple(made))

    def overview(self) -> Grid:
        """Return the table of the mechanisms, once all other tables are made."""
        columns = [Column(title, title, number=False) for title in ("mechanism", "what", "kind")]
        columns += [Column(title, title, down=True) for title in ("year", "rows", "claims")]
        made = []
        for one in self.mechanisms.values():
            paper = one.entry and one.entry.paper
            year = Cell(str(paper.year), float(paper.year)) if paper else _EMPTY
            cells = [
                Cell(linked(one.address, coded(one.name)), one.name.lower()),
                *(Cell(one.summary or "Not registered here."), Cell(one.kind), year),
                _count(len(self.mentions.get(one.name, ()))),
                _count(len(self.claims.get(one.name, ()))),
            ]
            made.append(Line(one.id, tuple(cells), (one.kind,), one.traits, one.words))
        return Grid("t-mechanisms", "Mechanisms", tuple(columns), tuple(made))

    def _name(self, spec: str, role: str = "") -> Cell:
        """Return the cell of a specification, each part a link to its page."""
        links = [linked(self.mechanisms[name].address, coded(text)) for text, name in parts(spec)]
        shown = Markup("+<wbr>").join(links)
        if role:
            shown = Markup("{} <small>{}</small>").format(shown, role)
        return Cell(shown, spec.lower())

    def _line(self, id: str, spec: str, cells: Sequence[Cell], *words: str) -> Line:
        members = [self.mechanisms[name] for _, name in parts(spec)]
        kinds = tuple(dict.fromkeys(one.kind for one in members))
        traits = frozenset.intersection(*(one.traits for one in members))
        text = " ".join([spec.lower(), *(one.words for one in members), *words]).lower()
        return Line(id, tuple(cells), kinds, traits, text)


def _count(number: int) -> Cell:
    return Cell(str(number), float(number))


def _costs(one: Standing) -> list[Cell]:
    row = one.row
    cpu, wall = row.median("step_time_cpu"), row.median("step_time_wall")
    rate = NONE if row.lr is None else f"{row.lr:g}"
    bytes_, memory = row.median("state_bytes"), row.median("peak_memory_bytes")
    parameters, flops = row.median("parameters"), row.median("flops")
    return [
        Cell(f"{rate} ({len(row.lrs)})", row.lr),
        Cell(quantity(parameters), _float(parameters)),
        Cell(quantity(flops), _float(flops)),
        Cell(size(bytes_), _float(bytes_)),
        Cell(f"{milliseconds(cpu)} / {milliseconds(wall)}", _float(cpu)),
        Cell(size(memory), _float(memory)),
        Cell(str(len(row.runs)), float(len(row.runs))),
        Cell(failures(row), float(len(row.failures))),
    ]


def _difference(one: Standing, board: TableBoard) -> Cell:
    if board.baseline is None:
        return _EMPTY
    if one.row is board.baseline:
        return Cell("baseline", 0.0)
    found = one.difference
    if found is None:
        return Cell("no shared seed")
    if found.low is None or found.high is None:
        return Cell(f"{figures(found.mean, sign=True)[0]} ({found.n})", found.mean)
    mean, low, high = figures(found.mean, found.low, found.high, sign=True)
    return Cell(f"{mean} [{low}, {high}] ({found.n})", found.mean)


def _role(spec: str, track: Track) -> str:
    """Return what a row is in every table of its track, if it is anything."""
    if spec == track.baseline:
        return "baseline"
    return "recurrent" if spec == track.ceiling else "floor" if spec in track.floors else ""


def _badge(outcome: str | None) -> str | Markup:
    if outcome is None:
        return NONE
    short = outcome.partition(":")[0]
    colour = {"win": "good", "reproduced": "good", "loss": "bad", "not reproduced": "bad"}
    return Markup('<span class="badge {}">{}</span>').format(colour.get(short, "even"), outcome)


def _verdict(one: Published) -> Cell:
    outcome = claim_table.STALE if one.stale else one.verdict.outcome
    return Cell(lines([_badge(outcome), "" if one.stale else one.verdict.why]), outcome)


def _measured(variant: str, texts: Sequence[str]) -> Markup:
    unbroken = [Markup('<span class="unbroken">{}</span>').format(text) for text in texts]
    return Markup("{} {}").format(coded(variant), Markup(", ").join(unbroken))


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
