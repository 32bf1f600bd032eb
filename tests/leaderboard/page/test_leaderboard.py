from __future__ import annotations

import math
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_tables import tables

from zoo.errors import ZooError
from zoo.leaderboard.current import current
from zoo.leaderboard.page import markdown_page as leaderboard
from zoo.leaderboard.page.markdown_page import render, verify
from zoo.runs.records import RecordWarning, write

ROOT = Path(__file__).parents[3]
PLAIN = {"select": "val/accuracy", "report": "test/accuracy", "mode": "max", "solved": None}


def seeds(make, attention, figures, **changes):
    return [make(attention=attention, seed=s, report=f, **changes) for s, f in enumerate(figures)]


def standings(records):
    """The rows of the only table after the summary, by attention."""
    _, rows = tables(render(records))
    return {row["attention"].strip("`"): row for row in rows}


@pytest.fixture
def three(make):
    return [
        *seeds(make, "mha", [0.99, 1.0, 0.995]),
        *seeds(make, "linear", [0.80, 0.84, 0.82]),
        *seeds(make, "cog", [0.99, 0.98, 0.999]),
    ]


def test_a_row_has_every_figure(make):
    records = [
        *seeds(make, "mha", [0.99, 1.0, 0.995]),
        *seeds(make, "mha", [0.5], lr=3e-3, select=0.1),
        *seeds(make, "linear", [0.80, 0.84, 0.82]),
        *seeds(make, "linear", [0.5], lr=3e-3, select=0.1),
    ]
    row = standings(records)["linear"]
    assert row == {
        "rank": "2",
        "attention": "`linear`",
        "`test/accuracy` ↑": "0.8200 ± 0.0200 (3)",
        "solved": "0/3",
        "vs softmax": "-0.1750 [-0.2123, -0.1377] (3)",
        "outcome": "loss",
        "lr (tried)": "0.001 (2)",
        "parameters": "18.2k",
        "FLOPs": "1.23M",
        "state": "16 KiB",
        "step CPU / wall, ms": "12.3 / 24.6",
        "peak memory": "300 MiB",
        "conv": "on",
        "runs": "4",
        "failures": "—",
    }


def test_the_softmax_row_is_the_baseline(make, three):
    rows = standings(three)
    assert rows["mha"]["vs softmax"] == "baseline"
    assert rows["mha"]["solved"] == "3/3"
    assert rows["cog"]["outcome"] == "tie"
    assert rows["linear"]["outcome"] == "loss"
    assert "No softmax baseline" not in render(three)


def test_a_table_without_softmax_says_so(make):
    for records in (
        seeds(make, "linear", [0.5]),
        [*seeds(make, "linear", [0.5]), make(status="failed")],
    ):
        assert "- **No softmax baseline**" in render(records)


def test_a_table_without_a_floor_says_so(make, three):
    assert "- **No floor**: this table has no run of `no_mixing`, `uniform_mean`" in render(three)
    assert "- **No recurrent layer**: this table has no run of `gru`" in render(three)
    fixed = [make(attention=name) for name in ("no_mixing", "uniform_mean", "gru")]
    page = render([*three, *fixed])
    assert "No floor" not in page
    assert "No recurrent layer" not in page
    assert "`uniform_mean` (floor)" in page
    assert "`gru` (recurrent)" in page


@given(
    order=st.randoms(),
    runs=st.lists(
        st.tuples(
            st.sampled_from(["mha", "linear", "sliding_window(window=16)"]),
            st.sampled_from(["g0", "g1"]),
            st.integers(0, 2),
            st.sampled_from([1e-3, 3e-3]),
            st.sampled_from(["finished", "nan", "failed"]),
            st.floats(),
            st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
        ),
        max_size=16,
    ),
)
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_records_changes_no_byte(make, order, runs):
    records = [
        make(
            attention=attention,
            group=group,
            seed=seed,
            lr=lr,
            status=status,
            report=figure,
            created=created,
            id=f"r{i}",
            config={"model": {"dim": group}, "seed": seed},
        )
        for i, (attention, group, seed, lr, status, figure, created) in enumerate(runs)
    ]
    page = render(records)
    order.shuffle(records)
    assert render(records) == page
    assert render(records + records) == page


def test_the_page_changes_with_a_figure(three):
    metrics = {**three[0].metrics, "test/accuracy": 0.5}
    assert render([replace(three[0], metrics=metrics), *three[1:]]) != render(three)


def test_no_records_give_a_page_that_says_so():
    page = render([])
    assert "There are no records yet." in page
    assert tables(page) == []
    assert f"`{leaderboard.COMMAND}`" in page


def test_the_protocol_and_the_command_stand_at_the_top(three):
    top = render(three).split("## Summary")[0]
    assert "## Protocol" in top
    assert f"`{leaderboard.COMMAND}`" in top


def test_equal_rounded_means_share_a_rank(make):
    rows = standings(
        [
            *seeds(make, "mha", [0.9] * 3),
            *seeds(make, "linear", [0.90001] * 3),
            *seeds(make, "cog", [0.5] * 3),
            *seeds(make, "moba", [0.95] * 3),
        ]
    )
    assert {name: row["rank"] for name, row in rows.items()} == {
        "moba": "1",
        "linear": "2",
        "mha": "2",
        "cog": "4",
    }


def test_a_loss_ranks_the_lower_first(make):
    metric = {"select": "val/loss", "report": "test/loss", "mode": "min", "solved": 0.3}
    records = [
        make(attention=a, metric=metric, metrics={"val/loss": v, "test/loss": v})
        for a, v in (("mha", 0.5), ("linear", 0.25))
    ]
    rows = standings(records)
    assert list(rows) == ["linear", "mha"]
    assert rows["linear"]["solved"] == "1/1"
    assert "`test/loss` ↓" in rows["mha"]
    assert "lower is better" in render(records)
    assert "solved at ≤ 0.3" in render(records)


def test_failures_are_shown_everywhere(make):
    records = [
        *seeds(make, "mha", [0.9, 0.9, 0.9]),
        *seeds(make, "mha", [0.1], lr=0.01),
        *seeds(make, "linear", [1.0, 1.0]),
        make(attention="linear", seed=2, status="nan"),
        make(attention="linear", seed=0, lr=0.01, status="failed"),
        *[make(attention="cog", seed=s, status="failed") for s in range(3)],
        make(attention="cog", lr=0.01, status="failed"),
    ]
    summary, rows = tables(render(records))
    linear, mha, cog = rows
    assert linear["`test/accuracy` ↑"] == "1.0000 ± 0.0000 (2 of 3)"
    assert linear["solved"] == "2/3"
    assert linear["failures"] == "1 failed at lr 0.01, 1 nan at lr 0.001"
    assert mha["failures"] == "—"
    assert cog["rank"] == "—"
    assert cog["`test/accuracy` ↑"] == "no figure (0 of 3)"
    assert cog["solved"] == "0/3"
    assert cog["vs softmax"] == "no shared seed"
    assert cog["failures"] == "3 failed at lr 0.001, 1 failed at lr 0.01"
    assert [(row["attention"], row["Recall"]) for row in summary] == [
        ("`linear`", "1.0 ± 0.0 (2)"),
        ("`mha`", "1.7 ± 0.6 (3)"),
    ]


def test_one_seed_has_no_deviation_and_no_interval(make):
    rows = standings([*seeds(make, "mha", [0.5]), *seeds(make, "linear", [0.25])])
    assert rows["linear"]["`test/accuracy` ↑"] == "0.2500 (1)"
    assert rows["linear"]["vs softmax"] == "-0.2500 (1)"
    assert rows["linear"]["outcome"] == "one seed"


def test_few_seeds_and_unequal_tuning_are_pointed_out(make, three):
    assert "Fewer than" not in render(three)
    assert "Unequal tuning" not in render(three)
    page = render([*three, *seeds(make, "moba", [0.5], lr=0.01)])
    assert "- **Fewer than 3 seeds** with a figure: `moba`." in page
    assert "**Unequal tuning**" in page
    assert "([0.001], [0.01])" in page


def test_a_rate_at_the_end_of_the_grid_is_pointed_out(make):
    best = {"mha": 0.001, "linear": 0.01, "cog": 0.003}
    rates = (0.001, 0.003, 0.01)
    records = [
        make(attention=name, seed=seed, lr=lr, report=0.9 if lr == best[name] else 0.1)
        for name in best
        for lr in rates
        for seed in range(3)
    ]
    page = render(records)
    ends = [line for line in page.splitlines() if "At the end of the grid" in line]
    assert ends == [
        "- At the end of the grid: 1 of 3 rows chose the largest rate, 0.01, and might have done "
        "better beyond it (`linear`).",
        "- At the end of the grid: 1 of 3 rows chose the smallest rate, 0.001, and might have done "
        "better beyond it (`mha`).",
    ]
    two = [record for record in records if record.lr != 0.003 and record.attention != "cog"]
    assert "At the end of the grid" not in render(two)


def test_a_figure_that_is_the_same_in_every_row_is_a_remark(make):
    def metrics(value):
        return {"val/accuracy": 0.5, "test/accuracy": value, "test/input": 7.25}

    records = [
        make(attention=name, seed=seed, metrics=metrics(0.5 + seed / 10))
        for name in ("mha", "linear")
        for seed in range(3)
    ]
    page = render(records)
    assert "- The same in every row: `test/input` 7.2500." in page
    assert "`test/input` |" not in page
    records[0] = make(attention="mha", metrics={**metrics(0.5), "test/input": 7.5})
    page = render(records)
    assert "The same in every row" not in page
    assert "`test/input` |" in page
    assert "`test/input` |" in render(records[3:])  # one row is not compared with any


def test_further_test_metrics_are_columns(make):
    def metrics(value):
        return {"val/accuracy": 0.5, "test/accuracy": 0.5, "test_sparse/accuracy": value}

    records = [
        *[make(seed=s, metrics=metrics(v)) for s, v in enumerate([0.25, 0.75, math.inf])],
        *seeds(make, "linear", [0.5]),
    ]
    rows = standings(records)
    assert rows["mha"]["`test_sparse/accuracy`"] == "0.5000 ± 0.3536 (2 of 3)"
    assert rows["linear"]["`test_sparse/accuracy`"] == "no figure (0 of 1)"


def test_without_a_threshold_there_is_no_solve_rate(make):
    assert "solved" not in standings([make(metric=PLAIN)])["mha"]


def test_what_is_unknown_is_a_dash(make):
    record = make(parameters=None, flops=None, state_bytes=None, step_time_cpu=None, conv=False)
    row = standings([record])["mha"]
    assert (row["parameters"], row["FLOPs"], row["state"]) == ("—", "—", "—")
    assert row["step CPU / wall, ms"] == "— / 24.6"
    assert row["conv"] == "off"


def test_groups_of_one_recipe_are_told_apart(make):
    wide = {"model": {"dim": 128, "depth": 2}, "seed": 5}
    page = render(
        [make(), make(attention="linear"), make(group="g1", config=wide), make(recipe="copy")]
    )
    assert [len(rows) for rows in tables(page)[-3:]] == [1, 2, 1]
    assert page.count("Unlike other groups of this recipe: `model.dim=64`.") == 1
    assert page.count("Unlike other groups of this recipe: `model.dim=128`.") == 1


def test_groups_are_not_told_apart_by_what_no_figure_depends_on(make):
    def config(dim, **rest):
        return {"model": {"dim": dim}, **rest}

    old = config(64, description="As it was.", budget={"seeds": 3})
    page = render([make(config=old), make(group="g1", config=config(32))])
    assert page.count("Unlike other groups of this recipe: `model.dim=64`.") == 1
    assert page.count("Unlike other groups of this recipe: `model.dim=32`.") == 1


def test_a_long_hash_is_shortened(make):
    page = render([make(group="0123456789abcdef")])
    assert "### `mqar`, group `0123456789ab`\n" in page


def test_the_summary_ranks_by_track_and_counts_outcomes(make, three):
    other = seeds(make, "mha", [0.5, 0.5, 0.5], recipe="copy", track="state")
    other += seeds(make, "cog", [0.7, 0.8, 0.9], recipe="copy", track="state")
    summary, *_ = tables(render([*three, *other]))
    assert summary == [
        {
            "attention": "`cog`",
            "Recall": "1.5 ± 0.5 (3)",
            "State and counting": "1.0 ± 0.0 (3)",
            "win / tie / loss": "1 / 1 / 0",
        },
        {
            "attention": "`mha`",
            "Recall": "1.5 ± 0.5 (3)",
            "State and counting": "2.0 ± 0.0 (3)",
            "win / tie / loss": "baseline",
        },
        {
            "attention": "`linear`",
            "Recall": "3.0 ± 0.0 (3)",
            "State and counting": "—",
            "win / tie / loss": "0 / 0 / 1",
        },
    ]


def test_where_it_was_made_stands_under_the_table(make):
    page = render(
        [
            make(),
            make(
                attention="linear",
                device={"type": "cuda", "name": "Some GPU", "threads": 4},
                versions={"python": "3.12.1"},
                data={"name": "mqar", "fingerprint": None},
                commit="fedcba9876543210-dirty",
                conv=False,
            ),
            make(attention="linear", commit=None, id="older", created="2025-01-01T00:00:00Z"),
        ]
    )
    assert "- Devices: `Some CPU` (cpu, threads 1); `Some GPU` (cuda, threads 4)." in page
    assert "- Versions: python 3.11.0, 3.12.1; torch 2.11.0, unknown." in page
    assert "- Commits: `0123456789ab`, `fedcba987654-dirty`." in page
    assert "- Data: `mqar ffffffffffff`, `mqar unknown`." in page
    assert "**Several devices**" in page
    assert "**Several data**" in page
    assert "1 older runs" in page


def test_a_strange_name_cannot_break_the_table(make):
    rows = standings(seeds(make, "odd(a='x|y`z')", [0.5] * 3))
    assert [row["rank"] for row in rows.values()] == ["1"]


def test_write_counts_the_records_of_all_folders(make, three, tmp_path):
    for record in three:
        write(record, tmp_path / "records" / record.attention)
    (tmp_path / "records" / "half.json").write_text("{")
    page = tmp_path / "docs" / "leaderboard.md"
    with pytest.warns(RecordWarning, match=r"half\.json"):
        assert leaderboard.write(tmp_path / "records", page) == (page, 9)
    assert page.read_bytes() == render(three, now=current(three)).encode()
    assert os.listdir(page.parent) == ["leaderboard.md"]


def test_write_refuses_a_folder_that_is_not_there(tmp_path):
    page = tmp_path / "leaderboard.md"
    page.write_text("old")
    with pytest.raises(ZooError, match="gone does not exist"):
        leaderboard.write(tmp_path / "gone", page)
    assert page.read_text() == "old"


def test_verify_names_the_first_line_that_differs(three, tmp_path):
    random.Random(0).shuffle(three)
    for record in three:
        write(record, tmp_path / "records")
    page, _ = leaderboard.write(tmp_path / "records", tmp_path / "page.md")
    assert verify(page, tmp_path / "records") == ""
    text = page.read_text()
    line = text[: text.index("0.8200")].count("\n") + 1
    page.write_text(text.replace("0.8200", "0.8300"))
    assert f"from line {line} on" in verify(page, tmp_path / "records")
    page.write_text(text + "more\n")
    assert "run `zoo leaderboard`" in verify(page, tmp_path / "records")
    page.write_bytes(text.replace("\n", "\r\n").encode())
    assert "from line 1 on" in verify(page, tmp_path / "records")
    page.unlink()
    with pytest.raises(ZooError, match=r"page\.md"):
        verify(page, tmp_path / "records")


def test_the_published_page_is_what_the_published_records_give():
    page = ROOT / "leaderboard.md"
    if not page.exists():
        pytest.skip("leaderboard.md has not been published yet")
    assert verify(page, ROOT / "data" / "runs") == ""
