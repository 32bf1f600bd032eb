"""The summary of the leaderboard: places and outcomes over the tracks of one baseline.

The Markdown page and the HTML show the same lines in the same order, and get them here.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.leaderboard.board import Board, TrackBoard
from zoo.statistics import spread as stats
from zoo.statistics.spread import OUTCOMES, Spread


@dataclass(frozen=True)
class Line:
    """One attention over some tracks.

    Args:
        attention: Its specification.
        places: Its place in each track with its deviation over recipes and seeds; None where it has
            none.
        outcomes: Tables in which it wins, ties and loses; None for the baseline itself.
    """

    attention: str
    places: tuple[Spread | None, ...]
    outcomes: dict[str, int] | None


@dataclass(frozen=True)
class Summary:
    """The tracks of one baseline.

    Args:
        baseline: The baseline.
        tracks: Its tracks that count.
        lines: Who has a place in any of them: those with a place in all of them first, then by
            their mean place, then by name.
    """

    baseline: str
    tracks: tuple[TrackBoard, ...]
    lines: tuple[Line, ...]

    @property
    def recipes(self) -> int:
        """The number of tables that count."""
        return sum(len(track.counted) for track in self.tracks)


def summaries(board: Board) -> list[Summary]:
    """Return a summary for each baseline that has a track that counts.

    Args:
        board: Everything that the leaderboard shows.
    """
    found: dict[str, list[TrackBoard]] = {}
    for track in board.tracks:
        if track.counted:
            found.setdefault(track.track.baseline, []).append(track)
    return [Summary(name, tuple(some), _lines(name, some)) for name, some in found.items()]


def _lines(baseline: str, tracks: list[TrackBoard]) -> tuple[Line, ...]:
    ranks = [track.ranks() for track in tracks]
    outcomes = [track.outcomes() for track in tracks]
    lines = []
    for name in sorted({name for one in ranks for name in one}):
        same = name == baseline or (stats.is_softmax(baseline) and stats.is_softmax(name))
        total = {kind: sum(one.get(name, {}).get(kind, 0) for one in outcomes) for kind in OUTCOMES}
        lines.append(Line(name, tuple(one.get(name) for one in ranks), None if same else total))
    return tuple(sorted(lines, key=_order))


def _order(line: Line) -> tuple[bool, float, str]:
    known = [place.mean for place in line.places if place is not None]
    return len(known) < len(line.places), sum(known) / len(known), line.attention
