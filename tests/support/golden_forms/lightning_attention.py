"""Another golden file of lightning attention, its example module and the author's small model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, join_heads, metadata, prefixed, split_heads, stored
from zoo.attend.lightning import alibi_slopes

CONFIG: dict[str, Any] = {
    "b": 1,
    "h": 5,
    "n": 14,
    "d": 3,
    "e": 4,
    "tnl": {"embed_dim": 10, "num_heads": 5, "layer_idx": 2, "num_layers": 3, "bias": True},
    "srms_eps": 0.01,
    "tnl1": {
        "vocab_size": 9,
        "n_embd": 12,
        "n_head": 3,
        "n_layer": 3,
        "bias": False,
        "lrpe_layers": [1, 2],
    },
    "seed": 21,
    "loss": "op: (o*w).sum(); tnl: y.sum()",
}
EPS = 1e-6  # of the model's norms, as in the author's code


def make() -> Golden:
    """The operator, the module, the model, and what it is made of."""
    source = Source(CONFIG["seed"])
    x = source(2, 5)
    found = {
        "in.srms.x": x,
        "out.srms.y": srms(x, CONFIG["srms_eps"]),
        **{f"out.slopes_h{h}": slopes(h) for h in (3, 5, 7)},
        **operator(source),
        **example(source),
        **small_model(source),
    }
    return stored(found, torch.float32), metadata(CONFIG)


def srms(x: Tensor, eps: float) -> Tensor:
    """Division by the root mean square."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def slopes(heads: int, layer: int | None = None, layers: int = 1) -> Tensor:
    """Of ALiBi, (H, 1, 1), smaller in later layers."""
    factor = 1.0 if layer is None else 1 - layer / (layers - 1) + 1e-5
    return alibi_slopes(heads, torch.float64).view(-1, 1, 1) * factor


def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """All products of queries and keys, weighed by how long ago the keys were."""
    places = torch.arange(q.shape[2])
    gap = (places[:, None] - places).clamp(min=0)
    return (q @ k.mT * (-slope * gap).exp()).tril() @ v


def operator(source: Source) -> dict[str, Tensor]:
    """Attention of given queries, keys and values, with and without decay."""
    samples, heads, length = CONFIG["b"], CONFIG["h"], CONFIG["n"]
    widths = {"q": CONFIG["d"], "k": CONFIG["d"], "v": CONFIG["e"]}
    given = {n: source(samples, heads, length, w).requires_grad_() for n, w in widths.items()}
    slope = source(heads, 1, 1).abs()
    y, plain = (attend(*given.values(), s) for s in (slope, torch.zeros_like(slope)))
    weight = source(*y.shape)
    return {
        **prefixed("in.", {**given, "slope": slope, "w": weight}),
        "out.o": y,
        "out.o_no_decay": plain,
        **gradients((y * weight).sum(), given),
    }


def example(source: Source) -> dict[str, Tensor]:
    """The module with a LayerNorm and a gate of low rank."""
    config = CONFIG["tnl"]
    dim, heads = config["embed_dim"], config["num_heads"]
    shapes = {f"{n}_proj.weight": (dim, dim) for n in "qkvo"}
    shapes |= {"output_gate.0.weight": (dim // heads, dim)}
    shapes |= {"output_gate.1.weight": (dim, dim // heads)}
    shapes |= {n.replace("weight", "bias"): shape[:1] for n, shape in shapes.items()}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    param = {n: 0.5 * source(*shape).requires_grad_() for n, shape in shapes.items()}
    x = source(CONFIG["b"], CONFIG["n"], dim).requires_grad_()

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, param[f"{name}.weight"], param[f"{name}.bias"])

    q, k, v = (split_heads(F.silu(linear(f"{n}_proj", x)), heads) for n in "qkv")
    slope = slopes(heads, config["layer_idx"], config["num_layers"])
    y = join_heads(attend(q, k, v, slope))
    y = F.layer_norm(y, (dim,), param["norm.weight"], param["norm.bias"])
    gate = linear("output_gate.1", linear("output_gate.0", x)).sigmoid()
    y = linear("o_proj", y * gate)
    return {
        "in.tnl.x": x,
        "out.tnl.y": y,
        "out.tnl.slope_rate": slope,
        **prefixed("param.tnl.", param),
        **gradients(y.sum(), {"x": x, **param}, "grad.tnl."),
    }


def rotate(x: Tensor, theta: Tensor) -> Tensor:
    """Both parts of LRPE side by side; theta (H, 1, D)."""
    angles = torch.arange(x.shape[2])[:, None] * theta
    return torch.cat([x * angles.cos(), x * angles.sin()], -1)


def sglu(param: dict[str, Tensor], x: Tensor) -> Tensor:
    """Gated linear unit without an activation."""
    value, gate = x @ param["l1.weight"].T, x @ param["l2.weight"].T
    return (value * gate) @ param["l3.weight"].T


def small_model(source: Source) -> dict[str, Tensor]:
    """Logits, and a gradient for each kind of parameter of its mixers."""
    config = CONFIG["tnl1"]
    dim, heads, depth = config["n_embd"], config["n_head"], config["n_layer"]
    hidden = 3 * dim
    words, param = 0.5 * source(config["vocab_size"], dim), {}
    tokens = source.whole(config["vocab_size"], 2, 11)
    of, x = {}, words[tokens]
    mlps: list[dict[str, Tensor]] = []
    thetas = {}
    for i in range(depth):
        mixer = {"qkvu_proj.weight": 0.4 * source(4 * dim, dim)}
        mixer["out_proj.weight"] = 0.4 * source(dim, dim)
        if i in config["lrpe_layers"]:
            thetas[i] = mixer["lrpe.theta"] = source(heads, 1, dim // heads)
        shapes = {"l1.weight": (hidden, dim), "l2.weight": (hidden, dim)}
        mlps.append(
            {n: 0.4 * source(*s) for n, s in {**shapes, "l3.weight": (dim, hidden)}.items()}
        )
        name = f"transnormer.h.{i}.token_mixer"
        wanted = "lrpe.theta" if i in thetas else "qkvu_proj.weight"
        of[f"{name}.{wanted}"] = mixer[wanted].requires_grad_()
        param |= prefixed(f"{name}.", mixer)
        param |= prefixed(f"transnormer.h.{i}.channel_mixer.", mlps[-1])
        q, k, v, u = (srms(x, EPS) @ mixer["qkvu_proj.weight"].T).chunk(4, -1)
        q, k = (split_heads(F.silu(t), heads) for t in (q, k))
        if i in thetas:
            q, k = rotate(q, thetas[i]), rotate(k, thetas[i])
        y = attend(q, k, split_heads(v, heads), slopes(heads, i, depth))
        x = x + (srms(join_heads(y), EPS) * u) @ mixer["out_proj.weight"].T
        x = x + sglu(mlps[-1], srms(x, EPS))
    logits = srms(x, EPS) @ words.T
    first = min(thetas)
    lrpe_x, sglu_x = source(1, heads, 11, dim // heads), source(2, 11, dim)
    return {
        "in.tnl1.tokens": tokens,
        "in.tnl1.lrpe_x": lrpe_x,
        "in.tnl1.sglu_x": sglu_x,
        "out.tnl1.logits": logits,
        "out.tnl1.lrpe_y": rotate(lrpe_x, thetas[first]),
        "out.tnl1.sglu_y": sglu(mlps[0], sglu_x),
        "param.tnl1.transnormer.wte.weight": words,
        **prefixed("param.tnl1.", param),
        **gradients(logits.square().mean(), of, "grad.tnl1."),
    }
