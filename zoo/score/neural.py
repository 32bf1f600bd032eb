"""Neural Attention (2025): a small network scores each pair of query and key.

    q'_i = P_q q_i + b_q        (B, H, N, P), one pair of maps for all heads,
    k'_j = P_k k_j + b_k        (B, G, M, P), P = max(2, D // 32), made even
    s_ij = w_3 . f(W_2 f(W_1 [q'_i ; k'_j] + b_1) + b_2) + b_3
           f = ReLU, W_1 (P, 2 P), W_2 (P / 2, P), w_3 (P / 2)

"A Novel Mechanism for Enhanced Expressive Power in Transformer Models". The text has one hidden
layer, s = w . f(W [q ; k] + b), which is ``hidden=(width,)``; the code has the two above, and the
default follows it. Scores take no 1 / sqrt(D), which the code computes and leaves unused, nor any
other `scale`. Causality and masks add up; the code's causal form drops the caller's mask. Only the
first layer of the published models is of this kind, the others are plain.

b_3 shifts whole rows, so a softmax cancels it and its gradient is exactly zero. Here it is a
buffer: it loads with official weights and is part of the scores that other normalizers see, but
is not trained. The rest counts 2 (D + 1) P + (2 P + 1) P + (P + 1) P / 2 + P / 2 parameters. With
P = 2 the second layer is a single unit: where it is dead for all keys of a row, that row is a
uniform average without a gradient. Small models want P >= 4 or leaky_relu; `uniform_rows` counts
such rows.

Cost N M (P^2 + D) per head. W_1 [q' ; k'] = A q' + C k' is computed for each token (`prepare`), so
that a pair only adds. The engine holds the hidden layers of a strip; the route "neural_strips"
works on strips whose buffers stay in the processor's cache, keeps no tensor but its inputs and its
output, and differentiates each strip by hand. Cached decoding keeps k, not the smaller k'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.host import engine
from zoo.host.refusals import refuse_parts, refuse_position, refuse_tracing
from zoo.parts import Call, Host, Layout, Route, Score, Strip, repeat_heads
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.score._neural_strips import neural_attention_strips

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def neural_scores_reference(
    q: Tensor,
    k: Tensor,
    query_proj: tuple[Tensor, Tensor],
    key_proj: tuple[Tensor, Tensor],
    layers: Sequence[tuple[Tensor, Tensor]],
    activation: str = "relu",
) -> Tensor:
    """Scores (B, H, N, M) with the concatenation of every pair written out, any dtype.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        query_proj: P_q (P, D) and b_q (P,).
        key_proj: P_k (P, D) and b_k (P,).
        layers: Weight and bias of each layer, W_1 (w, 2 P) first, the last of one row.
        activation: Name of f.
    """
    rows, keys = q.shape[2], k.shape[2]
    qs = F.linear(q, *query_proj)[:, :, :, None].expand(-1, -1, -1, keys, -1)
    ks = F.linear(k, *key_proj)[:, :, None].expand(-1, -1, rows, -1, -1)
    x = torch.cat((qs, ks), -1)  # (B, H, N, M, 2 P)
    for layer in layers[:-1]:
        x = ACTIVATIONS[activation](F.linear(x, *layer))
    return F.linear(x, *layers[-1]).squeeze(-1)


def uniform_rows(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of rows, among those that see two keys or more, whose weights are all the same.

    Args:
        weights: (..., N, M), 0 where a pair may not meet.
        mask: Boolean, True may attend, broadcastable to `weights`. By default the keys of weight
            above 0, which misses those whose weight is too small for its type.

    Returns:
        A number from 0 to 1; 0 where no row sees two keys.
    """
    seen = weights > 0 if mask is None else mask.expand_as(weights)
    same = weights.amax(-1) == weights.masked_fill(~seen, torch.inf).amin(-1)
    several = seen.sum(-1) > 1
    return (same & several).sum() / several.sum().clamp(min=1)


def _refuse_strips(host: Host, call: Call) -> str | None:
    assert isinstance(host.score, Neural)
    dense = {"normalize": "softmax", "select": "all"}
    reason = refuse_parts(host, dense) or refuse_position(host)
    if reason:
        return reason
    if host.score.activation != "relu":
        return f"activation is {host.score.activation!r}, not 'relu'"
    if call.q.device.type != "cpu":
        return f"its strips are cut for the caches of a CPU, not for {call.q.device.type!r}"
    reason = refuse_tracing(
        "a compiler cannot look into its backward pass",
        "torch.func cannot look into its backward pass",
    )
    if reason:
        return reason
    if call.bias is not None:
        return "it takes no bias on the scores"
    if call.dropout:
        return "it knows no dropout"
    return "a single row is a strip by itself" if call.q.shape[2] == 1 else None


def _run_strips(host: Host, call: Call) -> Tensor:
    assert isinstance(host.score, Neural)
    shared = call.prepared["score"]
    return neural_attention_strips(
        shared["query"],
        shared["key"],
        call.v,
        host.score.layers()[1:],
        mask=call.mask,
        causal=call.causal,
        shift=call.q_start - call.k_start,
    )


def _run_reference(host: Host, call: Call) -> Tensor:
    part = host.score
    assert isinstance(part, Neural)
    # Whatever else the host holds gets its scores from the whole tensor of pairs.
    dense = replace(host.parts, score=Dense(part))
    return engine.run(dense, call, whole=True)


@register(
    "neural",
    kind="score",
    paper=Paper(
        "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
        2025,
    ),
    traits=Traits(cost="N * M * (proj_dim**2 + D)"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="deep",
        distribution="inherited",
        complexity="quadratic",
        trainable_params=True,
    ),
    parameters=(
        "2 * (qk_dim + 1) * (p := proj_dim or qk_dim // 64 * 2 or 2)"
        " + (2 * p + 1) * (h := hidden or (p, p // 2))[0] + h[-1]"
        " + ((h[0] + 1) * h[1] if h[1:] else 0)"
    ),
    layers={"default": "plain", "first": "same"},
)
class Neural(Score):
    """A network of one or two hidden layers scores the concatenation of query and key.

    Args:
        layout: Head counts and widths.
        proj_dim: P, width that q and k are brought to; default ``max(2, D // 32)``, made even.
        hidden: Widths of one or two hidden layers; default (P, P // 2), as in the released code.
        activation: f: "relu", "leaky_relu" (slope 0.01), "gelu" or "silu".
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A width below 1, an odd `proj_dim` that is to be halved, no hidden layer or more
            than two, or an unknown activation.
    """

    special_init = True
    out_bias: Tensor

    def __init__(
        self,
        layout: Layout,
        proj_dim: int | None = None,
        hidden: Sequence[int] | None = None,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.choice("activation", activation, ACTIVATIONS, of="neural")
        width = layout.qk_dim // 64 * 2 or 2
        if proj_dim is not None:
            width = checks.whole("proj_dim", proj_dim, of="neural")
        if hidden is None:
            also = "since the second hidden layer has half its width, or give hidden"
            width = checks.multiple("proj_dim", width, 2, of="neural", also=also)
            widths = [width, width // 2]
        else:
            also = "the widths of one or two layers, "
            also += f"e.g. ({width},) or ({width}, {max(1, width // 2)})"
            widths = list(checks.wholes("hidden", hidden, of="neural", also=also))
            if len(widths) > 2:
                raise checks.wrong("hidden", hidden, also, of="neural")
        self.activation = activation
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_proj = nn.Linear(layout.qk_dim, width, **made)
        self.key_proj = nn.Linear(layout.qk_dim, width, **made)
        sizes = [2 * width, *widths]
        self.hidden = nn.ModuleList(
            nn.Linear(sizes[i], sizes[i + 1], **made) for i in range(len(widths))
        )
        self.out = nn.Linear(widths[-1], 1, bias=False, **made)
        self.register_buffer("out_bias", torch.empty(1, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default for linear layers, as in the released code; b_3 like its layer's."""
        for module in (self.query_proj, self.key_proj, *self.hidden, self.out):
            assert isinstance(module, nn.Linear)
            module.reset_parameters()
        bound = self.out.in_features**-0.5
        nn.init.uniform_(self.out_bias, -bound, bound)

    def incompatible(self, host: Host) -> str | None:
        """A scale, which these scores do not have."""
        if host.scale != host.layout.qk_dim**-0.5:
            return f"'neural' scores pairs without a factor; leave out scale={host.scale!r}"
        return None

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every layer of the network, the first one first."""
        hidden = [(layer.weight, layer.bias) for layer in self.hidden]
        return [*hidden, (self.out.weight, self.out_bias)]  # type: ignore[list-item]

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """The first layer's share of each query, (B, H, N, w), and of each key, (B, G, M, w)."""
        weight, bias = self.layers()[0]
        of_query, of_key = weight.chunk(2, 1)
        query = F.linear(self.query_proj(call.q), of_query, bias)
        key = F.linear(self.key_proj(call.k), of_key)
        wide = torch.promote_types(query.dtype, torch.float32)
        return {"query": query.to(wide), "key": key.to(wide)}

    def forward(self, strip: Strip) -> Tensor:
        """Scores (B, H, R, M)."""
        shared = strip.prepared("score")
        a = shared["query"][strip.batch, :, strip.rows].transpose(-1, -2)
        b = shared["key"][strip.batch, :, strip.keys]
        b = repeat_heads(b, a.shape[1]).transpose(-1, -2)
        x = (a[..., None] + b[..., None, :]).flatten(0, 1)  # (B H, w, R, M)
        pairs = x.shape[2:]
        x = x.flatten(-2)
        for weight, shift in self.layers()[1:]:
            x = ACTIVATIONS[self.activation](x)
            weight, shift = weight.to(x.dtype), shift.to(x.dtype)
            x = torch.baddbmm(shift[:, None], weight.expand(len(x), -1, -1), x)
        return x.view(*a.shape[:2], *pairs)

    def routes(self) -> tuple[Route, ...]:
        """Strips in cache with their own backward pass, and the official dense form."""
        return (
            Route("neural_strips", _refuse_strips, _run_strips),
            Route("reference", lambda host, call: None, _run_reference, auto=False),
        )

    def extra_repr(self) -> str:
        """The options."""
        widths = ", ".join(str(layer.out_features) for layer in self.hidden)
        return f"proj_dim={self.query_proj.out_features}, hidden=({widths}), {self.activation}"


class Dense(Score):
    """The scores of `part` by its reference, from the tensor of all pairs.

    Args:
        part: Holds the parameters.
    """

    def __init__(self, part: Neural) -> None:
        super().__init__()
        self.part = part

    def forward(self, strip: Strip) -> Tensor:
        """Scores (B, H, R, M)."""
        part = self.part
        return neural_scores_reference(
            strip.q,
            repeat_heads(strip.k, strip.q.shape[1]),
            (part.query_proj.weight, part.query_proj.bias),
            (part.key_proj.weight, part.key_proj.bias),
            part.layers(),
            part.activation,
        )
