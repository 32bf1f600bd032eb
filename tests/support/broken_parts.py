"""Parts that are wrong on purpose, one promise each, and a sound one beside them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from zoo.parts import (
    Call,
    Combine,
    Layout,
    Normalize,
    Position,
    Score,
    Select,
    Strip,
    mask_scores,
)
from zoo.registry import Traits
from zoo.select.sliding_window import SlidingWindow


def _dot(strip: Strip) -> Tensor:
    keys = strip.k.repeat_interleave(strip.q.shape[1] // strip.k.shape[1], 1)
    return strip.q @ keys.transpose(-1, -2) * strip.scale


class SoundScore(Score):
    """A dot product with a temperature for each head (made up in 2026).

    Args:
        layout: Head counts and widths.
        start: Temperature at the start.
    """

    def __init__(
        self, layout: Layout, start: float = 1.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.heat = nn.Parameter(
            torch.full((layout.score_heads,), start, device=device, dtype=dtype)
        )

    def forward(self, strip: Strip) -> Tensor:
        """Scores (B, H, R, M)."""
        return _dot(strip) * self.heat[:, None, None]


class Untested(SoundScore):
    """Lives in the package and has no test file there."""

    __module__ = "zoo.score.untested"


class Undocumented(SoundScore):
    """Says nothing of its option (made up in 2026)."""

    def __init__(self, layout: Layout, start: float = 1.0, power: float = 1.0) -> None:
        super().__init__(layout, start)


class CountsOn(Score):
    """Weighs keys by their index, in whatever sequence they stand."""

    def forward(self, strip: Strip) -> Tensor:
        """Scores (B, H, R, M)."""
        return _dot(strip) * (1 + strip.k_index)


class HoldsAllPairs(Score):
    """Makes the scores of all pairs once, before the strips."""

    def prepare(self, call: Call) -> dict[str, Tensor]:
        keys = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
        return {"all": call.q @ keys.transpose(-1, -2) * call.scale}

    def forward(self, strip: Strip) -> Tensor:
        return strip.prepared("score")["all"][strip.batch, :, strip.rows, strip.keys]


class MixesBatch(Score):
    """Subtracts the mean over the samples."""

    def forward(self, strip: Strip) -> Tensor:
        scores = _dot(strip)
        return scores - scores.mean(0, keepdim=True)


class SeesHiddenKeys(Score):
    """Scales by the mean over all keys, hidden and future ones included."""

    def forward(self, strip: Strip) -> Tensor:
        return _dot(strip) * (1 + strip.call.k.mean((-1, -2), keepdim=True).tanh().mean(1, True))


class DependsOnStrip(Score):
    """Divides by the largest score of the strip instead of the row."""

    def forward(self, strip: Strip) -> Tensor:
        scores = _dot(strip)
        return scores / (1 + scores.detach().abs().amax((-1, -2), keepdim=True))


class DeadParameter(Score):
    """Has a parameter that reaches no output."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(dim))

    def forward(self, strip: Strip) -> Tensor:
        return _dot(strip)


class ZeroedParameter(DeadParameter):
    """Has a parameter whose gradient is always zero."""

    def forward(self, strip: Strip) -> Tensor:
        return _dot(strip) + 0 * self.unused.sum()


class WrongGradient(Score):
    """Forgets a factor in its hand-written backward pass."""

    class _Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, scores: Tensor) -> Tensor:
            return 2 * scores

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    def forward(self, strip: Strip) -> Tensor:
        return self._Double.apply(_dot(strip))


class Noisy(Score):
    """Draws from a generator that no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count(1)

    def forward(self, strip: Strip) -> Tensor:
        return _dot(strip) * next(self.count)


class NotPicklable(Score):
    """Holds a function that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.compare = lambda strip: _dot(strip)

    def forward(self, strip: Strip) -> Tensor:
        return self.compare(strip)


class Forgetful(Score):
    """Keeps what it needs outside the state_dict."""

    def __init__(self, heads: int, dtype: Any = None) -> None:
        super().__init__()
        self.heat = torch.rand(heads, dtype=dtype)

    def forward(self, strip: Strip) -> Tensor:
        return _dot(strip) * self.heat[:, None, None]


class HalfPrecisionSum(Score):
    """Adds and takes away a large number, which half precision does not survive."""

    def forward(self, strip: Strip) -> Tensor:
        return (_dot(strip) + 1000) - 1000


class BreaksGraph(Score):
    """Looks at a value while it computes."""

    def forward(self, strip: Strip) -> Tensor:
        scores = _dot(strip)
        return scores if float(scores.detach().mean()) > 0 else scores * 1.0


class _NoRule(torch.autograd.Function):
    """The identity, which torch.func is told nothing about."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class HasNoRule(Score):
    """Goes through a function that nobody can map over."""

    def forward(self, strip: Strip) -> Tensor:
        return _NoRule.apply(_dot(strip))


class InPlace(Combine):
    """Overwrites the layer's input."""

    def __init__(self, dim: int, dtype: Any = None) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim, bias=False, dtype=dtype)

    def forward(self, y: Tensor, x: Tensor, prepared: Any = None) -> Tensor:
        with torch.no_grad():
            x.mul_(0.5)
        return self.out(y.transpose(1, 2).flatten(2))


class WrongType(Combine):
    """Leaves float64 whatever comes in."""

    def forward(self, y: Tensor, x: Tensor, prepared: Any = None) -> Tensor:
        return y.transpose(1, 2).flatten(2).double()


class AlwaysCpu(Combine):
    """Makes its parameters where it likes."""

    def __init__(self, dim: int, dtype: Any = None) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim, bias=False, dtype=dtype)

    def forward(self, y: Tensor, x: Tensor, prepared: Any = None) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))


class NanOnEmptyRows(Normalize):
    """Divides nothing by nothing where all keys are hidden."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = weights if mask is None else weights * mask
        return weights / weights.sum(-1, keepdim=True)


class IgnoresMask(Normalize):
    """A softmax over hidden keys as well."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.softmax(-1)


class ForgetsMaskInOneRow(Normalize):
    """Thinks that a single row is a decoding step, with nothing to hide."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and scores.shape[-2] > 1:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1)


class AddsMasks(Normalize):
    """Gives its host a way in that knows masks made of numbers as numbers only."""

    def attach(self, host: Any) -> None:
        inner = host.forward

        def forward(x: Tensor, **inputs: Any) -> Any:
            if (bias := inputs.get("bias")) is not None:
                inputs["bias"] = bias.clamp(min=-9e3)
            return inner(x, **inputs)

        host.forward = forward

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return mask_scores(scores.abs(), mask).softmax(-1)  # what is far below is large


class Overflows(Normalize):
    """A softmax that does not subtract the largest score."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        weights = scores.exp() if mask is None else scores.exp() * mask
        return weights / weights.sum(-1, keepdim=True)


class Unnormalised(Normalize):
    """Says softmax, but its rows sum to one half."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) / 2


class PrefersEven(Normalize):
    """Prefers even positions, though it claims to be equivariant."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        even = torch.arange(scores.shape[-1], device=scores.device) % 2 == 0
        scores = scores + even
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1)


class CountsFromZero(Position):
    """A bias by row of the strip, so that a cached query thinks it is the first."""

    biases = True
    traits = Traits(equivariant=False)

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        assert scores is not None
        rows = torch.arange(scores.shape[-2], device=scores.device)
        return scores - 0.5 * (rows[:, None] - strip.k_index).abs()


class IgnoresPositions(Position):
    """A bias that looks at shapes and not at the positions that it is given."""

    biases = True
    traits = Traits(equivariant=False)

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return scores - 0.1 * (strip.call.q_pos.ndim * strip.q_index)[:, None] * strip.k_index


class KeepsTooMuch(SlidingWindow):
    """A window that never tells the cache."""

    def window(self) -> None:
        return None


class KeepsTooLittle(SlidingWindow):
    """A window whose cache is a token short."""

    def window(self) -> int | None:
        known = super().window()
        return None if known is None else known - 2


class IgnoresBias(Normalize):
    """Throws the scores away, and with them any bias."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        flat = torch.zeros_like(scores)
        if mask is not None:
            flat = flat.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return flat.softmax(-1) + 0 * scores


class Idle(Select):
    """Hides nothing: no different from the default."""

    def allow(self, strip: Strip) -> Tensor | None:
        return None


class NoDefault(Score):
    """Takes an option without a default."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()


class ManyArguments(Score):
    """Takes any number of arguments."""

    def __init__(self, *sharpness: float) -> None:
        super().__init__()
