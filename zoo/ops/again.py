"""Second derivatives of functions whose own backward pass gives first ones only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def differentiate_again(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that can be differentiated once more, through a form that autograd knows.

    Args:
        outputs: Made of the inputs once more, in plain operations.
        inputs: What the function was given; None for what was not.
        needed: Which of them want a gradient.
        grads: Gradients of the outputs; None where none arrives.

    Returns:
        A gradient for each input, or None where it is not needed.
    """
    pairs = zip(outputs, grads, strict=True)
    reached = [(y, grad) for y, grad in pairs if grad is not None and y.requires_grad]
    wanted = [x for x, flag in zip(inputs, needed, strict=True) if flag and x is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in reached],
            wanted,
            [grad for _, grad in reached],
            create_graph=True,
            materialize_grads=True,
        )
    )
    return [next(found) if flag else None for flag in needed]
