"""Another golden file of landmark attention, its language model and its retrieval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from golden_files import Golden, read
from torch import Tensor

from golden_forms import (
    Source,
    gradients,
    join_heads,
    metadata,
    prefixed,
    split_heads,
    stored,
    turn,
)
from zoo.normalize.landmark import grouped_softmax, insert_landmarks

# Landmarks of the first layer are all alike, so the cache holds no more blocks than stand apart.
CHANGES = {
    "n_embd": 12,
    "n_head": 3,
    "n_layer": 3,
    "vocab_size": 17,
    "landmark_id": 16,
    "mem_freq": 2,
    "mem_cache_freq": 2,
    "block_len": 2,
    "batch_size": 1,
    "mem_cache_size": 4,
    "cache_topk": 3,
    "cache_selection_method": "max_over_heads",
    "chunk": 7,
    "seed": 14,
}
BASE = 10000.0  # as in the official code
TOKENS, LENGTH = 19, 13
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def make() -> Golden:
    """The softmax, a layer, the model, and the model with a cache."""
    config = {**read("landmark")[1]["config"], **CHANGES}
    source = Source(config["seed"], 0.4)
    block, heads, samples = config["mem_freq"], config["n_head"], config["batch_size"]
    param = parameters(source, config)
    x = 3 * source(samples, LENGTH, config["n_embd"])
    scores = 5 * source(samples, heads, LENGTH, LENGTH)
    marks = torch.arange(LENGTH) % (block + 1) == block
    tokens = source.whole(config["landmark_id"], samples, TOKENS)
    stream, _ = insert_landmarks(tokens, block, config["landmark_id"])
    of = {"x": x.requires_grad_(), "c_attn.weight": param["h.0.attn.c_attn.weight"]}
    of["c_attn.weight"].requires_grad_()
    whole = parallel(block)
    y = layer(param, 0, x, heads, whole)
    cached = model(param, stream, heads, in_chunks(config))
    ordinary = torch.arange(stream.shape[1]) % (block + 1) != block
    found = {
        "in.attn.x": x,
        "in.attn.is_mem": marks.expand(samples, -1).byte(),
        "in.softmax.scores": scores,
        "in.lm.tokens": tokens,
        "in.lm.tokens_with_landmarks": stream,
        "out.softmax.probs": grouped_softmax(scores, marks),
        "out.attn.y": y,
        "out.lm.logits": model(param, stream, heads, whole),
        f"out.cached_topk{config['cache_topk']}.logits": cached[:, ordinary],
        **prefixed("param.transformer.", param),
        **gradients(y.sum(), of, "grad.attn."),
    }
    return stored(found, torch.float32), metadata(config)


def parameters(source: Source, config: dict[str, Any]) -> dict[str, Tensor]:
    """All weights by their official names."""
    dim = config["n_embd"]
    param = {"wte.weight": source(config["vocab_size"], dim), "ln_f.weight": 1 + source(dim)}
    for i in range(config["n_layer"]):
        param |= {f"h.{i}.{name}.weight": 1 + source(dim) for name in ("ln_1", "ln_2")}
        param[f"h.{i}.attn.c_attn.weight"] = source(3 * dim, dim)
        param[f"h.{i}.attn.c_proj.weight"] = source(dim, dim)
        param[f"h.{i}.mlp.c_fc.weight"] = source(4 * dim, dim)
        param[f"h.{i}.mlp.c_proj.weight"] = source(dim, 4 * dim)
    return param


def layer(param: dict[str, Tensor], i: int, x: Tensor, heads: int, attend: Attend) -> Tensor:
    """Attention with its projections."""
    rows = F.linear(x, param[f"h.{i}.attn.c_attn.weight"]).chunk(3, -1)
    y = attend(i, *(split_heads(t, heads) for t in rows))
    return F.linear(join_heads(y), param[f"h.{i}.attn.c_proj.weight"])


def model(param: dict[str, Tensor], tokens: Tensor, heads: int, attend: Attend) -> Tensor:
    """Logits of all tokens."""
    words = param["wte.weight"]
    x, shape, depth = words[tokens], words.shape[1:], 0
    while f"h.{depth}.ln_1.weight" in param:
        name = f"h.{depth}"
        normed = F.layer_norm(x, shape, param[f"{name}.ln_1.weight"])
        x = x + layer(param, depth, normed, heads, attend)
        normed = F.layer_norm(x, shape, param[f"{name}.ln_2.weight"])
        inner = F.gelu(F.linear(normed, param[f"{name}.mlp.c_fc.weight"]))
        x = x + F.linear(inner, param[f"{name}.mlp.c_proj.weight"])
        depth += 1
    return F.linear(F.layer_norm(x, shape, param["ln_f.weight"]), words)


def parallel(block: int) -> Attend:
    """The form without a cache."""

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        marks = torch.arange(q.shape[2]) % (block + 1) == block
        scores = turn(q, BASE) @ turn(k, BASE).mT * q.shape[-1] ** -0.5
        return grouped_softmax(scores, marks) @ v

    return attend


def in_chunks(config: dict[str, Any]) -> Attend:
    """The form with a cache, written out for each row; heads choose together."""
    block, top, chunk = config["mem_cache_freq"], config["cache_topk"], config["chunk"]
    span = block + 1
    assert config["cache_selection_method"] == "max_over_heads"

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = [n + n // block for n in range(chunk, TOKENS, chunk)]
        pairs = zip([0, *ends], [*ends, q.shape[2]], strict=True)
        return torch.cat([rows_of(first, last, q, k, v) for first, last in pairs], 2)

    def rows_of(first: int, last: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        done = first // span
        held = list(range(max(0, done - config["mem_cache_size"]), done))
        begin = min(len(held), top + 1) * span - done * span  # from tokens of the stream to places
        return torch.cat([row(t, held, begin, done * span, q, k, v) for t in range(first, last)], 2)

    def row(
        t: int, held: list[int], begin: int, own: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        near = torch.arange(own, t + 1)
        asked = turn(q[:, :, t : t + 1], BASE, near[-1:] + begin)
        keys, values = [turn(k[:, :, near], BASE, near + begin)], [v[:, :, near]]
        if held:
            chosen = choose(asked, held, k)
            for j in reversed(range(top)):
                b, late = held[chosen[j]], chosen[j] >= len(held) - top
                tokens = torch.arange(b * span, b * span + span)
                places = torch.arange(span) + span * (j + late)
                keys.insert(0, turn(k[:, :, tokens], BASE, places))
                values.insert(0, v[:, :, tokens])
        together = torch.cat(keys, 2)
        marks = torch.arange(together.shape[2]) % span == block
        scores = asked @ together.mT * q.shape[-1] ** -0.5
        return grouped_softmax(scores, marks) @ torch.cat(values, 2)

    def choose(asked: Tensor, held: list[int], k: Tensor) -> list[int]:
        """Which of the held blocks the heads of the only sample like best, in time order."""
        slots = [max(0, n - (len(held) - top) + 1) for n in range(len(held))]
        places = torch.tensor(slots) * span + block
        marks = turn(k[:, :, [b * span + block for b in held]], BASE, places)
        shares = (asked @ marks.mT * k.shape[-1] ** -0.5).softmax(-1).amax(1)
        assert len(shares) == 1
        return sorted(shares.flatten().topk(top).indices.tolist())

    return attend
