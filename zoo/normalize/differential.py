"""Differential attention (Ye, Dong, Xia, Sun, Zhu, Huang, Wei 2024, "Differential Transformer").

Each head takes the difference of two softmax maps, so that what both see everywhere cancels:

    A_c    = softmax(q_c k_c^T / sqrt(D / 2) + mask)      c = 1, 2; q_c, k_c (B, H, N, D / 2)
    o      = (A_1 - lambda A_2) v                         v (B, H, M, D)
    y      = (1 - lambda_init) RMSNorm(o)                 over D, one weight for all heads
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init
    lambda_init = 0.8 - 0.6 exp(-0.3 depth)

`heads` H counts output heads, D = head_dim is the width of v; q and k have 2 H heads of width
D / 2, heads 2h and 2h + 1 belonging to output head h, so the projections are as large as those of
multi-head attention. The paper halves the heads of its baseline to keep D / 2 at 64 to 128.
Parameters 4 (D / 2) + D. Rows of A_1 - lambda A_2 sum to 1 - lambda and may hold negative weights.
Cost: twice the exponentials of attention; the route "pair_sdpa" takes two fused calls with one v.

Where code and paper differ. Depth counts from 0 in the code, from 1 in the paper with
exp(-0.3 (depth - 1)): the same. With grouped keys (G = kv_heads < H groups, 2 G key heads) the
code repeats each key head H / G times in a row, which hands both maps of a head the *same* key
head whenever H / G is even; ``kv_grouping="pair"``, the default, keeps the pairs: head h takes key
heads 2g and 2g + 1 of its group g = h // (H / G). ``"official"`` follows the code. Dropout, which
the authors do not use, falls on the difference of the maps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.host.refusals import refuse_masks, refuse_parts, refuse_position
from zoo.parts import Call, Host, Layout, Normalize, Route, mask_scores, repeat_heads
from zoo.registry import Paper, Taxonomy, register

GROUPINGS = ("pair", "official")


def initial_lambda(depth: int) -> float:
    """Value that lambda starts from in the layer of index `depth`, from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def differential_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_: float | Tensor,
    *,
    causal: bool = False,
    grouping: str = "pair",
) -> Tensor:
    """The difference of two attentions, line by line, before the norm; any dtype.

    Args:
        q: (B, 2 H, N, D / 2).
        k: (B, 2 G, M, D / 2), G dividing H.
        v: (B, G, M, D).
        lambda_: Factor of the second map.
        causal: Key j is seen by queries i >= j only (N = M).
        grouping: "pair" or "official".
    """
    heads, groups = q.shape[1] // 2, v.shape[1]
    outputs = []
    for h in range(heads):
        maps = []
        for c in range(2):
            if grouping == "pair":
                key = 2 * (h // (heads // groups)) + c
            else:
                key = (2 * h + c) // (heads // groups)
            scores = q[:, 2 * h + c] @ k[:, key].transpose(-1, -2) / math.sqrt(q.shape[-1])
            if causal:
                future = torch.ones_like(scores, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(future, -torch.inf)
            maps.append(scores.softmax(-1))
        outputs.append((maps[0] - lambda_ * maps[1]) @ v[:, h // (heads // groups)])
    return torch.stack(outputs, 1)


def pair_keys(k: Tensor, heads: int) -> Tensor:
    """Give every query head the key head of its pair: (B, 2 G, M, D) to (B, 2 H, M, D).

    Args:
        k: Key heads 2g and 2g + 1 belong to group g.
        heads: Output heads H; head h belongs to group h // (H / G).
    """
    pairs = k.unflatten(1, (-1, 2))
    return pairs.repeat_interleave(heads // pairs.shape[1], 1).flatten(1, 2)


def _refuse(host: Host, call: Call) -> str | None:
    reason = refuse_parts(host, {"score": "dot"})
    if reason is None and host.part_names["select"] != "all":
        reason = f"select {host.part_names['select']!r} hides pairs"
    reason = reason or refuse_position(host)
    if reason is None and call.dropout:
        reason = "dropout falls on the difference of the maps, which it never forms"
    return reason or refuse_masks(call)


def _run(host: Host, call: Call) -> Tensor:
    normalize = host.normalize
    assert isinstance(normalize, Differential)
    score_heads = call.q.shape[1]
    k, v = repeat_heads(call.k, score_heads), repeat_heads(call.v, score_heads // 2)
    # Fused kernels want one width: zeros after q and k change no score and save the N x M maps.
    fill = max(0, v.shape[3] - k.shape[3])
    attn_mask = call.mask if call.bias is None else call.bias.to(call.q.dtype)
    # Not `causal and rows > 1`, which is no bool while a compiler treats lengths as symbols.
    top_left = False if call.q.shape[2] == 1 else call.causal
    maps = []
    for c in range(2):
        mask = attn_mask
        if mask is not None:
            mask = mask[:, c::2] if mask.shape[1] > 1 else mask
            mask = mask.expand(*mask.shape[:2], call.q.shape[2], call.k.shape[2])
        maps.append(
            F.scaled_dot_product_attention(
                F.pad(call.q[:, c::2], (0, fill)),
                F.pad(k[:, c::2], (0, fill)),
                v,
                attn_mask=mask,
                is_causal=top_left,
                scale=call.scale,
            )
        )
    y = maps[0] - normalize.lambda_().to(maps[1].dtype) * maps[1]
    if call.mask is not None:
        mask = call.mask[:, ::2] if call.mask.shape[1] > 1 else call.mask
        y = y.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return y


@register(
    "differential",
    kind="normalize",
    paper=Paper("Differential Transformer", 2024, "2410.05258"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="signed",
        complexity="quadratic",
        trainable_params=True,
    ),
    parameters="4 * qk_dim + v_dim",
    aliases=("diff",),
)
class Differential(Normalize):
    """Difference of two softmax maps per head, normed.

    Args:
        layout: Head counts and widths of plain attention.
        depth: Index of the layer, from 0.
        kv_grouping: How heads share grouped keys: "pair" or "official".
        eps: Of the RMSNorm.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: An odd head width, an unknown grouping, or `eps` or `depth` out of range.
    """

    special_init = True

    def __init__(
        self,
        layout: Layout,
        depth: int = 0,
        kv_grouping: str = "pair",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        also = "since it is halved for q and k"
        checks.multiple("head_dim", layout.qk_dim, 2, of="differential", also=also)
        checks.choice("kv_grouping of 'differential'", kv_grouping, GROUPINGS)
        eps = checks.number("eps", eps, above=0)
        depth = checks.whole("depth", depth, 0, also="as layers count from 0")
        self.kv_grouping = kv_grouping
        self.lambda_init = initial_lambda(depth)
        self.repeats = layout.heads // layout.k_heads
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = layout.qk_dim // 2
        self.lambda_q1 = nn.Parameter(torch.empty(width, **made))
        self.lambda_k1 = nn.Parameter(torch.empty(width, **made))
        self.lambda_q2 = nn.Parameter(torch.empty(width, **made))
        self.lambda_k2 = nn.Parameter(torch.empty(width, **made))
        self.norm = nn.RMSNorm(layout.v_dim, eps=eps, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Vectors of lambda normal with std 0.1, norm weight 1."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)
        self.norm.reset_parameters()

    def change_layout(self, layout: Layout) -> Layout:
        """Twice the heads of half the width for q and k."""
        return layout.with_(
            score_heads=2 * layout.heads, k_heads=2 * layout.k_heads, qk_dim=layout.qk_dim // 2
        )

    def lambda_(self) -> Tensor:
        """Factor of the second map, a scalar of at least float32."""
        q1, k1, q2, k2 = (
            x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            for x in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def share_keys(self, k: Tensor) -> Tensor:
        """Lay out grouped keys so that the two maps of a head keep their own.

        The host hands query head s the key head s // (H / G), which is the official grouping.
        """
        if self.kv_grouping == "official" or self.repeats == 1:
            return k  # without groups, key head s is query head s in either reading
        return pair_keys(k, k.shape[1] // 2 * self.repeats)

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """A_1 - lambda A_2, (B, H, R, M), from scores (B, 2 H, R, M)."""
        half = scores.dtype in (torch.float16, torch.bfloat16)
        maps = mask_scores(scores, mask).softmax(-1, dtype=torch.float32 if half else None)
        maps = maps.unflatten(1, (-1, 2))
        return maps[:, :, 0] - self.lambda_() * maps[:, :, 1]

    def finish(self, y: Tensor) -> Tensor:
        """RMSNorm of each head's output times 1 - lambda_init."""
        # Under autocast the weight has the wider type, which the fused norm wants of both.
        wide = torch.promote_types(y.dtype, self.norm.weight.dtype)
        return (1 - self.lambda_init) * self.norm(y.to(wide)).to(y.dtype)

    def routes(self) -> tuple[Route, ...]:
        """Two fused attentions with the same values."""
        return (Route("pair_sdpa", _refuse, _run),)

    def extra_repr(self) -> str:
        """The options."""
        return f"kv_grouping={self.kv_grouping}, lambda_init={self.lambda_init:.4f}"
