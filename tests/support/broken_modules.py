"""Attend parts and whole modules that are wrong on purpose, and a sound one beside them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.errors import ZooError
from zoo.parts import Attend, Call
from zoo.registry import Traits


class Leaks(Attend):
    """Accepts causal=True and ignores it."""

    traits = Traits(mask="none", bias=False, decode=False, weights=False, cross=False)

    def forward(self, call: Call) -> Tensor:
        heads = call.q.shape[1]
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (call.k, call.v))
        return F.scaled_dot_product_attention(call.q, k, v)


class LeaksByValue(Attend):
    """Hides its leak from the gradient: a factor from the future, detached."""

    traits = Traits(mask="none", bias=False, decode=False, weights=False, cross=False)

    def forward(self, call: Call) -> Tensor:
        heads = call.q.shape[1]
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (call.k, call.v))
        y = F.scaled_dot_product_attention(call.q, k, v, is_causal=call.causal)
        return y * call.k.detach().mean()


class AlwaysCausal(Attend):
    """Accepts causal=False and stays causal."""

    traits = Traits(mask="none", bias=False, decode=False, weights=False, cross=False)

    def forward(self, call: Call) -> Tensor:
        heads = call.q.shape[1]
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (call.k, call.v))
        return F.scaled_dot_product_attention(call.q, k, v, is_causal=True)


class FalseWeights(Attend):
    """Shows weights that it did not use."""

    traits = Traits(mask="none", bias=False, decode=False, cross=False)

    def forward(self, call: Call) -> Tensor:
        heads = call.q.shape[1]
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (call.k, call.v))
        return F.scaled_dot_product_attention(call.q, k, v, is_causal=call.causal)

    def weights(self, call: Call) -> Tensor:
        return torch.ones_like(call.q @ call.k.transpose(-1, -2)).tril()


class IgnoresDropout(FalseWeights):
    """Never drops a weight, whatever the host asks."""


class ModuloHeads(Attend):
    """Gives query head h the key head h mod G."""

    traits = Traits(mask="none", bias=False, decode=False, weights=False, cross=False)

    def forward(self, call: Call) -> Tensor:
        times = call.q.shape[1] // call.k.shape[1]
        k, v = (t.repeat(1, times, 1, 1) for t in (call.k, call.v))
        return F.scaled_dot_product_attention(call.q, k, v, is_causal=call.causal)


class GrowingState(Attend):
    """A running mean that keeps all values, though it is of linear cost."""

    traits = Traits(mask="none", bias=False, weights=False, cross=False, bidirectional=False)

    def forward(self, call: Call) -> Tensor:
        v = call.v if call.cache is None else call.cache.extend("v", call.v)
        count = torch.arange(1, v.shape[2] + 1, dtype=v.dtype)[:, None]
        mean = v.cumsum(2) / count
        mean = mean[:, :, -call.q.shape[2] :]
        return mean.repeat_interleave(call.q.shape[1] // v.shape[1], 1) + 0 * call.q


class SeesHiddenContext(Attend):
    """Adds the mean of the whole context to what it attends to."""

    traits = Traits(mask="keys", bias=False, decode=False, weights=False)

    def forward(self, call: Call) -> Tensor:
        heads = call.q.shape[1]
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (call.k, call.v))
        y = F.scaled_dot_product_attention(call.q, k, v)
        return y + v.mean(2, keepdim=True)


class AcceptsAnything(nn.Module):
    """A mixer that declares no masks and no decoding, and swallows both."""

    kind = "mixer"
    traits = Traits(
        decode=False, weights=False, cross=False, bias=False, mask="none", bidirectional=False
    )

    def __init__(self, dim: int, heads: int, causal: bool = False, dtype: Any = None) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim, dtype=dtype)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        return self.out(x)


class SoundFeature(nn.Module):
    """A gate on each channel of a feature map from its mean (made up in 2026).

    Args:
        channels: Channels C.
        device: Where parameters are made.
        dtype: Their type.
    """

    kind = "feature"

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) from the same."""
        return x * self.gate(x.mean((2, 3))).sigmoid()[..., None, None]


class MixingFeature(SoundFeature):
    """A gate from the mean over the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((0, 2, 3))).sigmoid()[:, None, None]


class ShrinkingFeature(SoundFeature):
    """Loses a row of pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:, :]


class OpenDoor(SoundFeature):
    """Says that its door is guarded, and takes what comes."""

    def forward(self, x: Any) -> Tensor:
        return super().forward(x) if isinstance(x, Tensor) else torch.zeros(())

    forward.guarded = True


class NoisyFeature(SoundFeature):
    """Draws from a generator that no seed reaches."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, device, dtype)
        self.count = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(self.count)


class LayoutFeature(SoundFeature):
    """Reads the memory instead of the map."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return super().forward(x) * (2 if last else 1)


class SoundSlots(nn.Module):
    """A weighted mean for each slot (made up in 2026).

    Args:
        dim_in: Channels of the inputs.
        dim: Channels of a slot.
        slots: Slots K.
        device: Where parameters are made.
        dtype: Their type.
    """

    kind = "slots"

    def __init__(
        self, dim_in: int, dim: int = 64, slots: int = 7, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.k = nn.Linear(dim_in, dim, bias=False, **made)
        self.start = nn.Parameter(torch.ones(slots, dim, **made))

    def begin(self, x: Tensor, slots: Tensor | None, generator: Any) -> Tensor:
        """Given slots, or random ones."""
        if slots is None:
            noise = torch.randn((len(x), *self.start.shape), generator=generator, dtype=x.dtype)
            return self.start * noise
        if slots.shape[-1] != self.start.shape[1]:
            raise ZooError("slots have the wrong width")
        return slots

    def weigh(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax over slots, zero where hidden, mean over inputs."""
        w = scores.softmax(-1) + 1e-8
        if mask is not None:
            if mask.shape != w.shape[:2]:
                raise ZooError("mask has the wrong shape")
            w = w * mask[..., None]
        return w / w.sum(1, keepdim=True)

    def forward(
        self,
        x: Tensor,
        slots: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        generator: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """(B, N, C) to (B, K, D)."""
        s = self.begin(x, slots, generator)
        k = self.k(x)
        w = self.weigh(k @ s.mT / k.shape[-1] ** 0.5, mask)
        y = s + w.mT @ k
        return (y, w) if return_weights else y


class OrderedSlots(SoundSlots):
    """Prefers its first slot."""

    def weigh(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return super().weigh(scores + torch.arange(scores.shape[-1]).to(scores), mask)


class OrderedInputs(SoundSlots):
    """Prefers its first input."""

    def weigh(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        w = super().weigh(scores, mask) * torch.arange(1, scores.shape[1] + 1).to(scores)[:, None]
        return w / w.sum(1, keepdim=True)


class SeesHiddenInputs(SoundSlots):
    """Checks the mask and forgets it."""

    def weigh(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        super().weigh(scores, mask)
        return super().weigh(scores, None)


class GlobalChance(SoundSlots):
    """Has no use for a generator."""

    def begin(self, x: Tensor, slots: Tensor | None, generator: Any) -> Tensor:
        return super().begin(x, slots, None)
