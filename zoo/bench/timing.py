"""Times of one call, by torch.utils.benchmark on a CPU and by triton.testing on a GPU."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Imported along with the timer, it remarks on a CUDA toolkit without a card, which is nobody's
# concern here.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils.benchmark import Timer  # noqa: E402


@dataclass
class Samples:
    """Times of one contender, in seconds per call.

    Args:
        wall: Elapsed time of every block of calls.
        cpu: Processor time of the same blocks, over all threads; empty on a GPU.
        wall_rounds: Median elapsed time of each round.
        cpu_rounds: Median processor time of each round; empty on a GPU.
        spent: Seconds of all blocks together.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    wall_rounds: list[float] = field(default_factory=list)
    cpu_rounds: list[float] = field(default_factory=list)
    spent: float = 0.0


class _Clock:
    """A clock for the timer that notes the processor time whenever it is read."""

    def __init__(self) -> None:
        self.noted: list[float] = []

    def __call__(self) -> float:
        self.noted.append(time.process_time())
        return time.perf_counter()


def spread(times: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(times) < 2:
        return times[0], 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return middle, high - low


def take_round(call: Callable[[], object], samples: Samples, seconds: float, device: str) -> None:
    """Time a call for one round and add what was found.

    Args:
        call: What is timed.
        samples: Where the times go.
        seconds: How long to go on, at least for one block after a first call.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        from triton.testing import do_bench

        low, middle, high = (
            t / 1e3
            for t in do_bench(call, warmup=5, rep=seconds * 1e3, quantiles=[0.25, 0.5, 0.75])
        )
        samples.wall += [low, middle, high]
        samples.wall_rounds.append(middle)
        samples.spent += seconds
        return
    clock = _Clock()
    timer = Timer(
        "call()", globals={"call": call}, timer=clock, num_threads=torch.get_num_threads()
    )
    found = timer.blocked_autorange(min_run_time=seconds)
    # The clock is read twice for every block, those of the timer's own trials first.
    pairs = zip(clock.noted[0::2], clock.noted[1::2], strict=True)
    cpu = [(end - start) / found.number_per_run for start, end in pairs][-len(found.raw_times) :]
    samples.wall += found.times
    samples.cpu += cpu
    samples.wall_rounds.append(statistics.median(found.times))
    samples.cpu_rounds.append(statistics.median(cpu))
    samples.spent += sum(found.raw_times)


def speed(base: list[float], mine: list[float]) -> float | None:
    """How many times as fast as the baseline: median over the rounds of the ratio of times.

    Both of a ratio were taken in the same round, so that what slows the machine cancels out.
    """
    ratios = [b / m for b, m in zip(base, mine, strict=True) if m > 0]
    return statistics.median(ratios) if ratios else None
