"""`scalekd probe`: its accuracies against scipy's and a loop's, which images choose what, and what is not done twice."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from scipy.optimize import minimize
from torchvision import datasets

from scalekd.analyze import probe
from scalekd.analyze.probe import over_draws
from scalekd.analyze.shots import labelled_sets, parse_shots
from scalekd.common.errors import UserError
from scalekd.data.options import Data
from scalekd.data.split import open_split
from scalekd.heads import features
from scalekd.heads import linear as head_solver
from scalekd.heads.features import Backbone, named_backbone
from scalekd.models.student_file import export_student

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat"]
SIZE = 32  # pixels
VIT = "test_vit=vit.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(head_solver, "STRENGTHS", (100.0, 1.0))
    monkeypatch.setattr(head_solver, "CROSS_VALIDATED", 0)  # one part is held out, not each of five in its turn


def write_hard_images(folder: Path, per_class: int, seed: int) -> None:
    """Classes differ in colour by less than images of a class do, so that nobody is right always."""
    random = np.random.default_rng(seed)
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            colour = 110 + random.normal(0, 35, 3) + 45 * np.eye(3)[c]
            image = (colour + random.normal(0, 10, (SIZE, SIZE, 3))).clip(0, 255)
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f"{i}.png")


def student(folder: Path, channels: int = 3, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=7, in_chans=channels).eval()
    folder.mkdir()
    card = {"model": "test_resnet", "kwargs": {"num_classes": 7, "in_chans": channels}, "image_size": [SIZE, SIZE]}
    card |= {"classes": list("abcdefg"), "interpolation": "bicubic", "crop_pct": 1.0}
    export_student(model, folder / "student.safetensors", card | {"mean": [0.4] * channels, "std": [0.25] * channels})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """train/ with 8 and val/ with 20 images a class, a student, a grey one, weights of a ViT; not to be changed."""
    root = tmp_path_factory.mktemp("probe")
    write_hard_images(root / "train", per_class=8, seed=0)
    write_hard_images(root / "val", per_class=20, seed=1)
    student(root / "student")
    student(root / "grey", channels=1)
    torch.manual_seed(0)
    state = timm.create_model("test_vit", img_size=SIZE).state_dict()
    save_file({k: v + 0.1 * torch.rand_like(v[:1]) for k, v in state.items()}, root / "vit.safetensors")
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of `made`, to be worked in."""
    root = Path(shutil.copytree(made, tmp_path / "own"))
    monkeypatch.chdir(root)
    return root


def probed(*models: str, shots: str = "1,4,all", draws: int = 2, **options: Any) -> dict[str, Any]:
    """`probe` on the images in this folder, writing to out/."""
    data = Data(train="train", val=str(options.pop("val", "val")), seed=options.pop("seed", 0))
    more = {"shots": parse_shots(shots), "draws": draws, "image_size": (SIZE, SIZE), "cache": Path("cache")}
    console = options.pop("console", Console(file=io.StringIO()))
    found = probe.probe(models, data, Path("out"), CPU, console, **more | options)
    assert found is not None
    return found


# ---------------------------------------------------------------- the numbers


def pixels(folder: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, C, H, W) in [0, 1] and labels, in the order of the source."""
    files = [(c, file) for c, name in enumerate(CLASSES) for file in sorted(Path(folder, name).iterdir(), key=str)]
    modes = {1: "L", 3: "RGB"}
    read = [np.asarray(Image.open(file).convert(modes[channels]), np.float32) / 255 for _, file in files]
    images = np.stack([image.reshape(SIZE, SIZE, channels).transpose(2, 0, 1) for image in read])
    return images, np.array([c for c, _ in files])


def by_scipy(x: np.ndarray, y: np.ndarray, asked: np.ndarray, strength: float) -> np.ndarray:
    """The class that logistic regression on standardised features gives, solved by scipy."""
    mean, std = x.mean(0), np.where(x.std(0) > 1e-9, x.std(0), 1)
    z, truth = (x - mean) / std, np.eye(3)[y]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[:-3].reshape(3, -1), flat[-3:]
        logits = z @ w.T + b
        log_sum = np.log(np.exp(logits).sum(1, keepdims=True))
        error = np.exp(logits - log_sum) - truth
        slope = np.concatenate([(error.T @ z + strength * w).ravel(), error.sum(0)])
        return -((logits - log_sum) * truth).sum() + strength / 2 * (w**2).sum(), slope

    flat = minimize(loss, np.zeros(3 * (x.shape[1] + 1)), jac=True, method="L-BFGS-B", options={"gtol": 1e-9}).x
    return ((asked - mean) / std @ flat[:-3].reshape(3, -1).T + flat[-3:]).argmax(1)


def by_votes(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    found = []
    for one in asked:
        similarity = x @ one / np.linalg.norm(x, axis=1) / np.linalg.norm(one)
        votes = np.zeros(3)
        for i in np.argsort(-similarity)[:20]:
            votes[y[i]] += math.exp((similarity[i] - 1) / 0.07)
        found.append(votes.argmax())
    return np.array(found)


@pytest.mark.parametrize("text, channels", [("student", 3), ("grey", 1)])
def test_accuracies_are_those_of_scipy_and_of_a_loop(own, text, channels):
    found = probed(text)
    model = timm.create_model(
        "test_resnet", checkpoint_path=f"{text}/student.safetensors", num_classes=7, in_chans=channels
    )

    @torch.no_grad()
    def pooled(folder: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = pixels(folder, channels)
        x = model.eval().forward_features((torch.from_numpy(images) - 0.4) / 0.25).mean((2, 3))
        return x.double().numpy(), labels

    (x, y), (asked, truth) = pooled("train"), pooled("val")
    sets = labelled_sets(open_split(Data(train="train", val="val")), [1, 4, "all"], 2, seed=0)
    fits = {(fitted["shots"], fitted["seed"]): fitted for fitted in found["fits"]}
    assert fits.keys() == sets.keys() and {f["model"] for f in found["fits"]} == {text}
    for s, images in sets.items():
        linear = by_scipy(x[images], y[images], asked, fits[s]["strength"])
        votes = by_votes(x[images], y[images], asked)
        assert fits[s]["linear"]["top1"] == pytest.approx(100 * (linear == truth).mean())
        assert fits[s]["knn"]["top1"] == pytest.approx(100 * (votes == truth).mean())
    assert 40 < fits["all", 0]["linear"]["top1"] < 95  # neither chance nor too easy to tell anything


def test_two_models_are_compared_on_the_same_images(own):
    found = probed("student", VIT)
    by_model = {text: model["shots"] for text, model in found["models"].items()}
    assert list(by_model) == ["student", VIT] and list(found["against_first"]) == [VIT]
    for n, draws in (("1", 2), ("4", 2), ("all", 1)):
        for kind in ("linear", "knn"):
            first, second = (by_model[text][n][kind]["top1"] for text in by_model)
            gains = found["against_first"][VIT][n][kind]
            assert gains["top1"] == [b - a for a, b in zip(first, second)] and len(gains["top1"]) == draws
            assert gains["mean"] == pytest.approx(sum(gains["top1"]) / draws)
            assert (gains["half_width_95"] is None) == (draws == 1)
    assert by_model["student"] != by_model[VIT]
    assert found["models"][VIT]["features"] == 64 and found["models"][VIT]["card"]["sha256"] == features.sha256_of(
        Path("vit.safetensors")
    )


def test_the_interval_is_student_s():
    found = over_draws([50.0, 52.0, 57.0])
    assert found["mean"] == 53
    assert found["half_width_95"] == pytest.approx(4.302652729911275 * math.sqrt(13) / math.sqrt(3))  # t, 2 d.f.
    assert over_draws([50.0])["half_width_95"] is None


# ---------------------------------------------------------------- which images


def test_draws_are_nested_even_and_of_the_seed(own):
    split = open_split(Data(train="train", val="val"))
    sets = labelled_sets(split, [1, 5, "all"], 3, seed=4)
    assert list(sets) == [(1, 0), (1, 1), (1, 2), (5, 0), (5, 1), (5, 2), ("all", 0)]
    for (n, d), images in sets.items():
        counts = [sum(split.train.targets[i] == c for i in images) for c in range(3)]
        assert counts == [8 if n == "all" else n] * 3 and len(set(images)) == len(images)
        assert n == "all" or set(sets[1, d]) <= set(images)
    assert sets[1, 0] != sets[1, 1] and sets[5, 0] != sets[5, 1]
    assert sets == labelled_sets(split, [1, 5, "all"], 3, seed=4)
    assert sets[5, 1] == labelled_sets(split, [5], 1, seed=5)[5, 0]


def test_without_val_a_part_is_held_out_and_never_learned_from(own, monkeypatch):
    seen = {}
    give = probe.features

    def note(backbone: Backbone, source: Any, indices: Any, name: str, *rest: Any) -> Any:
        seen[len(seen)] = set(indices)
        return give(backbone, source, indices, name, *rest)

    monkeypatch.setattr(probe, "features", note)
    probe.probe(
        ["student"], Data(train="train"), Path("out"), CPU, Console(file=io.StringIO()), shots=[2, "all"], draws=3
    )
    learned, tested = seen[0], seen[1]
    assert len(tested) == 3 and len(learned) == 21 and not learned & tested


def test_validation_images_choose_nothing(own):
    first = probed("student")
    Path("planted").mkdir()  # validation labels that would call for another choice
    for k, name in enumerate(CLASSES):
        shutil.copytree(Path("val", name), Path("planted", CLASSES[k - 1]))
    shutil.rmtree("out")
    second = probed("student", val="planted")
    for a, b in zip(first["fits"], second["fits"]):
        assert (a["strength"], a["tried"]) == (b["strength"], b["tried"])
        assert a["linear"]["nll"] < b["linear"]["nll"] or a["shots"] == 1
    assert {len(fitted["tried"]) for fitted in first["fits"] if fitted["shots"] != 1} != {0}
    strengths = {fitted["strength"] for fitted in first["fits"] if fitted["shots"] == 1}
    assert strengths == {head_solver.UNCHOSEN}  # of one image a class nothing can be held out


def test_cifar_100_by_its_torchvision_name(own, cli, monkeypatch):
    class CIFAR100:
        def __init__(self, root: str, train: bool = True):
            images, self.targets = pixels("train" if train else "val", 3)
            self.images = [Image.fromarray((255 * image.transpose(1, 2, 0)).astype(np.uint8)) for image in images]
            self.classes = CLASSES

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return self.images[i], self.targets[i]

    monkeypatch.setattr(datasets, "CIFAR100", CIFAR100)
    shown = cli("probe", "student", "--data", "torchvision:CIFAR100:/data", "--shots", "1,5", "--draws", 2)
    assert shown.code == 0, shown.err
    found = json.loads(Path("runs/probe/results.json").read_text())
    assert found["data"]["val"] == "torchvision:CIFAR100:test:/data" and found["data"]["val_images"] == 60
    same = probed("student", shots="1,5", val_limit=None)
    assert [f["linear"] for f in found["fits"]] == [f["linear"] for f in same["fits"]]


# ---------------------------------------------------------------- what is not done twice


@pytest.fixture
def work(monkeypatch) -> dict[str, int]:
    """Counts fits, and images through a model."""
    done = {"fits": 0, "images": 0}
    fit, give = probe.fit_and_score, Backbone.pooled

    def fitted(*args: Any) -> Any:
        done["fits"] += 1
        return fit(*args)

    def pooled(self: Backbone, images: torch.Tensor) -> torch.Tensor:
        done["images"] += len(images)
        return give(self, images)

    monkeypatch.setattr(probe, "fit_and_score", fitted)
    monkeypatch.setattr(Backbone, "pooled", pooled)
    return done


def test_finished_fits_and_features_are_kept(own, work):
    def again(*models: str, **options: Any) -> tuple[int, int, dict[str, Any]]:
        work.update(fits=0, images=0)
        found = probed(*models, **options)
        return work["fits"], work["images"] - len(models), found  # each model is tried on one image first

    fits, images, first = again("student", shots="1,4")
    assert (fits, images) == (4, 60 + len({i for s in _sets([1, 4]).values() for i in s}))
    assert again("student", shots="1,4")[:2] == (0, 0)
    fits, images, more = again("student", shots="1,4,all")
    assert (fits, images) == (1, 24 - len({i for s in _sets([1, 4]).values() for i in s}))
    assert more["models"]["student"]["shots"]["4"] == first["models"]["student"]["shots"]["4"]
    assert again("student", VIT, shots="1")[:2] == (2, 60 + len({i for s in _sets([1]).values() for i in s}))
    assert again("student", shots="1", draws=3)[0] == 1
    assert again("student", shots="1", seed=1)[0] == 0  # the first two draws of seed 1 are the last two of seed 0
    assert again("student", shots="1", seed=2)[0] == 1
    assert again("student", shots="1", val_limit=30)[:2] == (2, 0)
    shutil.rmtree("student")
    student(own / "student", seed=1)
    assert again("student", shots="1")[0] == 2  # other weights


def _sets(shots: list[Any]) -> dict[Any, list[int]]:
    return labelled_sets(open_split(Data(train="train", val="val")), shots, 2, seed=0)


def test_a_probe_that_was_stopped_goes_on(own, monkeypatch):
    whole = probed("student")
    shutil.rmtree("out")
    give, times = probe.fit_and_score, iter(range(9))

    def stopped(*args: Any) -> Any:
        if next(times) == 2:
            raise KeyboardInterrupt
        return give(*args)

    monkeypatch.setattr(probe, "fit_and_score", stopped)
    with pytest.raises(KeyboardInterrupt):
        probed("student")
    assert len(json.loads(Path("out/results.json").read_text())["fits"]) == 2
    console = Console(file=io.StringIO())
    resumed = probed("student", console=console)
    assert "3 fits to do, 2 reused" in console.file.getvalue()  # type: ignore[attr-defined]
    assert resumed["models"] == whole["models"]


# ---------------------------------------------------------------- the command line


GIVEN = ["--data", ".", "--image-size", SIZE, "--draws", 2, "--shots", "1,4,all", "--cache", "cache"]


def test_what_is_shown_and_written(own, cli):
    shown = cli("probe", "student", VIT, *GIVEN, "--out", "out", "--val-limit", 30)
    assert shown.code == 0, shown.err
    assert "3 classes, 24 images for training, 30 for testing" in shown.out
    assert "grey" not in shown.out and "test_vit, sha256" in shown.out and "input 32x32; 5 fits to do" in shown.out
    assert sorted(p.name for p in Path("out").iterdir()) == ["probe.png", "probe.svg", "results.json", "summary.md"]
    found = json.loads(Path("out/results.json").read_text())
    assert len(found["fits"]) == 10 and {f["images"] for f in found["fits"]} == {3, 12, 24}
    page = Path("out/summary.md").read_text()
    cell = found["models"]["student"]["shots"]["4"]["linear"]
    for text in (page, shown.out):
        assert f"{cell['mean']:.2f} ± {cell['half_width_95']:.2f}" in text and "second minus first" in text
    assert "![Accuracy over labelled images per class](probe.svg)" in page and "| 1 | 4 | all |" in page
    drawn = Path("out/probe.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("student", "all (8)", "labelled images per class"))


def test_a_dry_run_writes_nothing(own, cli):
    shown = cli("probe", "student", VIT, *GIVEN, "--dry-run")
    assert shown.code == 0 and shown.out.count("5 fits to do, 0 reused") == 2
    assert not Path("runs").exists() and not Path("cache").exists()


def test_without_matplotlib_all_but_the_figure_is_there(own, cli, monkeypatch):
    def missing() -> Any:
        raise UserError("the figure needs matplotlib")

    monkeypatch.setattr(probe, "figure_class", missing)
    shown = cli("probe", "student", *GIVEN, "--shots", 1, "--out", "out")
    assert shown.code == 0 and "no figure, because matplotlib is missing: pip install 'scalekd[figures]'" in shown.out
    assert sorted(p.name for p in Path("out").iterdir()) == ["results.json", "summary.md"]
    assert "![" not in Path("out/summary.md").read_text()


def test_classes_without_a_test_image_are_reported(own, cli):
    assert "no test image" not in cli("probe", "student", *GIVEN, "--dry-run").out
    shown = cli("probe", "student", *GIVEN, "--dry-run", "--val-limit", 2)
    assert shown.code == 0 and re.search(
        r"1 classes have no test image: (ant|bee|cat); the figures are those of", shown.out
    )


def test_an_untrained_model_is_refused(own):
    save_file(timm.create_model("test_vit").state_dict(), "fresh.safetensors")
    with pytest.raises(UserError, match=r"^test_vit=fresh.safetensors: \d+% of the biases .* never trained"):
        named_backbone("test_vit=fresh.safetensors", None, CPU)


def test_a_model_whose_features_are_not_finite(own):
    state = timm.create_model("test_vit", img_size=SIZE).state_dict()
    save_file({k: torch.full_like(v, math.nan) for k, v in state.items()}, "nan.safetensors")
    with pytest.raises(UserError, match="test_vit: some features are not finite"):
        probed("test_vit=nan.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--shots", "1,9"],
            r"3 of 3 classes have fewer than 9 training images: ant \(8\), .*set `--shots` to 8 at most, or",
        ),
        (
            ["--shots", "1,few"],
            "`--shots`: 'few' is neither a positive number nor 'all'; use for example 1,5,10,25,all",
        ),
        (["--shots", "0"], "`--shots`: '0' is neither"),
        (["--shots", ","], "`--shots`: empty"),
        (["--draws", 0], "`--draws` 0: must be 1 or more"),
        (["--val-limit", -1], "`--val-limit` -1: must be 1 or more"),
        (
            ["--data", "train", "--val", "train"],
            "--val equals --data, train: models would be tested on their training images",
        ),
        (["--val", "few"], "--data has 3 classes and --val 2; not in both: cat"),
        (["--val", "nowhere"], "--val: .*nowhere"),
        (["--image-size", "wide"], "--image-size: pixels, such as 224"),
        (["--image-size", 4], "weights: vit.safetensors does not fit a VisionTransformer for 4x4 pixels with"),
        (["--out", "vit.safetensors"], "`--out`: vit.safetensors is a file; choose a folder"),
        (
            ["--out", "other"],
            "other/results.json was not written by `scalekd probe` .*choose another folder with `--out`",
        ),
        (["student"], "student is given twice; name each model once"),
        (
            ["resnet5"],
            "scalekd: resnet5: this is neither a timm model nor an exported student. timm names that start with it: resnet50",
        ),
        (["resnet50=nowhere.pt"], "scalekd: resnet50=nowhere.pt: weights: no file nowhere.pt"),
        (["train"], "scalekd: train has no student.safetensors with its .json"),
    ],
)
def test_errors_on_the_command_line(cli, own, options, message):
    for name in ("ant", "bee"):
        shutil.copytree(Path("val", name), Path("few", name))
    Path("other").mkdir()
    Path("other/results.json").write_text('{"top1": 3}')
    models = [word for word in options if options[0] == word and not str(word).startswith("--")]
    rest = [] if models else options
    shown = cli("probe", "student", VIT, *models, *GIVEN, "--out", "o", *rest)
    assert shown.code == 2 and not Path("o").exists()
    assert re.search(message, shown.err), shown.err
