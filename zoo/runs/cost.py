"""What a model costs: parameters, operations, decoding state, memory."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor, nn

from zoo.cache import Cache
from zoo.host.spec import parse
from zoo.models.language.decoder_lm import DecoderLM
from zoo.ops import flops as operations


def parameters(model: nn.Module) -> int:
    """Return the number of trained parameters, shared ones counted once.

    Args:
        model: The model.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def flops(model: nn.Module, *example: Tensor) -> int:
    """Return the floating point operations of a forward pass, as `zoo.ops.flops` counts them.

    Args:
        model: The model, in evaluation mode.
        example: Its inputs for one sequence or image.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # The counter looks for the history of a view of a parameter, which there is none of here.
    for p in trained:
        p.requires_grad_(False)
    try:
        return operations.count(lambda: model(*example))
    finally:
        for p in trained:
            p.requires_grad_(True)


@torch.no_grad()
def state_bytes(model: nn.Module, tokens: Tensor) -> int | None:
    """Return the bytes that decoding keeps after a sequence; None if there is no such thing.

    Args:
        model: The model, in evaluation mode.
        tokens: (1, T).
    """
    if not isinstance(model, DecoderLM):
        return None
    parts = [part for spec in model.specs for part in parse(spec)]
    if not all(part.entry.traits.decode for part in parts):
        return None
    cache = Cache()
    model(tokens, cache=cache)
    return cache.nbytes


def peak_memory(device: torch.device) -> int:
    """Return the highest memory use in bytes.

    On a CUDA device it is the most that torch had in use since the last reset of its statistics;
    elsewhere the highest resident memory of this process since it began, its libraries included.

    Args:
        device: Where the model was trained.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
