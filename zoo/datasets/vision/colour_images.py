"""What models are told of colour images of the height and width that an option says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ColourImages:
    """Mixed into data sets of colour images.

    Attributes:
        height: Pixels, H.
        width: Pixels, W.
    """

    height: int
    width: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 3, self.height, self.width

    def model_facts(self) -> dict[str, Any]:
        """Return image_shape."""
        return {"image_shape": self.image_shape}

    def example(self) -> tuple[Tensor, ...]:
        """Return an image (1, 3, H, W)."""
        return (torch.zeros(1, *self.image_shape),)


class MaskedImages(ColourImages):
    """Mixed into data sets of colour images that come with a mask each."""

    def example(self) -> tuple[Tensor, ...]:
        """Return an image (1, 3, H, W) and a mask (1, 1, H, W)."""
        mask = torch.zeros(1, 1, self.height, self.width, dtype=torch.bool)
        return *super().example(), mask


class ObjectImages(ColourImages):
    """Mixed into data sets of colour images that hold objects.

    Attributes:
        max_objects: Most objects of an image.
    """

    max_objects: int

    def model_facts(self) -> dict[str, Any]:
        """Return image_shape and max_objects."""
        return {**super().model_facts(), "max_objects": self.max_objects}
