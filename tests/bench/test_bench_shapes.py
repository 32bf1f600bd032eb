"""Measurements on given shapes: feature modules, slots, whole timm models."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from zoo.bench import Report, Row, ShapeSetting, measure, pages, report, sort_of
from zoo.bench.plot import draw
from zoo.errors import ZooError
from zoo.registry import Taxonomy, register, unregister

FEW = {"rounds": 2, "seconds": 1e-4}
MAPS = [(2, 4, 6, 5), (1, 8, 5, 5)]


class Pooled(nn.Module):
    """Slots of a sort: means of the inputs, projected."""

    def __init__(self, dim_in: int, dim: int = 3, slots: int = 7, *, scale: float = 1.0) -> None:
        super().__init__()
        self.slots, self.scale = slots, scale
        self.proj = nn.Linear(dim_in, dim)

    def forward(self, x: Tensor, slots: Tensor | None = None) -> Tensor:
        mean = self.scale * self.proj(x.mean(1, keepdim=True))
        return mean.expand(-1, self.slots, -1)


@pytest.fixture
def pooled() -> Iterator[str]:
    taxonomy = Taxonomy("self", "single", "global", "single", "none", "none", "na")
    register("bench_pooled", kind="slots", taxonomy=taxonomy)(Pooled)
    yield "bench_pooled"
    unregister("bench_pooled")


@pytest.fixture(scope="module")
def maps() -> Report:
    specs = ["triplet(kernel_size=3)", "eca", "triplet(kernel_size=3)@reference"]
    return measure(ShapeSetting(specs=specs, shapes=MAPS, **FEW))


def test_feature_modules_against_their_straightforward_form(maps: Report) -> None:
    reference = "triplet(kernel_size=3)@reference"
    assert maps.setting.baseline == reference
    assert maps.setting.specs == [reference, "triplet(kernel_size=3)", "eca"]
    assert [(r.shape, r.kind, r.spec) for r in maps.rows] == [
        (shape, kind, spec)
        for shape in MAPS
        for kind in ("forward", "forward+backward")
        for spec in maps.setting.specs
    ]
    for row in maps.rows:
        assert row.error is None
        assert row.time is not None
        assert row.rate == row.shape[0] / row.time
        assert row.memory is not None
        assert row.length == row.shape[2] * row.shape[3]
        if row.spec == reference:
            assert row.speed_wall == row.speed_cpu == 1.0
    assert [r.route for r in maps.rows[:3]] == ["reference", "fused", "-"]
    assert maps.growth("eca", "forward") is None
    assert maps.failed == []


def test_the_route_is_the_one_that_runs() -> None:
    setting = ShapeSetting(specs=["triplet@reference", "triplet"], shapes=[(2, 4, 5, 6)])
    made = {spec: setting.build(spec, (2, 4, 5, 6)) for spec in setting.specs}
    (plain, x), (fused, same) = made["triplet@reference"], made["triplet"]
    assert plain.route == "reference"
    assert fused.route is None
    assert torch.equal(x, same)
    torch.testing.assert_close(plain.eval()(x), fused.eval()(x))


def test_slots(pooled: str) -> None:
    setting = ShapeSetting(
        specs=[pooled, f"{pooled}(scale=2.0)"], shapes=[(2, 9, 4)], slots=5, **FEW
    )
    module, x = setting.build(pooled, (2, 9, 4))
    assert module(x).shape == (2, 5, 3)
    found = measure(setting)
    assert found.failed == []
    assert {row.length for row in found.rows} == {9}
    assert found.setting.baseline == pooled


def test_defaults_by_kind(pooled: str) -> None:
    assert ShapeSetting(specs=["triplet"]).shapes[0] == (8, 64, 56, 56)
    assert len(ShapeSetting(specs=[pooled]).shapes[0]) == 3
    assert sort_of(["triplet@reference", "se"]) == "feature"
    assert sort_of([pooled]) == "slots"
    assert sort_of(["mha"]) is sort_of(["handwritten"]) is sort_of([]) is None


@pytest.mark.parametrize(
    ("host", "specs", "shape"),
    [
        ("resnet10t", ["triplet(kernel_size=3)", "eca", "triplet@reference"], (2, 3, 32, 32)),
        ("test_vit", ["mha", "linear", "mha@engine"], (1, 1, 64, 64)),
    ],
)
def test_hosts(host: str, specs: list[str], shape: tuple[int, ...]) -> None:
    setting = ShapeSetting(specs=specs, host=host, shapes=[shape], **FEW)
    assert setting.specs == ["plain", *specs]
    found = measure(setting)
    assert [row.error for row in found.rows] == [None] * 8
    text = _shown(found)
    assert "images/s" in text
    assert f"inside {host}" in text
    models = {spec: setting.build(spec, shape)[0] for spec in setting.specs}
    kinds = {spec: {type(m).__name__ for m in model.modules()} for spec, model in models.items()}
    wanted, where = {
        "resnet10t": ("TripletAttention", [False, True, False, True]),
        "test_vit": ("MHA", [False, True, True, True]),
    }[host]
    assert [wanted in kinds[spec] for spec in setting.specs] == where
    forced = [m.route for m in models[specs[2]].modules() if hasattr(m, "route")]
    assert len(forced) >= 2
    assert set(forced) == {specs[2].partition("@")[2]}


def test_a_vit_with_mha_is_the_vit() -> None:
    setting = ShapeSetting(specs=["mha"], host="test_vit", shapes=[(2, 3, 64, 64)])
    plain, x = setting.build("plain", (2, 3, 64, 64))
    swapped, _ = setting.build("mha", (2, 3, 64, 64))
    torch.testing.assert_close(swapped.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"specs": ["mha"]}, "'mha' is a project; this measurement takes feature"),
        ({"specs": ["triplet", "mha"], "host": "resnet18"}, "of one kind, but 'triplet' is of"),
        ({"specs": ["triplet@fusd"]}, "unknown route of 'triplet' 'fusd'; did you mean 'fused'"),
        ({"specs": ["se@reference"]}, "'se' has no routes"),
        ({"specs": ["triplet", "triplet"]}, "'triplet' is given twice"),
        ({"specs": ["triplt"]}, "did you mean 'triplet'"),
        ({"specs": []}, "empty"),
        ({"shapes": [(1, 2, 3)]}, r"shape=\(1, 2, 3\) must be 4 whole numbers.*batch, channels"),
        ({"shapes": [(1, 0, 3, 3)]}, r"shape=\(1, 0, 3, 3\) must be 4"),
        ({"slots": 3}, "slots=3 is for slots"),
        ({"slots": 0}, "slots=0 must be a whole number of at least 1"),
        ({"host": "resnet81"}, "unknown model of timm 'resnet81'"),
        ({"baseline": "ecca"}, "did you mean 'eca'"),
        ({"dtype": "float31"}, "unknown dtype"),
    ],
)
def test_impossible_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        ShapeSetting(**{"specs": ["triplet"], **options})


def _shown(found: Report) -> str:
    out = io.StringIO()
    report.show(found, Console(file=out, width=200))
    return out.getvalue()


def test_tables_plots_and_records(maps: Report, tmp_path: Path) -> None:
    text = _shown(maps)
    assert "2x4x6x5" in text
    assert "samples/s" in text
    assert "growth" not in text
    paths = report.save(maps, tmp_path)
    content = json.loads(paths[0].read_text())
    assert content["setting"]["shapes"] == [list(s) for s in MAPS]
    assert content["setting"]["sort"] == "feature"
    assert content["rows"][0]["shape"] == list(MAPS[0])
    page = pages.tables(content)
    assert "| contender | route | 2x4x6x5 | 1x8x5x5 | MiB at 2x4x6x5 |" in page
    assert "batch, channels, height, width" in page
    time, *_ = draw(maps).axes
    assert len(time.patches) == 6
    assert report.slug(maps).endswith("-2x4x6x5-1x8x5x5-cpu")


def test_a_failure_names_its_shape(maps: Report) -> None:
    rows = [Row(r.spec, r.length, r.kind, shape=r.shape, error="no room") for r in maps.rows]
    assert "eca at 2x4x6x5, 1x8x5x5 failed: no room" in _shown(Report(maps.setting, rows))
