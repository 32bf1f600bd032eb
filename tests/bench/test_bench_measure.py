from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor, nn

from zoo.bench import HANDWRITTEN, Report, Row, Setting, measure, memory, timing
from zoo.bench import measurement as measuring
from zoo.errors import ZooError
from zoo.registry import Taxonomy, register, unregister

TINY = {"dim": 8, "heads": 2, "rounds": 2, "seconds": 1e-4}


def report_of(times: dict[int, float]) -> Report:
    setting = Setting(specs=[], lengths=list(times), **TINY)
    return Report(setting, [Row("mha", n, "forward", cpu=t) for n, t in times.items()])


def test_rows_cover_contenders_lengths_and_passes() -> None:
    told: list[str] = []
    setting = Setting(specs=["linear", HANDWRITTEN], lengths=[8, 4], **TINY)
    report = measure(setting, told.append)
    assert [(r.length, r.kind, r.spec) for r in report.rows] == [
        (length, kind, spec)
        for length in (4, 8)
        for kind in ("forward", "forward+backward")
        for spec in ("mha", "linear", HANDWRITTEN)
    ]
    assert told == [f"N = {n}, {k}" for n in (4, 8) for k in setting.passes]
    for row in report.rows:
        assert row.error is None
        assert row.wall > 0
        assert row.cpu > 0
        assert row.wall_iqr >= 0
        assert row.memory > 0
        assert row.blocks >= setting.rounds
    assert [row.route for row in report.rows[:3]] == ["sdpa", "linear", "-"]
    for row in report.rows:
        if row.spec == "mha":
            assert row.speed_wall == row.speed_cpu == 1.0
    assert report.failed == []


def test_a_slow_contender_is_left_out_at_greater_lengths() -> None:
    report = measure(Setting(specs=["linear"], lengths=[4, 8], give_up=1e-9, **TINY))
    assert all(row.error is None for row in report.rows if row.length == 4)
    for row in report.rows:
        if row.length == 8:
            assert "left out: a call took" in str(row.error)
            assert row.time is None
    assert report.failed == []


def test_flops_are_those_of_the_matrix_products() -> None:
    setting = Setting(specs=[HANDWRITTEN], lengths=[16], causal=False, **TINY)
    dim, n = setting.dim, 16
    products = 2 * n * dim * 4 * dim + 2 * 2 * n * n * dim
    for row in measure(setting).rows:
        if row.kind == "forward":
            assert row.flops == products
        else:
            assert row.flops > 2.5 * products


def test_threads_are_set_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def stage(setting: Setting, length: int, kind: str, slow: object) -> list[Row]:
        seen.append(torch.get_num_threads())
        raise RuntimeError

    monkeypatch.setattr(measuring, "_stage", stage)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure(Setting(specs=[], threads=before + 1, lengths=[4], **TINY))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_a_failure_is_a_row_and_stops_nobody() -> None:
    taxonomy = Taxonomy("self", "single", "global", "single", "none", "none", "na")

    class Short(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.proj = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 4:
                raise MemoryError("no room\nfor that")
            return self.proj(x)

    register("bench_short", kind="mixer", taxonomy=taxonomy)(Short)
    try:
        setting = Setting(specs=["bench_short", "rope"], lengths=[4, 8], **TINY)
        report = measure(setting)
    finally:
        unregister("bench_short")
    by_length = {row.length: row for row in report.of("bench_short", "forward")}
    assert by_length[4].error is None
    assert by_length[4].wall is not None
    assert by_length[8].error == "MemoryError: no room for that"
    assert by_length[8].wall is None
    assert all(row.error is None for row in report.rows if row.spec != "bench_short")
    assert report.failed == []


def test_what_cannot_be_built_fails_everywhere_with_the_reason() -> None:
    report = measure(Setting(specs=["rope(fraction=0.3)"], lengths=[4], **TINY))
    row = report.of("mha+rope(fraction=0.3)", "forward")[0]
    assert row.error is not None
    assert "fraction" in row.error
    assert report.failed == ["mha+rope(fraction=0.3)"]


def test_a_failing_baseline_leaves_times_without_speeds() -> None:
    setting = Setting(specs=["mha"], baseline="rope(fraction=0.3)", lengths=[4], **TINY)
    row = measure(setting).of("mha", "forward")[0]
    assert row.wall is not None
    assert row.speed_wall is None


def test_a_contender_that_breaks_while_timed_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []

    def broken(call: object, samples: timing.Samples, seconds: float, device: str) -> None:
        taken.append(call)
        if len(taken) == 2:
            raise RuntimeError("gone")
        timing.take_round(call, samples, seconds, device)

    monkeypatch.setattr(measuring, "take_round", broken)
    setting = Setting(specs=[HANDWRITTEN], lengths=[4], backward=False, **TINY)
    base, other = measure(setting).rows
    assert base.error is None
    assert base.blocks >= 2
    assert other.error == "RuntimeError: gone"
    assert other.wall is None


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []

    def noted(call: object, samples: timing.Samples, seconds: float, device: str) -> None:
        order.append(call)
        timing.take_round(call, samples, seconds, device)

    monkeypatch.setattr(measuring, "take_round", noted)
    options = {**TINY, "rounds": 3, "seconds": 1e-9}
    measure(Setting(specs=[HANDWRITTEN], lengths=[4], backward=False, **options))
    first, second = order[:2]
    assert order == [first, second, second, first, first, second]


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    measure(Setting(specs=[], lengths=[4], backward=False, **TINY))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_growth_is_the_slope_of_the_last_three(power: float) -> None:
    times = {n: 1e-6 * n**power for n in (64, 128, 256)}
    report = report_of({16: 7.0, 32: 5.0, **times})
    assert math.isclose(report.growth("mha", "forward"), power)
    assert report_of({16: 1.0}).growth("mha", "forward") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads=0 must be a whole number of at least 1"),
        ({"rounds": 0}, "rounds=0 must be a whole number of at least 1"),
        ({"lengths": []}, r"lengths=\[\] must be"),
        ({"lengths": [4, 0]}, "lengths=.* must be"),
        ({"seconds": 0.0}, "seconds=0.0 must be a number above 0"),
        ({"give_up": 0.0}, "give_up=0.0 must be a number above 0, or None for never"),
        ({"seconds": math.nan}, "seconds=nan must be a number above 0"),
        ({"device": "cuba"}, "unknown device 'cuba'; did you mean 'cuda'"),
        ({"dtype": "float31"}, "unknown dtype 'float31'; did you mean 'float32'"),
        ({"specs": ["rope", "mha+rope"]}, "'mha.rope' is given twice"),
        ({"baseline": "mhaa"}, "did you mean 'mha'"),
    ],
)
def test_impossible_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        Setting(**{"specs": ["rope"], **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ZooError, match="'cuda' was asked for, but torch finds none"):
        Setting(specs=[], device="cuda")


@pytest.mark.gpu
def test_cuda() -> None:
    setting = Setting(specs=[HANDWRITTEN], lengths=[64], device="cuda", dtype="bfloat16")
    for row in measure(setting).rows:
        assert row.error is None
        assert row.wall > 0
        assert row.cpu is None
        assert row.memory > 0


def test_memory_is_the_peak_of_what_torch_allocates() -> None:
    x = torch.ones(1000)
    step = 4 * 1000
    few = 64  # the numbers 1, 2 and 3 become tensors for a moment
    # Two temporaries and a result, of which two are alive at any time.
    assert 0 <= memory.peak(lambda: x.add(1).mul(2).sub(3), "cpu") - 2 * step < few
    assert 0 <= memory.peak(lambda: (x + 1, x + 2, x + 3), "cpu") - 3 * step < few
    assert memory.peak(lambda: x.add_(1), "cpu") < few


def test_memory_of_dense_attention_is_quadratic_and_of_strips_is_not(many_strips: None) -> None:
    def bytes_of(route: str, length: int) -> int:
        host = measuring.contenders.build(
            "sparsemax",
            {"dim": 16, "heads": 2, "causal": True, "max_len": length, "device": "cpu"},
        )
        host.route = route
        x = torch.randn(1, length, 16)
        with torch.no_grad():
            return memory.peak(lambda: host(x), "cpu")

    assert bytes_of("dense", 512) > 3.5 * bytes_of("dense", 256)
    assert bytes_of("dense", 512) > 2 * 512 * 512 * 4
    assert bytes_of("engine", 512) < 2.2 * bytes_of("engine", 256)
    assert bytes_of("engine", 512) < 2 * 512 * 512 * 4 / 5


def test_times_come_from_both_clocks() -> None:
    samples = timing.Samples()
    for _ in range(2):
        timing.take_round(lambda: time.sleep(1e-3), samples, 1e-3, "cpu")
    assert len(samples.wall) == len(samples.cpu) >= 2
    assert len(samples.wall_rounds) == len(samples.cpu_rounds) == 2
    # Sleeping takes time but no processor.
    assert min(samples.wall) >= 1e-3
    assert min(samples.cpu) < 1e-3
    assert samples.spent >= 2e-3


def test_spread_and_speed() -> None:
    assert timing.spread([5.0]) == (5.0, 0.0)
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0)
    # Each round is compared with itself: a slow machine in the second changes nothing.
    assert timing.speed([1.0, 10.0, 1.0], [0.5, 5.0, 0.5]) == 2.0
    assert timing.speed([], []) is None


def test_the_core_is_measured_without_the_projections() -> None:
    specs = ["mha+rope", "linear", "moh", "cope(npos=4)"]
    report = measure(Setting(specs=specs, lengths=[16], core=True, **TINY))
    assert all(row.error is None for row in report.rows)
    core = 2 * 2 * 16 * 16 * TINY["dim"]
    flops = {row.spec: row.flops for row in report.of("mha", "forward")}
    assert flops == {"mha": core}
    (both,) = report.of("mha", "forward+backward")
    assert both.flops == 3.5 * core
    (moh,) = report.of("moh", "forward")
    assert moh.flops == core + 2 * 16 * 8 * 2  # its router is prepared with the heads


def test_what_is_no_host_has_no_core() -> None:
    report = measure(Setting(specs=["gru", HANDWRITTEN], lengths=[8], core=True, **TINY))
    assert report.failed == ["gru", HANDWRITTEN]
    assert all("is no host" in row.error for row in report.rows if row.spec != "mha")


def test_only_the_baseline_may_be_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, bool]] = []
    build = measuring.contenders.build

    def noted(name: str, facts: dict[str, object]) -> nn.Module:
        made.append((name, bool(facts["causal"])))
        return build(name, facts)

    monkeypatch.setattr(measuring.contenders, "build", noted)
    measure(Setting(specs=["linear"], lengths=[4], causal=False, causal_baseline=True, **TINY))
    assert set(made) == {("mha", True), ("linear", False)}
