"""Neural Attention by strips in the cache, differentiated by hand: `zoo.score.neural`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ZooError
from zoo.host import engine
from zoo.parts import repeat_heads


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
