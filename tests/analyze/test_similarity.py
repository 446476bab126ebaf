"""Students beside their teacher: CKA, calibration and attention worked out another way, and the command."""

from __future__ import annotations

import csv
import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy
import torch
from trained_runs import trained_runs
from whole_runs import CPU

from scalekd.analyze.attention import attention_weights
from scalekd.analyze.calibration import Answers, calibration, class_gains
from scalekd.analyze.cka import StageCKA, hsic, inner_products
from scalekd.analyze.runs import open_runs
from scalekd.analyze.similarity import STAGES
from scalekd.analyze.similarity_figures import draw_cka, draw_classes
from scalekd.methods.projectors import CrossAttentionProjector
from scalekd.train import checkpoint


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- CKA


def test_hsic_is_the_mean_over_quadruples():
    """The unbiased estimate by its definition: a U-statistic over all ordered quadruples of different images."""
    x, y = noise(6, 4) + 3, noise(6, 2, seed=1)
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()  # noqa: E741
    each = [
        k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]
        for i, j, q, r in itertools.permutations(range(6), 4)
    ]
    assert float(hsic(torch.from_numpy(k), torch.from_numpy(l))) == pytest.approx(np.mean(each))
    centred = hsic(inner_products(x), inner_products(y))  # images less their mean: the same
    assert float(centred) == pytest.approx(np.mean(each), rel=1e-4)


def cka_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al.: |Y'X|^2 / (|X'X| |Y'Y|) of features (images, n), each less its mean over images."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def of_stages(a: torch.Tensor, b: torch.Tensor, batch: int) -> float:
    found = StageCKA()
    for x, y in zip(a.split(batch), b.split(batch)):
        found.add([x], [y])
    ((value,),) = found.result()
    assert value is not None
    return value


def test_cka_is_kornblith_s_over_many_images():
    x = noise(600, 2, 2, 2)
    y = torch.einsum("bdhw,de->behw", x, noise(2, 3, seed=1)) + 0.5 * noise(600, 3, 2, 2, seed=2)
    expected = cka_by_hand(x.flatten(1).numpy(), y.flatten(1).numpy())
    assert 0.3 < expected < 0.95
    assert of_stages(x, y, 600) == pytest.approx(expected, abs=0.01)
    assert of_stages(x, y, 20) == pytest.approx(expected, abs=0.03)  # small batches: no bias
    # on 20 images the plain formula is far off for what is unrelated; this is not
    a, b = noise(600, 30, 1, 1), noise(600, 30, 1, 1, seed=3)
    plain = np.mean([cka_by_hand(p.flatten(1).numpy(), q.flatten(1).numpy()) for p, q in zip(a.split(20), b.split(20))])
    assert plain > 0.5 and abs(of_stages(a, b, 20)) < 0.05


def test_cka_knows_rotations_and_nothing_to_compare():
    x = noise(40, 3, 2, 2)
    rotation = torch.linalg.qr(noise(12, 12, seed=1)).Q
    turned = (x.flatten(1) @ rotation * 7 + 2).unflatten(1, (3, 2, 2))
    assert of_stages(x, turned, 10) == pytest.approx(1, abs=1e-5)
    found = StageCKA()
    found.add([x[:3]], [x[:3]])
    assert found.result() == []  # three images are too few
    found.add([x, torch.ones_like(x)], [x])
    assert found.result() == [[pytest.approx(1)], [None]] and found.images == 40


# ---------------------------------------------------------------- answers


def test_calibration_by_hand():
    generator = np.random.default_rng(0)
    confidence, right = generator.uniform(0.1, 1, 300), generator.random(300) < 0.6
    confidence[:3] = [3 / 15, 1.0, 1e-9]  # the upper end of a bin is its own
    found = calibration(confidence, right)
    whole = 0.0
    for i, b in enumerate(found["bins"]):
        inside = [j for j in range(300) if i / 15 < confidence[j] <= (i + 1) / 15]
        assert b["images"] == len(inside)
        if inside:
            accuracy, mean = np.mean(right[inside]), np.mean(confidence[inside])
            assert (b["accuracy"], b["confidence"]) == pytest.approx((accuracy, mean))
            whole += len(inside) / 300 * abs(accuracy - mean)
    assert found["ece"] == pytest.approx(100 * whole)
    assert calibration([1.0] * 4, [True, True, True, False])["ece"] == pytest.approx(25)
    assert calibration([0.75] * 4, [True, True, True, False])["ece"] == pytest.approx(0)


def test_answers_are_torch_s_and_scipy_s():
    student, teacher = noise(9, 4) * 3, noise(9, 4, seed=1)
    targets = torch.arange(9) % 4
    answers = Answers()
    answers.add(student[:5], targets[:5], teacher[:5])
    answers.add(student[5:], targets[5:], teacher[5:])
    found = answers.result(True)
    p, q = (scipy.special.softmax(z.numpy(), axis=1) for z in (student, teacher))
    assert found["nll"] == pytest.approx(torch.nn.functional.cross_entropy(student, targets).item())
    assert found["kl"] == pytest.approx(scipy.special.rel_entr(q, p).sum(1).mean())
    assert found["agreement"] == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).mean())
    assert found["top1"] == pytest.approx(100 * (p.argmax(1) == targets.numpy()).mean())
    assert found["ece"] == calibration(p.max(1), p.argmax(1) == targets.numpy())["ece"]
    assert "kl" not in answers.result(False)


def test_gains_by_class():
    target = np.array([0, 0, 0, 0, 1, 1, 3])
    before = {"target": target, "right": np.array([1, 0, 0, 0, 1, 1, 0], bool)}
    after = {"target": target, "right": np.array([1, 1, 1, 0, 0, 1, 1], bool)}
    rows = class_gains(before, after, ["ant", "bee", "cat", "dog"])
    assert [(r["class"], r["images"], r["before"], r["after"], r["gain"]) for r in rows] == [
        ("dog", 1, 0, 100, 100), ("ant", 4, 25, 75, 50), ("bee", 2, 100, 50, -50),
    ]  # fmt: skip
    assert rows[0]["half_width"] is None
    assert rows[1]["half_width"] == pytest.approx(1.96 * np.std([0, 100, 100, 0], ddof=1) / 2)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("learned", [True, False])
def test_attention_weights_give_the_projector_s_output(learned):
    torch.manual_seed(0)
    cap = CrossAttentionProjector((6, 4, 3), (8, 2, 5), heads=2, norm="layer", learned_queries=learned).eval()
    with torch.no_grad():
        for parameter in cap.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        x, queries = torch.randn(3, 6, 4, 3), None if learned else torch.randn(3, 8, 2, 5)
        weights = attention_weights(cap, x, queries).expand(3, -1, -1, -1)
        assert weights.shape == (3, 2, 10, 12)
        tokens = (torch.relu(cap.norm(cap.conv(x))) + cap.position).flatten(2).transpose(1, 2)
        values = cap.v(tokens).view(3, 12, 2, 4)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(2)
        normed = cap.out_norm(cap.out(mixed))
        y = (normed + cap.ffn(normed)).transpose(1, 2).unflatten(2, (2, 5))
        torch.testing.assert_close(y, cap(x) if learned else cap(x, queries))
    assert weights.sum(3).allclose(torch.ones(())) and weights.std() > 0.01


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def made(root):
    return trained_runs(root, "plain", "scalekd")


def test_a_run_beside_its_baseline(cli, root, made, tmp_path):
    out = tmp_path / "out"
    command = ("analyze", "similarity", root / "scalekd", "--baseline", root / "plain", "--batch", 5)
    result = cli(*command, "--pictures", 2, "--out", out)
    assert result.code == 0, result.err
    assert "plain (baseline)" in result.out and "12 of 12 images" in result.out
    found = json.loads((out / "results.json").read_text())
    assert [r["run"] for r in found["runs"]] == ["plain", "scalekd"] and found["baseline"] == "plain"

    d, images = made["scalekd"].distiller, made["scalekd"].val_images
    pixels = torch.stack([images[0, i].image for i in range(12)]) / 255
    targets = torch.tensor([images[0, i].target for i in range(12)])
    with torch.no_grad():
        teacher = d.teacher_view.model((pixels - d.teacher_mean) / d.teacher_std)
        for of_run in found["runs"]:
            logits = made[of_run["run"]].distiller.student((pixels - d.student_mean) / d.student_std)
            assert of_run["agreement"] == pytest.approx(100 * (logits.argmax(1) == teacher.argmax(1)).float().mean())
            assert of_run["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-3)
            assert np.shape(of_run["cka"]) == (4, 4)
    with open(out / "answers.csv", newline="") as file:
        answers = list(csv.DictReader(file))
    assert len(answers) == 12
    right = 100 * np.mean([row["scalekd: answer"] == row["class"] for row in answers])
    assert found["runs"][1]["top1"] == pytest.approx(right)
    with open(out / "classes.csv", newline="") as file:
        gains = {row["class"]: float(row["gain"]) for row in csv.DictReader(file)}
    assert any(gains.values())
    assert np.mean(list(gains.values())) == pytest.approx(found["runs"][1]["top1"] - found["runs"][0]["top1"])

    caps = ["scalekd.ori", "scalekd.alt", "scalekd.proxy_ori", "scalekd.proxy_alt"]
    summary = (out / "summary.md").read_text()
    pictures = ["calibration", "cka", "classes", *(f"attention-{i}" for i in range(1, 5))]
    for name in pictures:
        assert ElementTree.parse(out / f"{name}.svg").getroot().tag.endswith("svg")
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"({name}.png)" in summary
    for i, cap in enumerate(caps, 1):
        assert f"attention-{i}: scalekd, {cap}" in summary
        with open(out / f"attention-{i}.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["query"] == "mean"]
        assert sum(float(row["weight"]) for row in rows) == pytest.approx(2)  # 1 for each image
    written = {f"{name}.{form}" for name in pictures for form in ("csv", "png", "svg")}
    assert {p.name for p in out.iterdir()} == written | {"answers.csv", "results.json", "summary.md"}


def test_a_projector_that_serves_both_views_is_drawn_once(cli, root, tmp_path):
    trained_runs(root, "shared")
    result = cli("analyze", "similarity", root / "shared", "--pictures", 1, "--out", tmp_path)
    assert result.code == 0, result.err
    summary = (tmp_path / "summary.md").read_text()
    assert "attention-1: shared, scalekd.ori" in summary and "attention-2: shared, scalekd.proxy_ori" in summary
    assert len([*tmp_path.glob("attention-*.csv")]) == 2


def test_cka_of_a_run_s_maps(cli, root, made, tmp_path):
    cli("analyze", "similarity", root / "scalekd", "--batch", 12, "--pictures", 0, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    d, images = made["scalekd"].distiller, made["scalekd"].val_images
    pixels = torch.stack([images[0, i].image for i in range(12)]) / 255
    with torch.no_grad():
        student = d.student_view((pixels - d.student_mean) / d.student_std)
        teacher = d.teacher_view((pixels - d.teacher_mean) / d.teacher_std)
    for s, t in itertools.product(STAGES, STAGES):
        x, y = ((f.final if stage == 4 else f.maps[stage - 1]).double() for f, stage in ((student, s), (teacher, t)))
        assert found["runs"][0]["cka"][s - 1][t - 1] == pytest.approx(of_stages(x, y, 12), abs=1e-3)


def test_what_cannot_be_compared_is_left_out_and_reported(cli, root):
    trained_runs(root / "logits", "kd", student={"model": "levit_128s"}, data={"image_size": 64})
    result = cli("analyze", "similarity", root / "logits" / "kd", "--out", root / "out")
    assert result.code == 0 and "Left out: levit_128s (LevitDistilled) has no stage maps" in result.out
    assert not (root / "out" / "cka.csv").exists() and not (root / "out" / "attention-1.csv").exists()
    trained_runs(root / "other", "cap", teacher={"kwargs": {"depth": 4, "num_classes": 5}})
    result = cli("analyze", "similarity", root / "other" / "cap")
    assert result.code == 0 and "the teacher has 5 classes and the data 3" in result.out


def test_the_exported_student_answers_and_the_trained_one_attends(root, tmp_path):
    made = trained_runs(root / "averaged", "cap", train={"ema": 0.9})
    folder = root / "averaged" / "cap"
    state = checkpoint.load(folder / "last.pt")
    t = open_runs([folder], None, None, 4, CPU).trained[0]
    model = t.student.view.model
    for which in ("deployed", "student"):
        t.use(which)
        assert all(torch.equal(value, state[which][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(state["student"][n], v) for n, v in made["cap"].deployed.state_dict().items())


def test_errors(cli, root, made):
    def error(*words: object) -> str:
        result = cli("analyze", "similarity", root / "scalekd", *words)
        assert result.code == 2 and "Traceback" not in result.err
        return result.err

    assert "`--pictures` -1: must be 0" in error("--pictures", -1)
    assert "`--batch` 3: must be 4" in error("--batch", 3)
    assert "given twice" in error("--baseline", root / "scalekd")


# ---------------------------------------------------------------- pictures


def test_pictures_of_many_runs_and_classes():
    figure = draw_cka([{"run": f"run{i}", "cka": [[0.5] * 3 + [None]] * 4} for i in range(6)])
    assert sum(axes.get_title().startswith("run") for axes in figure.axes) == 6
    rows = [{"class": f"class {i}", "images": 9, "gain": 50.0 - i, "half_width": None} for i in range(100)]
    (axes,) = draw_classes({"after": rows}, "before").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 40 and names[0] == "class 0 (9)" and names[-1] == "class 99 (9)"
    assert "of 100 classes" in axes.get_title()
