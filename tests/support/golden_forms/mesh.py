"""Another golden file of MESH."""

from __future__ import annotations

from typing import Any

import torch
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, metadata, prefixed, stored
from golden_forms.slot import distance, inputs, masses, parameters, rounds
from zoo.slots._sinkhorn import log_marginal, mesh_reference, sinkhorn_reference

CONFIG: dict[str, Any] = {
    "b": 3,
    "n": 6,
    "n_slots": 3,
    "d_in": 5,
    "d_slot": 4,
    "d_mlp": 7,
    "n_sa_iters": 2,
    "n_sh_iters": 4,
    "n_mesh_iters": 3,
    "noise_scale": 0.05,
    "temperature": 0.8,
    "reuse_u_v": False,
    "image": {"pairwise_distance": "l2", "scale_cost": 2, "scale_marginals": 5, "mesh_lr": 3},
    "video": {"pairwise_distance": "cosine", "scale_cost": 4, "scale_marginals": 9, "mesh_lr": 2},
    "learnlr": {"pairwise_distance": "l2", "scale_cost": 1, "scale_marginals": 3, "lr": 0.6},
    "detach": {"as_": "video but detach_slots=True"},
}


def make() -> Golden:
    """The module in every case, and the functions alone."""
    source, config = Source(18), CONFIG
    found = inputs(source, config)
    found["in.noise"] = source(config["b"], config["n"], config["n_slots"])
    found |= functions(source)
    for name, case in config.items():
        if isinstance(case, dict):
            detach = "as_" in case
            found |= module(source, found, name, config["video"] if detach else case, detach)
    return stored(found, torch.float64), metadata(config)


def module(
    source: Source, given: dict[str, Tensor], name: str, case: dict[str, Any], detach: bool
) -> dict[str, Tensor]:
    """Slots, and gradients with respect to what the loss depends on."""
    param = parameters(source, CONFIG, plan=True)
    x, slots = (given[f"in.{n}"].detach().requires_grad_() for n in ("x", "slots"))
    lr, of = case.get("mesh_lr"), {"x": x} if detach else {"x": x, "slots": slots}
    if "lr" in case:
        lr = param["lr"] = torch.tensor([case["lr"]], dtype=torch.float64, requires_grad=True)
        of["lr"] = lr
    settings = {"iterations": CONFIG["n_sh_iters"]}

    def weigh(k: Tensor, q: Tensor, normed: Tensor, log_a: Tensor) -> Tensor:
        cost = case["scale_cost"] * distance(k, q, case["pairwise_distance"])
        cost = cost + CONFIG["noise_scale"] * given["in.noise"]
        log_b = masses(param, "slot", normed, case["scale_marginals"])
        options = {"steps": CONFIG["n_mesh_iters"], "reuse": CONFIG["reuse_u_v"]}
        cost, v = mesh_reference(cost, log_a, log_b, lr=lr, **options, **settings)
        last = {"temperature": CONFIG["temperature"], "v": v, **settings}
        return sinkhorn_reference(cost, log_a, log_b, **last)[0]

    y = rounds(param, x, slots, CONFIG, weigh, case["scale_marginals"], detach)
    loss = (y * given["in.w"]).sum()
    return {
        f"out.{name}.slots": y,
        **prefixed(f"param.{name}.", param),
        **gradients(loss, of, f"grad.{name}."),
    }


def functions(source: Source) -> dict[str, Tensor]:
    """Sinkhorn and MESH on a given cost; v is reused whatever the modules do."""
    samples, n, slots = CONFIG["b"], CONFIG["n"], CONFIG["n_slots"]
    cost, noise, weight = (source(samples, n, slots) for _ in range(3))
    cost = cost.abs().requires_grad_()
    a = source(samples, n).softmax(1).requires_grad_()
    b = source(samples, slots).softmax(1).requires_grad_()
    log_a, log_b = log_marginal(a), log_marginal(b)
    settings, lr = {"iterations": CONFIG["n_sh_iters"]}, CONFIG["image"]["mesh_lr"]
    plan, u, v = sinkhorn_reference(cost, log_a, log_b, **settings)
    warm, *_ = sinkhorn_reference(cost, log_a, log_b, temperature=0.25, iterations=6)
    noisy = cost + CONFIG["noise_scale"] * noise
    steps = {"lr": lr, "steps": CONFIG["n_mesh_iters"], **settings}
    sharp, last = mesh_reference(noisy, log_a, log_b, **steps)
    low, u_low, _ = sinkhorn_reference(sharp, log_a, log_b, v=last, **settings)
    fresh, _ = mesh_reference(noisy, log_a, log_b, lr=2.0, steps=1, reuse=False, **settings)
    given = {"C": cost, "a": a, "b": b, "noise": noise, "w": weight}
    out = {
        "sinkhorn.T": plan,
        "sinkhorn.u": u,
        "sinkhorn.v": v,
        "sinkhorn_t025_i6.T": warm,
        "mesh.C": sharp,
        "mesh.u": u_low,
        "mesh.v": last,
        "mesh.T": low,
        "mesh_noreuse_lr2_it1.C": fresh,
    }
    of = {"C": cost, "a": a, "b": b}
    return {
        **prefixed("in.fn.", given),
        **prefixed("out.fn.", out),
        **gradients((plan * weight).sum(), of, "grad.fn.sinkhorn."),
        **gradients((low * weight).sum(), {"C": cost}, "grad.fn.mesh."),
    }
