"""The setting of a run: seeded, deterministic, quiet; put back as it was afterwards."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng

# What Lightning and torch warn of although it is meant to be so: batches are prepared in the
# training process because they cost little; a resumed loader starts at the right step by itself;
# an evaluation set may be smaller than the logging interval; kernels without a deterministic form
# are used as they are; Lightning still uses a name of torch that is on its way out.
_EXPECTED = (
    r".*does not have many workers.*",
    r".*your dataloader is not resumable.*",
    r".*is smaller than the logging interval.*",
    r".*treespec, LeafSpec.*",
    r".*does not have a deterministic implementation.*",
)
_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_VARIABLES = (
    *("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG"),
    # What a run on several devices leaves, and the next one would take for its own.
    *("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def setting(seed: int) -> Iterator[None]:
    """Seed everything, ask for deterministic kernels, and silence what is expected.

    Args:
        seed: Seed of all generators.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    kernels = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    threads = threading.current_thread() is threading.main_thread()
    interrupt = signal.getsignal(signal.SIGINT)
    grouped = _grouped()
    try:
        with warnings.catch_warnings(), isolate_rng():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message=message)
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            # Filling fresh memory makes bugs repeatable, at a price; no part may read it anyway.
            memory.fill_uninitialized_memory = False
            seed_everything(seed, workers=True, verbose=False)
            yield
    finally:
        if _grouped() and not grouped:
            torch.distributed.destroy_process_group()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.use_deterministic_algorithms(kernels, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
        if threads and interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)  # Lightning ignores it after the first one
