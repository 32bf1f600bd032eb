"""What landmark attention is made of: where landmarks stand, and the weights in two levels.

`grouped_softmax` takes landmarks anywhere and scatters every key into the bucket of its block, as
the official code does; `by_blocks` is for regular ones, whose blocks are a reshape away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.parts import repeat_heads, widen


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the last axis of what is allowed; zeros for the rest and for empty rows."""
    low = torch.finfo(scores.dtype).min
    return scores.masked_fill(~allowed, low).softmax(-1).masked_fill(~allowed, 0.0)


def insert_landmarks(tokens: Tensor, block: int, landmark_id: int) -> tuple[Tensor, Tensor]:
    """Put a landmark after every `block` tokens.

    Args:
        tokens: (.., N) integers.
        block: Ordinary tokens L between landmarks.
        landmark_id: The token that marks the end of a block.

    Returns:
        Tokens (.., N + N // L) and which of them are landmarks, (N + N // L,) boolean.

    Raises:
        ZooError: `block` is below 1, the tokens or the landmark are no integers, or a token is the
            landmark already.
    """
    block = checks.whole("block", block)
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.ndim < 1:
        raise ZooError(
            f"tokens of shape {tuple(tokens.shape)} and {tokens.dtype} must be (.., N) integers"
        )
    most, also = torch.iinfo(tokens.dtype).max, f"which {tokens.dtype} holds"
    landmark_id = checks.whole("landmark_id", landmark_id, 0, most, also=also)
    if bool((tokens == landmark_id).any()):
        raise ZooError(f"landmark_id={landmark_id!r} occurs among the tokens; it must be new")
    length = tokens.shape[-1]
    is_landmark = landmarks_of(length + length // block, block, tokens.device)
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
        ZooError: Scores or masks of a wrong shape or type, or `dropout` outside [0, 1].
    """
    rows, keys = scores.shape[-2:] if scores.ndim == 4 else (1, 0)
    if rows > keys:
        raise ZooError(
            f"scores of shape {tuple(scores.shape)} must be (B, H, R, M), of the last R of M tokens"
        )
    checks.number("dropout", dropout, 0, 1)
    fits = mask is None or all(
        a in (1, b) for a, b in zip(mask.shape[::-1], scores.shape[::-1], strict=False)
    )
    if mask is not None and (mask.dtype != torch.bool or mask.ndim > 4 or not fits):
        raise ZooError(
            f"mask of shape {tuple(mask.shape)} and {mask.dtype} does not fit; allowed: boolean, "
            f"broadcastable to {tuple(scores.shape)}"
        )
    check_landmarks(is_landmark, scores.shape[0], keys)
    causal = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril(keys - rows)
    mask = causal if mask is None else causal & mask
    return by_buckets(scores, is_landmark, keys - rows, keys, mask, dropout)


def by_buckets(
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
    scores = widen(scores)
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


def by_blocks(
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
    scores = F.pad(widen(scores), padding).unflatten(-1, (-1, span))  # (B, H, R, blocks, L + 1)
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
        k: (B, G, M, D), G dividing H.
        v: (B, G, M, E).
        block: Ordinary tokens L of a block, where `is_landmark` does not say it.
        scale: Factor on the scores; default ``1 / sqrt(D)``.
        is_landmark: (M,) or (B, M) boolean.

    Source: the official repository's ``lm_benchmark/models/landmark.py``.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_landmark is None:
        is_landmark = landmarks_of(k.shape[2], block, k.device)
    return grouped_softmax(scores, is_landmark).to(v.dtype) @ v


def landmarks_of(length: int, block: int, device: torch.device | None = None) -> Tensor:
    """Which of the first tokens of a sequence are landmarks, (length,)."""
    return torch.arange(length, device=device) % (block + 1) == block


def check_landmarks(is_landmark: Tensor, samples: int, keys: int) -> None:
    """Refuse marks of landmarks that do not fit (B, .., keys).

    Raises:
        ZooError: Wrong type or shape.
    """
    shape = tuple(is_landmark.shape)
    if is_landmark.dtype != torch.bool or shape not in ((keys,), (samples, keys)):
        raise ZooError(
            f"is_landmark of shape {shape} and {is_landmark.dtype} does not fit; allowed: boolean "
            f"({keys},) or ({samples}, {keys})"
        )


def check_places(is_landmark: Tensor, k: Tensor, block: int, backend: str) -> None:
    """Refuse landmarks of keys (B, G, M, D) that stand elsewhere than at every (block + 1)-th.

    Raises:
        ZooError: They do, or do not fit.
    """
    keys = k.shape[2]
    check_landmarks(is_landmark, k.shape[0], keys)
    wrong = is_landmark != landmarks_of(keys, block, k.device)
    if bool(wrong.any()):
        place = int(wrong.view(-1, keys).any(0).nonzero()[0])
        raise ZooError(
            f"landmarks are in the wrong places: backend={backend!r} wants one after every "
            f"block={block} tokens and nowhere else, but token {place} differs; use "
            "backend='reference'"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries, keys and values that do not fit each other.

    Raises:
        ZooError: They do not.
    """
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    fits = fits and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ZooError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; allowed: "
            "(B, H, N, D), (B, G, M, D) and (B, G, M, E), G dividing H and M at least N"
        )
    if not all(x.is_floating_point() for x in (q, k, v)):
        raise ZooError(f"q {q.dtype}, k {k.dtype} and v {v.dtype} must be floating-point tensors")
