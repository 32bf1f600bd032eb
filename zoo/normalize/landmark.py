"""Landmark attention (Mohtashami and Jaggi 2023, "Landmark Attention").

After every L ordinary tokens stands a landmark, whose key speaks for the block before it. With
s_ij = q_i k_j / sqrt(D), a row i shares its attention first among the ordinary tokens A_i of its own
block up to itself and the landmarks M_i of earlier blocks, then, inside each of these, by the scores
of the L tokens there:

    p_i   = softmax over A_i and M_i of s_ij              q, k (B, H, N, D)
    r_i^b = softmax over the ordinary tokens of block b of s_ij
    w_ij  = p_ij                       j in A_i
    w_ij  = p_i,landmark(b) r_ij^b     j in an earlier block b
    w_ij  = 0                          j a landmark
    o_i   = sum_j w_ij v_j                                v, o (B, H, N, D)

Weights of a row sum to one. The landmark of the current block is hidden, also from itself: the row
of a landmark sees the L tokens before it and the earlier landmarks. Values of landmarks are never
used. Cost N^2 D as in softmax attention, in memory O(N). No parameters: the embedding of the
landmark is the model's.

Landmarks are known by their place: token j of a sequence is one if ``j % (block + 1) == block``. A
model that sees `insert_every` puts them in (`zoo.models.decoder_lm`), so that users of the model
know ordinary tokens only; a host on its own is given them with the others. They take positions.

- `group_dropout`: dropout on the probabilities of the landmarks, in training.
- `pos_jump`: in training, positions after each landmark move on by a random number from 0 to
  ``pos_jump - 1``, to get used to gaps; drawn for each sample, once for all layers of a model. The
  paper says 1 to 100; we follow the code, whose default is none.
- `retrieve`: with a cache, a query sees the best k of the finished blocks only (`_landmark_memory`).

Where masks or selections hide tokens (the official code knows only causality): a landmark whose
block shows nothing to a row is hidden from it too, so that the weights still sum to one, and a block
whose landmark is hidden is closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.normalize._landmark_blocks import BlockAttention
from zoo.parts import Call, Normalize, Strip, repeat_heads
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.routes import Route

if TYPE_CHECKING:
    from zoo.attention import Attention

BACKENDS = ("auto", "reference", "torch", "triton")


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the last axis of what is allowed; zeros for the rest and for empty rows."""
    low = torch.finfo(scores.dtype).min
    return scores.masked_fill(~allowed, low).softmax(-1).masked_fill(~allowed, 0.0)


def _full(scores: Tensor) -> Tensor:
    """Scores of at least float32."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def insert_landmarks(tokens: Tensor, block: int, landmark_id: int) -> tuple[Tensor, Tensor]:
    """Put a landmark after every `block` tokens.

    Args:
        tokens: (.., N) integers.
        block: Ordinary tokens L between landmarks.
        landmark_id: The token that marks the end of a block.

    Returns:
        Tokens (.., N + N // L) and which of them are landmarks, (N + N // L,) boolean.

    Raises:
        ZooError: `block` is below 1, or a token is the landmark already.
    """
    _check_block(block)
    if bool((tokens == landmark_id).any()):
        raise ZooError(f"landmark_id={landmark_id!r} occurs among the tokens; it must be new")
    length = tokens.shape[-1]
    is_landmark = _landmarks_of(length + length // block, block, tokens.device)
    found = tokens.new_full((*tokens.shape[:-1], len(is_landmark)), landmark_id)
    found[..., ~is_landmark] = tokens
    return found, is_landmark


def landmark_targets(
    tokens: Tensor, is_landmark: Tensor, *, ignore: int = -100, include_landmarks: bool = False
) -> Tensor:
    """Targets of next-token prediction in a sequence with landmarks.

    The token before a landmark predicts the one after it, and outputs at landmarks are ignored.

    Args:
        tokens: (B, N) with landmarks.
        is_landmark: (N,) boolean.
        ignore: Target where there is none: at landmarks, and after the last ordinary token.
        include_landmarks: Landmarks are predicted, and predict, like any other token (as the
            official LLaMA code does).

    Returns:
        (B, N).

    Raises:
        ZooError: Shapes do not fit.
    """
    if is_landmark.dtype != torch.bool or is_landmark.shape != tokens.shape[-1:]:
        raise ZooError(
            f"is_landmark of shape {tuple(is_landmark.shape)} and {is_landmark.dtype} must be "
            f"boolean, one for each of the {tokens.shape[-1]} tokens"
        )
    targets = torch.full_like(tokens, ignore)
    if include_landmarks:
        targets[..., :-1] = tokens[..., 1:]
        return targets
    ordinary = (~is_landmark).nonzero()[:, 0]
    targets[..., ordinary[:-1]] = tokens[..., ordinary[1:]]
    return targets


def grouped_softmax(
    scores: Tensor, is_landmark: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Weights of landmark attention for landmarks anywhere: the reference.

    Args:
        scores: (B, H, R, M), of the last R tokens of M.
        is_landmark: (M,) or (B, M) boolean.
        mask: Boolean, True may attend, broadcastable to (B, H, R, M), on top of causality.
        dropout: Probability with which the share of a landmark is dropped.

    Returns:
        (B, H, R, M), rows summing to one where anything is visible, at least float32.

    Raises:
        ZooError: `is_landmark` is not boolean or does not fit.
    """
    rows, keys = scores.shape[-2:]
    if is_landmark.dtype != torch.bool or tuple(is_landmark.shape) not in (
        (keys,),
        (scores.shape[0], keys),
    ):
        raise ZooError(
            f"is_landmark of shape {tuple(is_landmark.shape)} and {is_landmark.dtype} does not fit; "
            f"allowed: boolean ({keys},) or ({scores.shape[0]}, {keys})"
        )
    causal = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril(keys - rows)
    mask = causal if mask is None else causal & mask
    return _by_buckets(scores, is_landmark, keys - rows, keys, mask, dropout)


def _by_buckets(
    scores: Tensor,
    is_landmark: Tensor,
    first: int,
    buckets: int,
    mask: Tensor,
    dropout: float,
) -> Tensor:
    """Grouped softmax by scattering every key into the bucket of its block.

    Args:
        scores: (B, H, R, M).
        is_landmark: (M,) or (B, M).
        first: Key that the first row stands at.
        buckets: A number above that of the landmarks.
        mask: What each row may see, causality included, broadcastable to the scores.
        dropout: On the shares of the landmarks.
    """
    scores = _full(scores)
    mask = mask.expand(scores.shape)
    marks = is_landmark if is_landmark.ndim == 2 else is_landmark[None]
    bucket = marks.cumsum(-1) - marks.long()  # a landmark belongs to the block that it ends
    own = bucket[:, first : first + scores.shape[2], None] == bucket[:, None]
    marks, own = marks[:, None, None], own[:, None]
    index = bucket[:, None, None].expand(scores.shape)
    inside = mask & ~marks
    low = torch.finfo(scores.dtype).min
    shape = (*scores.shape[:-1], buckets)
    top = scores.detach().masked_fill(~inside, low)
    top = scores.new_full(shape, low).scatter_reduce(-1, index, top, "amax")
    power = (scores - top.gather(-1, index)).masked_fill(~inside, -torch.inf).exp()
    total = scores.new_zeros(shape).scatter_add(-1, index, power)
    shown = total > 0
    inner = power / total.masked_fill(~shown, 1.0).gather(-1, index)
    open_ = mask & marks & ~own & shown.gather(-1, index)
    share = _softmax(scores, (inside & own) | open_)
    blocks = F.dropout(share.masked_fill(~marks, 0.0), dropout)
    of_block = scores.new_zeros(shape).scatter_add(-1, index, blocks).gather(-1, index)
    return torch.where(own, share * inside, of_block * inner)


def _by_blocks(
    scores: Tensor, block: int, first: int, rows: Tensor, mask: Tensor, dropout: float
) -> Tensor:
    """Grouped softmax where every block has its L tokens: plain softmaxes after a reshape.

    Args:
        scores: (B, H, R, M).
        block: Ordinary tokens L.
        first: Index of the first key in the sequence.
        rows: Index of each row, (R,).
        mask: What each row may see, causality included, broadcastable to the scores.
        dropout: On the shares of the landmarks.
    """
    span = block + 1
    front, keys = first % span, scores.shape[-1]
    padding = (front, -(front + keys) % span)
    mask = F.pad(mask.expand(*mask.shape[:-1], keys), padding, value=False)
    mask = mask.unflatten(-1, (-1, span))
    scores = F.pad(_full(scores), padding).unflatten(-1, (-1, span))  # (B, H, R, blocks, L + 1)
    group = torch.arange(scores.shape[-2], device=scores.device) + first // span
    own, past = (f(group, rows[:, None] // span)[..., None] for f in (torch.eq, torch.lt))
    ordinary, landmark = scores[..., :block], scores[..., block]
    seen = mask[..., :block]
    inner = _softmax(ordinary, seen)
    open_ = mask[..., block] & past[..., 0] & seen.any(-1)
    level = torch.cat((ordinary.flatten(-2), landmark), -1)
    allowed = torch.cat(((seen & own).flatten(-2), open_.expand(*seen.shape[:-1])), -1)
    share = _softmax(level, allowed)
    local, blocks = share.split((level.shape[-1] - landmark.shape[-1], landmark.shape[-1]), -1)
    weights = F.dropout(blocks, dropout)[..., None] * inner + local.view_as(ordinary)
    return F.pad(weights, (0, 1)).flatten(-2)[..., front : front + keys]


def landmark_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    scale: float | None = None,
    is_landmark: Tensor | None = None,
) -> Tensor:
    """The equations with all N x M scores, landmarks anywhere; any dtype.

    Args:
        q: (B, H, N, D), the last N of M tokens.
        k: (B, H, M, D).
        v: (B, H, M, E).
        block: Ordinary tokens L of a block, where `is_landmark` does not say it.
        scale: Factor on the scores; default ``1 / sqrt(D)``.
        is_landmark: (M,) or (B, M) boolean.

    Source: the official repository's ``lm_benchmark/models/landmark.py``.
    """
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_landmark is None:
        is_landmark = _landmarks_of(k.shape[2], block, k.device)
    return grouped_softmax(scores, is_landmark).to(v.dtype) @ v


def _landmarks_of(length: int, block: int, device: torch.device | None = None) -> Tensor:
    """Which of the first tokens of a sequence are landmarks, (length,)."""
    return torch.arange(length, device=device) % (block + 1) == block


def _check_block(block: int) -> None:
    if type(block) is not int or block < 1:
        raise ZooError(f"block={block!r} must be a whole number of at least 1")
