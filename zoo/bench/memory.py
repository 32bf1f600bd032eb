"""Peak memory of one call, beyond what was held before it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

METHODS = {
    "cpu": "peak of torch's own CPU allocations during one call (torch.profiler)",
    "cuda": "torch.cuda.max_memory_allocated during one call",
}


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes that a call holds at its peak, results included, on top of what was there before.

    On a CPU the running sum of every allocation and release is followed, those inside fused
    operators included. The resident set of the process would need pages to be given back between
    calls to say the same, and rounds to pages.

    Args:
        call: What is measured; it has run before, so that one-time set-up does not count.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it chats on standard error
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = highest = 0
    events = found.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
