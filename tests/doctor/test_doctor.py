from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from zoo import doctor
from zoo.claims import trials as claims
from zoo.datasets import hub
from zoo.doctor import data, devices, examination, published, software
from zoo.doctor.lines import LEVELS, Line, note, ok, section
from zoo.doctor.world import World
from zoo.errors import ZooError
from zoo.leaderboard.page import markdown_page as leaderboard
from zoo.runs import config
from zoo.runs.records import Record, read, write

ROOT = Path(__file__).parents[2]


def levels(found: Iterator[Line]) -> dict[str, str]:
    return {line.name: line.level for line in found}


def by_name(found: Iterator[Line]) -> dict[str, Line]:
    return {line.name: line for line in found}


class Offline(World):
    """A world whose hub does not answer, and was not asked."""

    @property
    def silence(self) -> str:
        return "no network"


class Online(World):
    """A world whose hub answers."""

    @property
    def silence(self) -> str:
        return ""


# How checks are kept from failing.


def test_a_check_that_fails_is_a_line_after_those_it_made() -> None:
    def check() -> Iterator[Line]:
        yield ok("one", "fine")
        raise KeyError("two\nlines")

    found = section("topic", check)
    assert found.lines[0] == ok("one", "fine")
    assert found.lines[1].level == "problem"
    assert found.lines[1].text == r"this check failed: KeyError: 'two\nlines'"
    assert len(found.lines) == 2


def test_a_check_that_hangs_is_given_up() -> None:
    end = threading.Event()

    def check() -> Iterator[Line]:
        yield note("one", "first")
        end.wait(60)

    found = section("topic", check, patience=0.05)
    end.set()
    assert [line.level for line in found.lines] == ["note", "problem"]
    assert "did not end within 0.05 seconds" in found.lines[1].text


def test_a_check_that_leaves_the_process_does_not() -> None:
    def check() -> Iterator[Line]:
        raise SystemExit("gone")
        yield

    (line,) = section("topic", check).lines
    assert line.text == "this check failed: SystemExit: gone"


def test_warnings_for_users_are_lines() -> None:
    def check() -> Iterator[Line]:
        warnings.warn("the driver\nis old", UserWarning, stacklevel=1)
        warnings.warn("the driver is old", UserWarning, stacklevel=1)
        warnings.warn("a name will go", DeprecationWarning, stacklevel=1)
        yield ok("one", "fine")

    found = section("topic", check)
    assert found.lines[1:] == (note("topic", "warning: the driver is old"),)


def test_a_module_that_cannot_be_imported_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(examination.importlib, "import_module", broken)
    found = list(doctor.examine("nowhere"))
    assert [line.level for part in found for line in part.lines] == ["problem"] * len(found)
    assert found[0].lines[0].text == "this check failed: ImportError: no zoo.doctor.software"


# Versions.


def test_what_the_metadata_asks_for_is_there() -> None:
    found = by_name(software.versions())
    assert {"python", "zoo", "torch", "lightning", "timm", "torchmetrics", "omegaconf"} <= set(
        found
    )
    assert found["torch"].level == "ok"
    assert found["torch"].facts["version"] == metadata.version("torch")
    assert found["torch"].facts["wanted"].startswith(">=")


@pytest.mark.parametrize(
    ("text", "level", "message"),
    [
        ("timm>=0.1", "ok", "timm "),
        ("timm>=999", "problem", " is outside >=999"),
        ("no-such-package>=1; python_version>'3'", "problem", "no-such-package is not installed"),
        ("no-such-package; python_version<'3'", None, ""),
        ("what is this?", None, ""),
    ],
)
def test_a_requirement_is_judged(
    monkeypatch: pytest.MonkeyPatch, text: str, level: str | None, message: str
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: [text])
    found = by_name(software.versions())
    del found["python"], found["zoo"]
    assert [line.level for line in found.values()] == ([level] if level else [])
    for line in found.values():
        assert message in line.text
        assert line.level == "ok" or line.todo.startswith("pip install '")


@pytest.mark.parametrize(
    ("name", "modules", "imported"),
    [
        ("other-name", {"another": ["Other_Name"], "third": ["other"]}, "another"),
        ("other-name", {"_other": ["other-name"], "another": ["other-name"]}, "another"),
        ("other-name", {"another": ["other-name"], "other_name": ["other-name"]}, "other_name"),
        ("other-name", {"another": ["else"]}, "other_name"),
    ],
)
def test_what_to_import_is_found_in_the_metadata(
    monkeypatch: pytest.MonkeyPatch, name: str, modules: dict[str, list[str]], imported: str
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: [f"{name}>=1"])
    monkeypatch.setattr(metadata, "version", lambda _: "2")
    monkeypatch.setattr(metadata, "packages_distributions", lambda: modules)
    asked = []
    monkeypatch.setattr(software.importlib, "import_module", asked.append)
    assert by_name(software.versions())[name].level == "ok"
    assert asked == [imported]


def test_what_the_library_stands_on_can_be_imported() -> None:
    found = by_name(software.versions())
    assert {name: line.text for name, line in found.items() if line.level == "problem"} == {}


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "brokenlib.py").write_text("raise OSError('no libcuda')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metadata, "requires", lambda name: ["brokenlib>=1"])
    line = by_name(software.versions())["brokenlib"]
    assert line.level == "problem"
    assert line.text.endswith("cannot be imported: no libcuda")


def test_a_library_without_metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "plainlib.py").write_text("")
    (tmp_path / "namedlib.py").write_text("__version__ = '3'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metadata, "requires", lambda name: ["plainlib>=1", "namedlib>=2"])
    found = by_name(software.versions())
    assert found["plainlib"].level == "note"
    assert "its version (no metadata) cannot be judged" in found["plainlib"].text
    assert found["namedlib"] == ok("namedlib", "namedlib 3 (>=2)", version="3", wanted=">=2")


def test_the_library_itself_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "DISTRIBUTION", "no-such-package")
    assert levels(software.versions()) == {"python": "ok", "zoo": "note"}
    assert list(software.extras()) == []


def test_extras_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["timm>=0.1; extra == 'ray'", "no-such-package>=2; extra == 'hf'", "torch"]
    monkeypatch.setattr(metadata, "requires", lambda name: texts)
    found = by_name(software.extras())
    assert found["ray"].level == "ok"
    assert found["hf"].level == "note"
    assert found["hf"].todo == "pip install 'no-such-package>=2'"


# Devices.


def test_the_machine_is_described() -> None:
    found = by_name(devices.devices())
    assert found["cpu"].facts["cores"] >= found["cpu"].facts["usable"] >= 1
    assert found["memory"].facts["total"] > 2**20
    assert all(line.level in LEVELS for line in found.values())


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "info").write_text("MemTotal:  2048 kB\nMemAvailable:  1024 kB\n")
    (tmp_path / "limit").write_text("524288\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(devices, "MEMINFO", tmp_path / "info")
    for limit, expected in (("none", (2**21, 2**20)), ("limit", (2**19, 2**19))):
        monkeypatch.setattr(devices, "LIMITS", (tmp_path / "missing", tmp_path / limit))
        assert devices.memory() == expected


@pytest.mark.parametrize(
    ("interpret", "cuda", "compiler", "level", "runs"),
    [
        ("1", True, True, "note", "interpreter"),
        ("", False, True, "note", "interpreter"),
        ("", True, True, "ok", "cuda"),
        ("", True, False, "problem", "no"),
    ],
)
def test_where_kernels_can_run(
    monkeypatch: pytest.MonkeyPatch,
    interpret: str,
    cuda: bool,
    compiler: bool,
    level: str,
    runs: str,
) -> None:
    monkeypatch.setattr("zoo.kernels.INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/bin/cc" if compiler else None)
    (line,) = devices.triton()
    assert (line.level, line.facts["runs"]) == (level, runs)


# Data.


def test_data_that_need_nothing_are_there_and_the_others_are_notes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data._PACKAGED, "fashion_mnist", tmp_path / "none")
    found = by_name(data.sources(Offline()))
    assert {line.level for line in found.values()} == {"ok", "note"}
    assert found["digits"].facts["how"] == "embedded"
    assert found["mqar"].facts["how"] == "drawn"
    missing = [name for name, line in found.items() if line.level == "note"]
    assert {"cifar10", "fashion_mnist", "istd", "object_folders", "wikitext103"} <= set(missing)
    assert all(found[name].todo for name in missing)
    assert "no network" in found["cifar10"].text
    assert "install dataset-fashion-mnist" in found["fashion_mnist"].todo


def test_files_that_are_there_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ISTD_Dataset", "objects", "packaged"):
        (tmp_path / name).mkdir()
    monkeypatch.setitem(data._PACKAGED, "fashion_mnist", tmp_path / "packaged")
    monkeypatch.setattr(data, "_READ", ())
    found = by_name(data.sources(Online()))
    assert found["istd"].text == "istd: files in 'ISTD_Dataset' in the current folder"
    assert {found[name].facts["how"] for name in ("istd", "object_folders", "fashion_mnist")} == {
        "files"
    }
    assert found["cifar10"].facts["how"] == "hub"
    assert found["cifar10"].level == "ok"


def test_a_broken_data_file_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "torn.yaml").write_text("name: [")
    (tmp_path / "vision" / "list.yaml").write_text("- 1")
    (tmp_path / "vision" / "other.yaml").write_text("name: digts")
    (tmp_path / "vision" / "wrong.yaml").write_text("name: mqar\noptions: {pairs: -1}")
    monkeypatch.setattr(data, "folder", lambda name: tmp_path)
    monkeypatch.setattr(data, "_READ", ())
    found = by_name(data.sources(Offline()))
    for name in ("torn", "list", "other", "wrong"):
        assert found[name].level == "problem"
        assert found[name].todo
    assert "did you mean 'digits'" in found["other"].text
    assert found["digits"].level == "ok"  # a data set without a file


def test_a_package_that_cannot_bring_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> None:
        raise OSError("digits.csv.gz is gone")

    monkeypatch.setattr("zoo.datasets.vision.digits.Digits.setup", broken)
    found = by_name(data.sources(Offline()))
    assert found["digits"].level == "problem"
    assert "digits.csv.gz is gone" in found["digits"].text


def test_which_recipes_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    real = config.load

    def load(name: str) -> object:
        if name == "mqar":
            raise ZooError("it is wrong")
        return real(name)

    monkeypatch.setattr(config, "recipes", lambda: ["bytes", "cifar10", "istd", "mqar"])
    monkeypatch.setattr(config, "load", load)
    found = by_name(data.recipes(Offline()))
    assert found["recipes"].facts["able"] == ["bytes"]
    assert found["recipes"].text == "1 of 4 recipes can run here"
    assert [found[name].level for name in ("cifar10", "istd", "mqar")] == [
        "note",
        "note",
        "problem",
    ]


def test_the_hub_is_asked_once_and_only_if_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def reachable(timeout: float) -> bool:
        asked.append(timeout)
        return False

    monkeypatch.setattr(hub, "reachable", reachable)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    world = World(patience=0.5)
    assert asked == []
    assert [world.silence, world.silence] == ["no network, or the hub is down"] * 2
    assert asked == [0.5]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert World().silence == "HF_HUB_OFFLINE is set"
    assert asked == [0.5]


# Records, claims and the leaderboard.


@pytest.fixture
def made() -> Record:
    """A published record of a recipe that ships, as if the recipe had made it now."""
    path = min((ROOT / "data/runs").glob("mqar-*.json"))
    now = config.identify(config.load("mqar", ["seed=0"]))
    return replace(read(path), recipe="mqar", group=now.group)


def test_whole_records(made: Record, tmp_path: Path) -> None:
    write(made, tmp_path)
    assert levels(published.records(tmp_path, strict=True)) == {"records": "ok", "recipes": "ok"}


def test_records_that_are_none(made: Record, tmp_path: Path) -> None:
    write(made, tmp_path)
    text = made.to_json()
    for number in range(7):
        (tmp_path / f"torn{number}.json").write_text(text[:200])
    (tmp_path / "other.json").write_text(text)
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    old = {**json.loads(text), "schema": 0}
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = list(published.records(tmp_path, strict=False))
    assert found[0].facts["count"] == 1
    problems = [line for line in found if line.level == "problem"]
    named = [line.name for line in problems]
    assert named[:2] == ["bytes.json", "other.json"]
    assert "4 more files that are no record" in [line.text for line in problems]
    assert named[-1] == "schema 0"
    assert problems[-1].facts["files"] == [str(tmp_path / "old.json")]
    assert all(line.todo for line in problems)


def test_records_that_are_there_twice(made: Record, tmp_path: Path) -> None:
    write(made, tmp_path)
    write(made, tmp_path / "copy")
    assert by_name(published.records(tmp_path, strict=True))[made.id].level == "note"
    write(replace(made, steps=made.steps + 1), tmp_path / "copy")
    line = by_name(published.records(tmp_path, strict=True))[made.id]
    assert line.level == "problem"
    assert "2 times" in line.text
    write(replace(made, id="again"), tmp_path)
    assert by_name(published.records(tmp_path, strict=True))["repeats"].level == "note"


def test_records_of_a_recipe_that_was_changed(made: Record, tmp_path: Path) -> None:
    write(replace(made, id="old", group="0123"), tmp_path)
    write(replace(made, id="own", recipe="own_recipe"), tmp_path)
    write(replace(made, id="claim", group="4567"), tmp_path / "claims" / "one")
    strict = by_name(published.records(tmp_path, strict=True))
    assert strict["mqar"].level == "problem"
    assert strict["mqar"].text.startswith("1 of 1 records of 'mqar' are not of what the recipe")
    assert strict["own_recipe"].level == "note"
    assert by_name(published.records(tmp_path, strict=False))["mqar"].level == "note"


def test_folders_that_are_missing_or_empty(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for check in (published.records, published.claims):
        assert {line.level for line in check(nowhere, strict=True)} == {"note"}
    assert levels(published.records(nowhere, strict=False)) == {"records": "problem"}
    assert levels(published.records(tmp_path, strict=False)) == {"records": "note"}
    page = tmp_path / "page.md"
    assert levels(published.page(page, nowhere, strict=True)) == {"leaderboard": "note"}
    assert levels(published.page(page, tmp_path, strict=True)) == {"leaderboard": "problem"}


def test_a_page_is_what_its_records_give_or_not(made: Record, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write(made, tmp_path / "records")
    (tmp_path / "records" / "torn.json").write_text("{")  # said elsewhere, and no warning
    with pytest.warns(UserWarning, match="torn"):
        leaderboard.write(tmp_path / "records", path)
    (line,) = published.page(path, tmp_path / "records", strict=False)
    assert line.level == "ok"
    path.write_text(path.read_text() + "more\n")
    (line,) = published.page(path, tmp_path / "records", strict=False)
    assert line.level == "problem"
    assert line.todo == f"zoo leaderboard --records {tmp_path / 'records'} --output {path}"


def test_claims_that_hold_and_that_do_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    names = ["cog_delete_and_copy", "fope_needle", "mesh_scenes", "mesh_video", "moba_recall"]
    for name in names:
        shutil.copytree(ROOT / "data/runs/claims" / name, folder / name)
    edited = folder / names[1] / "verdict.yaml"
    edited.write_text(edited.read_text().replace("\nverdict: ", "\nverdict: not quite "))
    (folder / names[2] / "verdict.yaml").write_text("{")
    (folder / names[3] / "verdict.yaml").unlink()
    min((folder / names[4]).glob("*.json")).unlink()
    found = by_name(published.claims(tmp_path, strict=True))
    assert found["claims"].text.startswith("1 verdicts follow from their records")
    assert [found[name].level for name in names[1:]] == ["problem"] * 4
    assert "remove" in found[names[2]].todo
    assert found[names[3]].todo.endswith("--verdict-only")
    assert found[names[4]].todo == f"zoo claims moba_recall --records {folder}"
    rest = set(claims.names()) - set(names)
    assert all(found[name].level == "note" for name in rest)


def test_a_claim_that_was_changed_after_its_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "mesh_scenes"
    shutil.copytree(ROOT / "data/runs/claims" / name, tmp_path / "claims" / name)
    monkeypatch.setattr(published, "is_stale", lambda *given: True)
    (line,) = published.claims(tmp_path, strict=False)
    assert line.level == "problem"
    assert "was changed after its verdict, 'reproduced'" in line.text
    assert line.todo.startswith(f"remove {tmp_path / 'claims' / name / 'verdict.yaml'}; zoo claims")
