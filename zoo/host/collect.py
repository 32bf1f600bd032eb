"""What a model's layers leave behind: auxiliary losses and captured passes; and padding masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.host.attention import Attention, Captured


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """Auxiliary losses of the last forward pass, summed over layers by name.

    Parts put them into their `aux_losses`; training adds the sum to the task's loss.
    """
    total: dict[str, Tensor] = {}
    for module in model.modules():
        losses = getattr(module, "aux_losses", None)
        if isinstance(losses, dict):
            for name, value in losses.items():
                total[name] = total[name] + value if name in total else value
    return total


@contextmanager
def capture(model: nn.Module) -> Iterator[dict[str, list[Captured]]]:
    """Record every attention layer of a model inside the block.

    Yields:
        Passes of each layer by module name. Where the block around the layer has a ``norm1``
        (blocks of the zoo and of timm), the norm's input is recorded as well.

    Raises:
        ZooError: The model has no attention layer of the zoo.
    """
    hosts = {name: m for name, m in model.named_modules() if isinstance(m, Attention)}
    if not hosts:
        raise ZooError(f"{type(model).__name__} has no attention layer of the zoo to capture")
    with ExitStack() as stack:
        found: dict[str, list[Captured]] = {}
        for name, host in hosts.items():
            norm = _norm_before(model, name)
            seen: list[Tensor] = []
            if norm is not None:

                def remember(module: nn.Module, args: Any, seen: list[Tensor] = seen) -> None:
                    seen.append(args[0])

                stack.callback(norm.register_forward_pre_hook(remember).remove)

                def attach(
                    module: nn.Module, args: Any, out: Any, seen: list[Tensor] = seen
                ) -> None:
                    assert isinstance(module, Attention)
                    if module._recorder and seen:
                        module._recorder[-1].norm_input = seen[-1]

                stack.callback(host.register_forward_hook(attach).remove)
            found[name] = stack.enter_context(host.capture())
        yield found


def _norm_before(model: nn.Module, name: str) -> nn.Module | None:
    """Find the ``norm1`` of the block that holds a layer, directly or inside an adapter."""
    for _ in range(2):
        name = name.rpartition(".")[0]
        norm = getattr(model.get_submodule(name), "norm1", None)
        if isinstance(norm, nn.Module):
            return norm
    return None


def padding_mask(lengths: Tensor, length: int | None = None) -> Tensor:
    """Mask that hides padding at the end.

    Args:
        lengths: (B,) number of real tokens of each sample.
        length: Tokens N of the padded batch; default the longest.

    Returns:
        (B, 1, 1, N), True at real tokens.
    """
    size = int(lengths.max()) if length is None else length
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None, None]
