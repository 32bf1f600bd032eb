"""The measurement: contenders by lengths by passes, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import log
from statistics import linear_regression

import torch
from torch import Tensor, nn

from zoo.bench import contenders, memory
from zoo.bench.settings import PASSES, Setting
from zoo.bench.shapes import ShapeSetting
from zoo.bench.timing import Samples, speed, spread, take_round
from zoo.errors import ZooError
from zoo.ops import flops

# Part of the time that a turn takes: many short turns, so that disturbances meet everybody.
SLICE = 1 / 40
# Lengths, counted from the longest, over which the growth of time is fitted.
GROWTH_LENGTHS = 3


@dataclass
class Row:
    """What was found for one contender at one length in one pass.

    Args:
        spec: The contender.
        length: Tokens N, or places of a map.
        kind: "forward" or "forward+backward".
        route: Route that the host took.
        wall: Median elapsed time, in seconds, of one call.
        wall_iqr: Its interquartile range.
        cpu: Median processor time in seconds, None on a GPU.
        cpu_iqr: Its interquartile range.
        speed_wall: Times as fast as the baseline, by elapsed time.
        speed_cpu: Times as fast as the baseline, by processor time.
        memory: Bytes held at the peak of a call beyond those before it.
        flops: Floating point operations of one call.
        blocks: Blocks of calls timed.
        error: Why there are no figures, in one line, or None.
        shape: Shape of the input.
    """

    spec: str
    length: int
    kind: str
    route: str = "-"
    wall: float | None = None
    wall_iqr: float | None = None
    cpu: float | None = None
    cpu_iqr: float | None = None
    speed_wall: float | None = None
    speed_cpu: float | None = None
    memory: int | None = None
    flops: int | None = None
    blocks: int = 0
    error: str | None = None
    shape: tuple[int, ...] = ()

    @property
    def rate(self) -> float | None:
        """Samples a second."""
        return self.shape[0] / self.time if self.shape and self.time else None

    @property
    def time(self) -> float | None:
        """Processor time, which a busy machine disturbs less, or elapsed time on a GPU."""
        return self.wall if self.cpu is None else self.cpu


@dataclass
class Report:
    """All rows of a measurement.

    Args:
        setting: What was asked for.
        rows: One for each contender, case and pass.
    """

    setting: Setting | ShapeSetting
    rows: list[Row]

    def of(self, spec: str, kind: str) -> list[Row]:
        """Rows of a contender in one pass, by case."""
        return [row for row in self.rows if row.spec == spec and row.kind == kind]

    def growth(self, spec: str, kind: str) -> float | None:
        """Exponent p of time ~ N^p over the longest lengths, None with fewer than two figures."""
        if isinstance(self.setting, ShapeSetting):
            return None
        points = [
            (row.length, row.time) for row in self.of(spec, kind)[-GROWTH_LENGTHS:] if row.time
        ]
        if len(points) < 2:
            return None
        lengths, times = zip(*points, strict=True)
        return linear_regression(list(map(log, lengths)), list(map(log, times))).slope

    @property
    def failed(self) -> list[str]:
        """Contenders without a single figure."""
        specs = self.setting.specs
        return [s for s in specs if all(row.error for row in self.rows if row.spec == s)]


@dataclass
class _Contender:
    row: Row
    call: Callable[[], object]
    samples: Samples = field(default_factory=Samples)


def measure(setting: Setting | ShapeSetting, told: Callable[[str], None] | None = None) -> Report:
    """Measure every contender; one that fails is noted and does not stop the others.

    Args:
        setting: What and how.
        told: Is given a line whenever another length or pass begins.
    """
    rows: list[Row] = []
    with _threads(setting.threads):
        for case in setting.cases:
            for kind in setting.passes:
                if told is not None:
                    name = "N" if isinstance(setting, Setting) else "shape"
                    told(f"{name} = {setting.label(case)}, {kind}")
                slow = _too_slow(setting, rows, kind)
                rows += _stage(setting, case, kind, slow)
    return Report(setting, rows)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _too_slow(setting: Setting | ShapeSetting, rows: list[Row], kind: str) -> dict[str, Row]:
    """Contenders that took too long at a smaller length, with what they took there."""
    if setting.give_up is None:
        return {}
    return {
        row.spec: row
        for row in rows
        if row.kind == kind and row.time is not None and row.time > setting.give_up
    }


def _stage(
    setting: Setting | ShapeSetting, case: tuple[int, ...], kind: str, slow: dict[str, Row]
) -> list[Row]:
    """Measure all contenders in one case and pass, but for those known to be too slow."""
    length = case[1] if len(case) == 3 else case[2] * case[3]
    every = [Row(spec, length, kind, shape=case) for spec in setting.specs]
    ready = []
    for row in every:
        if row.spec in slow:
            before = slow[row.spec]
            row.error = f"left out: a call took {before.time:.1f} s at N = {before.length}"
            continue
        with _noted(row):
            call = _prepare(setting, row)
            # Counting and following memory cost time, so they are done away from the clock.
            row.memory = memory.peak(call, setting.device)
            row.flops = flops.count(call)
            ready.append(_Contender(row, call))
    turn = 0
    while ready and (
        turn < setting.rounds or max(item.samples.spent for item in ready) < setting.seconds
    ):
        # Back and forth, so that nobody always runs after the same neighbour.
        for item in ready if turn % 2 == 0 else reversed(ready):
            with _noted(item.row):
                take_round(item.call, item.samples, setting.seconds * SLICE, setting.device)
        ready = [item for item in ready if item.row.error is None]
        turn += 1
    base = next((item for item in ready if item.row.spec == setting.baseline), None)
    for item in ready:
        _summarise(item, base)
    return every


def _summarise(item: _Contender, base: _Contender | None) -> None:
    row, found = item.row, item.samples
    row.wall, row.wall_iqr = spread(found.wall)
    row.blocks = len(found.wall)
    if found.cpu:
        row.cpu, row.cpu_iqr = spread(found.cpu)
    if base is not None:
        row.speed_wall = speed(base.samples.wall_rounds, found.wall_rounds)
        row.speed_cpu = speed(base.samples.cpu_rounds, found.cpu_rounds)


@contextmanager
def _noted(row: Row) -> Iterator[None]:
    """Write a failure into the row instead of raising it."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or "no reason given"
        text = text if len(text) <= 200 else text[:197] + "..."
        row.error = text if isinstance(error, ZooError) else f"{type(error).__name__}: {text}"


def _prepare(setting: Setting | ShapeSetting, row: Row) -> Callable[[], object]:
    """Build a contender and its input, and return the call to measure after running it once."""
    module, x = setting.build(row.spec, row.shape)
    call = _forward(module, x) if row.kind == PASSES[0] else _both(module, x)
    with torch.set_grad_enabled(row.kind != PASSES[0]):
        row.route = contenders.route(getattr(module, "host", module), x)
    call()
    return call


def _forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    module.eval()

    def call() -> Tensor:
        with torch.no_grad():
            return module(x)

    return call


def _both(module: nn.Module, x: Tensor) -> Callable[[], object]:
    x.requires_grad_()

    def call() -> None:
        y = module(x)
        y.backward(torch.ones_like(y))
        x.grad = None
        module.zero_grad(set_to_none=True)

    return call
