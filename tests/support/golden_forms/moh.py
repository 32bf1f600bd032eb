"""Another golden file of mixture-of-head attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, metadata, prefixed, split_heads, stored, turn
from zoo.combine.moh import moh_gates_reference, moh_reference, query_norm_gates_reference

CONFIG: dict[str, Any] = {
    "batch": 3,
    "seq": 7,
    "dim": 15,
    "num_heads": 5,
    "shared": 3,
    "routed_topk": 1,
    "variants": {
        "both": {"shared_head": 2, "routed_head": 1},
        "one_shared": {"shared_head": 1, "routed_head": 3},
        "routed": {"shared_head": 0, "routed_head": 4},
        "shared": {"shared_head": 5, "routed_head": 0},
    },
    "aux_coeff": 0.3,
    "vit": {"hw": 3, "num_heads": 5},
    "llama": {
        "num_heads": 6,
        "kv_heads": 3,
        "head_dim": 2,
        "rope_theta": 900.0,
        "rope": "half rotation",
        "shared": 2,
        "routed_topk": 3,
        "causal": False,
    },
    "qkv_layout": "as in the file it stands in for",
    "loss": "sum(y*cotangent)+aux_coeff*aux, float64 for DiT variants; float32 for vit and llama",
}


def make() -> Golden:
    """Layers of the diffusion, the vision and the language model."""
    source = Source(23)
    variants: dict[str, Tensor] = {}
    for name, sizes in CONFIG["variants"].items():
        variants |= variant(source, name, sizes["shared_head"], sizes["routed_head"])
    others = {**vision(source), **llama(source)}
    found = {**stored(variants, torch.float64), **stored(others, torch.float32)}
    return found, metadata(CONFIG)


def parameters(source: Source, shared: int) -> dict[str, Tensor]:
    """Projections, and the routers that there are."""
    dim, heads = CONFIG["dim"], CONFIG["num_heads"]
    shapes = {"qkv.weight": (3 * dim, dim), "qkv.bias": (3 * dim,)}
    shapes |= {"proj.weight": (dim, dim), "proj.bias": (dim,)}
    if shared < heads:
        shapes["wg.weight"] = (heads - shared, dim)
    if shared > 1:
        shapes["wg_1.weight"] = (shared, dim)
    if 0 < shared < heads:
        shapes["wg_0.weight"] = (2, dim)
    return {name: 0.5 * source(*shape).requires_grad_() for name, shape in shapes.items()}


def gated(
    x: Tensor, param: dict[str, Tensor], y: Tensor, shared: int, top: int
) -> tuple[Tensor, Tensor | None]:
    """Outputs of heads weighed by the routers, and the balance loss."""
    routers = (param.get(f"{name}.weight") for name in ("wg", "wg_1", "wg_0"))
    gates, loss = moh_gates_reference(x, y.shape[1], shared, top, *routers)  # (B, H, N)
    return moh_reference(y, gates, param["proj.weight"], param["proj.bias"]), loss


def variant(source: Source, name: str, shared: int, top: int) -> dict[str, Tensor]:
    """A layer of the diffusion model."""
    param = parameters(source, shared)
    x = source(CONFIG["batch"], CONFIG["seq"], CONFIG["dim"]).requires_grad_()
    rows = F.linear(x, param["qkv.weight"], param["qkv.bias"]).chunk(3, -1)
    y = F.scaled_dot_product_attention(*(split_heads(t, CONFIG["num_heads"]) for t in rows))
    y, aux = gated(x, param, y, shared, top)
    aux = y.new_zeros(()) if aux is None else aux
    cotangent = source(*y.shape)
    loss = (y * cotangent).sum() + CONFIG["aux_coeff"] * aux
    of = {"in.x": x, **prefixed("param.", param)}
    return {
        f"in.{name}.x": x,
        f"in.{name}.cotangent": cotangent,
        f"out.{name}.y": y,
        f"out.{name}.aux": aux[None],
        **prefixed(f"param.{name}.", param),
        **gradients(loss, of, f"grad.{name}."),
    }


def vision(source: Source) -> dict[str, Tensor]:
    """A layer whose queries and keys have length one, with a bias by relative places."""
    side, heads = CONFIG["vit"]["hw"], CONFIG["vit"]["num_heads"]
    dim, tokens, steps = CONFIG["dim"], side * side, 2 * side - 1
    param = parameters(source, CONFIG["shared"])
    param |= {"cpb_fc1.weight": source(11, 2), "cpb_fc1.bias": source(11)}
    param |= {"cpb_fc2.weight": source(heads, 11), "cpb_fc2.bias": source(heads)}
    param |= {"query_embedding": source(heads, 1, dim // heads)}
    param["temperature"] = source(heads, 1, 1)
    x, scale = source(2, tokens, dim), torch.tensor([1.7], dtype=torch.float64)
    table = source(steps * steps, 2)
    places = torch.arange(tokens)
    gaps = [p[:, None] - p + side - 1 for p in (places // side, places % side)]
    index = gaps[0] * steps + gaps[1]
    rows = F.linear(x, param["qkv.weight"], param["qkv.bias"]).chunk(3, -1)
    q, k, v = (split_heads(t, heads) for t in rows)
    q = (F.normalize(q, dim=-1) + param["query_embedding"]) * F.softplus(param["temperature"])
    inner = F.linear(table, param["cpb_fc1.weight"], param["cpb_fc1.bias"]).relu()
    bias = F.linear(inner, param["cpb_fc2.weight"], param["cpb_fc2.bias"]).T[:, index]
    scores = q * scale @ F.normalize(k, dim=-1).mT + bias
    y, _ = gated(x, param, scores.softmax(-1) @ v, CONFIG["shared"], CONFIG["routed_topk"])
    return {
        "in.vit.x": x,
        "in.vit.rel_index": index.int(),
        "in.vit.rel_table": table,
        "in.vit.seq_length_scale": scale,
        "out.vit.y": y,
        **prefixed("param.vit.", param),
    }


def turn_halves(x: Tensor, base: float) -> Tensor:
    """Rotary positions where the first half of the channels is paired with the second."""
    mixed = torch.stack(x.chunk(2, -1), -1).flatten(-2)
    return torch.cat(turn(mixed, base).unflatten(-1, (-1, 2)).unbind(-1), -1)


def llama(source: Source) -> dict[str, Tensor]:
    """A layer whose heads are chosen by the length of their queries, before these turn."""
    config = CONFIG["llama"]
    heads, groups, width = config["num_heads"], config["kv_heads"], config["head_dim"]
    shared, base = config["shared"], config["rope_theta"]
    dim = heads * width
    counts = {"q": heads, "k": groups, "v": groups}
    param = {f"{n}_proj.weight": 0.5 * source(c * width, dim) for n, c in counts.items()}
    param["o_proj.weight"] = 0.5 * source(dim, dim)
    x = source(CONFIG["batch"], CONFIG["seq"], dim)
    q, k, v = (split_heads(x @ param[f"{n}_proj.weight"].T, c) for n, c in counts.items())
    gates = query_norm_gates_reference(q, shared, config["routed_topk"])
    k, v = (t.repeat_interleave(heads // groups, 1) for t in (turn_halves(k, base), v))
    y = F.scaled_dot_product_attention(turn_halves(q, base), k, v, is_causal=config["causal"])
    norms = q[:, shared:].norm(dim=-1)  # (B, H, N)
    return {
        "in.llama.x": x,
        "out.llama.y": moh_reference(y, gates, param["o_proj.weight"]),
        "out.llama.query_norms": norms.transpose(1, 2).flatten(0, 1),
        **prefixed("param.llama.", param),
    }
