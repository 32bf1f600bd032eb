"""Time, memory and, first of all, correctness of the Triton kernels on a card.

A kernel whose results are wrong gets no speed. Every time stands beside that of PyTorch's softmax
attention and of the other back-ends, taken in the same process, and beside what the card can do at
most: a large matrix product and a copy, measured before everything else.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.bench import memory
from zoo.bench.kernel_cases import Case, Form, cases, inputs, sdpa
from zoo.errors import ZooError, unknown

LENGTHS = (4096, 16384, 65536, 1024, 32768, 131072, 8192, 2048)
PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Root mean square of the error over that of the reference: output, gradients.
ALLOWED = {"float32": (1e-5, 3e-5), "float16": (2e-3, 5e-3), "bfloat16": (1e-2, 2e-2)}
YARDSTICK = "sdpa"
# A contender that would take more seconds than this, by what it took at another length, is left
# out: softmax attention takes its time quadratically, the others at least linearly.
GIVE_UP = 0.3
# Milliseconds of measurement for each cell.
WARMUP, REPEAT = 10, 60


@dataclass(kw_only=True)
class Plan:
    """What to measure.

    Args:
        only: Names of cases, or beginnings of them; empty for all.
        lengths: Tokens N, the most telling first.
        dtype: Of q, k and v.
        seconds: No new cell is begun after this long.
        smoke: Tiny sizes in Triton's interpreter, on a CPU: shows that the benchmark works.

    Raises:
        ZooError: A name or type is unknown, or there is no card to measure on.
    """

    only: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    dtype: str = "bfloat16"
    seconds: float = 420.0
    smoke: bool = False

    def __post_init__(self) -> None:
        checks.choice("dtype", self.dtype, DTYPES)
        checks.number("seconds", self.seconds, above=0)
        self.lengths = list(checks.wholes("lengths", self.lengths))
        if not self.smoke and not torch.cuda.is_available():
            raise ZooError(
                "kernels are measured on a CUDA device, and torch finds none; --smoke (smoke=True) "
                "runs the benchmark at tiny sizes in Triton's interpreter"
            )
        known = [case.name for case in cases(self.smoke)]
        for name in self.only:
            if not any(item.startswith(name) for item in known):
                raise unknown("case", name, known)

    @property
    def device(self) -> str:
        """Where everything runs."""
        return "cpu" if self.smoke else "cuda"

    def cases(self) -> list[Case]:
        """The cases asked for."""
        every = cases(self.smoke)
        return [c for c in every if not self.only or any(c.name.startswith(n) for n in self.only)]


@dataclass
class Check:
    """A kernel against the reference in float64.

    Args:
        case: Name of the case.
        length: Tokens N.
        dtype: Type of q, k and v.
        output: Relative error of the output, or None.
        gradient: Largest relative error of the gradients of q, k and v, or None.
        error: What went wrong, or None.
    """

    case: str
    length: int
    dtype: str
    output: float | None = None
    gradient: float | None = None
    error: str | None = None

    @property
    def right(self) -> bool:
        """Whether the kernel may be timed."""
        if self.error is not None or self.output is None or self.gradient is None:
            return False
        output, gradient = ALLOWED[self.dtype]
        return self.output <= output and self.gradient <= gradient


@dataclass
class Cell:
    """One contender at one length in one pass.

    Args:
        case: Name of the case.
        contender: "sdpa", "triton", or a back-end.
        length: Tokens N.
        kind: "forward" or "forward+backward".
        seconds: Median elapsed time of a call, or None.
        speed: Times as fast as the yardstick at the same length, or None.
        tflops: Useful 10^12 operations a second, or None for linear attention.
        of_matmul: Their share of the matrix product's, or None.
        gbytes: 10^9 bytes a second, counting every tensor once.
        of_copy: Their share of a copy's.
        memory: Bytes at the peak of a call beyond its input, or None.
        error: Why there is no figure, or None.
    """

    case: str
    contender: str
    length: int
    kind: str
    seconds: float | None = None
    speed: float | None = None
    tflops: float | None = None
    of_matmul: float | None = None
    gbytes: float | None = None
    of_copy: float | None = None
    memory: int | None = None
    error: str | None = None


@dataclass
class Report:
    """What was found.

    Args:
        plan: What was asked for.
        peaks: "matmul" in operations and "copy" in bytes a second.
        checks: Kernels against the reference.
        cells: Times.
        left_out: Cells that the time did not suffice for, in words.
    """

    plan: Plan
    peaks: dict[str, float]
    checks: list[Check] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = asdict(self)
        for check, plain in zip(self.checks, found["checks"], strict=True):
            plain["right"] = check.right
        return found


def measure(plan: Plan, told: Callable[[str], None] = lambda line: None) -> Report:
    """Check every kernel, then time those that are right.

    Args:
        plan: What to measure.
        told: Is given a line of progress at a time.
    """
    began = time.monotonic()
    told("measuring the peaks of the machine")
    report = Report(plan, _peaks(plan))
    right: set[str] = set()
    every = plan.cases()
    for case in every:
        told(f"checking {case.name}")
        found = [_check(plan, case, n, kind) for n, kind in _checked(plan, case)]
        report.checks += found
        if all(check.right for check in found):
            right.add(case.name)
    taken: dict[tuple[str, str, str], tuple[int, float]] = {}
    base: dict[tuple[int, int, int, int, str], float] = {}
    for length in [64] if plan.smoke else plan.lengths:
        for case in every:
            n = case.smoke if plan.smoke else length
            if not case.valid(n):
                continue
            if time.monotonic() - began > plan.seconds:
                report.left_out.append(f"{case.name} at N = {n}: the time was up")
                continue
            told(f"timing {case.name}, N = {n}")
            report.cells += _stage(plan, case, n, case.name in right, report.peaks, taken, base)
    return report


def _checked(plan: Plan, case: Case) -> list[tuple[int, str]]:
    """Lengths and types to check at: the benchmark's own type everywhere, float32 once."""
    found = [(n, plan.dtype) for n in case.check if case.valid(n)]
    return found + [(n, "float32") for n in case.check[:1] if case.valid(n)] * (
        plan.dtype != "float32"
    )


def _relative(found: Tensor, right: Tensor) -> float:
    found, right = found.detach().double(), right.detach()
    error, size = (x.square().mean().sqrt() for x in (found - right, right))
    return float(error / size.clamp_min(1e-30))


def _check(plan: Plan, case: Case, length: int, dtype: str) -> Check:
    check = Check(case.name, length, dtype)
    small = replace(case, batch=1, heads=min(case.heads, 2))
    tensors = inputs(small, length, DTYPES[dtype], plan.device, seed=1)
    exact = tuple(x.detach().double().requires_grad_() for x in tensors)
    try:
        with _exact_products():
            wanted = case.form("reference", length)(*exact)
            grad = torch.randn(wanted.shape, device=plan.device, dtype=torch.float64)
            right = torch.autograd.grad(wanted, exact, grad)
            found = case.form("triton", length)(*tensors)
            grads = torch.autograd.grad(found, tensors, grad.to(found.dtype))
        check.output = _relative(found, wanted)
        check.gradient = max(_relative(a, b) for a, b in zip(grads, right, strict=True))
    except Exception as error:
        check.error = _line(error)
    return check


class _exact_products:
    """Products of float32 without tf32, for the checks."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *args: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    text = text if len(text) <= 200 else text[:197] + "..."
    return text if isinstance(error, ZooError) else f"{type(error).__name__}: {text}"


def _time(plan: Plan, call: Callable[[], object]) -> float:
    """Median seconds of a call; in the smoke mode a single one, which says nothing."""
    if plan.smoke:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    from triton.testing import do_bench

    return float(do_bench(call, warmup=WARMUP, rep=REPEAT, return_mode="median")) / 1e3


def _peaks(plan: Plan) -> dict[str, float]:
    side, size = (128, 2**16) if plan.smoke else (8192, 2**28)
    a = torch.randn(side, side, device=plan.device).to(DTYPES[plan.dtype])
    x = torch.zeros(size, dtype=torch.uint8, device=plan.device)
    y = torch.zeros_like(x)
    matmul = 2.0 * side**3 / _time(plan, lambda: a @ a)
    copy = 2.0 * size / _time(plan, lambda: y.copy_(x))
    return {"matmul": matmul, "copy": copy}


def _stage(
    plan: Plan,
    case: Case,
    length: int,
    right: bool,
    peaks: dict[str, float],
    taken: dict[tuple[str, str, str], tuple[int, float]],
    base: dict[tuple[int, int, int, int, str], float],
) -> list[Cell]:
    """All contenders of a case at one length."""
    found = []
    tensors = inputs(case, length, DTYPES[plan.dtype], plan.device)
    grad = torch.randn_like(tensors[0])
    for kind in PASSES:
        both = kind == PASSES[1]
        key = (case.batch, case.heads, case.head_dim, length, kind)
        for contender in (YARDSTICK, "triton", *case.rivals):
            cell = Cell(case.name, contender, length, kind)
            found.append(cell)
            if contender == "triton" and not right:
                cell.error = "the results are wrong; see the checks"
                continue
            before = taken.get((case.name, contender, kind))
            if before is not None:
                growth = (length / before[0]) ** (2 if contender == YARDSTICK else 1)
                if before[1] * growth > GIVE_UP:
                    cell.error = f"left out: a call took {before[1]:.2g} s at N = {before[0]}"
                    continue
            try:
                form = sdpa(length) if contender == YARDSTICK else case.form(contender, length)
                if contender == YARDSTICK and key in base:
                    cell.seconds = base[key]
                else:
                    call = _call(form, tensors, grad, both)
                    call()
                    cell.memory = memory.peak(call, plan.device)
                    cell.seconds = _time(plan, call)
            except Exception as error:
                cell.error = _line(error)
                continue
            finally:
                if not plan.smoke:
                    gc.collect()
                    torch.cuda.empty_cache()
            if contender == YARDSTICK:
                base[key] = cell.seconds
            taken[case.name, contender, kind] = (length, cell.seconds)
            _rate(plan, case, cell, both, peaks, base.get(key))
    return found


def _rate(
    plan: Plan,
    case: Case,
    cell: Cell,
    both: bool,
    peaks: dict[str, float],
    base: float | None,
) -> None:
    """Turn a time into rates and shares of the machine's peaks."""
    assert cell.seconds is not None
    cell.speed = None if base is None else base / cell.seconds
    if cell.contender == YARDSTICK:
        return  # its work is another one
    flops = case.flops(cell.length, both)
    if flops is not None:
        cell.tflops = flops / cell.seconds / 1e12
        cell.of_matmul = flops / cell.seconds / peaks["matmul"]
    moved = case.bytes(cell.length, both, DTYPES[plan.dtype].itemsize)
    cell.gbytes = moved / cell.seconds / 1e9
    cell.of_copy = moved / cell.seconds / peaks["copy"]


def _call(
    form: Form, tensors: tuple[Tensor, Tensor, Tensor], grad: Tensor, both: bool
) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return form(*tensors)

    def backward() -> object:
        return torch.autograd.grad(form(*tensors), tensors, grad)

    return backward if both else forward
