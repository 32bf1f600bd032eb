from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pytest
from typer.testing import Result

from zoo.cli.cluster import complete, spawner
from zoo.errors import ZooError
from zoo.sweeps import cluster
from zoo.sweeps.sweep import SweepResult

Call = Callable[..., Result]


class Places:
    """Stands in for the spawner of a cluster."""

    opened: list[str]

    def __init__(self, address: str) -> None:
        self.opened.append(address)
        self.places = 6

    def __enter__(self) -> Places:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.opened.append("closed")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> type[Places]:
    monkeypatch.setattr(cluster, "RaySpawner", Places)
    Places.opened = []
    return Places


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("mqar seeds=3 --ray", "mqar seeds=3 --ray local"),
        ("mqar --ray seeds=3", "mqar --ray local seeds=3"),
        ("mqar --ray --jobs 2 seeds=3", "mqar --ray local --jobs 2 seeds=3"),
        ("mqar --ray head:6379 seeds=3", "mqar --ray head:6379 seeds=3"),
        ("mqar --ray=head:6379 seeds=3", "mqar --ray=head:6379 seeds=3"),
        ("mqar seeds=3", "mqar seeds=3"),
        ("mqar -- --ray", "mqar -- --ray"),
    ],
)
def test_an_address_may_be_left_out(words: str, completed: str) -> None:
    assert complete(words.split()) == completed.split()


@pytest.mark.parametrize(("jobs", "count"), [(None, 6), (2, 2), (50, 6)])
def test_as_many_runs_as_there_is_room_for(
    places: type[Places], jobs: int | None, count: int
) -> None:
    with spawner("head:1", jobs) as (found, number):
        assert isinstance(found, Places)
        assert number == count
    assert places.opened == ["head:1", "closed"]


@pytest.mark.parametrize(("jobs", "count"), [(None, 1), (3, 3)])
def test_without_an_address_runs_are_processes(
    places: type[Places], jobs: int | None, count: int
) -> None:
    with spawner(None, jobs) as found:
        assert found == (None, count)
    assert places.opened == []


def test_jobs_must_be_positive_on_a_cluster_too(zoo_cli: Call, places: type[Places]) -> None:
    result = zoo_cli("sweep", "mqar", "seeds=2", "--ray", "--jobs", 0)
    assert result.exit_code == 2
    assert "jobs=0 must be a whole number of at least 1" in result.stderr
    assert places.opened == ["local", "closed"]


@pytest.mark.parametrize("words", [["mqar", "seeds=2"], ["leaderboard", "recipe=mqar", "seeds=1"]])
def test_a_sweep_is_given_the_cluster(
    zoo_cli: Call, places: type[Places], monkeypatch: pytest.MonkeyPatch, words: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    from zoo.leaderboard import tournament
    from zoo.sweeps import sweep

    given = []

    def run(every: list[object], **options: object) -> SweepResult:
        given.append((type(options["spawner"]), options["jobs"]))
        return SweepResult()

    monkeypatch.setattr(sweep, "sweep_cells", run)
    monkeypatch.setattr(tournament, "sweep_cells", run)
    where = ["--records", tmp_path / "records", "--runs", tmp_path]
    result = zoo_cli("sweep", *words, "--ray", "head:1", *where)
    assert result.exit_code == 0, result.output
    assert given == [(Places, 6)]
    assert places.opened == ["head:1", "closed"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head", "ray address 'head' cannot be read; allowed: HOST:PORT, ray://HOST:PORT"),
        ("127.0.0.1:1", "ray address '127.0.0.1:1': cannot reach 127.0.0.1 port 1: "),
    ],
)
def test_a_wrong_address_is_one_line(
    zoo_cli: Call, only_line: Call, monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    result = zoo_cli("sweep", "mqar", "seeds=2", "--ray", address)
    assert result.exit_code == 2
    assert message in str(only_line(result))


class FakeRay:
    """Ray as far as it is asked for before an address is known to be good."""

    @staticmethod
    def is_initialized() -> bool:
        return False


def test_without_ray_it_is_one_line(
    zoo_cli: Call, only_line: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = zoo_cli("sweep", "mqar", "seeds=2", "--ray")
    assert "pip install 'attention-zoo[ray]'" in str(only_line(result))


def test_a_refused_cluster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise ZooError("not here")

    monkeypatch.setattr(cluster, "RaySpawner", refuse)
    with pytest.raises(ZooError, match="not here"), spawner("head:1", None):
        pytest.fail("it went on")
