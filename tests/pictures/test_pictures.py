"""Pictures of gates, slots and rows of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import ZooError
from zoo.models import create
from zoo.pictures import figures as pictures


class Halves(nn.Module):
    """Halves the left half of a map and drops the rest of one channel."""

    kind = "feature"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        left = torch.arange(x.shape[-1]) < x.shape[-1] // 2
        return torch.where(left, 0.5 * x, x)


def test_the_gain_is_the_ratio_of_lengths() -> None:
    x = torch.randn(2, 3, 4, 6)
    x[1, :, 0, 0] = 0
    (gain,) = pictures.gains(Halves(), x).values()
    assert gain.shape == (2, 4, 6)
    torch.testing.assert_close(gain[0, :, :3], torch.full((4, 3), 0.5))
    torch.testing.assert_close(gain[0, :, 3:], torch.ones(4, 3))
    assert gain[1, 0, 0].isnan()


def test_every_block_of_a_resnet_has_its_gate() -> None:
    model = create(
        "resnet", attention="se", image_shape=(1, 8, 8), num_classes=3, variant="resnet18", width=4
    ).train()
    images = torch.rand(6, 1, 8, 8)
    assert len(pictures.gains(model, images)) == 8
    assert model.training
    figure = pictures.gate_figure(model, images, title="t")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["input", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))]
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == pictures.SAMPLES * 9
    first = np.asarray(shown[0].images[0].get_array())
    assert first.shape == (8, 8)


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(ZooError, match="Linear has no module on feature maps"):
        pictures.gains(nn.Linear(2, 2), torch.zeros(1, 2))


def test_nested_modules_count_once() -> None:
    class Outer(Halves):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Halves()

    assert list(pictures.feature_modules(nn.Sequential(Outer(), Halves()))) == ["0", "1"]
    assert list(pictures.feature_modules(Outer())) == [""]


def test_rows_of_pictures_and_maps() -> None:
    image, grey, plane = torch.rand(3, 4, 8), torch.rand(1, 4, 8), torch.rand(4, 8)
    figure = pictures.panels(
        [[image, plane], [grey, None]], columns=["a", "b"], names=["x", "y"], label="n", title="$t"
    )
    drawn = [axis for axis in figure.axes if axis.images]
    assert len(drawn) == 3
    assert [axis.get_title() for axis in figure.axes[:2]] == ["a", "b"]
    assert figure.axes[2].get_ylabel() == "y"
    low, high = drawn[1].images[0].get_clim()
    assert float(plane.min()) <= low < high <= float(plane.max())
    with pytest.raises(ZooError, match="no pictures"):
        pictures.panels([])
    with pytest.raises(ZooError, match=r"panel of shape \(2, 4, 8\)"):
        pictures.panels([[torch.rand(2, 4, 8)]])


def test_a_value_far_out_does_not_hide_the_others() -> None:
    plane = torch.linspace(0, 1, 400).reshape(20, 20)
    plane[0, 0] = 1000
    low, high = pictures.panels([[plane]], label="n").axes[0].images[0].get_clim()
    assert 0 <= low < 0.05
    assert 0.95 < high <= 1


def test_a_constant_map_has_a_scale() -> None:
    figure = pictures.panels([[torch.full((2, 2), 0.25)]], label="n")
    assert figure.axes[0].images[0].get_clim() == (-0.25, 0.75)


@pytest.mark.parametrize("spec", zoo.list(kind="feature"))
def test_every_module_on_feature_maps_can_be_shown(spec: str) -> None:
    figure = pictures.module_figure(spec, channels=8)
    assert [axis.get_title() for axis in figure.axes[:3]] == ["input", "features", "gain"]


@pytest.mark.parametrize("spec", zoo.list(kind="slots"))
def test_slots_are_shown_by_what_they_take(spec: str) -> None:
    figure = pictures.module_figure(f"{spec}", channels=8)
    assert figure.axes[1].get_title() == "slot 0"


def test_a_token_mixer_has_no_such_picture() -> None:
    with pytest.raises(ZooError, match="'mha' is of kind 'project'"):
        pictures.module_figure("mha")
