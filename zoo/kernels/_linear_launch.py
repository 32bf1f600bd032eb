"""How the kernels of `zoo.kernels.linear` are cut into programs, and launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from zoo.kernels._linear_walk import grad_kernel, scan_kernel, walk_kernel
from zoo.kernels.common import LEAST, block_d, precision, strides, upcast

# Tokens of a chunk.
CHUNK = 64
# Numbers of the state that a program holds, and columns of a tile.
STATE = 8192
TILE = 128
# Tokens of a piece, at least: a piece costs four passes over a D x E state.
SHORTEST = 256
# Programs for each multiprocessor that fill a card, and for all of the interpreter.
RESIDENT = 2
INTERPRETED = 1


class Inputs(NamedTuple):
    """The arguments of `zoo.kernels.linear.linear_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def sequences(self) -> int:
        """How many there are."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def new_state(self) -> Tensor:
        """Room for a state of each sequence, (S, H, D, E)."""
        shape = self.sequences, self.q.shape[1], self.q.shape[3], self.v.shape[3]
        return self.q.new_empty(shape, dtype=torch.float32)


@dataclass(frozen=True)
class Cut:
    """How the sequences are cut into pieces.

    Args:
        sequences: Sequences.
        count: Pieces of all of them, those without tokens included.
        whole: Every sequence is one piece.
        length: Tokens of a sequence (of all of them, where they are packed).
        pieces: Pieces of a sequence.
        piece: Tokens of a piece.
        bounds: First token and end of each piece, (count, 2), where sequences are packed.
        firsts: First piece of each sequence, and the end, (sequences + 1,), where they are packed.
    """

    sequences: int
    count: int
    whole: bool
    length: int
    pieces: int
    piece: int
    bounds: Tensor | None = None
    firsts: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What `_span` needs."""
        return self.bounds, self.length, self.pieces, self.piece


def fill(device: torch.device) -> int:
    """Programs that fill a device."""
    if device.type == "cpu":
        return INTERPRETED
    return RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def cut_pieces(q: Tensor, cu_seqlens: Tensor | None, programs: int) -> Cut:
    """Cut sequences into pieces where whole ones would leave much of the device idle.

    Args:
        q: (B, H, N, D).
        cu_seqlens: (S + 1,) or None. How long its sequences are is not known without waiting for
            the device, so pieces are as long as if there were only one.
        programs: Programs for each piece.
    """
    samples, length = q.shape[0], q.shape[2]
    pieces = min(fill(q.device) // (samples * programs), length // SHORTEST)
    whole = pieces <= 1
    piece = length if whole else triton.cdiv(triton.cdiv(length, pieces), CHUNK) * CHUNK
    pieces = triton.cdiv(length, piece)
    if cu_seqlens is None:
        return Cut(samples, samples * pieces, whole, length, pieces, piece)
    cu = cu_seqlens.long()
    sequences = cu.shape[0] - 1
    if whole:
        bounds = torch.stack([cu[:-1], cu[1:]], 1)
        return Cut(sequences, sequences, whole, length, 1, piece, bounds)
    firsts = torch.zeros_like(cu)
    torch.cumsum((cu.diff() + piece - 1) // piece, 0, out=firsts[1:])
    # There cannot be more pieces than this; the spare ones start at or after their end.
    count = length // piece + sequences
    p = torch.arange(count, device=cu.device)
    s = torch.searchsorted(firsts[1:], p, right=True).clamp_(max=sequences - 1)
    start = cu[s] + (p - firsts[s]) * piece
    bounds = torch.stack([start, torch.minimum(start + piece, cu[s + 1])], 1)
    return Cut(sequences, count, whole, length, pieces, piece, bounds, firsts)


def _how(q: Tensor, width: int) -> tuple[int, bool, str]:
    """Tokens of a chunk, whether to upcast, and the precision of products."""
    half = q.dtype == torch.float16
    prec = "tf32" if half else precision(q)
    exact = prec == "ieee" and q.dtype == torch.float32
    # Wide rows in chunks as long do not fit into shared memory; products in full float32 do not run
    # on tensor cores, and long ones drown in registers.
    chunk = CHUNK // 2 if width > 128 or exact else CHUNK
    chunk = min(chunk, max(LEAST, triton.next_power_of_2(q.shape[2])))
    return chunk, half or upcast(q), prec


def _widths(q: Tensor, x: int, y: int) -> tuple[int, int, int, int]:
    """WIDTHS of a walk with states (x, y)."""
    block = block_d(x)
    state = STATE if q.dtype == torch.bfloat16 else STATE // 2  # others are multiplied as float32
    return x, y, block, min(block_d(y), max(LEAST, min(TILE, state // block)))


def _tiles(widths: tuple[int, ...]) -> int:
    return triton.cdiv(widths[1], widths[3])


def _options(q: Tensor, d: int, e: int, backward: bool = False) -> dict[str, int]:
    """Warps and stages of a launch: for bfloat16 as an H200 likes them at D = 128."""
    half = q.element_size() == 2
    # Rows that do not start at multiples of 16 bytes, and wide ones, need more threads.
    few = q.dtype == torch.bfloat16 and max(d, e) <= 128 and d % 8 == e % 8 == 0
    return {"num_warps": 4 if few else 8, "num_stages": 2 if half and not backward else 1}


def _given(x: Tensor) -> tuple[Any, ...]:
    """A tensor (B, H, N, D) as kernels take it."""
    return (x, *strides(x))


def _states(
    b: Tensor,
    c: Tensor,
    before: Tensor | None,
    log_decay: Tensor | None,
    heads: int,
    cut: Cut,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States that the pieces start from, (pieces, H, D, E), and those at the end."""
    d, e = b.shape[3], c.shape[3]
    widths = _widths(b, d, e)
    states = b.new_empty(cut.count, heads, d, e, dtype=torch.float32)
    after = b.new_empty(cut.sequences, heads, d, e, dtype=torch.float32)
    walk_kernel[(cut.count * heads * _tiles(widths),)](
        None, _given(b), _given(c), None, None, states, log_decay, cut.arguments, heads,
        widths, heads // b.shape[1], reverse, _how(b, max(d, e)), **_options(b, d, e),
    )  # fmt: skip
    block = 1024
    scan_kernel[(cut.sequences * heads * triton.cdiv(d * e, block),)](
        states, before, after, log_decay, cut.arguments, cut.firsts, heads, d * e, block, reverse
    )
    return states, after


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, E), and the states after the last tokens."""
    q, k, v, log_decay, before, cu_seqlens = x
    heads, d, e = q.shape[1], q.shape[3], v.shape[3]
    widths = _widths(q, d, e)
    out = q.new_empty(*q.shape[:3], e)
    cut = cut_pieces(q, cu_seqlens, heads * _tiles(widths))
    end = None
    after: Tensor
    if cut.whole:
        end = after = x.new_state()
    else:
        before, after = _states(k, v, before, log_decay, heads, cut, reverse=False)
    walk_kernel[(cut.count * heads * _tiles(widths),)](
        _given(q), _given(k), _given(v), _given(out), before, end, log_decay, cut.arguments, heads,
        widths, heads // k.shape[1], False, _how(q, max(d, e)), **_options(q, d, e),
    )  # fmt: skip
    return out, after


def backward(do: Tensor, dstate: Tensor | None, x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial states."""
    q, k, v, log_decay, past, cu_seqlens = x
    heads, groups, d, e = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    group = heads // groups
    over_e, over_d = _widths(q, d, e), _widths(q, e, d)
    units = _tiles(over_e) + (1 + group) * _tiles(over_d)
    # Twice as many short programs fill an H200 better here.
    cut = cut_pieces(q, cu_seqlens, max(1, groups * units // 2))
    future, end = dstate, None
    if cut.whole:
        end = start = x.new_state()
    else:
        past, _ = _states(k, v, past, log_decay, heads, cut, reverse=False)
        future, start = _states(q, do, dstate, log_decay, heads, cut, reverse=True)
    dq = q.new_empty(q.shape)
    # Where heads share a group, they add to it one after another, in float32.
    dtype = torch.float32 if group > 1 else q.dtype
    dk, dv = (each.new_empty(each.shape, dtype=dtype) for each in (k, v))
    grad_kernel[(cut.count * groups * units,)](
        *(_given(each) for each in (q, k, v, do, dq, dk, dv)), past, future, end, log_decay,
        cut.arguments, groups, over_e, over_d, group, _how(q, max(d, e)),
        **_options(q, d, e, backward=True),
    )  # fmt: skip
    return dq, dk.to(q.dtype), dv.to(q.dtype), start
