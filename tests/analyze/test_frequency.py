"""The frequencies of a model's last maps: against scipy image by image, maps of known spectrum, and the command."""

from __future__ import annotations

import builtins
import csv
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy
import timm
import torch
from safetensors.torch import save_file

from scalekd.analyze.figures import FIGURES_MISSING
from scalekd.analyze.frequency import Spectrum, Subject, draw, ring_of, spectrum_of
from scalekd.common.errors import UserError
from scalekd.models.inputs import default_statistics
from scalekd.models.student_file import export_student


def spectrum(*batches: torch.Tensor) -> dict:
    found = Spectrum()
    for maps in batches:
        found.add(maps)
    return found.result()


def test_it_is_scipy_s_image_by_image():
    maps = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = spectrum(maps[:2], maps[2:])
    magnitudes, shares = [], []
    for image in maps.double().numpy():
        each = [scipy.fft.dctn(channel, type=2, norm="ortho") for channel in image]
        magnitudes.append(np.mean([np.abs(c) for c in each], axis=0))
        energy = np.sum([c**2 for c in each], axis=0)
        assert energy.sum() == pytest.approx((image**2).sum())  # orthonormal
        shares.append(energy / energy.sum())
    np.testing.assert_allclose(found["magnitude"], np.mean(magnitudes, axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["energy_share"], np.mean(shares, axis=0), rtol=1e-12)
    direct = [share[0, 0] for share in shares]
    told = found["direct_share"]
    assert (told["mean"], told["std"]) == pytest.approx((np.mean(direct), np.std(direct, ddof=1)))
    assert (told["least"], told["most"]) == pytest.approx((min(direct), max(direct)))
    assert found["grid"] == [4, 6] and found["images"] == 5


def test_shares_of_the_energy_sum_to_one():
    found = spectrum(torch.randn(3, 2, 5, 4))
    assert np.sum(found["energy_share"]) == pytest.approx(1)
    assert sum(ring["energy_share"] for ring in found["radial"]) == pytest.approx(1)
    assert sum(ring["frequencies"] for ring in found["radial"]) == 20
    for ring in found["radial"]:
        inside = ring_of(5, 4) == ring["ring"]
        assert ring["magnitude"] == pytest.approx(np.array(found["magnitude"])[inside].mean())


def test_a_constant_map_has_the_direct_component_only():
    found = spectrum(torch.full((2, 3, 4, 4), 2.5))
    assert found["direct_share"] == pytest.approx({"mean": 1, "std": 0, "least": 1, "most": 1}, abs=1e-12)
    assert found["magnitude"][0][0] == pytest.approx(2.5 * 4)  # mean x sqrt(H W)
    assert np.sum(found["magnitude"]) == pytest.approx(2.5 * 4)


@pytest.mark.parametrize("v, u", [(0, 1), (2, 0), (3, 4)])
def test_a_cosine_has_its_own_frequency(v, u):
    down, across = np.arange(6) + 0.5, np.arange(8) + 0.5
    wave = np.outer(np.cos(np.pi * v * down / 6), np.cos(np.pi * u * across / 8))
    found = spectrum(torch.from_numpy(wave)[None, None])
    expected = np.zeros((6, 8))
    expected[v, u] = 1
    np.testing.assert_allclose(found["energy_share"], expected, atol=1e-12)
    (ring,) = [r["ring"] for r in found["radial"] if r["energy_share"] > 0.5]
    assert ring == round(np.hypot(v, u))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_maps_without_a_spectrum_are_refused(bad):
    with pytest.raises(ValueError, match="zero everywhere or not finite"):
        spectrum(torch.full((1, 1, 2, 2), bad))


def test_the_map_is_the_one_after_the_final_norm():
    model = timm.create_model("test_vit", img_size=48).eval()
    stats = default_statistics(model)
    subject = Subject("test_vit", model, "random", None, (48, 48), stats, "bicubic", 1.0)
    pixels = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    found = spectrum_of(subject, [pixels[:2], pixels[2:]], torch.device("cpu"))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in stats)
    with torch.no_grad():
        tokens = model.forward_features((pixels / 255 - mean) / std)  # its norm included
    maps = tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (3, 3))
    assert found["grid"] == [3, 3]
    np.testing.assert_allclose(found["magnitude"], spectrum(maps)["magnitude"], rtol=1e-4)


# ---------------------------------------------------------------- the command


@pytest.fixture
def grey_student(tmp_path):
    torch.manual_seed(0)
    kwargs = {"img_size": 48, "in_chans": 1, "num_classes": 3}
    model = timm.create_model("test_vit", **kwargs).eval()
    card = {"model": "test_vit", "kwargs": kwargs, "classes": ["ant", "bee", "cat"], "image_size": [48, 48]}
    card |= {"mean": [0.5], "std": [0.25], "interpolation": "bilinear", "crop_pct": 0.9}
    folder = tmp_path / "grey"
    folder.mkdir()
    export_student(model, folder / "student.safetensors", card)
    return folder


def test_models_side_by_side(cli, image_folder, grey_student, tmp_path):
    out = tmp_path / "out"
    models = ["test_vit", grey_student]
    result = cli("analyze", "frequency", *models, "--data", image_folder, "--images", 5, "--random", "--out", out)
    assert result.code == 0 and "direct component" in result.out and "5 of 12 images" in result.out
    found = json.loads((out / "frequency.json").read_text())
    assert [m["model"] for m in found["models"]] == ["test_vit", str(grey_student)]
    assert [m["weights"] for m in found["models"]] == ["random", str(grey_student)]
    assert found["data"] == str(image_folder / "val") and found["models"][1]["grid"] == [3, 3]
    with open(out / "frequency.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for m in found["models"]:
        shares = [float(row["energy_share"]) for row in rows if row["model"] == m["model"]]
        assert len(shares) == m["grid"][0] * m["grid"][1] and sum(shares) == pytest.approx(1)
    drawing = ElementTree.parse(out / "frequency.svg").getroot()
    assert drawing.tag.endswith("svg") and (out / "frequency.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == [f"frequency.{form}" for form in ("csv", "json", "png", "svg")]


def test_weights_in_a_file(cli, image_folder, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "new.safetensors")
    command = ("analyze", "frequency", "--data", image_folder, "--images", 2)
    refused = cli(*command, f"test_vit={tmp_path}/new.safetensors")
    assert refused.code == 2 and "never trained" in refused.err and "--random" in refused.err
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter[:1])  # the same for every row, as only training would
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    assert cli(*command, f"test_vit={tmp_path}/trained.safetensors").code == 0


@pytest.mark.parametrize(
    "words, told",
    [
        (["test_vitt"], "Did you mean `test_vit`"),
        (["test_vit=nowhere.safetensors"], "no file nowhere.safetensors"),
        (["test_vit", "--images", "0"], "`--images` 0: must be 1 or more"),
        (["test_vit", "test_vit", "--random"], "given twice"),
    ],
)
def test_errors(cli, image_folder, words, told):
    result = cli("analyze", "frequency", *words, "--data", image_folder)
    assert result.code == 2 and told in result.err and "Traceback" not in result.err


def test_a_map_of_one_position_is_refused():
    model = timm.create_model("test_resnet").eval()
    subject = Subject("test_resnet", model, "random", None, (32, 32), default_statistics(model), "bicubic", 1.0)
    with pytest.raises(UserError, match="test_resnet: its last map has a single position"):
        spectrum_of(subject, [], torch.device("cpu"))


def test_a_missing_extra_is_reported_before_any_work(cli, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    result = cli("analyze", "frequency", "test_vit", "--data", tmp_path / "nothing", "--out", tmp_path / "out")
    assert result.code == 2 and result.err == f"scalekd: {FIGURES_MISSING}\n".replace("`out`", "`--out`")


def test_a_figure_of_many_models_can_be_drawn():
    one = spectrum(torch.randn(2, 2, 3, 3)) | {"model": "vit_huge_patch14_clip_quickgelu_378.dfn5b"}
    figure = draw([one] * 6)
    titles = [axes.get_title() for axes in figure.axes]
    assert sum("direct: " in title for title in titles) == 6
