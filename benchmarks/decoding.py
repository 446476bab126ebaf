"""Measures the parts of loading a training image: decoding, the random crop, and the operations of RandAugment.

    python benchmarks/decoding.py --out docs/results/performance

Decoders read the same drawn JPEG files (photos.py). The crop is timm's, to 224 pixels, bicubic: by Pillow as timm does
it; by Pillow from an image that libjpeg scaled (`draft`); by torch on an image of torchvision's decoder, and by
`data.decoder: simplejpeg`. RandAugment's operations run on images of 224 pixels, by timm with Pillow and by torchvision
on uint8 tensors; torchvision has no bicubic rotation or shear of tensors, so those are bilinear.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from harness import about, in_turns, median_text, parser, prepare, quartiles, table, write
from photos import KINDS, photo
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from scalekd.data.jpeg import JpegCrop

CROP = RandomResizedCropAndInterpolation(224, interpolation="bicubic")
FAST = JpegCrop(CROP, 3)
GREY = [124, 116, 104]
BILINEAR = InterpolationMode.BILINEAR
OF_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {  # operations of timm's RandAugment, by its names
    "AutoContrast": F.autocontrast,
    "Equalize": F.equalize,
    "Invert": F.invert,
    "Posterize": lambda t: F.posterize(t, 3),
    "Solarize": lambda t: F.solarize(t, 100),
    "Color": lambda t: F.adjust_saturation(t, 1.6),
    "Contrast": lambda t: F.adjust_contrast(t, 1.6),
    "Brightness": lambda t: F.adjust_brightness(t, 1.6),
    "Sharpness": lambda t: F.adjust_sharpness(t, 1.6),
    "Rotate": lambda t: F.rotate(t, 20, BILINEAR, fill=GREY),
    "ShearX": lambda t: F.affine(t, 0, [0, 0], 1.0, [10, 0], BILINEAR, fill=GREY),
    "TranslateXRel": lambda t: F.affine(t, 0, [20, 0], 1.0, [0, 0], BILINEAR, fill=GREY),
}


def by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def by_torchvision(data: bytes) -> Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def crop_by_draft(data: bytes) -> Tensor:
    image = Image.open(io.BytesIO(data))
    top, left, height, width = CROP.get_params(image, CROP.scale, CROP.ratio)
    before = image.size
    image.draft("RGB", (int(448 / width * image.width), int(448 / height * image.height)))
    x, y = image.width / before[0], image.height / before[1]
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return F.pil_to_tensor(image.resize((224, 224), Image.Resampling.BICUBIC, box=box))


def crop_by_torchvision(data: bytes) -> Tensor:
    pixels = by_torchvision(data)
    header = Image.open(io.BytesIO(data))
    top, left, height, width = CROP.get_params(header, CROP.scale, CROP.ratio)
    part = pixels[:, top : top + height, left : left + width]
    return F.resize(part, [224, 224], InterpolationMode.BICUBIC, antialias=True)


def loading(kind: str, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds an image: quartiles."""
    files = [photo(kind, i) for i in range(count)]
    one: dict[str, Callable[[bytes], object]] = {
        "decode: Pillow": by_pillow,
        "decode: torchvision": by_torchvision,
        "decode: simplejpeg": simplejpeg.decode_jpeg,
        "crop: timm, Pillow": lambda data: F.pil_to_tensor(CROP(by_pillow(data))),
        "crop: Pillow, draft": crop_by_draft,
        "crop: torchvision": crop_by_torchvision,
        "crop: simplejpeg": FAST,
    }
    assert torch.equal(F.pil_to_tensor(by_pillow(files[0])), by_torchvision(files[0]))
    assert np.array_equal(simplejpeg.decode_jpeg(files[0]), np.asarray(by_pillow(files[0])))
    return milliseconds({name: over(function, files) for name, function in one.items()}, count, rounds)


def augmenting(count: int, rounds: int) -> dict[str, Any]:
    images = [by_pillow(photo("500x375", i)).resize((224, 224)) for i in range(count)]
    tensors = [F.pil_to_tensor(image) for image in images]
    hyper = {"translate_const": 100, "img_mean": tuple(GREY), "interpolation": Image.Resampling.BICUBIC}
    chosen = rand_augment_transform("rand-m7-mstd0.5", hyper)
    functions: dict[str, Callable[[], object]] = {"RandAugment: timm, Pillow": over(chosen, images)}
    for operation in rand_augment_transform("rand-m7-mstd0.5", hyper).ops:
        operation.prob = 1.0
        if operation.name in OF_TENSORS:
            functions[f"{operation.name}: timm, Pillow"] = over(operation, images)
            functions[f"{operation.name}: tensors"] = over(OF_TENSORS[operation.name], tensors)
    return milliseconds(functions, count, rounds)


def over(function: Callable[[Any], object], items: Sequence[Any]) -> Callable[[], object]:
    """Calls a function with each item, with the same random numbers each time."""

    def call() -> None:
        random.seed(0)
        for item in items:
            function(item)

    return call


def milliseconds(functions: dict[str, Callable[[], object]], count: int, rounds: int) -> dict[str, Any]:
    taken = in_turns(functions, torch.device("cpu"), rounds)
    return {name: quartiles([1000 * s / count for s in seconds]) for name, seconds in taken.items()}


def main() -> None:
    args_parser = parser(__doc__, rounds=9)
    args_parser.add_argument("--images", type=int, default=32)
    args = args_parser.parse_args()
    found = about(prepare(args)) | {"images": args.images, "rounds": args.rounds}
    found["loading"] = {kind: loading(kind, args.images, args.rounds) for kind in KINDS}
    found["augmenting"] = ops = augmenting(args.images, args.rounds)
    kinds = found["loading"]
    names = list(next(iter(kinds.values())))
    lines = [
        "Loading, milliseconds an image:",
        "",
        *table(["step", *kinds], [[name, *(median_text(kinds[kind][name]) for kind in kinds)] for name in names]),
        "",
        f"RandAugment as a whole: {median_text(ops['RandAugment: timm, Pillow'])} ms an image. Each operation:",
        "",
        *table(
            ["operation", "timm, Pillow", "torchvision, tensors"],
            [
                [n, *(median_text(ops[f"{n}: {by}"]) for by in ("timm, Pillow", "tensors"))]
                for n in OF_TENSORS
                if f"{n}: tensors" in ops
            ],
        ),
        "",
        f"{found['machine']}; {args.rounds} rounds of {args.images} images; seconds of the processor; medians (quartiles).",
    ]
    write(args.out, "decoding", found, lines)


if __name__ == "__main__":
    main()
