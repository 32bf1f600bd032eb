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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo import engine
from zoo.errors import ZooError, unknown
from zoo.parts import Call, Layout, Score, Strip, repeat_heads
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.routes import Route

if TYPE_CHECKING:
    from zoo.attention import Attention

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


class Tile(NamedTuple):
    """Some rows of some heads with the keys that they may see.

    Args:
        samples: Samples of the tile.
        heads: Heads of the tile: all of them where there are several samples.
        flat: The same heads, counted through all samples.
        rows: Queries.
        stop: Number of keys.
    """

    samples: slice
    heads: slice
    flat: slice
    rows: slice
    stop: int


def tiles(a: Tensor, b: Tensor, causal: bool, shift: int, buffers: int) -> Iterator[Tile]:
    """Cut a pass so that the buffers of a tile fit the processor's cache.

    Args:
        a: (w, B, H, N).
        b: (w, B, H, M).
        causal: Row i sees keys up to i + shift.
        shift: Keys before the first row.
        buffers: Numbers held for each pair.
    """
    samples, heads, length = a.shape[1:]
    keys, width = b.shape[3], max(1, b.shape[3])
    # Pairs whose buffers take, together, as much as the scores of one of the engine's strips.
    budget = engine.STRIP_BYTES["cpu"] // (buffers * a.element_size())
    height = max(1, min(length, max(engine.MIN_ROWS, budget // width)))
    lot = max(1, budget // (height * width))
    many, few = max(1, lot // heads), min(lot, heads)
    for s in range(0, samples, many):
        batch = slice(s, min(s + many, samples))
        for h in range(0, heads, few):
            part = slice(h, min(h + few, heads))
            flat = slice(batch.start * heads + part.start, (batch.stop - 1) * heads + part.stop)
            for r in range(0, length, height):
                rows = slice(r, min(r + height, length))
                stop = min(keys, rows.stop + shift) if causal else keys
                yield Tile(batch, part, flat, rows, stop)


def _hide(s: Tensor, tile: Tile, mask: Tensor | None, causal: bool, shift: int) -> Tensor | None:
    """Give hidden pairs of scores (heads, R, M) a very low score, in place.

    Returns:
        Rows without keys, (heads, R, 1), or None where no row can be.
    """
    low, rows = torch.finfo(s.dtype).min, s.shape[1]
    first = tile.rows.start + shift + 1  # the first key that some row may not see
    ahead = None
    if causal and first < tile.stop:
        shape = (rows, tile.stop - first)
        ahead = torch.ones(shape, dtype=torch.bool, device=s.device).triu_()
        s[..., first:].masked_fill_(ahead, low)
    if mask is None:
        return None
    seen = mask[tile.samples, tile.heads, tile.rows, : tile.stop].flatten(0, 1)
    s.masked_fill_(~seen, low)
    if ahead is not None:
        seen = seen.clone()
        seen[..., first:] &= ~ahead
    return ~seen.any(-1, keepdim=True)


class _Net(NamedTuple):
    """The network behind its factored first layer; w2 and b2 are None with one hidden layer."""

    w2: Tensor | None
    b2: Tensor | None
    w3: Tensor

    def run(self, a: Tensor, b: Tensor, buffer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Hidden layers (w, heads, R, M) and scores (heads, R, M) of a tile, in buffers.

        Args:
            a: (w, heads, R).
            b: (w, heads, M).
            buffer: ``buffer(name, *shape)`` gives memory to write to.
        """
        shape = (a.shape[1], a.shape[2], b.shape[2])
        h = top = buffer("h", len(a), *shape)
        torch.add(a[..., None], b[:, :, None], out=h).relu_()
        if self.w2 is not None and self.b2 is not None:
            top = buffer("u", len(self.w2), *shape)
            torch.mm(self.w2, h.flatten(1), out=top.flatten(1))
            top.add_(self.b2[:, None, None, None]).relu_()
        s = buffer("s", *shape)
        torch.mm(self.w3[None], top.flatten(1), out=s.view(1, -1))
        return h, top, s


def _buffers(like: Tensor) -> Callable[..., Tensor]:
    """Memory by name, of the size that its first user asks for, used again by all others."""
    held: dict[str, Tensor] = {}

    def buffer(name: str, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if name not in held or held[name].numel() < size:
            held[name] = like.new_empty(size)
        return held[name][:size].view(shape)

    return buffer


class _Strips(torch.autograd.Function):
    """Softmax attention on the network's scores, tile by tile.

    With ds_ij = p_ij (do_i . v_j - do_i . o_i), g = ds [u > 0] for each unit u of the last hidden
    layer and e = W^T g [h > 0] for the first one, the gradients of a, b are the row and column
    sums of e; those of the weights follow from sum g and sum g h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        v: Tensor,
        w2: Tensor | None,
        b2: Tensor | None,
        w3: Tensor,
        mask: Tensor | None,
        causal: bool,
        shift: int,
    ) -> Tensor:
        """Outputs (B, H, N, D) from a (w, B, H, N), b (w, B, H, M) and v (B, H, M, D)."""
        net, buffer = _Net(w2, b2, w3), _buffers(a)
        af, bf, vf = a.flatten(1, 2), b.flatten(1, 2), v.flatten(0, 1)
        out = v.new_empty(*a.shape[1:], v.shape[3])
        ctx.buffers = len(a) + (0 if w2 is None else len(w2)) + 2
        for tile in tiles(a, b, causal, shift, ctx.buffers):
            s = net.run(af[:, tile.flat, tile.rows], bf[:, tile.flat, : tile.stop], buffer)[2]
            empty = _hide(s, tile, mask, causal, shift)
            p = torch.softmax(s, -1, out=s)
            y = buffer("y", *s.shape[:2], v.shape[3])
            torch.bmm(p, vf[tile.flat, : tile.stop], out=y)  # out=: not for autocast to round
            if empty is not None:
                y.masked_fill_(empty, 0.0)
            out.flatten(0, 1)[tile.flat, tile.rows] = y
        ctx.save_for_backward(a, b, v, w2, b2, w3, mask, out)
        ctx.causal, ctx.shift = causal, shift
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a, b, v, w2, b2 and w3."""
        a, b, v, w2, b2, w3, mask, out = ctx.saved_tensors
        net, buffer = _Net(w2, b2, w3), _buffers(a)
        grad = grad.contiguous()
        delta = (grad * out).sum(-1, keepdim=True).flatten(0, 1)
        af, bf, vf, gf = a.flatten(1, 2), b.flatten(1, 2), v.flatten(0, 1), grad.flatten(0, 1)
        da, db, dv = torch.empty_like(af), torch.zeros_like(bf), torch.zeros_like(vf)
        # From the last hidden layer (or a single one's score) to the first, (w, units).
        down = w3[:, None] if w2 is None else (w3[:, None] * w2).t().contiguous()
        units = down.shape[1]
        gh, gs = w3.new_zeros(units, len(a)), w3.new_zeros(units)
        for tile in tiles(a, b, ctx.causal, ctx.shift, ctx.buffers + (len(a) if units > 1 else 1)):
            flat, rows, stop = tile.flat, tile.rows, tile.stop
            h, top, s = net.run(af[:, flat, rows], bf[:, flat, :stop], buffer)
            empty = _hide(s, tile, mask, ctx.causal, ctx.shift)
            p = torch.softmax(s, -1, out=s)
            go = gf[flat, rows] if empty is None else gf[flat, rows].masked_fill(empty, 0.0)
            dv[flat, :stop].baddbmm_(p.transpose(1, 2), go)
            ds = torch.bmm(go, vf[flat, :stop].transpose(1, 2), out=buffer("ds", *s.shape))
            g = ds.sub_(delta[flat, rows]).mul_(p)[None]
            if w2 is not None:
                g = _where_positive(g.expand_as(top), top, top)
                gs += g.flatten(1).sum(1)
            gh.addmm_(g.flatten(1), h.flatten(1).t())
            if units > 1:
                e = buffer("e", *h.shape)
                torch.mm(down, g.flatten(1), out=e.flatten(1))
                _where_positive(e, h, e)
            else:  # one factor for each channel, left to the end
                e = _where_positive(g.expand_as(h), h, h)
            da[:, flat, rows] = e.sum(-1)
            db[:, flat, :stop] += e.sum(-2)
        if units == 1:
            da *= down[..., None]
            db *= down[..., None]
        grads: tuple[Tensor | None, ...] = (None, None, gh[0])
        if w2 is not None and b2 is not None:
            grads = (w3[:, None] * gh, w3 * gs, (w2 * gh).sum(1) + b2 * gs)
        return da.view_as(a), db.view_as(b), dv.view_as(v), *grads, None, None, None


def _where_positive(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Gradient where x > 0, else 0, in one pass; `out` may be either."""
    return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def neural_attention_strips(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    shift: int = 0,
) -> Tensor:
    """Softmax attention on the scores of a ReLU network, (B, H, N, D), memory O(rows * M).

    Args:
        a: A q' + b_1, (B, H, N, w).
        b: C k', (B, G, M, w), G dividing H.
        v: (B, G, M, D).
        layers: Weight and bias of the layers behind the first, (w2, w) and (1, w2), or (1, w).
        mask: Boolean, True may attend, broadcastable to (B, H, N, M), or None.
        causal: Row i sees keys up to i + shift.
        shift: Keys before the first row.

    Raises:
        ZooError: A mask that is not boolean or does not broadcast, or b and v of other lengths.
    """
    if b.shape[2] != v.shape[2]:
        raise ZooError(f"b has {b.shape[2]} keys, but v has {v.shape[2]} values")
    if mask is not None:
        wanted = (*a.shape[:3], b.shape[2])
        pairs = zip(mask.shape[::-1], wanted[::-1], strict=False)
        if mask.dtype != torch.bool or mask.ndim > 4 or any(n not in (1, due) for n, due in pairs):
            raise ZooError(
                f"mask of dtype {mask.dtype} and shape {tuple(mask.shape)}; allowed: torch.bool "
                f"that broadcasts to {wanted}"
            )
        mask = mask.expand(wanted)
    wide = torch.promote_types(v.dtype, torch.float32)
    a, b = (x.to(wide).permute(3, 0, 1, 2).contiguous() for x in (a, repeat_heads(b, a.shape[1])))
    values = repeat_heads(v, a.shape[2]).to(wide).contiguous()
    w3 = layers[-1][0][0].to(wide)
    w2, b2 = (x.to(wide) for x in layers[0]) if len(layers) > 1 else (None, None)
    return _Strips.apply(a, b, values, w2, b2, w3, mask, causal, shift).to(v.dtype)


def _refuse_strips(host: Attention, call: Call) -> str | None:
    assert isinstance(host.score, Neural)
    for kind, wanted in (("normalize", "softmax"), ("select", "all")):
        found = host.part_names[kind]
        if found != wanted:
            return f"{kind} is {found!r}, not {wanted!r}"
    if host.position.biases:
        return f"position {host.part_names['position']!r} biases the scores"
    if host.score.activation != "relu":
        return f"activation is {host.score.activation!r}, not 'relu'"
    if call.q.device.type != "cpu":
        return f"its strips are cut for the caches of a CPU, not for {call.q.device.type!r}"
    if torch.compiler.is_compiling():
        return "a compiler cannot look into its backward pass"
    if torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into its backward pass"
    if call.bias is not None:
        return "it takes no bias on the scores"
    if call.dropout:
        return "it knows no dropout"
    return "a single row is a strip by itself" if call.q.shape[2] == 1 else None


def _run_strips(host: Attention, call: Call) -> Tensor:
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


def _run_reference(host: Attention, call: Call) -> Tensor:
    part = host.score
    assert isinstance(part, Neural)
    # Whatever else the host holds gets its scores from the whole tensor of pairs.
    dense = replace(host.parts, score=Dense(part))
    return engine.run(dense, call, whole=True)


def _whole(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ZooError(
            f"{name}={value!r} of 'neural' must be a whole number of at least 1; nearest allowed: "
            f"{max(1, round(value)) if isinstance(value, int | float) else 1}"
        )
    return value


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
        if activation not in ACTIVATIONS:
            raise unknown("activation of 'neural'", activation, ACTIVATIONS)
        width = layout.qk_dim // 64 * 2 or 2 if proj_dim is None else _whole("proj_dim", proj_dim)
        if hidden is None:
            if width % 2:
                raise ZooError(
                    f"proj_dim={width} of 'neural' must be even, since the second hidden layer has "
                    f"half its width; nearest allowed: {width + 1}, or give hidden"
                )
            widths = [width, width // 2]
        else:
            if not isinstance(hidden, list | tuple) or len(hidden) not in (1, 2):
                raise ZooError(
                    f"hidden={hidden!r} of 'neural' must hold the widths of one or two layers, "
                    f"e.g. ({width},) or ({width}, {max(1, width // 2)})"
                )
            widths = [_whole("hidden", item) for item in hidden]
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

    def incompatible(self, host: Attention) -> str | None:
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
