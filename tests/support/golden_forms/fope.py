"""Another golden file of Fourier positions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, metadata, stored
from zoo.position.fope import fope_reference

CONFIG: dict[str, Any] = {
    "batch": 1,
    "n_heads": 3,
    "head_dim": 12,
    "seq": 8,
    "max_sequence_length": 40,
    "rope_theta": 2000,
    "far_offset": "q_far are the last rows of a length seq+max_sequence_length call",
    "fourier_init_norm_gain": 0.5,
    "dtype": "float32",
}
FAR, LAST = 4, 2
# Options of the official code; the sizes that come of them are counted below.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all": {"rope_clamp_floor_freq": False, "fourier_ignore_zero": False, "rope_theta": 300},
    "still": {"fourier_ignore_zero": False, "fourier_dim": 20},
    "identity": {"fourier_init": "eye", "fourier_dim": 16},
}


def make() -> Golden:
    """Queries turned in every variant, and by plain rotary positions."""
    source, config = Source(13), {**CONFIG, "variants": {}}
    length, width = config["seq"], config["head_dim"]
    steps = torch.arange(length).double()
    far = torch.arange(length + config["max_sequence_length"]).double()[-FAR:]
    found = {}
    for name, options in VARIANTS.items():
        frequencies, pairs = spectrum(options)
        shape = (config["n_heads"], len(frequencies), pairs)
        coef = {basis: source(*shape) for basis in ("sin", "cos")}
        if options.get("fourier_init") == "eye":
            coef = {basis: identity(*shape) for basis in coef}
        q = source(config["batch"], config["n_heads"], length, width)
        q_far = source(1, config["n_heads"], FAR, width)

        def turn(x: Tensor, places: Tensor, by: Any = (frequencies, coef)) -> Tensor:
            return fope_reference(x, places, by[0], by[1]["sin"], by[1]["cos"])

        config["variants"][name] = {**options, "input_dim": shape[1], "output_dim": pairs}
        found |= {
            f"in.{name}.q": q,
            f"in.{name}.q_far": q_far,
            f"out.{name}.q_rot": turn(q, steps),
            f"out.{name}.q_rot_last2": turn(q, steps)[:, :, -LAST:],
            f"out.{name}.q_rot_far": turn(q_far, far),
            f"param.{name}.inv_freq": frequencies[None],
            **{f"param.{name}.{basis}_coef": x for basis, x in coef.items()},
        }
    x, half = found["in.default.q"], width // 2
    plain = config["rope_theta"] ** (-torch.arange(half).double() / half)
    unit = torch.eye(half, dtype=torch.float64).expand(config["n_heads"], -1, -1)
    found["out.rope.q_rot"] = fope_reference(x, steps, plain, unit, unit)
    return stored(found, torch.float32), metadata(config)


def spectrum(options: dict[str, Any]) -> tuple[Tensor, int]:
    """Frequencies that are mixed, zeros for those that are too slow, and the pairs that turn."""
    width = options.get("fourier_dim", CONFIG["head_dim"])
    base = options.get("rope_theta", CONFIG["rope_theta"])
    w = base ** (-2 * torch.arange(width // 2).double() / width)
    floor = 2 * math.pi / CONFIG["max_sequence_length"]
    kept = w[w >= floor] if options.get("rope_clamp_floor_freq", True) else w
    if not options.get("fourier_ignore_zero", True):
        return F.pad(kept, (0, len(w) - len(kept))), CONFIG["head_dim"] // 2
    return kept, min(len(kept), CONFIG["head_dim"] // 4)


def identity(heads: int, inputs: int, pairs: int) -> Tensor:
    """A one in every row, or in one of several."""
    found = torch.zeros(heads, inputs, pairs, dtype=torch.float64)
    step = math.ceil(inputs / pairs)
    for i in range(math.ceil(inputs / step)):
        found[:, i * step, i] = 1.0
    return found
