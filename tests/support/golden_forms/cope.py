"""Another golden file of contextual positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, join_heads, metadata, prefixed, split_heads, stored
from zoo.position.cope import cope_attention_reference

CONFIG = {
    "batch": 3,
    "seq": 7,
    "nheads": 3,
    "head_dim": 2,
    "npos": 3,
    "dtype": "float64",
    "variants": {
        "plain": "cope defaults",
        "own_keys": {"cope_sep_key": True, "cope_nodiv": True},
        "values": {"cope_val_gates": True},
        "far": {"pos_emb": "cope+rel"},
    },
    "layout": "as in the file it stands in for",
    "loss": "per variant sum(out.<variant>.y * in.<variant>.cotangent)",
    "pad": "out.core.y_pad: padded keys of some samples hidden (a padded token still sees itself)",
}


def make() -> Golden:
    """The layer in every variant, and the attention alone."""
    source, config = Source(12), CONFIG
    batch, length, heads = config["batch"], config["seq"], config["nheads"]
    x = source(batch, length, heads * config["head_dim"]).requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    found = {"in.x": x, "in.mask": mask.double(), **core(source, mask)}
    for name, options in config["variants"].items():
        found |= variant(source, x, mask, name, {} if isinstance(options, str) else options)
    return stored(found, torch.float64), metadata(config)


def variant(
    source: Source, x: Tensor, mask: Tensor, name: str, options: dict[str, object]
) -> dict[str, Tensor]:
    """A layer with projections."""
    heads, width, length = CONFIG["nheads"], CONFIG["head_dim"], CONFIG["seq"]
    dim = heads * width
    maps = ["query", "key", "val", "out", *(["key_cope"] if "cope_sep_key" in options else [])]
    param = {f"proj_{m}.weight": 0.6 * source(dim, dim) for m in maps}
    param |= {f"proj_{m}.bias": source(dim) for m in maps}
    param["attn.pos_emb"] = source(1, width, CONFIG["npos"])
    if options.get("pos_emb") == "cope+rel":
        param["attn.rel_pos_emb.emb"] = source(1, width, length)
    for value in param.values():
        value.requires_grad_()
    relative = None
    if "attn.rel_pos_emb.emb" in param:  # the last column is distance 0
        relative = param["attn.rel_pos_emb.emb"][0].flip(1).t()

    def mapped(which: str) -> Tensor:
        rows = F.linear(x, param[f"proj_{which}.weight"], param[f"proj_{which}.bias"])
        return split_heads(rows, heads)

    q, k, v = (mapped(which) for which in ("query", "key", "val"))
    gates = mapped("key_cope") if "cope_sep_key" in options else None
    given = {
        "mask": mask,
        "gate_k": v if options.get("cope_val_gates") else gates,
        "relative": relative,
        "nodiv": bool(options.get("cope_nodiv")),
    }
    embedding = param["attn.pos_emb"][0]
    unit = torch.eye(length, dtype=torch.float64).expand(len(x), heads, -1, -1)
    weights = cope_attention_reference(q, k, unit, embedding, **given)
    y = join_heads(cope_attention_reference(q, k, v, embedding, **given))
    y = F.linear(y, param["proj_out.weight"], param["proj_out.bias"])
    cotangent = source(*y.shape)
    of = {"in.x": x, **prefixed("param.", param)}
    return {
        f"in.{name}.cotangent": cotangent,
        f"out.{name}.y": y,
        f"out.{name}.attn": weights,
        **prefixed(f"param.{name}.", param),
        **gradients((y * cotangent).sum(), of, f"grad.{name}."),
    }


def core(source: Source, mask: Tensor) -> dict[str, Tensor]:
    """The attention of given queries, keys and values, whole and with padding."""
    batch, length, heads = CONFIG["batch"], CONFIG["seq"], CONFIG["nheads"]
    width = CONFIG["head_dim"]
    q, k, v = (source(batch, heads, length, width) for _ in range(3))
    embedding = source(width, CONFIG["npos"])
    pad = torch.arange(length) >= torch.tensor([length, length - 1, length - 3])[:, None]
    shown = mask & ~pad[:, None, None] | torch.eye(length, dtype=torch.bool)
    gates = q @ k.mT / width**0.5
    found = {
        "in.core.q": q,
        "in.core.k": k,
        "in.core.v": v,
        "out.core.y": cope_attention_reference(q, k, v, embedding, mask=mask),
        "out.core.y_pad": cope_attention_reference(q, k, v, embedding, mask=shown),
        "out.core.positions_unclamped": gates.sigmoid().mul(mask).flip(-1).cumsum(-1).flip(-1),
    }
    found = {name: value.flatten(0, 1) for name, value in found.items()}
    return {**found, "in.core.pad": pad.int(), "param.core.pos_emb": embedding[None]}
