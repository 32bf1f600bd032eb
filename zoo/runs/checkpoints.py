"""Checkpoints that a kill cannot spoil, and the random state that belongs to them."""

from __future__ import annotations

import contextlib
import io
import os
import random
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from zoo.errors import ZooError

LAST = "last.ckpt"
KEEPER = "Keeper"
"""Where the keeper's state is in a checkpoint, among those of the callbacks."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there in one step.

    Lightning's own writes into the system's folder for temporary files and then copies where that
    is another file system, which a kill can cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: The file; its folder is created.
            storage_options: Refused.
        """
        if storage_options is not None:
            raise ZooError("storage_options belong to remote storage; a run folder is local")
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        replace_bytes(Path(path), buffer.getbuffer())


def replace_bytes(path: Path, content: bytes | memoryview) -> None:
    """Put a file in place in one step.

    Args:
        path: The file; its folder is created.
        content: All of its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(draft, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run onto the CPU.

    Args:
        path: The file.

    Raises:
        ZooError: It is missing, cannot be read, or is something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ZooError(f"{path} does not exist; there is nothing to go on from") from None
    except Exception as error:  # pickle and zip readers raise many kinds
        raise ZooError(f"{path} is not a readable checkpoint: {_line(error)}") from None
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= set(checkpoint):
        raise ZooError(f"{path} is not a checkpoint of a run of the zoo")
    return checkpoint


def best_path(folder: Path, best: dict[str, float]) -> Path:
    """Return where the best checkpoint is.

    Args:
        folder: Folder of the checkpoints.
        best: Its row of the history.
    """
    return folder / f"best-{int(best['step']):07d}.ckpt"


def keeper_state(path: Path, config_hash: str) -> dict[str, Any]:
    """Read what the keeper of a run wrote into its last checkpoint.

    Args:
        path: The checkpoint.
        config_hash: Hash of the configuration that it must belong to.

    Raises:
        ZooError: It cannot be read, or belongs to something else.
    """
    state = read_checkpoint(path).get("callbacks", {}).get(KEEPER)
    if state is None:
        raise ZooError(f"{path} is not a checkpoint of a run of the zoo")
    if state["config_hash"] != config_hash:
        raise ZooError(
            f"{path} was made with another configuration than this; "
            "start a new run, or restore the old configuration"
        )
    return state


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:120] or type(error).__name__


def random_state() -> dict[str, Any]:
    """Return the state of all random generators, as plain data and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (a part may use the global state)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put all random generators back into a state.

    Args:
        state: What `random_state` returned.
    """
    torch.set_rng_state(state["torch"].cpu())
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
