"""Golden files: where they are, what is in one, and how one is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"

Golden = tuple[dict[str, Tensor], dict[str, Any]]


def load(path: Path) -> Golden:
    """Tensors and metadata of a file, values that are JSON read."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata: dict[str, Any] = {}
        for key, value in (file.metadata() or {}).items():
            try:
                metadata[key] = json.loads(value)
            except json.JSONDecodeError:
                metadata[key] = value
    return tensors, metadata


def read(name: str) -> Golden:
    """The golden file of this name; also for lists of cases, which are needed at collection."""
    return load(GOLDEN / f"{name}.safetensors")


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a file that `load` reads back."""
    plain = {key: x.detach().contiguous() for key, x in tensors.items()}
    words = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    save_file(plain, str(path), words)


def under(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `start`, by the rest of their names."""
    return {key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}
