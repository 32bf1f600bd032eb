"""MoH: mixture-of-head attention (Jin, Zhu, Yuan, Yan 2024).

Multi-head attention is a sum over heads, y = sum_h o_h W_O^h. MoH weighs the sum for each token,
and switches most heads of a token off:

    y_t = sum_h g_th o_th W_O^h        g (B, H, N), from the token t that asks, not from its keys

The first Hs = `shared_heads` heads are always on, of the He = H - Hs routed ones k = `top_k` are.
With x_t (C,) the input of the layer, router "linear" (two stages, no biases) takes

    p = softmax(W_g x_t) in R^He    routed gate g_e = k p_e / (sum of the k largest), 0 elsewhere
    u = softmax(W_1 x_t) in R^Hs    shared gate g_s = Hs u_s (1 where Hs = 1)
    a = 2 softmax(W_0 x_t) in R^2   a_1 times the shared, a_2 times the routed, where both exist

so that an undecided router gives every active head the gate 1 and the scale is that of attention.
Router "query_norm" has no parameters (for models already trained): p = softmax(n / std(n)), n_e the
norm of routed head e's query, the unbiased std taken over these heads. Its gates are 0 or 1; in
training the gradient goes straight through to p, for heads that are on. While training, the layer
leaves a balance loss behind, `aux_weight` times

    L = He^2 mean_e(f_e P_e)        f_e, P_e: means over all tokens of "e is on" and of p_e

which is k for undecided or evenly used heads. Tokens whose key the mask hides from everybody are
padding and do not count. Parameters C (He + [Hs] + [2]) beside W_O. Cost: the official code
computes every head and then weighs, which saves nothing; the route "moh_skip" computes of a routed
head only the rows whose gate is not 0, against all keys: 1/1.5 of the time at half of the heads.

The paper adds the mean of the layers' losses, `zoo.auxiliary_losses` their sum: in a model of n
layers its weight of 0.01 is `aux_weight` 0.01 / n.

Where sources differ: with Hs = 1 the diffusion code lacks W_1 and stops; as in the vision code the
gate is 1. The LLaMA code is for inference only: the straight-through gradient is our reading of the
paper. It takes norms before rotation; those here come after, which is the same for RoPE but not for
FoPE. Temperatures, norms and biases of the vision variant are other sockets' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.combine._moh_router import (
    ROUTERS,
    balance_loss,
    linear_gates,
    query_norm_gates,
    query_scores,
    real_tokens,
    token_scores,
)
from zoo.combine._moh_router import moh_gates_reference as moh_gates_reference
from zoo.combine._moh_router import query_norm_gates_reference as query_norm_gates_reference
from zoo.combine._selected_rows import SelectedRows
from zoo.combine.concat import Concat
from zoo.errors import ZooError, unknown
from zoo.host.refusals import refuse_masks, refuse_parts, refuse_position
from zoo.parts import Call, Host, Layout, Project, Route, full_precision, repeat_heads, widen
from zoo.registry import Paper, Taxonomy, register

# Where skipping was measured to pay: from so many tokens on, up to this share of routed heads on.
SKIP_TOKENS, SKIP_SHARE = 1024, 0.7


def moh_reference(y: Tensor, gates: Tensor, w_out: Tensor, bias: Tensor | None = None) -> Tensor:
    """The heads in sum form.

    Args:
        y: Outputs of the heads, (B, H, N, D).
        gates: (B, H, N).
        w_out: W_O^T (C, H D), head by head.
        bias: (C,), or None.
    """
    width = y.shape[3]
    out = torch.zeros_like(y[:, 0, :, :1])
    for h in range(y.shape[1]):
        out = out + gates[:, h, :, None] * (y[:, h] @ w_out[:, h * width : (h + 1) * width].T)
    return out if bias is None else out + bias


def _refuse(host: Host, call: Call) -> str | None:
    part = host.combine
    assert isinstance(part, MoH)
    if torch.compiler.is_compiling():
        return "how many rows a head computes depends on the data, which no graph can hold"
    bare = {"score": "dot", "select": "all", "normalize": "softmax"}
    reason = refuse_parts(host, bare) or refuse_position(host)
    if reason:
        return reason
    if type(host.project).finish is not Project.finish:
        return f"project {host.part_names['project']!r} reads the outputs of all heads"
    if host.recording:
        return "the outputs of all heads are being captured"
    if call.mask is not None or call.bias is not None:
        return "it takes no mask or bias"
    if call.dropout:
        return "it has no dropout"
    if call.q.device.type != "cpu" or call.q.dtype not in (torch.float32, torch.float64):
        return f"it is made for float32 and float64 on a CPU, not {call.q.dtype} on {call.q.device}"
    reason = refuse_masks(call)
    if reason or host.route != "auto":
        return reason  # asked for by name, it also does what the dense form does faster
    if min(call.q.shape[2], call.k.shape[2]) < SKIP_TOKENS:
        return f"the dense form is faster below {SKIP_TOKENS} tokens"
    if part.top_k > SKIP_SHARE * part.routed_heads:
        return (
            f"the dense form is faster with more than {SKIP_SHARE:.0%} of the routed heads on: "
            f"{part.top_k} of {part.routed_heads}"
        )
    return None


def _run(host: Host, call: Call) -> Tensor:
    part = host.combine
    assert isinstance(part, MoH)
    heads = call.q.shape[1]
    sizes = [part.shared_heads, part.routed_heads]
    # One split each: its backward is one concatenation.
    q, k, v = (repeat_heads(x, heads).split(sizes, 1) for x in (call.q, call.k, call.v))
    active = call.prepared["combine"]["active"][:, part.shared_heads :].flatten(0, 1)
    rows, counts = active.nonzero()[:, 1], active.sum(1).tolist()
    causal = call.causal and call.q.shape[2] > 1  # the newest token alone sees all keys held
    y = SelectedRows.apply(q[1], k[1], v[1], rows, counts, causal, call.scale)
    if not part.shared_heads:
        return y
    shared = F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=causal, scale=call.scale)
    return torch.cat([shared.transpose(1, 2), y.transpose(1, 2)], 2).transpose(1, 2)


@register(
    "moh",
    kind="combine",
    paper=Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, "2410.11842"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="multi_representational",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="quadratic",
        trainable_params=True,
    ),
    parameters=(
        "heads * v_dim * dim + bias * dim + (router == 'linear') * dim"
        " * (lambda h, s: h - s + (s > 1) * s + (0 < s < h) * 2)"
        "(heads, heads // 4 if shared_heads is None else shared_heads)"
    ),
    notes="the top-k is over heads; the weights over keys are the normalizer's",
)
class MoH(Concat):
    """Heads that each token weighs, and mostly switches off, before they are summed.

    Args:
        dim: Channels.
        layout: Head counts and widths.
        bias: Add a bias to the output projection.
        shared_heads: Heads that are always on, the first ones; default a quarter of the heads,
            half of them for "query_norm" (the paper's patterns differ between models).
        top_k: Routed heads that are on for a token; default so many that three quarters of all
            heads are on (rounded down), but at least one.
        router: "linear" (from the token) or "query_norm" (from its queries; no parameters).
        aux_weight: Factor on the balance loss of this layer; those of all layers are summed.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: Unknown router, or numbers of heads that do not fit.
    """

    def __init__(
        self,
        dim: int,
        layout: Layout,
        bias: bool = False,
        shared_heads: int | None = None,
        top_k: int | None = None,
        router: str = "linear",
        aux_weight: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, layout, bias, device, dtype)
        if router not in ROUTERS:
            raise unknown("router of 'moh'", router, ROUTERS)
        also = "by default 0.01"
        aux_weight = checks.number("aux_weight", aux_weight, 0, of="moh", also=also)
        heads = layout.heads
        if shared_heads is None:
            shared_heads = heads // (4 if router == "linear" else 2)
        also = f"with {heads} heads"
        shared_heads = checks.whole("shared_heads", shared_heads, 0, heads, of="moh", also=also)
        routed = heads - shared_heads
        if top_k is None:
            top_k = min(routed, max(1, 3 * heads // 4 - shared_heads))
        least = min(1, routed)  # a routed head that is never on would be dead weight
        also = f"with {routed} routed heads"
        top_k = checks.whole("top_k", top_k, least, routed, of="moh", also=also)
        self.layout = layout
        self.shared_heads, self.routed_heads, self.top_k = shared_heads, routed, top_k
        self.router, self.aux_weight = router, float(aux_weight)

        def linear(rows: int) -> nn.Linear | None:
            if router != "linear" or not rows:
                return None
            return nn.Linear(dim, rows, bias=False, device=device, dtype=dtype)

        self.routed = linear(routed)
        self.shared = linear(shared_heads if shared_heads > 1 else 0)
        self.balance = linear(2 if routed and shared_heads else 0)

    def incompatible(self, host: Host) -> str | None:
        """Norms of queries say nothing once they have been normalised."""
        if self.router == "query_norm" and host.q_norm is not None:
            return (
                "router='query_norm' of 'moh' reads the norms of the queries, which qk_norm=True "
                "makes alike; use router='linear'"
            )
        return None

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """Route every token, once for all that read it.

        Returns:
            gates (B, H, N) in float32 at least, active (B, H, N): the heads that are on, and
            real (B, N): tokens that are no padding, or None for all.
        """
        # Outside autocast: a router in half precision breaks ties by rounding.
        with full_precision(call.x):
            gates, active, p = self._route(call)
        real = real_tokens(call)
        if self.training and self.aux_weight and p is not None:
            on = active[..., self.shared_heads :]
            self.aux_losses["moh_balance"] = self.aux_weight * balance_loss(on, p, real)
        return {"gates": gates.transpose(1, 2), "active": active.transpose(1, 2), "real": real}

    def _route(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gates (B, N, H), heads that are on (B, N, H), softmax over the routed ones (B, N, He)."""
        x = widen(call.x)
        shared = x.new_ones(*x.shape[:2], self.shared_heads)
        on = torch.ones_like(shared, dtype=torch.bool)
        if self.shared is not None:
            shared = self.shared_heads * token_scores(self.shared, x)
        if not self.routed_heads:
            return shared, on, None
        if self.routed is None:
            p = query_scores(call.q, self.layout.heads, self.shared_heads)
        else:
            p = token_scores(self.routed, x)
        if self.router == "query_norm":
            gates, chosen = query_norm_gates(p, self.top_k, self.training)
        else:
            gates, chosen = linear_gates(p, self.top_k)
        if self.balance is not None:
            a = 2 * token_scores(self.balance, x)
            shared, gates = shared * a[..., :1], gates * a[..., 1:]
        return torch.cat([shared, gates], -1), torch.cat([on, chosen], -1), p

    def forward(
        self, y: Tensor, x: Tensor, prepared: Mapping[str, Any] = MappingProxyType({})
    ) -> Tensor:
        """(B, N, C) from (B, H, N, v_dim)."""
        gates = prepared["gates"].to(y.dtype)
        return super().forward(y * gates[..., None], x)

    def routes(self) -> tuple[Route, ...]:
        """Skip the rows of routed heads whose gate is 0."""
        return (Route("moh_skip", _refuse, _run),) if self.routed_heads else ()

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"shared_heads={self.shared_heads}, top_k={self.top_k} of {self.routed_heads}, "
            f"router={self.router}, aux_weight={self.aux_weight:g}"
        )


@contextmanager
def head_usage(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count how often each head is on, in every MoH layer of a model, inside the block.

    Yields:
        By module name, the fraction of tokens (padding left out) for which each head was on,
        (H,), over all passes so far.

    Raises:
        ZooError: The model has no such layer.
    """
    parts = {name: part for name, part in model.named_modules() if isinstance(part, MoH)}
    if not parts:
        raise ZooError(f"{type(model).__name__} has no 'moh' layer whose heads could be counted")
    usage: dict[str, Tensor] = {}
    tokens = dict.fromkeys(parts, 0.0)
    hooks = []
    for name, part in parts.items():

        def count(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            active, real = args[2]["active"], args[2]["real"]
            counted = active if real is None else active & real[:, None]
            new = float(active.shape[0] * active.shape[2] if real is None else real.sum())
            before = usage.get(name, torch.zeros((), device=active.device))
            total = before * tokens[name] + counted.sum((0, 2))
            tokens[name] += new
            usage[name] = total / max(tokens[name], 1.0)

        hooks.append(part.register_forward_pre_hook(count))
    try:
        yield usage
    finally:
        for hook in hooks:
            hook.remove()
