"""Regional attention (Liu, Li and Guo 2024, "Regional Attention for Shadow Removal").

Every pixel of a map looks at a window of K x K pixels around it, d apart, so that a region under a
shadow sees its lit surroundings. It is neighborhood attention with a relative position bias:

    q, k, v = x W_qkv + b_qkv                        x (B, H, W, C), heads h of D = C / h
    s_im    = q_i . k_m / sqrt(D) + rpb[(m - i) / d + K - 1]           m in the window of i
    y_i     = sum_m softmax_m(s_im) v_m,   out = y W + b               rpb (h, 2 K - 1, 2 K - 1)

Both axes follow one rule, with N = K div 2: keys are of the query's residue class modulo d, and a
window near a border moves inwards, so that every query has exactly K x K keys (NATTEN 0.15.1; later
versions dropped the bias). A map shorter than K d along an axis is filled up with zeros at its end
before the projection: what fills up takes part as keys, whose value is the bias of the projection.

Cost H W K^2 C. The windows are those of `zoo.select.neighborhood`, whose tiles with halos do the
work; a copy of its K x K keys for each query, as below in the reference, moves K^2 times as much
memory as it computes with.

Code and paper. The mask of the shadow does not enter the attention of the released code: a region
is the window alone, and so it is here. `key_mask_bias` is our variant: a constant on the scores of
keys outside the mask.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.host.backends import Backends
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.select.neighborhood import neighborhood_attention

BACKENDS = ("auto", "reference", "torch")


def _axis_reference(length: int, kernel: int, dilation: int) -> tuple[list[int], list[int]]:
    """First key of each query along an axis, and the first entry of the bias table it reads."""
    starts, entries = [], []
    half = kernel // 2
    for i in range(length):
        start = i - half * dilation
        if start < 0:
            start = i % dilation
        elif i + half * dilation >= length:
            last = length - 1 - (length - 1 - i) % dilation  # of the residue class
            start = last - (kernel - 1) * dilation
        starts.append(start)
        entries.append((start - i) // dilation + kernel - 1)
    return starts, entries


def regional_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: int = 11,
    dilation: int = 2,
    *,
    rpb: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The equation with a copy of its keys and values for each query.

    Args:
        q: (B, h, H, W, D), H and W at least `kernel` times `dilation`.
        k: (B, h, H, W, D).
        v: (B, h, H, W, D).
        kernel: Keys K of a window along each axis, odd.
        dilation: Distance d of neighbours.
        rpb: (h, 2 K - 1, 2 K - 1), or None.
        scale: Factor on dot products; default ``1 / sqrt(D)``.
        key_bias: Added to the scores of keys, (B, H, W), or None.
        dropout: On the weights.

    Returns:
        (B, h, H, W, D).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    steps = torch.arange(kernel, device=q.device)
    index, entries = [], []
    for length in q.shape[2:4]:
        first, entry = (
            torch.tensor(x, device=q.device) for x in _axis_reference(length, kernel, dilation)
        )
        index.append(first[:, None] + steps * dilation)  # (L, K)
        entries.append(entry[:, None] + steps)
    rows, columns = index[0][:, None, :, None], index[1][None, :, None, :]
    near_k, near_v = k[:, :, rows, columns], v[:, :, rows, columns]  # (B, h, H, W, K, K, D)
    scores = torch.einsum("bhijd,bhijmnd->bhijmn", q, near_k) * scale
    if rpb is not None:
        scores = scores + rpb[:, entries[0][:, None, :, None], entries[1][None, :, None, :]]
    if key_bias is not None:
        scores = scores + key_bias[:, None, rows, columns]
    weights = F.dropout(scores.flatten(-2).softmax(-1), dropout).view(scores.shape)
    return torch.einsum("bhijmn,bhijmnd->bhijd", weights, near_v)


@register(
    "regional",
    kind="feature",
    contender="regional(kernel=3, dilation=1)",
    paper=Paper("Regional Attention for Shadow Removal", 2024, "2411.14201"),
    traits=Traits(cost="H * W * kernel ** 2 * C"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="local",
        representations="single",
        alignment="scaled_dot",
        distribution="softmax",
        complexity="linear",
        modality=("image",),
        trainable_params=True,
        family="token_mixer",
    ),
    parameters=(
        "4 * channels ** 2 + (3 * qkv_bias + 1) * channels"
        " + rel_pos_bias * heads * (2 * kernel - 1) ** 2"
    ),
)
class RegionalAttention(Backends, nn.Module):
    """Attention of every pixel to a dilated window around it, with a relative position bias.

    Args:
        channels: Channels C.
        heads: Heads; must divide `channels`.
        kernel: Keys of a window along each axis, odd and at least 3.
        dilation: Distance of neighbours.
        qkv_bias: Biases in the projection of q, k and v.
        rel_pos_bias: Learn a bias for each head and distance.
        scale: Factor on dot products; default ``(C / heads) ** -0.5``.
        dropout: On the attention weights, in training.
        proj_dropout: On the output, in training.
        key_mask_bias: Added to the scores of keys outside the mask that `forward` is given; None
            (the paper) takes no mask.
        backend: "auto" and "torch" take the windows of `zoo.select.neighborhood`, "reference"
            copies its keys for each query.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size that does not fit, or an unknown backend.
    """

    kind = "feature"
    special_init = True

    routes = ("torch", "reference")

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        kernel: int = 11,
        dilation: int = 2,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
        key_mask_bias: float | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels, heads = checks.whole("channels", channels), checks.whole("heads", heads)
        kernel = checks.odd("kernel", kernel, 3, also="so that a window has a middle")
        dilation = checks.whole("dilation", dilation)
        if channels % heads:
            raise ZooError(f"heads={heads} must divide channels={channels}")
        for name, flag in (("qkv_bias", qkv_bias), ("rel_pos_bias", rel_pos_bias)):
            checks.flag(name, flag)
        for name, rate in (("dropout", dropout), ("proj_dropout", proj_dropout)):
            checks.number(name, rate, 0, below=1)
        scale = checks.optional(checks.number)("scale", scale)
        key_mask_bias = checks.optional(checks.number)("key_mask_bias", key_mask_bias)
        checks.choice("backend", backend, BACKENDS)
        self.channels, self.heads, self.backend = channels, heads, backend
        self.kernel, self.dilation = kernel, dilation
        self.scale = (channels // heads) ** -0.5 if scale is None else scale
        self.dropout, self.key_mask_bias = dropout, key_mask_bias
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias, device=device, dtype=dtype)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            shape = (heads, 2 * kernel - 1, 2 * kernel - 1)
            self.rpb = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.proj = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.proj_dropout = nn.Dropout(proj_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02 for the table, as in NATTEN; hosts keep their own elsewhere."""
        if self.rpb is not None and not self.rpb.is_meta:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: Map (B, C, H, W).
            mask: Boolean, True inside (the shadow), (B|1, 1, H, W); only with `key_mask_bias`.

        Returns:
            (B, C, H, W).

        Raises:
            ZooError: Another number of channels, or a mask that is not wanted or does not fit.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ZooError(
                f"x of shape {tuple(x.shape)} must be (batch, channels={self.channels}, height, "
                "width); a map with its channels last has to be permuted"
            )
        height, width = x.shape[2:]
        if not x.numel():
            return self.proj_dropout(self.proj(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        least = self.kernel * self.dilation
        room = (0, max(0, least - width), 0, max(0, least - height))
        key_bias = self._key_bias(x, mask)
        maps = (F.pad(x, room) if any(room) else x).permute(0, 2, 3, 1)  # (B, H', W', C)
        if key_bias is not None:
            key_bias = F.pad(key_bias, room, value=float(self.key_mask_bias or 0.0))
        heads = self.qkv(maps).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(3, 0, 4, 1, 2, 5)  # (B, heads, H', W', D)
        y = self._windows(q, k, v, key_bias)
        y = y[:, :, :height, :width].permute(0, 2, 3, 1, 4).flatten(3)
        return self.proj_dropout(self.proj(y)).permute(0, 3, 1, 2)

    def _windows(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.backend == "reference":
            return regional_attention_reference(
                q, k, v, self.kernel, self.dilation, rpb=self.rpb, scale=self.scale,
                key_bias=key_bias, dropout=dropout,
            )  # fmt: skip
        y = neighborhood_attention(
            q.flatten(2, 3),
            k.flatten(2, 3),
            v.flatten(2, 3),
            shape=tuple(q.shape[2:4]),
            kernel_size=self.kernel,
            dilation=self.dilation,
            scale=self.scale,
            rpb=self.rpb,
            key_bias=None if key_bias is None else key_bias.flatten(1),
            dropout=dropout,
            backend=self.backend,
        )
        assert isinstance(y, Tensor)
        return y.unflatten(2, q.shape[2:4])

    def _key_bias(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The constant outside the mask and 0 inside, (B, H, W)."""
        if mask is None:
            return None
        if self.key_mask_bias is None:
            raise ZooError("mask given, but key_mask_bias=None takes none")
        fits = {(n, 1, *x.shape[2:]) for n in (1, len(x))}
        if mask.dtype != torch.bool or tuple(mask.shape) not in fits:
            raise ZooError(
                f"mask of dtype {mask.dtype} and shape {tuple(mask.shape)}; allowed: torch.bool of "
                f"shape {(len(x), 1, *x.shape[2:])}, the height and width of x"
            )
        outside = mask[:, 0].logical_not().to(x.dtype) * self.key_mask_bias
        return outside.expand(len(x), -1, -1)

    def extra_repr(self) -> str:
        """The options."""
        told = f"channels={self.channels}, heads={self.heads}, kernel={self.kernel}"
        return f"{told}, dilation={self.dilation}, backend={self.backend!r}"
