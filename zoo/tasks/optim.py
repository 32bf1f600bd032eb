"""The optimiser that every recipe uses: AdamW, warm-up, and a schedule stepped at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zoo import checks
from zoo.errors import ZooError
from zoo.parts import Position

SCHEDULES = ("constant", "cosine", "linear")


@dataclass
class Optim:
    """How the weights are updated.

    Args:
        lr: Peak learning rate.
        weight_decay: AdamW's decoupled decay of matrices.
        betas: AdamW's two momentum factors.
        warmup: Length of the linear warm-up: a whole number counts steps, a fraction below 1 is
            a share of all steps.
        schedule: What follows the warm-up: constant, or down to zero by a cosine or a line.
        clip: Largest norm of the gradient; None leaves it alone.

    Raises:
        ZooError: A value is out of range.
    """

    lr: float
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup: float = 0.1
    schedule: str = "cosine"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        self.lr = checks.number("optim.lr", self.lr, above=0)
        self.weight_decay = checks.number("optim.weight_decay", self.weight_decay, 0)
        betas = checks.each(checks.number, distinct=False)("optim.betas", self.betas, 0, below=1)
        if len(betas) != 2:
            raise checks.wrong("optim.betas", betas, "two numbers in [0, 1)")
        self.warmup = checks.number("optim.warmup", self.warmup, 0)
        if self.warmup >= 1 and self.warmup % 1:
            steps = "a whole number of steps, or a fraction below 1 of all steps"
            raise checks.wrong("optim.warmup", self.warmup, steps)
        checks.choice("optim.schedule", self.schedule, SCHEDULES)
        no_clipping = checks.optional(checks.number, "for no clipping")
        self.clip = no_clipping("optim.clip", self.clip, above=0)

    def warmup_steps(self, total: int) -> int:
        """Number of warm-up steps.

        Args:
            total: Number of all steps.

        Raises:
            ZooError: The warm-up is longer than the training.
        """
        steps = round(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if steps > total:
            raise ZooError(
                f"optim.warmup={steps} steps is longer than trainer.max_steps={total}; "
                "a fraction such as 0.1 is a share of all steps"
            )
        return steps


def schedule(name: str, warmup: int, total: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step, from 0.

    Args:
        name: constant, cosine or linear.
        warmup: Steps of linear warm-up; the first is above zero, the last at the peak.
        total: Steps after which cosine and linear have come down to zero.

    Raises:
        ZooError: No schedule of that name.
    """
    checks.choice("optim.schedule", name, SCHEDULES)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        if name == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1 - done if name == "linear" else 1.0

    return factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort the trained parameters into those that decay and those that do not.

    Matrices and kernels decay. Vectors and scalars (biases, norms, gains) do not, nor embeddings
    (an output layer tied to one included), nor what belongs to a position part, nor what the
    model names in `no_weight_decay()`, as the models of timm do.

    Args:
        model: The model.
        weight_decay: Decay of the first group.
    """
    spared = {id(p) for p in model.parameters() if p.ndim < 2}
    for module in model.modules():
        if isinstance(module, nn.Embedding | Position):
            spared |= {id(p) for p in module.parameters()}
    listed = getattr(model, "no_weight_decay", None)
    if callable(listed):
        names = set(listed())
        spared |= {id(p) for name, p in model.named_parameters() if name in names}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
