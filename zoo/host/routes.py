"""Routes: who computes a combination of parts, and why the others do not.

A route answers `refuse` with a reason or with None, and runs. The host asks them in order: those
that the parts bring themselves, SDPA, SDPA in strips, and last the strip engine, which takes
everything. All routes give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.host import engine
from zoo.host.refusals import refuse_masks, refuse_parts, refuse_position
from zoo.parts import Call, Host, Part, Route, repeat_heads


@dataclass(frozen=True)
class Explanation:
    """What a host does with a pass.

    Args:
        route: Name of the route taken.
        refused: Reason of every route that was asked before it, by name.
        skipped: Routes that could have taken it too and come later.
    """

    route: str
    refused: dict[str, str]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"takes {self.route}"]
        lines += [f"not {name}: {reason}" for name, reason in self.refused.items()]
        if self.skipped:
            lines.append(f"also possible, but slower: {', '.join(self.skipped)}")
        return "\n".join(lines)


def _plain_softmax(host: Host, call: Call) -> str | None:
    reason = refuse_parts(host, {"score": "dot", "normalize": "softmax"})
    if reason:
        return reason
    if call.dropout and call.q.device.type == "cpu":
        return "its CPU form with dropout holds all N x M weights"
    biased = host.position.biases or host.select.biases or call.bias is not None
    if biased and torch._C._are_functorch_transforms_active():
        return "under torch.func it has no gradient for a bias"
    return None


def _refuse_sdpa(host: Host, call: Call) -> str | None:
    reason = _plain_softmax(host, call) or refuse_position(host)
    if reason:
        return reason
    if host.part_names["select"] != "all":
        return f"select {host.part_names['select']!r} hides pairs"
    return refuse_masks(call)


def _run_sdpa(host: Host, call: Call) -> Tensor:
    heads = call.q.shape[1]
    attn_mask = call.mask
    if call.bias is not None:
        attn_mask = call.bias.to(call.q.dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:2], call.q.shape[2], call.k.shape[2])
    y = F.scaled_dot_product_attention(
        call.q,
        repeat_heads(call.k, heads),
        repeat_heads(call.v, heads),
        attn_mask=attn_mask,
        dropout_p=call.dropout,
        # Not `and rows > 1`: that is no bool while a compiler treats lengths as symbols.
        is_causal=False if call.q.shape[2] == 1 else call.causal,
        scale=call.scale,
    )
    if call.mask is not None:
        y = y.masked_fill(~call.mask.any(-1, keepdim=True), 0.0)
    return y


def _refuse_strips(host: Host, call: Call) -> str | None:
    reason = _plain_softmax(host, call)
    if reason:
        return reason
    if host.position.biases and not host.position.static:
        return f"the bias of {host.part_names['position']!r} depends on queries or scores"
    return None


SDPA = Route("sdpa", _refuse_sdpa, _run_sdpa)
SDPA_STRIPS = Route(
    "sdpa_strips",
    _refuse_strips,
    lambda host, call: engine.run(host.parts, call, fused=True),
    packed=True,
)
ENGINE = Route(
    "engine",
    lambda host, call: None,
    lambda host, call: engine.run(host.parts, call),
    packed=True,
)
DENSE = Route(
    "dense",
    lambda host, call: None,
    lambda host, call: engine.run(host.parts, call, whole=True),
    packed=True,
)


def _run_attend(host: Host, call: Call) -> Tensor:
    assert host.attend is not None
    return host.attend(call)


def candidates(host: Host) -> list[Route]:
    """Every route of a host, in the order in which they are asked."""
    if host.attend is not None:
        own = Route(
            host.part_names["attend"],
            lambda host, call: None,
            _run_attend,
            packed=host.traits.packed,
        )
        return [*host.attend.routes(), own]
    parts = [part for part in host.socket_parts() if type(part).routes is not Part.routes]
    return [*(route for part in parts for route in part.routes()), SDPA, SDPA_STRIPS, ENGINE]


def names(host: Host) -> list[str]:
    """Names that the host's `route` may have."""
    found = [route.name for route in candidates(host)]
    last = [DENSE.name] if host.attend is None else []
    return ["auto", *dict.fromkeys(found), *last]


def choose(host: Host, call: Call) -> Route:
    """First route that takes the pass, or the one that the host was told to take.

    Raises:
        ZooError: The route asked for by name cannot take the pass.
    """
    routes = candidates(host)
    if host.route == "auto":
        return next(route for route in routes if route.auto and not route.reason(host, call))
    # Two parts may bring a route of one name, such as their straightforward form.
    reasons = []
    for route in routes if host.attend is not None else [*routes, DENSE]:
        if route.name == host.route:
            reason = route.reason(host, call)
            if not reason:
                return route
            reasons.append(reason)
    raise ZooError(f"route={host.route!r} cannot take this pass: {'; '.join(reasons)}")


def explain(host: Host, call: Call) -> Explanation:
    """Say which route takes a pass and why not the others."""
    taken = choose(host, call)
    refused: dict[str, str] = {}
    skipped = []
    if host.attend is not None:
        whole = f"{host.part_names['attend']!r} fills score, select and normalize by itself"
        refused = dict.fromkeys((SDPA.name, ENGINE.name), whole)
    for route in candidates(host):
        if not route.auto:
            continue
        reason = route.reason(host, call)
        if reason:
            refused[route.name] = reason
        elif route.name != taken.name:
            skipped.append(route.name)
    return Explanation(taken.name, refused, tuple(skipped))
