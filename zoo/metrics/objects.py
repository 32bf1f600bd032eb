"""How well slots find objects: adjusted Rand index, matched overlap, and slots kept over time.

Predictions are masks of K slots, soft (..., K, H, W) or labels (..., H, W), in images (B, ...) or
videos (B, T, ...); the truth is boolean masks (..., M, H, W) of objects, disjoint, the background
in none. Empty masks are no objects. With n_km the number of pixels of object m that have label k:

adjusted Rand index over the foreground (Rand 1971; Hubert and Arabie 1985; as google-deepmind's
multi_object_datasets computes it):

    R = sum_km n_km (n_km - 1),  A = sum_k a_k (a_k - 1),  B = sum_m b_m (b_m - 1)
    ARI = (R - E) / ((A + B) / 2 - E),  E = A B / (N (N - 1))

where a and b are the sums of n over objects and over slots and N that of both. One slot around one
object is 1; scenes without foreground are left out. Slots that spill over into the background are
not punished: look at `MatchedIoU` too.

matched overlap: slots and objects are paired so that the sum of their intersections over unions is
largest (Hungarian method); an object's figure is that of its pair.

slots kept (the time consistency accuracy of davzha/MESH, Zhang et al. 2023): of all objects that
are seen in two frames, how many belong to the same slot in both. There the pairs of each frame are
those with the least difference between masks; here they are those of the matched overlap, and an
object whose slot does not touch it has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.metrics.ratio import Ratio
from zoo.metrics.registry import metric


def slot_labels(predicted: Tensor, masks: Tensor) -> Tensor:
    """Return which slot each pixel belongs to, (..., H, W).

    Args:
        predicted: Soft masks (..., K, H, W), of which the largest wins (the first among equals), or
            labels (..., H, W) of an integer type, from 0.
        masks: Boolean masks of the objects (..., M, H, W), which the prediction must fit.

    Raises:
        ZooError: Shapes or types that do not fit.
    """
    if masks.dtype != torch.bool or masks.ndim not in (4, 5):
        raise ZooError(
            f"masks of shape {tuple(masks.shape)} and {masks.dtype} must be torch.bool of shape "
            "(B, M, H, W), or (B, T, M, H, W) for videos"
        )
    soft = predicted.is_floating_point() or predicted.dtype == torch.bool
    lead, size = masks.shape[:-3], masks.shape[-2:]
    fits = predicted.shape[-2:] == size and predicted.shape[: len(lead)] == lead
    if not fits or predicted.ndim != masks.ndim - (not soft):
        form = "(..., K, H, W)" if soft else "(..., H, W)"
        raise ZooError(
            f"predicted of shape {tuple(predicted.shape)} does not fit masks of shape "
            f"{tuple(masks.shape)}; allowed: {form} with the same B, T, H and W"
        )
    if not soft:
        if predicted.numel() and int(predicted.min()) < 0:
            raise ZooError(f"predicted holds the label {int(predicted.min())}; allowed: from 0")
        return predicted.long()
    return (predicted.byte() if predicted.dtype == torch.bool else predicted).argmax(-3)


def counts(labels: Tensor, masks: Tensor, slots: int) -> Tensor:
    """Count the pixels that slots and objects share.

    Args:
        labels: Slot of each pixel (B, P).
        masks: Masks of the objects (B, M, P).
        slots: Number of slots, K.

    Returns:
        (B, K, M) in float64.
    """
    one_hot = F.one_hot(labels, slots).float()  # (B, P, K)
    # Counts of pixels are exact in float32, whose products follow are not.
    return torch.einsum("bpk,bmp->bkm", one_hot, masks.float()).double()


def adjusted_rand(shared: Tensor) -> Tensor:
    """Return the adjusted Rand index of tables (B, K, M) of counts; NaN for empty ones."""
    slots, objects, total = shared.sum(2), shared.sum(1), shared.sum((1, 2))
    index = (shared * (shared - 1)).sum((1, 2))
    a, b = (slots * (slots - 1)).sum(1), (objects * (objects - 1)).sum(1)
    expected = a * b / (total * (total - 1)).clamp(min=1)
    span = (a + b) / 2 - expected
    # No span: one group against one group, or only groups of one pixel against the same.
    found = torch.where(span == 0, 1.0, (index - expected) / torch.where(span == 0, 1.0, span))
    return torch.where(total == 0, torch.nan, found)


def overlaps(labels: Tensor, masks: Tensor) -> Tensor:
    """Return intersections over unions (B, M, K) of labels (B, P) and masks (B, M, P)."""
    slots = int(labels.max()) + 1 if labels.numel() else 1
    shared = counts(labels, masks, slots).transpose(1, 2)
    extent = F.one_hot(labels, slots).sum(1)[:, None]
    union = masks.sum(-1)[..., None] + extent - shared
    return shared / union.clamp(min=1)


def bind(overlap: Tensor) -> tuple[Tensor, Tensor]:
    """Pair objects with slots so that their overlaps have the largest sum.

    Objects may outnumber slots; those that get none, and those whose slot does not touch them,
    have slot -1 and overlap 0.

    Args:
        overlap: (B, M, K).

    Returns:
        Slot (B, M) and overlap (B, M) of every object.
    """
    from scipy.optimize import linear_sum_assignment

    slot = torch.full(overlap.shape[:2], -1)
    for row, table in enumerate(overlap.detach().cpu()):
        # Empty masks are left out, or their number would decide between pairings of one sum.
        there = table.any(1).nonzero()[:, 0]
        objects, slots = linear_sum_assignment(table[there].numpy(), maximize=True)
        slot[row, there[objects]] = torch.from_numpy(slots)
    slot = slot.to(overlap.device)
    found = overlap.gather(2, slot.clamp(min=0)[..., None])[..., 0].masked_fill(slot < 0, 0)
    return slot.masked_fill(found == 0, -1), found


@metric("foreground_ari")
class ForegroundARI(Ratio):
    """Adjusted Rand index over the pixels of objects, mean over images; a video is one image.

    Scenes may hold more objects than there are slots.

    Args:
        background: Count the background as one more object, over all pixels.
    """

    def __init__(self, background: bool = False) -> None:
        super().__init__()
        self.background = background

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Take in a batch.

        Args:
            predicted: Soft masks (B, K, H, W) or (B, T, K, H, W), or labels without K.
            masks: Masks of the objects (B, M, H, W) or (B, T, M, H, W).
        """
        labels = slot_labels(predicted, masks)
        truth = masks if masks.ndim == 5 else masks[:, None]
        if self.background:
            truth = torch.cat([truth, ~truth.any(2, keepdim=True)], 2)
        slots = int(labels.max()) + 1 if labels.numel() else 1
        shared = counts(labels.flatten(1), truth.transpose(1, 2).flatten(2), slots)
        found = adjusted_rand(shared)
        self.add(found, ~found.isnan())


@metric("matched_iou")
class MatchedIoU(Ratio):
    """Intersection over union of objects with their slots, mean over objects, then over images.

    An object for which no slot is left counts 0, so scenes may hold more objects than slots.
    Every frame of a video is an image of its own.

    Args:
        joint: Match whole videos instead: an object keeps one slot for all frames.
    """

    def __init__(self, joint: bool = False) -> None:
        super().__init__()
        self.joint = joint

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Take in a batch.

        Args:
            predicted: Soft masks (B, K, H, W) or (B, T, K, H, W), or labels without K.
            masks: Masks of the objects (B, M, H, W) or (B, T, M, H, W).
        """
        labels = slot_labels(predicted, masks)
        if masks.ndim == 5:
            if self.joint:
                labels, masks = labels.flatten(1, 2), masks.transpose(1, 2).flatten(2, 3)
            else:
                labels, masks = labels.flatten(0, 1), masks.flatten(0, 1)
        truth = masks.flatten(2)
        there = truth.any(-1)
        _, found = bind(overlaps(labels.flatten(1), truth))
        number = there.sum(1)
        self.add((found * there).sum(1) / number.clamp(min=1), number > 0)


@metric("slot_consistency")
class SlotConsistency(Ratio):
    """Share of objects, seen in two frames, that belong to the same slot in both.

    Objects without a slot in either frame count as not kept, so there may be more of them than
    slots.

    Args:
        all_pairs: Take all pairs of frames instead of neighbours only.
    """

    def __init__(self, all_pairs: bool = False) -> None:
        super().__init__()
        self.all_pairs = all_pairs

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Take in a batch of videos.

        Args:
            predicted: Soft masks (B, T, K, H, W), or labels (B, T, H, W).
            masks: Masks of the objects (B, T, M, H, W), object m the same in all frames.

        Raises:
            ZooError: There is no axis of time.
        """
        labels = slot_labels(predicted, masks)
        if masks.ndim != 5:
            raise ZooError(
                f"masks of shape {tuple(masks.shape)} have no frames; allowed: (B, T, M, H, W)"
            )
        frames = masks.shape[1]
        truth = masks.flatten(0, 1).flatten(2)
        slot, _ = bind(overlaps(labels.flatten(0, 1).flatten(1), truth))
        slot, seen = (x.unflatten(0, masks.shape[:2]) for x in (slot, truth.any(-1)))
        for lag in range(1, frames if self.all_pairs else min(frames, 2)):
            before, after = slot[:, :-lag], slot[:, lag:]
            kept = (before == after) & (before >= 0)
            self.add(kept.double(), seen[:, :-lag] & seen[:, lag:])
