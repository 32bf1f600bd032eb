"""Measures of objects found, against scikit-learn, plain loops and examples by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from zoo.errors import ZooError
from zoo.metrics.objects import (
    ForegroundARI,
    MatchedIoU,
    SlotConsistency,
    adjusted_rand,
    bind,
)


def one_hot(labels: Tensor, count: int) -> Tensor:
    """Masks (..., M, H, W) of labels (..., H, W), 0 being background."""
    return torch.stack([labels == m + 1 for m in range(count)], -3)


def measured(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return float(metric.compute())


@given(
    slots=st.integers(1, 5),
    objects=st.integers(1, 4),
    noise=st.sampled_from([0.0, 0.3, 1.0]),
    background=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_ari_is_that_of_scikit_learn(slots, objects, noise, background, seed):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(objects + 1, (3, 5, 7), generator=generator)
    random = torch.randint(slots, truth.shape, generator=generator)
    lots = torch.rand(truth.shape, generator=generator)
    predicted = torch.where(lots < noise, random, truth % slots)
    expected = []
    for found, wanted in zip(predicted, truth, strict=True):
        keep = torch.ones_like(wanted, dtype=torch.bool) if background else wanted > 0
        if keep.any():
            expected.append(adjusted_rand_score(wanted[keep].numpy(), found[keep].numpy()))
    result = measured(ForegroundARI(background), (predicted, one_hot(truth, objects)))
    assert result == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_ari_by_hand():
    # Two objects of two pixels each; one slot takes the first and half of the second.
    truth = torch.tensor([[[1, 1, 2, 2, 0]]])
    found = torch.tensor([[[0, 0, 0, 1, 1]]])
    # R = 2, A = 6 + 0, B = 2 + 2, E = 24 / 12 = 2: no better than chance.
    assert measured(ForegroundARI(), (found, one_hot(truth, 2))) == 0.0
    assert measured(ForegroundARI(), (truth, one_hot(truth, 2))) == 1.0


@pytest.mark.parametrize(
    ("truth", "found", "expected"),
    [
        ([1, 1, 0, 0], [2, 2, 0, 1], 1.0),  # one object in one slot
        ([1, 1, 1, 0], [0, 1, 1, 1], 0.0),  # one object in two slots
        ([1, 1, 2, 2], [0, 0, 0, 0], 0.0),  # two objects in one slot
        ([1, 2, 3, 0], [0, 1, 2, 0], 1.0),  # objects of one pixel, all apart
        ([1, 0, 0, 0], [3, 1, 0, 0], 1.0),  # a single pixel
    ],
)
def test_ari_of_single_groups(truth, found, expected):
    truth, found = torch.tensor(truth), torch.tensor(found)
    masks = one_hot(truth.view(1, 2, 2), 3)
    assert measured(ForegroundARI(), (found.view(1, 2, 2), masks)) == expected
    keep = truth > 0
    assert adjusted_rand_score(truth[keep].numpy(), found[keep].numpy()) == expected


def test_scenes_without_foreground_are_left_out():
    truth = torch.tensor([[[0, 0, 0, 0]], [[1, 1, 2, 2]]])
    masks = one_hot(truth, 2)
    assert measured(ForegroundARI(), (truth, masks)) == 1.0
    assert measured(MatchedIoU(), (truth, masks)) == 1.0
    nothing = measured(ForegroundARI(), (truth[:1], masks[:1]))
    assert nothing != nothing  # NaN: there was nothing to find
    assert adjusted_rand(torch.zeros(2, 3, 3)).isnan().all()


def test_ari_ignores_the_background_which_overlap_does_not():
    truth = torch.zeros(1, 4, 4, dtype=torch.int64)
    truth[0, 0], truth[0, 3] = 1, 2
    # Each slot takes half of the image.
    found = torch.tensor([0, 0, 1, 1])[:, None].expand(1, 4, 4)
    masks = one_hot(truth, 2)
    assert measured(ForegroundARI(), (found, masks)) == 1.0
    assert measured(ForegroundARI(True), (found, masks)) < 0.5
    assert measured(MatchedIoU(), (found, masks)) == pytest.approx(0.5)


def test_a_video_is_one_image_to_ari_and_frames_to_overlap():
    truth = torch.tensor([[[[1, 1, 2, 2]], [[1, 1, 2, 2]]]])  # (1, 2, 1, 4)
    swapped = torch.tensor([[[[0, 0, 1, 1]], [[1, 1, 0, 0]]]])
    masks = one_hot(truth, 2)
    joint = adjusted_rand_score(truth.flatten().numpy(), swapped.flatten().numpy())
    assert measured(ForegroundARI(), (swapped, masks)) == pytest.approx(joint)
    assert joint < 0
    assert measured(ForegroundARI(), (swapped.flatten(0, 1), masks.flatten(0, 1))) == 1.0
    assert measured(MatchedIoU(), (swapped, masks)) == 1.0
    # Over the whole video each slot shares 2 of 6 pixels with each object.
    assert measured(MatchedIoU(joint=True), (swapped, masks)) == pytest.approx(1 / 3)
    assert measured(SlotConsistency(), (swapped, masks)) == 0.0
    assert measured(SlotConsistency(), (truth, masks)) == 1.0


def best_overlap(found: Tensor, truth: Tensor, objects: int, slots: int) -> float:
    """Mean overlap of one image by trying all pairings."""
    table = torch.zeros(objects, slots)
    for m, k in itertools.product(range(objects), range(slots)):
        one, other = truth == m + 1, found == k
        union = int((one | other).sum())
        table[m, k] = int((one & other).sum()) / union if union else 0
    there = [m for m in range(objects) if (truth == m + 1).any()]
    if objects <= slots:
        pairings = ([(m, p[m]) for m in range(objects)]
                    for p in itertools.permutations(range(slots), objects))  # fmt: skip
    else:
        pairings = ([(p[k], k) for k in range(slots)]
                    for p in itertools.permutations(range(objects), slots))  # fmt: skip
    best = max(sum(float(table[m, k]) for m, k in pairs) for pairs in pairings)
    return best / len(there)


@given(slots=st.integers(1, 4), objects=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_overlap_is_the_best_of_all_pairings(slots, objects, seed):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(objects + 1, (2, 3, 3), generator=generator)
    truth[:, 0, 0] = 1
    found = torch.randint(slots, truth.shape, generator=generator)
    expected = [best_overlap(f, t, objects, slots) for f, t in zip(found, truth, strict=True)]
    result = measured(MatchedIoU(), (found, one_hot(truth, objects)))
    assert result == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_binding_by_hand():
    # The first object would take slot 0, but the sum is larger if the second does.
    overlap = torch.tensor([[[0.6, 0.5, 0.0], [0.7, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    slot, found = bind(overlap)
    assert slot.tolist() == [[1, 0, -1]]
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.7, 0.0]]))
    # The slot that is left does not touch the second object.
    slot, found = bind(torch.tensor([[[0.9, 0.0], [0.8, 0.0]]]))
    assert slot.tolist() == [[0, -1]]
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.0]]))
    slot, found = bind(torch.tensor([[[0.2], [0.9]]]))
    assert slot.tolist() == [[-1, 0]]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.9]]))


def test_slots_kept_by_hand():
    # Frames of four pixels. Object 1 keeps slot 0 and then changes it; object 2 keeps slot 1, is
    # hidden in the last frame; object 3 comes in the last frame.
    truth = torch.tensor([[[[1, 1, 2, 2]], [[1, 1, 2, 2]], [[1, 1, 3, 3]]]])
    found = torch.tensor([[[[0, 0, 1, 1]], [[0, 0, 1, 1]], [[2, 2, 1, 1]]]])
    masks = one_hot(truth, 3)
    metric = SlotConsistency()
    assert measured(metric, (found, masks)) == pytest.approx(2 / 3)
    assert metric.count == 3
    every = SlotConsistency(all_pairs=True)
    assert measured(every, (found, masks)) == pytest.approx(2 / 4)


def test_an_object_without_a_slot_is_not_kept():
    truth = torch.tensor([[[[1, 2, 3, 3]]]]).expand(1, 2, 1, 4)
    found = torch.zeros_like(truth)
    assert measured(SlotConsistency(), (found, one_hot(truth, 3))) == pytest.approx(1 / 3)


@pytest.mark.parametrize("make", [ForegroundARI, MatchedIoU, SlotConsistency])
def test_soft_masks_labels_and_the_order_of_slots_and_objects(make):
    truth = torch.randint(4, (3, 2, 6, 6))
    soft = torch.rand(3, 2, 5, 6, 6)
    masks = one_hot(truth, 3)
    expected = measured(make(), (soft, masks))
    labels = soft.argmax(2)
    assert measured(make(), (labels, masks)) == expected
    hard = torch.stack([labels == k for k in range(5)], 2)
    assert measured(make(), (hard, masks)) == expected
    slots, objects = torch.randperm(5), torch.randperm(3)
    moved = measured(make(), (soft[:, :, slots], masks[:, :, objects]))
    assert moved == pytest.approx(expected, abs=1e-6)
    # Empty masks are no objects, whatever their number.
    more = torch.cat([masks, torch.zeros_like(masks)], 2)
    assert measured(make(), (soft, more)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [ForegroundARI, MatchedIoU, SlotConsistency])
def test_batches_add_up_and_reset_forgets(make):
    soft, masks = torch.rand(5, 2, 4, 6, 6), one_hot(torch.randint(3, (5, 2, 6, 6)), 2)
    metric = make()
    whole = measured(metric, (soft, masks))
    metric.reset()
    parts = measured(metric, (soft[:2], masks[:2]), (soft[2:], masks[2:]))
    assert parts == pytest.approx(whole, abs=1e-6)
    # What two processes hold is summed.
    assert metric._reductions.keys() == {"total", "count"}
    assert all(reduce is not None for reduce in metric._reductions.values())


@pytest.mark.parametrize(
    ("predicted", "masks", "message"),
    [
        (torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 4, 5, dtype=torch.bool), "does not fit masks"),
        (torch.rand(2, 3, 4, 4), torch.zeros(3, 3, 4, 4, dtype=torch.bool), "does not fit masks"),
        (torch.rand(2, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.bool), r"\(..., K, H, W\)"),
        (torch.rand(2, 3, 4, 4).long(), torch.zeros(2, 3, 4, 4).bool(), r"allowed: \(..., H, W\)"),
        (torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), "must be torch.bool"),
        (torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool), "must be torch.bool"),
        (torch.full((2, 4, 4), -1), torch.zeros(2, 3, 4, 4).bool(), "label -1; allowed: from 0"),
    ],
)
def test_what_does_not_fit_is_refused(predicted, masks, message):
    for metric in (ForegroundARI(), MatchedIoU(), SlotConsistency()):
        with pytest.raises(ZooError, match=message):
            metric.update(predicted, masks)


def test_slots_of_a_single_image_cannot_be_kept():
    with pytest.raises(ZooError, match="have no frames"):
        SlotConsistency().update(torch.rand(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).bool())
