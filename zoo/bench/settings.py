"""What to measure and how: what all measurements share, and that of token mixers over lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.bench import contenders, memory
from zoo.errors import ZooError

PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class Common:
    """What every measurement is told.

    Args:
        specs: Contenders; the baseline is added.
        threads: Threads of torch on the CPU.
        backward: Measure forward+backward as well.
        rounds: How often every contender has its turn, at least.
        seconds: Rounds go on until one contender has been timed for so long, for each case and
            pass.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16".
    """

    specs: list[str]
    threads: int = 1
    backward: bool = True
    rounds: int = 5
    seconds: float = 1.0
    device: str = "cpu"
    dtype: str = "float32"

    def _check(self, *sizes: str) -> None:
        """Refuse values out of range."""
        for name in (*sizes, "threads", "rounds"):
            setattr(self, name, checks.whole(name, getattr(self, name)))
        self.seconds = checks.number("seconds", self.seconds, above=0)
        checks.choice("device", self.device, memory.METHODS)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ZooError("device 'cuda' was asked for, but torch finds none; allowed here: cpu")
        checks.choice("dtype", self.dtype, DTYPES)

    def _resolve(self, resolve: Callable[[str], str], baseline: str) -> list[str]:
        """Canonical names, the baseline in front, wherever it was named."""
        names = [resolve(spec) for spec in self.specs]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ZooError(f"{self.specs[i]!r} is given twice (both are {name!r})")
        return [baseline, *(name for name in names if name != baseline)]

    @property
    def passes(self) -> tuple[str, ...]:
        """Passes to measure."""
        return PASSES if self.backward else PASSES[:1]

    def input(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, the same for every contender."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.device, DTYPES[self.dtype])


@dataclass(kw_only=True)
class Setting(Common):
    """What to measure of token mixers, and how; `Common` has the rest.

    Args:
        specs: Specifications, `handwritten` among them if wanted; the baseline is added.
        lengths: Tokens N.
        dim: Channels C.
        heads: Heads H.
        batch: Samples B.
        causal: Query i sees keys 0..i only.
        causal_baseline: The baseline is causal even where the others are not: what attention on
            grids is commonly held against.
        core: Measure what a host does between its projections only.
        baseline: What the others are compared with.
        give_up: A contender whose call took more seconds than this is left out at greater
            lengths; None for never.

    Raises:
        ZooError: A value is out of range, a name is unknown or given twice.
    """

    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    dim: int = 512
    heads: int = 8
    batch: int = 1
    causal: bool = True
    causal_baseline: bool = False
    core: bool = False
    baseline: str = "mha"
    give_up: float | None = None

    def __post_init__(self) -> None:
        self._check("dim", "heads", "batch")
        self.lengths = sorted(set(checks.wholes("lengths", self.lengths)))
        never = checks.optional(checks.number, "for never")
        self.give_up = never("give_up", self.give_up, above=0)
        self.baseline = contenders.resolve(self.baseline)
        self.specs = self._resolve(contenders.resolve, self.baseline)

    @property
    def cases(self) -> list[tuple[int, ...]]:
        """Shapes of the input, (B, N, C)."""
        return [(self.batch, length, self.dim) for length in self.lengths]

    def label(self, case: tuple[int, ...]) -> str:
        """Name of a case in a table."""
        return str(case[1])

    def build(self, spec: str, case: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
        """Make a contender and its input."""
        facts: dict[str, Any] = {
            "dim": self.dim,
            "heads": self.heads,
            "causal": self.causal or (self.causal_baseline and spec == self.baseline),
            "max_len": max(self.lengths),
            "device": self.device,
            "dtype": DTYPES[self.dtype],
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = contenders.build(spec, facts)
        x = self.input(case)
        return (contenders.Core(module, x) if self.core else module), x
