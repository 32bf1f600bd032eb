"""Colours against scikit-image's numbers and against the definition."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.pictures.colour import MATRICES, to_lab, to_linear, to_srgb

COLOURS = torch.tensor(
    [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.4, 0.6], [0.02, 0.03, 0.01]],
    dtype=torch.float64,
)
# scikit-image 0.26.0, skimage.color.rgb2lab of the same, white D65 of two degrees. Its white is a
# rounded one, so that its own white has a = -0.0025 and b = 0.0047.
SKIMAGE = torch.tensor(
    [
        [100.0, -0.00245494, 0.00465342],
        [0.0, 0.0, 0.0],
        [53.24058794, 80.09230820, 67.20275102],
        [87.73509949, -86.18302974, 83.17970318],
        [32.29567257, 79.18559091, -107.85730021],
        [42.00800059, -0.15404120, -32.84289742],
        [1.84782711, -1.37607989, 1.69525927],
    ],
    dtype=torch.float64,
)


def test_lab_is_that_of_scikit_image_up_to_its_rounded_white():
    found = to_lab(COLOURS.T[None, :, :, None])[0, :, :, 0].T
    torch.testing.assert_close(found, SKIMAGE, rtol=0, atol=0.01)


@pytest.mark.parametrize("white", MATRICES)
def test_greys_have_no_colour_and_middle_grey_is_half_as_light(white):
    grey = torch.linspace(0, 1, 6, dtype=torch.float64).expand(1, 3, 1, 6)
    lightness, a, b = to_lab(grey, white)[0, :, 0]
    assert a.abs().max() < 1e-9
    assert b.abs().max() < 1e-9
    assert lightness[0] == pytest.approx(0, abs=1e-9)
    assert lightness[-1] == pytest.approx(100)
    # 18.418651851244416 % of the light: t = 0.184..., t^(1/3) = 66 / 116.
    half = to_srgb(torch.tensor((66 / 116) ** 3, dtype=torch.float64))
    assert to_lab(half.expand(1, 3, 1, 1), white)[0, 0].item() == pytest.approx(50)


def test_d50_is_adapted():
    """Pure red under D50 by Bradford, as tables of sRGB give it."""
    red = torch.tensor([1.0, 0, 0], dtype=torch.float64)[None, :, None, None]
    torch.testing.assert_close(
        to_lab(red, "D50").flatten(),
        torch.tensor([54.29, 80.81, 69.89], dtype=torch.float64),
        rtol=0,
        atol=0.02,
    )


def test_light_and_back():
    values = torch.linspace(0, 1, 256, dtype=torch.float64)
    torch.testing.assert_close(to_srgb(to_linear(values)), values, rtol=0, atol=1e-7)
    assert to_linear(torch.tensor(0.5)).item() == pytest.approx(0.2140411, rel=1e-6)
    assert to_linear(torch.tensor(0.04)).item() == pytest.approx(0.04 / 12.92)


def test_gradients_are_finite_at_black():
    black = torch.zeros(1, 3, 2, 2, requires_grad=True)
    to_lab(black).sum().backward()
    assert black.grad.isfinite().all()


def test_another_white_is_refused():
    with pytest.raises(ZooError, match="unknown white 'D56'; did you mean 'D65' or 'D50'"):
        to_lab(torch.zeros(1, 3, 1, 1), "D56")
