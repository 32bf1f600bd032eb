"""The contracts by name: each a function of a `Build`, and for which mechanisms it is due.

A contract is due by declared traits and by kind, never by name: a new file in the zoo is held to
all that it promises without an edit here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zoo.testing.decode import check_cache, check_decode, check_decode_mask
from zoo.testing.mask import check_additive, check_empty_rows, check_padding, check_pairs
from zoo.testing.memory import check_memory
from zoo.testing.numerics import check_compile, check_gradcheck, check_half, check_large, check_vmap
from zoo.testing.promises import (
    check_bites,
    check_documented,
    check_door,
    check_options,
    check_refusals,
    check_tested,
)
from zoo.testing.state import (
    check_copy,
    check_device,
    check_parameters,
    check_seed,
    check_state_dict,
)
from zoo.testing.subject import RUNNABLE, Build
from zoo.testing.values import (
    check_batch,
    check_bias,
    check_bidirectional,
    check_causal,
    check_cross,
    check_distribution,
    check_equivariance,
    check_gradients,
    check_grouped,
    check_packed,
    check_positions,
    check_shape,
    check_strips,
    check_weights,
)
from zoo.testing.vision import (
    check_formats,
    check_input_order,
    check_repeat,
    check_slot_chance,
    check_slot_mask,
    check_slot_order,
)


@dataclass(frozen=True)
class Contract:
    """A check and the mechanisms that owe it."""

    check: Callable[[Build], None]
    due: Callable[[Build], bool]


def _run(build: Build) -> bool:
    return build.entry.kind in RUNNABLE


def _tokens(build: Build) -> bool:
    return build.is_host or build.entry.kind == "mixer"


def _maps(build: Build) -> bool:
    return build.entry.kind == "feature"


def _slots(build: Build) -> bool:
    return build.entry.kind == "slots"


def _strips(build: Build) -> bool:
    return build.is_host and all(entry.kind != "attend" for entry in build.entries)


def _mixes(build: Build) -> bool:
    return all(entry.taxonomy.positions != "none" for entry in build.entries)


def _softmax(build: Build) -> bool:
    """The part that makes the weights is a softmax; without one it is the default, a softmax."""
    makers = [e for e in build.entries if e.kind in ("normalize", "attend")]
    return all(entry.taxonomy.distribution == "softmax" for entry in makers)


def _linear(build: Build) -> bool:
    return _tokens(build) and build.entry.taxonomy.complexity == "linear"


def _decodes(build: Build) -> bool:
    return _tokens(build) and build.traits.decode and build.traits.causal


CONTRACTS = {
    "documented": Contract(check_documented, lambda b: True),
    "tested": Contract(check_tested, lambda b: True),
    "options": Contract(check_options, _run),
    "door": Contract(check_door, _run),
    "refusals": Contract(check_refusals, _tokens),
    "bites": Contract(check_bites, lambda b: b.is_host),
    "shape": Contract(check_shape, _run),
    "gradients": Contract(check_gradients, _run),
    "batch": Contract(check_batch, _run),
    "gradcheck": Contract(check_gradcheck, lambda b: _run(b) and b.traits.gradient),
    "half": Contract(check_half, _run),
    "large": Contract(check_large, _run),
    "compile": Contract(check_compile, lambda b: _run(b) and b.traits.compile),
    "vmap": Contract(check_vmap, lambda b: _run(b) and b.traits.compile),
    "state_dict": Contract(check_state_dict, _run),
    "copy": Contract(check_copy, _run),
    "device": Contract(check_device, _run),
    "seed": Contract(check_seed, _run),
    "parameters": Contract(check_parameters, _run),
    "causal": Contract(check_causal, lambda b: _tokens(b) and b.traits.causal),
    "bidirectional": Contract(
        check_bidirectional, lambda b: _tokens(b) and b.traits.bidirectional and _mixes(b)
    ),
    "equivariance": Contract(
        check_equivariance, lambda b: _tokens(b) and b.traits.equivariant and b.traits.bidirectional
    ),
    "positions": Contract(check_positions, lambda b: b.is_host),
    "padding": Contract(check_padding, lambda b: _tokens(b) and b.traits.mask != "none"),
    "pairs": Contract(check_pairs, lambda b: _tokens(b) and b.traits.mask == "any"),
    "additive": Contract(check_additive, lambda b: b.is_host and b.traits.mask != "none"),
    "empty_rows": Contract(check_empty_rows, lambda b: _tokens(b) and b.traits.mask != "none"),
    "decode": Contract(check_decode, _decodes),
    "decode_mask": Contract(check_decode_mask, lambda b: _decodes(b) and b.traits.mask != "none"),
    "cache": Contract(check_cache, _decodes),
    "grouped": Contract(check_grouped, lambda b: b.is_host and b.traits.grouped),
    "packed": Contract(check_packed, lambda b: b.is_host and b.traits.packed),
    "cross": Contract(
        check_cross, lambda b: b.is_host and b.traits.cross and b.traits.bidirectional
    ),
    "bias": Contract(check_bias, lambda b: b.is_host and b.traits.bias),
    "weights": Contract(check_weights, lambda b: b.is_host and b.traits.weights),
    "distribution": Contract(
        check_distribution, lambda b: b.is_host and b.traits.weights and _softmax(b)
    ),
    "strips": Contract(check_strips, _strips),
    "memory": Contract(check_memory, lambda b: _strips(b) or _linear(b)),
    "repeat": Contract(check_repeat, lambda b: _maps(b) or _slots(b)),
    "formats": Contract(check_formats, _maps),
    "slot_order": Contract(check_slot_order, _slots),
    "input_order": Contract(check_input_order, _slots),
    "slot_mask": Contract(check_slot_mask, _slots),
    "slot_chance": Contract(check_slot_chance, _slots),
}

# What parts must still keep when several non-default ones share a host.
JOINT = ("causal", "padding", "additive", "empty_rows", "decode", "cache", "packed", "strips")


def owed(build: Build) -> list[str]:
    """Names of the contracts that a mechanism owes."""
    return [name for name, contract in CONTRACTS.items() if contract.due(build)]
