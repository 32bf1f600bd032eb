"""Tiles: exact where the network looks no further than the margin, smooth, and one at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.ops.tiling import tiled
from zoo.testing.tolerances import assert_close


def blur(image, mask=None):
    """Looks two pixels far, with zeros beyond the border."""
    x = image if mask is None else image * mask
    weights = torch.arange(25.0, dtype=x.dtype).view(1, 1, 5, 5).expand(3, 1, 5, 5)
    return F.conv2d(x, weights, padding=2, groups=3)


def pair(height, width):
    torch.manual_seed(0)
    shape = (2, 3, height, width)
    return torch.rand(shape, dtype=torch.float64), torch.rand(2, 1, *shape[2:], dtype=torch.float64)


@pytest.mark.parametrize("size", [(40, 61), (16, 50), (33, 16), (12, 9), (17, 17)])
@pytest.mark.parametrize("options", [{"multiple": 1}, {"multiple": 8}, {"overlap": 8}])
def test_exact_where_the_margin_is_as_far_as_the_network_looks(size, options):
    image, mask = pair(*size)
    full = {"tile": 16, "overlap": 6, "margin": 2, **options}
    assert_close(tiled(blur, image, mask, **full), blur(image, mask), "with a mask")
    assert_close(tiled(blur, image, **full), blur(image), "without")


def test_the_same_phase_of_a_network_that_halves():
    image, _ = pair(37, 53)

    def halve(x):
        room = (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)
        small = F.max_pool2d(F.pad(x, room, mode="replicate"), 4)
        return F.interpolate(small, scale_factor=4)[..., : x.shape[2], : x.shape[3]]

    found = tiled(halve, image, tile=16, overlap=4, multiple=4)
    assert_close(found, halve(image), "blocks of four")
    assert not torch.allclose(tiled(halve, image, tile=15, overlap=4, multiple=1), halve(image))


def test_one_tile_is_the_image_itself():
    image, mask = pair(16, 13)
    assert torch.equal(tiled(blur, image, mask, tile=16, overlap=6), blur(image, mask))


def test_tiles_that_disagree_are_blended_smoothly():
    """Each tile gives its own number: from one to the next without a jump."""
    count = iter(range(9))

    def number(x):
        return torch.full_like(x, float(next(count)))

    y = tiled(number, torch.zeros(1, 1, 8, 40, dtype=torch.float64), tile=24, overlap=8)[0, 0, 0]
    assert y[:16].tolist() == pytest.approx([0.0] * 16)
    assert y[24:].tolist() == pytest.approx([1.0] * 16)
    steps = y.diff()
    assert bool((steps >= -1e-12).all())
    assert float(steps.max()) < 0.25
    assert y[19:21].sum().item() == pytest.approx(1.0)  # halfway in the middle


def test_the_network_never_sees_more_than_a_tile():
    seen = []

    def spy(image, mask):
        seen.append(tuple(image.shape[2:]))
        assert mask.shape[2:] == image.shape[2:]
        return image

    image, mask = pair(70, 45)
    assert_close(tiled(spy, image, mask, tile=24, overlap=8), image, "the image")
    assert max(max(size) for size in seen) == 24
    assert len(seen) == 4 * 3


def test_no_gradients():
    image, _ = pair(40, 40)
    assert not tiled(blur, image.requires_grad_(), tile=16, overlap=6).requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": 0}, "tile=0"),
        ({"tile": 16, "overlap": 12, "multiple": 1}, "half of tile=16"),
        ({"tile": 16, "overlap": 9}, "multiple=8"),
        ({"tile": 16, "overlap": 8, "margin": 4}, "margin=4 must be below half"),
        ({"overlap": -1}, "overlap=-1"),
        ({"tile": 16.0}, r"tile=16\.0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(zoo.ZooError, match=words):
        tiled(blur, pair(40, 40)[0], **options)


def test_bad_input():
    image, mask = pair(40, 40)
    with pytest.raises(zoo.ZooError, match="mask of shape"):
        tiled(blur, image, mask[..., 1:])
    with pytest.raises(zoo.ZooError, match="image of shape"):
        tiled(blur, image[0])
    with pytest.raises(zoo.ZooError, match="same height"):
        tiled(lambda x: x[..., 1:], image, tile=16, overlap=4)
