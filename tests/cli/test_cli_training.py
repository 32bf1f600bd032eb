from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from zoo.leaderboard.page import html
from zoo.runs import records, train

Call = Callable[..., Result]


def test_run_writes_a_record_and_says_what_came_out(
    zoo_cli: Call, recall: list[str], tmp_path: Path
) -> None:
    where = ["--records", tmp_path / "records", "--runs", tmp_path / "runs"]
    result = zoo_cli("run", "mqar", "attention=linear", "seed=3", *recall, *where)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "records").glob("*.json")
    record = records.read(path)
    assert (record.attention, record.seed, record.status) == ("linear", 3, "finished")
    line = result.stdout.splitlines()[-1]
    assert line.startswith(f"{record.id}: val/accuracy ")
    assert line.endswith(" after 2 steps")
    assert f"test/accuracy {record.metrics['test/accuracy']:.4g}" in line
    before = path.read_bytes()
    again = zoo_cli("run", "mqar", "attention=linear", "seed=3", *recall, *where)
    assert again.stdout == f"done before: {line}\n"
    quiet = zoo_cli("run", "mqar", "attention=linear", "seed=3", *recall, *where, "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
    resumed = zoo_cli("run", "--resume", record.id, *where)
    assert resumed.stdout == again.stdout
    assert path.read_bytes() == before


def test_resume_with_a_recipe_must_fit(
    zoo_cli: Call, only_line: Call, recall: list[str], recall_run: Any
) -> None:
    words = ["--resume", recall_run.id, *recall_run.options]
    fits = zoo_cli("run", "mqar", *recall, *words)
    assert fits.exit_code == 0, fits.output
    assert fits.stdout.startswith(f"done before: {recall_run.id}")
    other = zoo_cli("run", "mqar", *recall, "seed=9", *words)
    assert other.exit_code == 2
    assert f"the run '{recall_run.id}' is not what the recipe 'mqar'" in only_line(other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "nothing to run; give a recipe or --resume RUN"),
        (["run", "mqra"], "unknown recipe 'mqra'; did you mean 'mqar'?"),
        (["run", "mqar", "stps=3"], "did you mean 'steps'"),
        (["run", "mqar", "attention=mhaa"], "unknown mechanism 'mhaa'; did you mean 'mha'"),
        (["run", "--resume", "nothing"], "unknown run in the folder 'runs' 'nothing'"),
        (["sweep", "mqar", "seeds=x"], "seeds='x' must be a whole number of at least 1"),
        (["sweep", "mqar", "attention=mha", "--jobs", "0"], "jobs=0 must be"),
        (["leaderboard", "--records", "nowhere"], "nowhere does not exist"),
        (["sample", "nothing", "--prompt", "a"], "unknown run"),
        (["show"], "nothing to show"),
        (["show", "--run", "a", "--recipe", "b"], "--run and --recipe are two models"),
        (["show", "mha", "--recipe", "mqar", "--heads", "2"], "--heads belongs to a single host"),
        (["show", "gru"], "no attention weights"),
    ],
)
def test_mistakes(
    zoo_cli: Call,
    only_line: Call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = zoo_cli(*words)
    assert result.exit_code == 2
    assert message in only_line(result)
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_run_is_named(zoo_cli: Call, only_line: Call, text_run: Any) -> None:
    result = zoo_cli("sample", text_run.id[:-1], "--prompt", "a", "--runs", text_run.runs)
    assert result.exit_code == 2
    assert f"did you mean '{text_run.id}'?" in only_line(result)


def test_a_run_that_breaks_is_a_failure(
    zoo_cli: Call, only_line: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(train, "run", broken)
    result = zoo_cli("run", "mqar", "--runs", tmp_path)
    assert result.exit_code == 1
    assert only_line(result) == "zoo: error: the run failed: RuntimeError: out of memory"
    assert "in broken" in zoo_cli("run", "mqar", "--runs", tmp_path, "--debug").stderr


def test_an_interrupted_run_says_how_to_go_on(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    result = zoo_cli("run", "mqar", "--runs", tmp_path)
    assert result.exit_code == 130
    first, second = result.stderr.splitlines()
    assert first.startswith(f"go on with: zoo run --resume {tmp_path}")
    assert second == "zoo: error: interrupted"


def test_a_diverged_run_is_an_outcome(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, recall_run: Any
) -> None:
    record = records.read(recall_run.records / f"{recall_run.id}.json")
    nan = dataclasses.replace(record, status="nan", error="training loss is nan", metrics={})
    monkeypatch.setattr(train, "run", lambda *args, **options: nan)
    result = zoo_cli("run", "mqar", *recall_run.options)
    assert result.exit_code == 0
    assert f"{record.id}: nan after 2 steps: training loss is nan" in result.stdout


def test_sweep_reports_what_became_of_each_run(
    zoo_cli: Call, recall: list[str], recall_run: Any, tmp_path: Path
) -> None:
    # The first cell has its record already, the second cannot be built.
    folder = tmp_path / "records"
    shutil.copytree(recall_run.records, folder)
    where = ["--records", folder, "--runs", tmp_path, "--quiet"]
    result = zoo_cli("sweep", "mqar", "attention=mha,mhaa", *recall, *where)
    assert result.exit_code == 1
    first, second, *_ = result.stdout.splitlines()
    assert first == "0 finished, 1 skipped, 1 failed"
    assert "unknown mechanism 'mhaa'; did you mean 'mha'" in second
    fine = zoo_cli("sweep", "mqar", "attention=mha", *recall, *where)
    assert (fine.exit_code, fine.stdout) == (0, "0 finished, 1 skipped, 0 failed\n")


@pytest.mark.slow
def test_sweep_runs_processes(zoo_cli: Call, recall: list[str], tmp_path: Path) -> None:
    where = ["--records", tmp_path / "records", "--runs", tmp_path, "--jobs", 2]
    result = zoo_cli("sweep", "mqar", "attention=mha,linear", *recall, *where)
    assert result.exit_code == 0, result.output
    assert result.stdout == "2 finished, 0 skipped, 0 failed\n"
    assert len(records.read_all(tmp_path / "records")) == 2


def test_leaderboard(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, recall_run: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = zoo_cli("leaderboard", "--records", recall_run.records)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert result.stderr == "wrote leaderboard.md from 1 records\n"
    page = (tmp_path / "leaderboard.md").read_text()
    assert "mqar" in page
    (tmp_path / "leaderboard.md").unlink()
    shown = zoo_cli("leaderboard", "--records", recall_run.records, "--print")
    assert shown.stdout == page
    assert list(tmp_path.iterdir()) == []
    both = zoo_cli("leaderboard", "--records", recall_run.records, "--print", "--output", "b.md")
    assert both.stdout == page == (tmp_path / "b.md").read_text()


def test_the_html_page_is_written_on_request(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, recall_run: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(html, "render", partial(html.render, draw=None))
    monkeypatch.chdir(tmp_path)
    result = zoo_cli("leaderboard", "--records", recall_run.records, "--html", "site")
    assert result.exit_code == 0
    beside = list((tmp_path / "site" / "mechanisms").glob("*.html"))
    first = "site/index.html"
    assert result.stderr == f"wrote {first} and {len(beside)} pages beside it from 1 records\n"
    assert "</html>" in (tmp_path / "site" / "index.html").read_text()
    assert not (tmp_path / "leaderboard.md").exists()
    zoo_cli("leaderboard", "--records", recall_run.records, "--html", "--output", "b.md")
    assert 'href="leaderboard_mechanisms/mha.html"' in (tmp_path / "leaderboard.html").read_text()
    assert (tmp_path / "leaderboard_mechanisms" / "mha.html").exists()
    assert (tmp_path / "b.md").exists()
    refused = zoo_cli("leaderboard", "page.html", "--records", recall_run.records)
    assert refused.exit_code == 2
    assert "belongs to --html" in refused.stderr


@pytest.mark.parametrize("page", ["file", "file/page.html", "page.md"])
def test_html_pages_in_a_place_that_cannot_be_written(
    zoo_cli: Call, only_line: Call, recall_run: Any, tmp_path: Path, page: str
) -> None:
    (tmp_path / "file").write_text("")
    result = zoo_cli("leaderboard", "--records", recall_run.records, "--html", tmp_path / page)
    assert result.exit_code == 2
    assert "allowed: a folder" in only_line(result)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_leaderboard_in_a_place_that_cannot_be_written(
    zoo_cli: Call, only_line: Call, recall_run: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    page = tmp_path / "file" / "page.md"
    result = zoo_cli("leaderboard", "--records", recall_run.records, "--output", page)
    assert result.exit_code == 2
    assert "cannot write page.md" in only_line(result)


def test_sample(zoo_cli: Call, text_run: Any) -> None:
    words = ["sample", text_run.id, "--runs", text_run.runs, "--prompt", "def ", "--tokens", 8]
    first = zoo_cli(*words, "--seed", 1)
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("def ")
    assert zoo_cli(*words, "--seed", 1).stdout == first.stdout
    assert zoo_cli(*words, "--seed", 2).stdout != first.stdout
    greedy = zoo_cli(*words, "--temperature", 0)
    assert zoo_cli(*words, "--top-k", 1, "--seed", 5).stdout == greedy.stdout
    assert zoo_cli(*words, "--top-p", 1e-6, "--seed", 6).stdout == greedy.stdout
    by_path = zoo_cli("sample", text_run.runs / text_run.id, *words[4:], "--temperature", 0)
    assert by_path.stdout == greedy.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must be a number of"),
        (["--prompt", "a", "--top-k", "0"], "top_k=0 must be a whole number of at least 1"),
        (["--prompt", "a", "--top-p", "2"], "top_p=2.0 must be a number in (0, 1]"),
        (["--prompt", "a", "--tokens", "99"], "the prompt has 1 tokens, 99 more were asked for"),
        ([], "missing option '--prompt'"),
    ],
)
def test_sample_mistakes(
    zoo_cli: Call, only_line: Call, text_run: Any, options: list[str], message: str
) -> None:
    result = zoo_cli("sample", text_run.id, "--runs", text_run.runs, *options)
    assert result.exit_code == 2
    assert message in only_line(result)


def test_sample_of_a_tagging_run(zoo_cli: Call, only_line: Call, recall_run: Any) -> None:
    result = zoo_cli("sample", recall_run.id, "--runs", recall_run.runs, "--prompt", "a")
    assert result.exit_code == 2
    assert "was trained for tagging; only language models write text" in only_line(result)


def test_show_a_run(zoo_cli: Call, only_line: Call, text_run: Any, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    words = ["--run", text_run.id, "--runs", text_run.runs, "--output", picture]
    result = zoo_cli("show", *words)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"wrote {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert zoo_cli("show", "softmax", *words).exit_code == 0
    other = zoo_cli("show", "linear", *words)
    assert other.exit_code == 2
    assert f"the run '{text_run.id}' has attention 'mha', not 'linear'" in only_line(other)


def test_a_trained_run_and_an_untrained_model_differ(text_run: Any) -> None:
    from zoo.cli.models import attention_maps, opened

    found, title = opened(None, text_run.id, None, text_run.runs, 0)
    trained, tokens = attention_maps(found, 6)
    assert title == "mha on bytes, after 2 steps"
    assert tokens is not None
    assert len(tokens) == 6
    weights = trained["layer 0"]
    assert weights.shape == (2, 6, 6)
    untrained, same = attention_maps(opened("linear", None, "mqar", text_run.runs, 0)[0], 6)
    assert same is not None
    assert all(token.isdigit() for token in same)
    assert untrained["layer 0"].shape[1:] == (6, 6)


def test_show_a_recipe_and_a_host(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, name in (
        (["sparsemax+rope", "--causal", "--length", 8, "--heads", 2, "--dim", 8], "sparsemax-rope"),
        (["--recipe", "digits"], "digits"),
    ):
        result = zoo_cli("show", *words)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "runs" / "show" / f"{name}.png").is_file()


def test_an_image_is_shown_whole(zoo_cli: Call, only_line: Call) -> None:
    result = zoo_cli("show", "--recipe", "digits", "--length", 4)
    assert result.exit_code == 2
    assert "an image is shown whole" in only_line(result)


def test_bench(zoo_cli: Call, tmp_path: Path) -> None:
    small = ["--lengths", "8,4", "--dim", 8, "--heads", 2, "--min-time", 1e-4, "--repeats", 1]
    result = zoo_cli("bench", "linear", "handwritten", *small, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for word in ("forward+backward", "linear", "handwritten", "sdpa", "growth"):
        assert word in result.stdout
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["setting"]["specs"] == ["mha", "linear", "handwritten"]
    assert found["setting"]["causal"] is True
    assert (tmp_path / "out" / "bench.svg").is_file()


def test_bench_of_what_cannot_be_measured(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--lengths", "4", "--dim", 8, "--heads", 2, "--min-time", 1e-4, "--repeats", 1]
    result = zoo_cli("bench", "gru", *small, "--no-causal", "--forward-only")
    assert result.exit_code == 1
    assert "gru at N = 4 failed: 'gru' is defined for causal mixing only" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        "zoo: error: no figures for 'gru'; the table says why"
    )
    assert (tmp_path / "runs" / "bench" / "mha-gru-d8h2b1-cpu" / "bench.json").is_file()


def test_show_gates(
    zoo_cli: Call, only_line: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "model=resnet", "--set", "model.width=4", "--set", "model.variant=resnet10t"]
    for words, name in (
        (["se", "--dim", 8], "se"),
        (["eca", "--recipe", "digits", *small], "eca"),
    ):
        result = zoo_cli("show", *words)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "runs" / "show" / f"{name}.png").is_file()
    for words, message in (
        (["se", "--heads", 2], "--heads belongs to token mixers"),
        (["mha", "--set", "a=b"], "--set a=b: changes belong to --recipe"),
        (["mha", "--recipe", "digits", "--set", "model=resnet"], "the model 'resnet' hosts"),
    ):
        result = zoo_cli("show", *words)
        assert result.exit_code == 2
        assert message in only_line(result)


def test_a_run_saves_its_pictures(zoo_cli: Call, tmp_path: Path) -> None:
    words = ["digits", "model=resnet", "attention=eca", "model.width=4", "model.variant=resnet10t"]
    places = ["--runs", tmp_path / "runs", "--records", tmp_path / "records", "--quiet"]
    result = zoo_cli("run", *words, "steps=2", "trainer.eval_every=2", *places)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "pictures" / "gates.png").read_bytes().startswith(b"\x89PNG")
    picture = tmp_path / "again.png"
    shown = zoo_cli("show", "--run", folder, "--output", picture)
    assert shown.stderr == f"wrote {picture}\n"
