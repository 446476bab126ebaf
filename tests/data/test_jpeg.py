"""`data.decoder: simplejpeg` gives the crops of the Pillow path, with pixels that differ by rounding."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from whole_runs import changed

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.data import jpeg
from scalekd.data.batches import Images, train_batches, training_images, validation_images
from scalekd.data.images import BadImage
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.sources.open import open_source
from scalekd.data.split import Split, open_split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB", blob: int = 8) -> Image.Image:
    """Soft blobs: what a photo has, and noise of single pixels has not."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (height // blob, width // blob, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 92} | options)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of six JPEG files of 120x90 pixels."""
    files = {
        f"{name}/{i}.jpg": encoded(picture(120, 90, i + 9 * len(name)))
        for name in ("ant", "bumblebee")
        for i in range(6)
    }
    return write(tmp_path / "photos", files)


def images(
    source: Path | str, decoder: str, size: int = 64, data: dict[str, Any] | None = None, **augment: Any
) -> Images:
    made = Data.model_validate({"train": str(source), "image_size": size, "decoder": decoder} | (data or {}))
    opened = open_source(str(source), "data.train")
    everything = range(len(opened))
    split = Split(list(opened.classes), opened, everything, opened, everything, len(opened))
    return training_images(split, made, Augment(**augment), MEAN[: made.channels], STD[: made.channels], seed=3)


def both(folder: Path, **options: Any) -> tuple[Images, Images]:
    return images(folder, "pillow", **options), images(folder, "simplejpeg", **options)


def difference(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).abs()


# ---------------------------------------------------------------- crops and pixels


def test_crops_are_those_of_the_other_path_and_pixels_differ_by_rounding(photos):
    plain, fast = both(photos)
    keys = [(epoch, i) for epoch in range(5) for i in range(12)]
    pairs = [(plain[key], fast[key]) for key in keys]
    differences = torch.stack([difference(a.image, b.image) for a, b in pairs])
    assert 0 < differences.mean() < 0.2 and differences.max() <= 3
    assert [a.target for a, _ in pairs] == [b.target for _, b in pairs]
    assert difference(pairs[0][0].image, pairs[12][0].image).mean() > 5  # another crop of the same image


def test_the_boxes_are_equal(photos, monkeypatch):
    boxes: list[list[Any]] = []
    for made in both(photos):
        crop = made.transform.crop.transforms[1]
        drawn: list[Any] = []
        boxes.append(drawn)
        original = crop.get_params
        monkeypatch.setattr(crop, "get_params", lambda *a, to=drawn, of=original: to.append(of(*a)) or to[-1])
        for i in range(12):
            made[1, i]
    assert len(boxes[1]) == 12 and boxes[0] == boxes[1]


@pytest.mark.parametrize(
    "augment",
    [{"auto_augment": "rand-m7-n2-mstd0.5"}, {"color_jitter": 0.4}, {"erase": 1.0}, {"interpolation": "bilinear"}],
)
def test_later_augmentations_draw_the_same_random_numbers(photos, augment):
    plain, fast = both(photos, **augment)
    without = images(photos, "simplejpeg")
    for i in range(12):
        a, b = plain[0, i].image, fast[0, i].image
        # of a solarized pixel a difference of 1 may become one of 255
        assert (difference(a, b) <= 8).float().mean() > 0.99
    assert any(not torch.equal(fast[0, i].image, without[0, i].image) for i in range(12))


def test_a_large_photo_is_decoded_at_a_smaller_scale(tmp_path, monkeypatch):
    folder = write(
        tmp_path / "large", {f"{c}/0.jpg": encoded(picture(1201, 803, i, blob=100)) for i, c in enumerate("ab")}
    )
    shapes = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **o: shapes.append((got := decode(*a, **o)).shape) or got)
    plain, fast = both(folder, size=64, scale=(0.3, 1.0))
    for key in ((epoch, i) for epoch in range(6) for i in range(2)):
        error = difference(plain[key].image, fast[key].image).square().mean()
        assert 10 * torch.log10(255**2 / error) > 34  # dB; the crop is rounded to pixels of the smaller image
    assert {shape[1] for shape in shapes} == {601, 301} and len(shapes) == 12


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 4}]
)
def test_kinds_of_jpeg(tmp_path, options):
    folder = write(tmp_path / "kinds", {f"{c}/0.jpg": encoded(picture(121, 83, 1), **options) for c in "ab"})
    plain, fast = both(folder)
    for epoch in range(4):
        assert difference(plain[epoch, 0].image, fast[epoch, 0].image).max() <= 3


def test_grey(tmp_path):
    folder = write(tmp_path / "grey", {f"{c}/0.jpg": encoded(picture(120, 90, 2, "L")) for c in "ab"})
    write(folder, {"a/colour.jpg": encoded(picture(120, 90, 3))})
    for channels in (1, 3):
        plain, fast = both(folder, data={"channels": channels})
        for i in range(3):
            assert fast[0, i].image.shape[0] == channels
            assert difference(plain[0, i].image, fast[0, i].image).max() <= 3
        colour = next(i for i in range(3) if "colour" in fast.source.where(i))
        equal = torch.equal(plain[0, colour].image, fast[0, colour].image)
        assert equal == (channels == 1)  # Pillow makes grey of colours


# ---------------------------------------------------------------- what Pillow decodes


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(120, 90, 4), exif=exif)


def _multi_picture() -> bytes:
    return encoded(picture(120, 90, 5), "MPO", save_all=True, append_images=[picture(120, 90, 6)])


def _damaged() -> bytes:
    """Changed bytes that Pillow decodes to something, and of which libjpeg warns."""
    whole = encoded(picture(120, 90, 7))
    for at in range(700, len(whole) - 40):
        data = whole[:at] + b"\xff\xd0\x00\x11" + whole[at + 4 :]
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            simplejpeg.decode_jpeg(data)
        except ValueError:
            return data
        except OSError:
            continue
    raise AssertionError


ODD = {
    "png": lambda: encoded(picture(120, 90, 1), "PNG"),
    "cmyk": lambda: encoded(picture(120, 90, 2).convert("CMYK")),
    "turned": _turned,
    "multi-picture": _multi_picture,
    "damaged": _damaged,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_have_the_same_pixels_to_the_last_bit(photos, kind):
    (photos / "ant" / "3.jpg").write_bytes(ODD[kind]())
    plain, fast = both(photos, auto_augment="rand-m7-n2-mstd0.5")
    for epoch in range(3):
        assert torch.equal(plain[epoch, 3].image, fast[epoch, 3].image)
        assert not torch.equal(plain[epoch, 2].image, fast[epoch, 2].image)


def test_validation_is_not_affected(photos):
    data = Data(train=str(photos), image_size=64, val_fraction=0.3)
    fast = data.model_copy(update={"decoder": "simplejpeg"})
    made = [validation_images(open_split(d), d, Augment()) for d in (data, fast)]
    assert len(made[0]) > 2
    for i in range(len(made[0])):
        assert torch.equal(made[0][0, i].image, made[1][0, i].image)


def test_bad_images_are_the_same_and_batches_depend_on_neither_workers_nor_start(photos):
    whole = (photos / "ant" / "1.jpg").read_bytes()
    write(photos, {"ant/1.jpg": whole[:1500], "ant/4.jpg": b"", "bumblebee/2.jpg": b"\xff\xd8\xff\xe0 no image"})
    options = {"data": {"on_bad_image": "skip", "max_bad": 0.5}}

    def batches(made: Images, workers: int = 0, start: int = 0) -> list[Any]:
        return list(train_batches(made, TrainSampler(len(made), 4, 3, 6, start), workers, pin=False))

    plain, fast = both(photos, **options)
    expected, found = batches(plain), batches(fast)
    assert [b.skipped for b in expected] == [b.skipped for b in found] and plain.bad.found == fast.bad.found
    assert len(plain.bad.found) == 3 and "truncated" in "".join(plain.bad.found.values())
    for a, b in zip(expected, found):
        assert torch.equal(a.targets, b.targets) and difference(a.images, b.images).max() <= 3
    again = batches(images(photos, "simplejpeg", **options), workers=2, start=2)
    assert all(torch.equal(a.images, b.images) for a, b in zip(again, found[2:], strict=True))


def test_without_skip_the_error_is_the_same(photos):
    (photos / "ant" / "0.jpg").write_bytes((photos / "ant" / "0.jpg").read_bytes()[:1000])
    plain, fast = (made[0, 0] for made in both(photos))
    assert isinstance(plain, UserError) and str(plain) == str(fast) and "truncated" in str(plain)


def test_archives_and_sources_that_give_no_bytes(photos, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "photos")
    of_tar, of_folder = (images(source, "simplejpeg") for source in (f"tar:{tmp_path / 'photos.tar'}", photos))
    assert torch.equal(of_tar[0, 5].image, of_folder[0, 5].image)

    def no_bytes(i: int) -> bytes:
        raise BadImage("none")

    monkeypatch.setattr(of_tar.source, "content", no_bytes)
    assert torch.equal(of_tar[0, 5].image, images(photos, "pillow")[0, 5].image)


# ---------------------------------------------------------------- errors


def test_data_without_jpeg_files(image_folder):
    with pytest.raises(UserError, match=r"simplejpeg decodes JPEG files, and none of 16 .*png; use pillow"):
        images(image_folder / "train", "simplejpeg")
    with pytest.raises(UserError, match=r"none of 16 training images .* image 0 of .*; use pillow"):
        images("fashion-mnist:train", "simplejpeg", data={"channels": 1})


def test_the_package_is_missing(photos, monkeypatch):
    monkeypatch.setattr(jpeg, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'scalekd\[simplejpeg\]', or use pillow"):
        images(photos, "simplejpeg")


def test_other_crops_do_not_use_it(tiny_recipe):
    with pytest.raises(UserError, match=r"data.decoder: has no effect here; .* augment.crop: random_resized"):
        check_config(changed(tiny_recipe, data={"decoder": "simplejpeg"}, augment={"crop": "none", "pad": 4}), "test")
