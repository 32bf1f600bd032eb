"""Another golden file of cog attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden_files import Golden
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
from zoo.normalize.cog import cog_attention_reference

CONFIG = {
    "batch": 3,
    "seq": 9,
    "n_heads": 3,
    "head_dim": 4,
    "dim": 10,
    "rope_theta": 500.0,
    "rope": "interleaved pairs (complex)",
    "vision_seq": 6,
    "vision_num_heads": 5,
    "vision_qkv_bias": True,
    "dtype": "float32",
    "param_layout": "as in the file it stands in for; param.vision.qkv.bias where there is one",
    "loss": "sum(out.y * in.cotangent)",
}


def make() -> Golden:
    """A layer of a language model and one of a vision model."""
    source, config = Source(11, 0.5), CONFIG
    batch, length, heads = config["batch"], config["seq"], config["n_heads"]
    dim, inner = config["dim"], config["n_heads"] * config["head_dim"]
    given = {name: source(dim, inner).requires_grad_() for name in ("qw", "kw", "vw")}
    given["ow"] = source(inner, dim).requires_grad_()
    x, cotangent = 2 * source(batch, length, dim), source(batch, length, dim)
    x.requires_grad_()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    places = torch.arange(length)
    starts = torch.tensor([2, 5, length - 1])  # where the second document of each sample begins
    apart = (places < starts[:, None])[:, :, None] == (places < starts[:, None])[:, None]

    def attend(mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (split_heads(x @ given[name], heads) for name in ("qw", "kw", "vw"))
        q, k = (turn(t, config["rope_theta"]) for t in (q, k))
        y = cog_attention_reference(q, k, v, mask=mask)
        unit = torch.eye(length, dtype=torch.float64).expand(batch, heads, -1, -1)
        return join_heads(y) @ given["ow"], cog_attention_reference(q, k, unit, mask=mask)

    y, weights = attend(causal)
    loss = (y * cotangent).sum()
    found = {
        "in.x": x,
        "in.cotangent": cotangent,
        "in.causal_mask": causal.int(),
        "in.doc_mask": (apart & causal).int(),
        "out.y": y,
        "out.y_decode": y,
        "out.attn_weights": weights,
        "out.y_docmask": attend((apart & causal)[:, None])[0],
        **prefixed("param.", given),
        **gradients(loss, {"in.x": x, **prefixed("param.", given)}),
        **vision(source),
    }
    return stored(found, torch.float32), metadata(config)


def vision(source: Source) -> dict[str, Tensor]:
    """The layer without positions."""
    dim, heads = CONFIG["dim"], CONFIG["vision_num_heads"]
    x = 2 * source(CONFIG["batch"], CONFIG["vision_seq"], dim)
    param = {
        "qkv.weight": source(3 * dim, dim),
        "qkv.bias": source(3 * dim),
        "proj.weight": source(dim, dim),
        "proj.bias": source(dim),
    }
    rows = F.linear(x, param["qkv.weight"], param["qkv.bias"])
    y = cog_attention_reference(*(split_heads(part, heads) for part in rows.chunk(3, -1)))
    y = F.linear(join_heads(y), param["proj.weight"], param["proj.bias"])
    return {"in.vision.x": x, "out.vision.y": y, **prefixed("param.vision.", param)}
