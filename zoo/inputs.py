"""At the door of every module: inputs that are no tensors, or not of the module's type or device.

Legend: B batch, N tokens, M keys, H heads. The checks look at nothing that no compiler knows, so
that they cost nothing under torch.compile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.errors import ZooError

HIDDEN = -1e4
"""Entries of an additive mask at or below this hide a pair.

No score is lowered by so much for any other reason: -inf, the lowest numbers of float16, bfloat16,
float32 and float64, and the -1e4 and -1e9 of hand-written masks all lie there.
"""


def tensor(name: str, value: object) -> None:
    """Require a tensor.

    Args:
        name: Name of the argument.
        value: Its value.

    Raises:
        ZooError: It is something else.
    """
    if not isinstance(value, Tensor):
        raise ZooError(f"{name} is of type {type(value).__name__}; allowed: a torch.Tensor")


def tensors(**values: object) -> None:
    """Require tensors, or None where an argument is left out.

    Args:
        values: The arguments by name.

    Raises:
        ZooError: One of them is something else.
    """
    for name, value in values.items():
        if value is not None:
            tensor(name, value)


def layer_cache(value: object) -> None:
    """Require the cache of one layer.

    Args:
        value: The argument `cache`.

    Raises:
        ZooError: It is something else, such as the cache of a whole model.
    """
    if not isinstance(value, LayerCache):
        raise ZooError(
            f"cache is of type {type(value).__name__}; allowed: the LayerCache of this layer, "
            "such as cache[0] of a Cache"
        )


def like_weights(module: nn.Module, name: str, x: Tensor) -> None:
    """Require an input of the type and on the device of a module's weights.

    Args:
        module: The module; one without weights takes anything.
        name: Name of the argument.
        x: The input.

    Raises:
        ZooError: It is not floating point, or its type or device are others. Under autocast, which
            converts, the type may differ.
    """
    if not x.is_floating_point():
        raise ZooError(f"{name} has dtype {x.dtype}; allowed: floating point")
    if torch.compiler.is_compiling():
        return  # which would go through all weights each time it traces
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None:
        return
    if x.device != weight.device:
        raise ZooError(
            f"{name} is on {x.device}, but the weights of {type(module).__name__} are on "
            f"{weight.device}; move one of them with .to(...)"
        )
    if x.dtype != weight.dtype and not _autocast(x.device.type):
        raise ZooError(
            f"{name} has dtype {x.dtype}, but the weights of {type(module).__name__} have "
            f"{weight.dtype}; convert one of them with .to(...), or use torch.autocast"
        )


def guard(cls: type[nn.Module], shape: str) -> None:
    """Put the checks of x in front of the `forward` of a module class, its own or inherited.

    Args:
        cls: A class of modules whose `forward` takes x first.
        shape: Names of the axes of x, such as "batch, channels, height, width".
    """
    inner = cls.forward
    if getattr(inner, "guarded", False):
        return  # by its base
    if cls.__module__.partition(".")[0] in ("timm", "torch"):
        return  # the class belongs to others, who use it as it is
    rank = len(shape.split(","))

    @functools.wraps(inner)
    def forward(self: nn.Module, x: Tensor, *args: Any, **options: Any) -> Any:
        tensor("x", x)
        if x.ndim != rank:
            raise ZooError(f"x of shape {tuple(x.shape)} must be ({shape})")
        like_weights(self, "x", x)
        tensors(**{name: value for name, value in options.items() if name in ("mask", "slots")})
        return inner(self, x, *args, **options)

    forward.guarded = True  # type: ignore[attr-defined]
    cls.forward = forward


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def split_bias(bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Tell a mask that is written as numbers from a bias.

    A normalizer that is not a softmax would give hidden pairs weight, or NaN, if they were hidden
    by numbers alone; so what can only be a mask becomes one.

    Args:
        bias: Floating point; entries at or below `HIDDEN` hide a pair.

    Returns:
        Boolean mask, True may attend, or None where nothing is hidden; and the bias with zeros at
        hidden pairs, or None where it is zero everywhere.
    """
    hidden = bias <= HIDDEN
    rest = bias.masked_fill(hidden, 0.0)
    if not _readable(bias):
        return ~hidden, rest
    if not bool(hidden.any()):
        return None, bias
    return ~hidden, rest if bias.requires_grad or bool(rest.any()) else None


def _readable(x: Tensor) -> bool:
    """Whether a program may branch on the numbers of a tensor."""
    if torch.compiler.is_compiling() or x.is_meta or torch._C._functorch.is_batchedtensor(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Pairs that two masks of rank 2 or 4 leave.

    Args:
        a: (N, M) or (B|1, H|1, N|1, M|1), or None for all pairs.
        b: The same.
    """
    if a is None or b is None:
        return b if a is None else a
    if a.ndim != b.ndim:
        a, b = (x[None, None] if x.ndim == 2 else x for x in (a, b))
    return a & b


def begins_hidden(mask: Tensor) -> bool:
    """Whether a sample begins with hidden keys and has others: padding on the left.

    Args:
        mask: Boolean, (B, 1, 1, M). Not read while compiling, which gives False.
    """
    if not _readable(mask) or mask.shape[-1] == 0:
        return False
    return bool((~mask[..., 0] & mask.any(-1)).any())


def placed(device: object, dtype: object) -> None:
    """Require what says where and as what type parameters are made.

    Args:
        device: A device, its name, or None.
        dtype: A floating point type, or None.

    Raises:
        ZooError: It is neither.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ZooError(f"dtype={dtype!r} must be a floating point torch.dtype, or None")
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        why = str(error).split("\n")[0]
        raise ZooError(f"device={device!r} must be a torch.device or its name: {why}") from None
