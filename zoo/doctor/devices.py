"""Processor, memory, accelerators, and whether Triton kernels can run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.doctor.lines import Line, note, ok, problem, reason
from zoo.report.environment import processor
from zoo.report.markdown import size

MEMINFO = Path("/proc/meminfo")
LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def devices() -> Iterator[Line]:
    """Say what there is to compute with."""
    cores, usable, threads = os.cpu_count() or 1, _usable(), torch.get_num_threads()
    text = f"{processor()}: {cores} cores, {usable} of them usable, torch uses {threads} threads"
    facts: dict[str, Any] = {
        "model": processor(),
        "cores": cores,
        "usable": usable,
        "threads": threads,
    }
    if threads > usable:
        yield note("cpu", text, f"set OMP_NUM_THREADS={usable}, or less for several runs", **facts)
    else:
        yield ok("cpu", text, **facts)
    yield _memory()
    yield from _cuda()
    mps = torch.backends.mps.is_available()
    if mps:
        yield ok("mps", "mps: Apple's GPU is there (trainer.accelerator=mps)", there=True)
    else:
        yield note("mps", "mps: no Apple GPU", there=False)


def _usable() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> Line:
    total, free = memory()
    if total is None:
        return note("memory", "the size of the memory is not known on this system")
    known = "" if free is None else f", {size(free)} of it free"
    return ok("memory", f"memory {size(total)}{known}", total=total, free=free)


def memory() -> tuple[int | None, int | None]:
    """Return total and free memory in bytes, None where unknown; a container's limit counts."""
    total = free = None
    try:
        pages = MEMINFO.read_text(encoding="utf-8").splitlines()
        values = {name: rest.split() for name, _, rest in (line.partition(":") for line in pages)}
        total = int(values["MemTotal"][0]) * 1024
        free = int(values["MemAvailable"][0]) * 1024
    except (OSError, LookupError, ValueError):
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None, None
    for path in LIMITS:
        try:
            limit = int(path.read_text(encoding="utf-8"))  # "max" is no number and no limit
        except (OSError, ValueError):
            continue
        total, free = min(total, limit), None if free is None else min(free, limit)
    return total, free


def _cuda() -> Iterator[Line]:
    built = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        why = f"torch is built for CUDA {built}" if built else "torch is built without CUDA"
        yield note("cuda", f"cuda: no device ({why})", there=False, built=built)
        return
    known = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        try:
            found = torch.cuda.get_device_properties(index)
            torch.zeros(1, device=name).add_(1).item()
        except Exception as error:  # the driver's errors are of many kinds
            text = f"{name} does not work: {reason(error)}"
            yield problem(name, text, "see whether another process holds it, and the driver")
            continue
        capability = f"{found.major}.{found.minor}"
        facts: dict[str, Any] = {
            "model": found.name,
            "memory": found.total_memory,
            "capability": capability,
        }
        text = f"{name}: {found.name}, {size(found.total_memory)}, capability {capability}"
        if known and f"sm_{found.major}{found.minor}" not in known:
            text = f"{text}; this torch has no code of its own for it"
            yield note(name, text, "see whether a newer torch has", **facts)
        else:
            yield ok(name, text, **facts)


def triton() -> Iterator[Line]:
    """Say whether the kernels can run here."""
    from zoo import kernels

    if not kernels.INSTALLED:
        yield note(
            "triton",
            "triton is not installed: every mechanism takes its plain torch form",
            "on Linux: pip install triton",
            runs="no",
        )
    elif os.environ.get("TRITON_INTERPRET") == "1":
        yield note(
            "triton",
            "TRITON_INTERPRET=1: kernels run in the interpreter, which is for tests and slow",
            runs="interpreter",
        )
    elif not torch.cuda.is_available():
        yield note(
            "triton",
            "without a CUDA device mechanisms take their plain torch form",
            "to try the kernels in Triton's interpreter, slowly: zoo kernels --smoke",
            runs="interpreter",
        )
    elif os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc"))):
        yield ok("triton", "Triton kernels run on the CUDA device", runs="cuda")
    else:
        yield problem(
            "triton",
            "Triton needs a C compiler to launch kernels, and there is none",
            "install gcc or clang, or set CC",
            runs="no",
        )
