"""Learned relative positions beside CoPE, its variant "cope+rel": `zoo.position.cope`.

A key at distance i - j adds q_i . R_{i-j} / sqrt(D) to its score, with R (max_len, D), one for all
heads. The gates do not see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.parts import Strip


def relative_term(strip: Strip, relative: Tensor, keep: int | None) -> Tensor:
    """The scaled q_i . R_{i-j} of a strip, (B, H, R, M), in the type of R.

    Args:
        strip: Queries, keys and who may meet.
        relative: R, a row for each distance, (max_len, D).
        keep: Farthest that the selection lets a query see, in tokens, or None for all.

    Raises:
        ZooError: A pair that may meet is farther apart than R reaches.
    """
    _check_reach(strip, len(relative), keep)
    meets = (strip.q.to(relative.dtype) * strip.scale) @ relative.t()
    distance = _distance(strip).clamp(0, len(relative) - 1)
    return meets.gather(-1, distance.expand(*meets.shape[:2], -1, -1))


def _distance(strip: Strip) -> Tensor:
    """I - j, (R, M)."""
    return strip.q_index[:, None] - strip.k_index


def _check_reach(strip: Strip, max_len: int, keep: int | None) -> None:
    call, rows, keys = strip.call, strip.rows, strip.keys
    farthest = call.q_start + rows.stop - 1 - call.k_start - keys.start
    far = farthest >= max_len
    if far and (torch.compiler.is_compiling() or strip.q_index.is_meta):
        # There are no values of masks to look at.
        far = keep is None or keep > max_len
    elif far and strip.mask is not None:
        far = bool((strip.mask & (_distance(strip) >= max_len)).any())
    if far:
        raise ZooError(
            f"max_len={max_len} of 'cope' with with_rel is too short for a distance of "
            f"{farthest}; allowed: less than max_len"
        )
