"""A run that takes a second, and what to compare of two runs."""

from __future__ import annotations

# Dropout draws random numbers at every step, so a lost random state would show.
TINY = [
    *("data.vocab_size=32", "data.seq_len=16", "data.pairs=2", "data.val_size=40"),
    *("data.test_size=40", "batch=8", "model.dim=16", "model.heads=2", "model.depth=2"),
    *("model.dropout=0.2", "steps=30", "trainer.eval_every=8", "trainer.checkpoint_every=3"),
    "lr=1e-2",
]


def tiny(**changes):
    """The overrides with changes by key; None leaves one out."""
    found = dict(item.split("=", 1) for item in TINY)
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in found.items() if value is not None]


def outcome(record):
    return record.metrics, record.history, record.steps, record.status
