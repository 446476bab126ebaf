"""Training crops of JPEG files, decoded by simplejpeg and resized by torch, in place of Pillow for both.

The random numbers and the crop are those of timm's transform. Pixels are equal to Pillow's before the resize and differ
by rounding after it. A crop of more than twice the output's size is decoded at a half, a quarter or an eighth of its size
(libjpeg's scaling in the frequency domain, as Pillow's `draft`); twice is the margin that Pillow recommends for its
`reducing_gap`.
"""

from __future__ import annotations

import io
import math
import random
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from scalekd.common.errors import UserError

from .images import is_upright

FACTORS = (1, 2, 4, 8)  # libjpeg-turbo scales by others too, but without SIMD instructions
GAP = 2  # a crop is decoded with at least this many times the pixels of the output, on each side


class JpegCrop:
    """A random crop of an encoded image, resized: `(C, height, width)` uint8.

    Args:
        crop: timm's `RandomResizedCropAndInterpolation`.
        channels: 3, or 1 for grey.

    Raises:
        UserError: simplejpeg is not installed.
    """

    def __init__(self, crop: Any, channels: int):
        if find_spec("simplejpeg") is None:
            raise UserError(
                "data.decoder: simplejpeg is not installed; run pip install 'scalekd[simplejpeg]', or use pillow"
            )
        self.crop, self.grey = crop, channels == 1

    def __call__(self, data: bytes) -> Tensor | None:
        """None, and no random numbers are used, for what Pillow should decode: other formats, CMYK, colours for a grey
        run, images that EXIF turns, and damaged files."""
        header = self._header(data)
        if header is None:
            return None
        before = random.getstate()
        top, left, height, width = self.crop.get_params(header, self.crop.scale, self.crop.ratio)
        try:
            pixels = self._decoded(data, header.size, height, width)
        except ValueError:  # for all damage that libjpeg notices; Pillow ignores some of it
            random.setstate(before)
            return None
        rows, columns = (
            _scaled(start, sides, pixels.shape[axis] / whole)
            for start, sides, axis, whole in ((top, height, 1, header.height), (left, width, 2, header.width))
        )
        return F.resize(pixels[:, rows, columns], self.crop.size, self.crop.interpolation, antialias=True)

    def takes(self, data: bytes) -> bool:
        """Whether an encoded image can be cropped here, by its header."""
        return self._header(data) is not None

    def _header(self, data: bytes) -> Image.Image | None:
        """The image, closed, of which no pixels were read; None if it cannot be cropped here."""
        modes = ("L",) if self.grey else ("L", "RGB")
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                return image if image.format == "JPEG" and image.mode in modes and is_upright(image) else None
        except Exception:  # for a damaged file Pillow may raise nearly anything; `decode` will say what it is
            return None

    def _decoded(self, data: bytes, size: tuple[int, int], height: int, width: int) -> Tensor:
        """`(C, H, W)` uint8: the image at a scale at which a crop of these sides has `GAP` times the output's size."""
        import simplejpeg

        enough = min(height / self.crop.size[0], width / self.crop.size[1]) / GAP
        smaller = max(factor for factor in FACTORS if factor == 1 or factor <= enough)
        pixels = simplejpeg.decode_jpeg(
            data,
            "GRAY" if self.grey else "RGB",
            min_height=math.ceil(size[1] / smaller),
            min_width=math.ceil(size[0] / smaller),
        )
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _scaled(start: int, length: int, scale: float) -> slice:
    """A range of pixels after the image was scaled; at least one pixel."""
    first = round(start * scale)
    return slice(first, max(first + 1, round((start + length) * scale)))
