"""How well a set is predicted: losses after the Hungarian method, and average precision.

Predictions are K vectors (B, K, P), the truth M vectors (B, M, P), in any order. A target is laid
out as Locatello et al. 2020 (arXiv 2006.15055) do it for CLEVR,

    coordinates | one-hot of each class | 1 for an object, 0 for none

A loss pairs every target with a prediction of its own so that the sum of the costs is least. The
cost of a pair is the mean over P of the squared error, or of the Huber loss as in the paper. Where
K > M, targets that say "no object" fill up the set (`fill`), if they have such a flag; otherwise
predictions that are left over cost nothing.

average precision (google-research/slot_attention): predictions of all images are ranked by their
flag; one is right if all its classes, by argmax, are those of an object of its image, the nearest
such object is nearer than a threshold, and no prediction ranked higher took that object. Distances
are those of CLEVR's world: coordinates from 0 to 1 times 6. The area is that under the precision at
each recall, made to fall.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zoo import checks
from zoo.errors import ZooError
from zoo.metrics.ratio import Ratio
from zoo.metrics.registry import metric

COSTS = ("huber", "mse")
THRESHOLDS = (float("inf"), 1.0, 0.5, 0.25, 0.125)
EXTENT = 6.0


def error(predicted: Tensor, wanted: Tensor, cost: str) -> Tensor:
    """Return the cost of predictions (..., P) for targets (..., P), mean over P."""
    loss = F.smooth_l1_loss if cost == "huber" else F.mse_loss
    shape = torch.broadcast_shapes(predicted.shape, wanted.shape)
    return loss(predicted.expand(shape), wanted.expand(shape), reduction="none").mean(-1)


def check_cost(cost: str) -> None:
    """Refuse an unknown cost.

    Raises:
        ZooError: It is neither "huber" nor "mse".
    """
    checks.choice("cost", cost, COSTS)


def fill(wanted: Tensor, slots: int) -> Tensor:
    """Fill up targets (B, M, P) with zeros, "no object", to as many as there are slots.

    Raises:
        ZooError: There are more targets than slots.
    """
    more = slots - wanted.shape[1]
    if more < 0:
        raise ZooError(
            f"targets of shape {tuple(wanted.shape)} hold up to {wanted.shape[1]} objects, but "
            f"there are only slots={slots}; allowed: at least {wanted.shape[1]}"
        )
    return F.pad(wanted, (0, 0, 0, more))


def matching(predicted: Tensor, wanted: Tensor, cost: str = "huber") -> Tensor:
    """Pair every target with a prediction of its own at the least sum of costs.

    Args:
        predicted: (B, K, P).
        wanted: (B, M, P), M at most K.
        cost: "huber" or "mse".

    Returns:
        Index of the prediction of each target (B, M).

    Raises:
        ZooError: Shapes that do not fit, more targets than predictions, numbers that are not
            finite, or an unknown cost.
    """
    from scipy.optimize import linear_sum_assignment

    check_cost(cost)
    lead = predicted.ndim == wanted.ndim == 3 and predicted.shape[0] == wanted.shape[0]
    if not lead or predicted.shape[2] != wanted.shape[2] or predicted.shape[1] < wanted.shape[1]:
        raise ZooError(
            f"predicted of shape {tuple(predicted.shape)} does not fit wanted of shape "
            f"{tuple(wanted.shape)}; allowed: (B, K, P) and (B, M, P) with K at least M"
        )
    with torch.no_grad():
        # (B, M, K)
        table = error(predicted[:, None].float(), wanted[:, :, None].float(), cost).cpu()
    if not table.isfinite().all():
        raise ZooError("predicted or wanted holds numbers that are not finite: nothing to match")
    pairs = [torch.from_numpy(linear_sum_assignment(one)[1]) for one in table.numpy()]
    found = torch.stack(pairs) if pairs else torch.zeros(wanted.shape[:2], dtype=torch.int64)
    return found.to(predicted.device)


def set_errors(predicted: Tensor, wanted: Tensor, cost: str = "huber") -> Tensor:
    """Return the cost of every target's prediction (B, M), differentiable.

    Their mean is the loss; the paper's is that times M, a sum over the set.

    Args:
        predicted: (B, K, P).
        wanted: (B, M, P), M at most K.
        cost: "huber" or "mse".

    Raises:
        ZooError: As `matching`.
    """
    index = matching(predicted, wanted, cost)
    chosen = predicted.gather(1, index[..., None].expand(-1, -1, predicted.shape[2]))
    return error(chosen.float(), wanted.float(), cost)


@metric("set_error")
class SetError(Ratio):
    """Cost of a set after matching, mean over targets.

    Args:
        cost: "mse" or "huber".

    Raises:
        ZooError: An unknown cost.
    """

    higher_is_better = False

    def __init__(self, cost: str = "mse") -> None:
        super().__init__()
        check_cost(cost)
        self.cost = cost

    def update(self, predicted: Tensor, wanted: Tensor) -> None:
        """Take in predictions (B, K, P) and targets (B, M, P)."""
        found = set_errors(predicted, wanted, self.cost)
        self.add(found, torch.ones_like(found, dtype=torch.bool))


def detections(
    predicted: Tensor,
    wanted: Tensor,
    *,
    coordinates: int,
    classes: Sequence[int],
    thresholds: Sequence[float] = THRESHOLDS,
    extent: float = EXTENT,
) -> Tensor:
    """Tell which predictions are right, (B, K, thresholds).

    Args:
        predicted: (B, K, P), the flag last.
        wanted: (B, M, P).
        coordinates: Number of coordinates, first in a target.
        classes: Widths of the one-hots that follow.
        thresholds: Distances below which a prediction is near enough.
        extent: What coordinates are multiplied by before distances are taken.
    """
    start = (predicted[..., :coordinates], wanted[..., :coordinates])
    away = (start[0][:, :, None] - start[1][:, None]).mul(extent).norm(dim=-1)  # (B, K, M)
    fits = (wanted[..., -1] > 0.5)[:, None].expand_as(away)
    place = coordinates
    for width in classes:
        said, true = (x[..., place : place + width].argmax(-1) for x in (predicted, wanted))
        fits = fits & (said[:, :, None] == true[:, None])
        place += width
    nearest, index = away.masked_fill(~fits, torch.inf).min(-1)  # (B, K)
    limits = torch.tensor(thresholds, device=away.device, dtype=away.dtype)
    near = (nearest[..., None] < limits) | (limits.isinf() & fits.any(-1)[..., None])
    flag = predicted[..., -1]
    earlier = flag[:, None] > flag[:, :, None]  # (B, K, other K)
    order = torch.arange(flag.shape[1], device=flag.device)
    earlier |= (flag[:, None] == flag[:, :, None]) & (order < order[:, None])
    rival = earlier & (index[:, None] == index[:, :, None])
    taken = (rival[..., None] & near[:, None]).any(2)
    return near & ~taken


def average_precision(scores: Tensor, right: Tensor, objects: Tensor) -> Tensor:
    """Return the area under precision over recall.

    Args:
        scores: Confidence of the predictions (R,).
        right: Whether they are right (R,).
        objects: Number of objects there are.
    """
    ranked = right[scores.argsort(descending=True, stable=True)].double()
    hits = ranked.cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1, device=hits.device)
    # Precision at a recall is the best at this or any larger one.
    best = precision.flip(0).cummax(0).values.flip(0)
    return ((best * ranked).sum() / objects).float()


@metric("set_precision")
class SetPrecision(Metric):
    """Average precision of predicted objects at several distances, by name: ap_inf, ap_1, ...

    Args:
        coordinates: Number of coordinates, first in a target.
        classes: Widths of the one-hots that follow.
        thresholds: Distances below which a prediction is near enough.
        extent: What coordinates are multiplied by before distances are taken; 6 is CLEVR's world.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    objects: Tensor
    scores: list[Tensor]
    right: list[Tensor]

    def __init__(
        self,
        coordinates: int,
        classes: Sequence[int],
        thresholds: Sequence[float] = THRESHOLDS,
        extent: float = EXTENT,
    ) -> None:
        super().__init__()
        self.coordinates, self.classes = coordinates, tuple(classes)
        self.thresholds, self.extent = tuple(thresholds), extent
        self.add_state("objects", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("right", [], dist_reduce_fx="cat")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the figures, one for each threshold."""
        return tuple(f"ap_{limit:g}" for limit in self.thresholds)

    def update(self, predicted: Tensor, wanted: Tensor) -> None:
        """Take in predictions (B, K, P) and targets (B, M, P).

        Raises:
            ZooError: Vectors of another width than coordinates, classes and flag together.
        """
        width = self.coordinates + sum(self.classes) + 1
        if predicted.shape[-1] != width or wanted.shape[-1] != width:
            raise ZooError(
                f"predicted of shape {tuple(predicted.shape)} and wanted of shape "
                f"{tuple(wanted.shape)} must have vectors of {width} numbers: {self.coordinates} "
                f"coordinates, one-hots of {self.classes} and a flag"
            )
        right = detections(
            predicted.float(),
            wanted.float(),
            coordinates=self.coordinates,
            classes=self.classes,
            thresholds=self.thresholds,
            extent=self.extent,
        )
        self.scores.append(predicted[..., -1].float().flatten())
        self.right.append(right.flatten(0, 1))
        self.objects += (wanted[..., -1] > 0.5).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the average precision of each threshold by name; NaN if there are no objects."""
        scores, right = dim_zero_cat(self.scores), dim_zero_cat(self.right)
        return {
            name: average_precision(scores, column, self.objects)
            for name, column in zip(self.names, right.unbind(-1), strict=True)
        }
