"""Data sets: Lightning data modules for generated tasks, text and images, found by name.

>>> data = create("mqar", seq_len=32, vocab_size=64, pairs=4)
>>> data.task, data.vocab_size
('tagging', 64)
"""

from __future__ import annotations

from zoo.datasets.base import IGNORE, DataModule
from zoo.datasets.registry import Info, create, dataset, from_yaml, info
from zoo.datasets.registry import names as list

__all__ = ["IGNORE", "DataModule", "Info", "create", "dataset", "from_yaml", "info", "list"]
