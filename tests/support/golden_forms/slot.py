"""Another golden file of slot attention; `mesh` makes its modules with the same rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, metadata, prefixed, stored
from zoo.slots._sinkhorn import log_marginal, sinkhorn_reference
from zoo.slots.slot import slot_attention_reference

CONFIG: dict[str, Any] = {
    "b": 3,
    "n": 7,
    "n_slots": 5,
    "d_in": 4,
    "d_slot": 6,
    "d_mlp": 9,
    "n_sa_iters": 2,
    "n_sh_iters": 3,
    "temperature": 0.7,
    "scale_cost": 1.5,
    "scale_marginals": 2.5,
    "orig_distance": "dot_prod",
    "sink_distance": "cosine",
}
Weigh = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make() -> Golden:
    """Softmax over slots, and a transport plan."""
    source, config = Source(17), CONFIG
    found = inputs(source, config)
    x, slots, weight = found["in.x"], found["in.slots"], found["in.w"]
    of = {"x": x.requires_grad_(), "slots": slots.requires_grad_()}

    def softmax(k: Tensor, q: Tensor, normed: Tensor, masses: Tensor) -> Tensor:
        return slot_attention_reference(k, q, k)[1]

    def plan(k: Tensor, q: Tensor, normed: Tensor, log_a: Tensor) -> Tensor:
        cost = config["scale_cost"] * distance(k, q, config["sink_distance"])
        log_b = masses(param, "slot", normed, config["scale_marginals"])
        options = {"iterations": config["n_sh_iters"], "temperature": config["temperature"]}
        return sinkhorn_reference(cost, log_a, log_b, **options)[0]

    param = parameters(source, config, plan=False)
    y = rounds(param, x, slots, config, softmax, None)
    found |= {"out.orig.slots": y, **prefixed("param.orig.", param)}
    learned = {n: p for n, p in param.items() if not n.startswith("slots_")}
    found |= gradients((y * weight).sum(), {**of, **learned}, "grad.orig.")
    param = parameters(source, config, plan=True)
    y = rounds(param, x, slots, config, plan, config["scale_marginals"])
    found |= {"out.sink.slots": y, **prefixed("param.sink.", param)}
    found |= gradients((y * weight).sum(), of, "grad.sink.")
    return stored(found, torch.float64), metadata(config)


def inputs(source: Source, config: dict[str, Any]) -> dict[str, Tensor]:
    """Inputs, initial slots and the weights of the loss."""
    shape = (config["b"], config["n_slots"], config["d_slot"])
    x = source(config["b"], config["n"], config["d_in"])
    return {"in.x": x, "in.slots": source(*shape), "in.w": source(*shape)}


def parameters(source: Source, config: dict[str, Any], plan: bool) -> dict[str, Tensor]:
    """All weights by their official names."""
    wide, dim, hidden = config["d_in"], config["d_slot"], config["d_mlp"]
    shapes = {
        "gru.weight_ih": (3 * dim, dim),
        "gru.weight_hh": (3 * dim, dim),
        "gru.bias_ih": (3 * dim,),
        "gru.bias_hh": (3 * dim,),
        "project_q.weight": (dim, dim),
        "project_k.weight": (dim, wide),
        "project_v.weight": (dim, wide),
        "slots_mu": (1, 1, dim),
        "slots_log_sigma": (1, 1, dim),
    }
    mlps = {"mlp": (dim, dim)}
    if plan:
        mlps |= {"mlp_input_marginals": (wide, 1), "mlp_slot_marginals": (dim, 1)}
    for name, (first, last) in mlps.items():
        shapes |= {f"{name}.0.weight": (hidden, first), f"{name}.0.bias": (hidden,)}
        shapes[f"{name}.2.weight"] = (last, hidden)
    shapes["mlp.2.bias"] = (dim,)
    for name, size in (("inputs", wide), ("slots", dim), ("mlp", dim)):
        shapes |= {f"norm_{name}.weight": (size,), f"norm_{name}.bias": (size,)}
    return {name: 0.6 * source(*shape).requires_grad_() for name, shape in shapes.items()}


def norm(param: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Layer norm."""
    return F.layer_norm(x, x.shape[-1:], param[f"{name}.weight"], param[f"{name}.bias"])


def mlp(param: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Two linear maps."""
    inner = F.linear(x, param[f"{name}.0.weight"], param[f"{name}.0.bias"]).relu()
    return F.linear(inner, param[f"{name}.2.weight"], param.get(f"{name}.2.bias"))


def masses(param: dict[str, Tensor], of: str, x: Tensor, total: float) -> Tensor:
    """Logarithms of masses that sum to `total`."""
    return log_marginal(total * mlp(param, f"mlp_{of}_marginals", x).squeeze(-1).softmax(1))


def distance(k: Tensor, q: Tensor, name: str) -> Tensor:
    """Of every input from every slot."""
    if name == "cosine":
        return 1 - F.cosine_similarity(k[:, :, None], q[:, None], -1)
    return (k[:, :, None] - q[:, None]).norm(dim=-1)


def rounds(
    param: dict[str, Tensor],
    x: Tensor,
    slots: Tensor,
    config: dict[str, Any],
    weigh: Weigh,
    total: float | None,
    detach: bool = False,
) -> Tensor:
    """Slots after all rounds.

    Args:
        param: Weights.
        x: (B, N, D_in).
        slots: (B, K, D).
        config: Of the file.
        weigh: Weights (B, N, K) from keys, queries, normed slots and the masses of the inputs.
        total: Their sum; None for a softmax, which knows no masses.
        detach: Cut the gradient between rounds.
    """
    x = norm(param, "norm_inputs", x)
    k, v = (F.linear(x, param[f"project_{n}.weight"]) for n in "kv")
    log_a = x if total is None else masses(param, "input", x, total)
    cell = [param[f"gru.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    for _ in range(config["n_sa_iters"]):
        before = slots.detach() if detach else slots
        normed = norm(param, "norm_slots", before)
        q = F.linear(normed, param["project_q.weight"])
        update = weigh(k, q, normed, log_a).mT @ v
        flat = torch.gru_cell(update.flatten(0, 1), before.flatten(0, 1), *cell)
        slots = flat.view_as(before)
        slots = slots + mlp(param, "mlp", norm(param, "norm_mlp", slots))
    return slots
