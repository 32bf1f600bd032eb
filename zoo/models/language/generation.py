"""Continuing sequences one token at a time: prompts, sampling, and where to stop.

A step runs the model on the new tokens alone, as the cache holds those before. From the logits of
the last position a token is drawn: of softmax(logits / temperature), restricted to the `top_k`
likeliest tokens, then to the fewest likeliest ones that together reach the probability `top_p`.

Prompts of different lengths are padded on the left, so that all of them end in the same column; a
mask hides the padding, and positions count from the first real token.

Legend: B batch, N length, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import checks
from zoo.cache import Cache
from zoo.errors import ZooError
from zoo.parts import Part

if TYPE_CHECKING:
    from zoo.models.language.decoder_lm import DecoderLM


@torch.no_grad()
def generate(
    model: DecoderLM,
    tokens: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Continue sequences one token at a time, with the cache.

    Args:
        model: Language model; it runs in evaluation mode and is put back into its own.
        tokens: Prompt, (B, N) int64, N at least 1.
        steps: Tokens to add.
        temperature: Of the softmax; 0 takes the likeliest token.
        top_k: Sample among this many likeliest tokens.
        top_p: Sample among the likeliest tokens that together have this probability.
        generator: Source of randomness.
        eos: Stop a sequence after this token (and repeat it to the end of the batch).
        lengths: (B,) real tokens of each prompt, which stand at the end (padding on the left);
            None where all prompts are of one length.

    Returns:
        (B, N + steps) int64, shorter when every sequence has ended.

    Raises:
        ZooError: An argument is out of range, the model gives no logits, or a prompt is padded
            where places are counted from the first token.
    """
    if model.num_outputs is not None:
        raise ZooError(f"num_outputs={model.num_outputs!r}: the model gives no tokens to sample")
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ZooError(f"prompt of shape {tuple(tokens.shape)} must be (batch, at least 1)")
    checks.whole("steps", steps, 0)
    checks.number("temperature", temperature, 0)
    checks.optional(checks.whole)("top_k", top_k)
    checks.optional(checks.number)("top_p", top_p, above=0, high=1)
    visible = None if lengths is None else real_tokens(model, tokens, lengths)
    was_training = model.training
    model.eval()
    try:
        cache, new = Cache(), tokens
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(steps):
            mask = positions = None
            if visible is not None:
                mask = visible[:, None, None]
                positions = (visible.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
                visible = F.pad(visible, (0, 1), value=True)
            logits = model(new, mask=mask, positions=positions, cache=cache)[:, -1]
            new = sample(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                new = new.masked_fill(ended[:, None], eos)
                ended |= new[:, 0] == eos
            tokens = torch.cat([tokens, new], 1)
            if eos is not None and bool(ended.all()):
                break
        return tokens
    finally:
        model.train(was_training)


def real_tokens(model: DecoderLM, tokens: Tensor, lengths: Tensor) -> Tensor | None:
    """Tell the tokens of prompts (B, N) from the padding on their left.

    Args:
        model: The model that is to continue them.
        tokens: (B, N).
        lengths: (B,) real tokens of each prompt.

    Returns:
        (B, N) bool, True for real tokens; None if all are.

    Raises:
        ZooError: Lengths that do not fit, or padding where places are counted from the first token.
    """
    length = tokens.shape[1]
    if lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > length:
        raise ZooError(f"lengths={lengths.tolist()!r} must be (batch,), from 1 to {length}")
    if int(lengths.min()) == length:
        return None
    if (what := counted_from_first(model)) is not None:
        raise ZooError(
            f"lengths={lengths.tolist()!r} means padding on the left, but {what}, counted from "
            "the first; give prompts of one length"
        )
    return torch.arange(length, device=tokens.device) >= length - lengths[:, None]


def counted_from_first(model: DecoderLM) -> str | None:
    """Say what in a model goes by the index of a token, so that padding would move it; or None."""
    if model.inserted is not None:
        return f"the model inserts tokens after every {model.inserted.every}"
    for part in model.modules():
        if isinstance(part, Part) and part.counts:
            return f"{type(part).__name__} cuts blocks"
    return None


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of logits.

    Args:
        logits: (B, V).
        temperature: Of the softmax; 0 takes the likeliest token.
        top_k: Draw among this many likeliest tokens.
        top_p: Draw among the likeliest tokens that together have this probability.
        generator: Source of randomness.

    Returns:
        (B, 1) int64.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
