"""What whole mixers share: their constructor, and the checks that the host makes for parts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks, inputs
from zoo.cache import LayerCache
from zoo.errors import ZooError


def check_sizes(dim: int, heads: int, dropout: float) -> None:
    """Refuse sizes that the host would refuse.

    Args:
        dim: Channels.
        heads: Heads; they must divide `dim`.
        dropout: In [0, 1).

    Raises:
        ZooError: A size does not fit.
    """
    for name, value in (("dim", dim), ("heads", heads)):
        checks.whole(name, value)
    if dim % heads:
        near = [h for h in range(1, dim + 1) if dim % h == 0]
        best = min(near, key=lambda h: abs(h - heads))
        raise ZooError(f"dim={dim} is not divisible by heads={heads}; nearest allowed heads={best}")
    checks.number("dropout", dropout, 0, below=1)


def check_input(
    name: str, dim: int, x: Tensor, mask: Tensor | None, cache: LayerCache | None
) -> Tensor | None:
    """Check the input of a mixer that can hide keys only, and bring its mask to (B, N).

    Args:
        name: Registry name of the mixer.
        dim: Channels that it was made for.
        x: (B, N, C).
        mask: Boolean (B|1, 1, 1, N), or with all tokens since the first of the cache, or None.
        cache: The layer's cache, or None.

    Returns:
        True at the tokens of x that may be seen, (B, N), or None for all.

    Raises:
        ZooError: `x` or `mask` has the wrong shape or type.
    """
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ZooError(f"x of shape {tuple(x.shape)} must be (batch, tokens, dim={dim})")
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ZooError(f"mask has dtype {mask.dtype}; allowed: torch.bool with True = may attend")
    samples, length = x.shape[:2]
    total = length + (cache.length if cache is not None else 0)
    if (
        mask.ndim != 4
        or mask.shape[0] not in (1, samples)
        or mask.shape[1:3] != (1, 1)
        or mask.shape[3] not in (length, total)
    ):
        raise ZooError(
            f"{name!r} can hide keys only: mask must have shape (batch, 1, 1, keys) with "
            f"batch={samples} and keys={total}, got {tuple(mask.shape)}"
        )
    return mask[:, 0, 0, -length:].expand(samples, length)


class Mixer(nn.Module):
    """A module that mixes tokens (B, N, C) by itself and knows no keys of others.

    Args:
        dim: Channels C.
        heads: Heads that dropout draws for separately; they must divide `dim`.
        causal: Only tokens up to the own one are seen.
        bias: Biases in the projections.
        dropout: Share of what is dropped in training.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size does not fit.
    """

    # What errors call it: its name in the registry.
    name: ClassVar[str]
    # True where reset_parameters must run again after a model has applied its own initialisation.
    special_init: ClassVar[bool] = False
    proj: nn.Linear

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim, heads, dropout)
        inputs.placed(device, dtype)
        self.dim, self.heads, self.causal, self.dropout = dim, heads, causal, dropout
        self.make_layers({"bias": bias, "device": device, "dtype": dtype})

    def make_layers(self, made: dict[str, Any]) -> None:
        """Make the parameters.

        Args:
            made: Bias, device and type of every layer.
        """
        raise NotImplementedError

    def mix(self, x: Tensor, seen: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Mix tokens.

        Args:
            x: (B, N, C).
            seen: True at the tokens that may be seen, (B, N), or None for all.
            cache: State after the tokens before these, or None.

        Returns:
            (B, N, C).
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: (B, N, C).
            mask: Boolean, True may be seen, (B|1, 1, 1, N).
            positions: Of no effect, as in a host without a position part.
            cache: Keeps what later tokens need of these.

        Raises:
            ZooError: `x` or `mask` has the wrong shape or type.
        """
        inputs.tensor("x", x)
        inputs.tensors(mask=mask, positions=positions)
        if cache is not None:
            inputs.layer_cache(cache)
        seen = check_input(self.name, self.dim, x, mask, cache)
        inputs.like_weights(self, "x", x)
        if not x.shape[1]:
            return self.proj(x)  # an empty chunk leaves the cache as it is
        y = self.mix(x, seen, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return y

    def reset_parameters(self) -> None:
        """Initialise the parameters as the paper does, for mixers with `special_init`."""

    def tie(self, first: Mixer) -> None:
        """Share parameters with `first`, the mixer of this class in a model's first such layer.

        Models call it on every layer; mixers that share nothing between layers ignore it.
        """

    def drop_values(self, v: Tensor) -> Tensor:
        """Drop whole values (B, N, C) of a head, in training."""
        if not (self.training and self.dropout):
            return v
        kept = F.dropout(v.new_ones(*v.shape[:2], self.heads, 1), self.dropout)
        return (v.unflatten(-1, (self.heads, -1)) * kept).flatten(2)


class ValueMixer(Mixer):
    """A mixer with the value and output projections of multi-head attention, and no others."""

    def make_layers(self, made: dict[str, Any]) -> None:
        """W_V and W_O."""
        self.v = nn.Linear(self.dim, self.dim, **made)
        self.proj = nn.Linear(self.dim, self.dim, **made)
