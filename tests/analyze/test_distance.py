"""Distances of alternative components: against scipy's DCT, least squares and SVD by numpy, and the command."""

from __future__ import annotations

import builtins
import csv
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy
import torch
import yaml
from trained_runs import trained_runs
from whole_runs import CPU

from scalekd.analyze.distance import LINEAR, STRENGTH, LinearMap, analyze, distances, mapped, principal_plane
from scalekd.analyze.figures import FIGURES_MISSING
from scalekd.analyze.runs import labels, open_runs, projector_calls
from scalekd.methods.distance import normalized_distance, remove_direct
from scalekd.train import checkpoint


def by_scipy(a: np.ndarray, t: np.ndarray) -> float:
    """Of two maps (D, H, W): DCT, direct component zero, inverse; then position by position."""

    def alternative(x: np.ndarray) -> np.ndarray:
        coefficients = scipy.fft.dctn(x, axes=(1, 2), norm="ortho")
        coefficients[:, 0, 0] = 0
        return scipy.fft.idctn(coefficients, axes=(1, 2), norm="ortho")

    a, t = alternative(a), alternative(t)
    each = []
    for i, j in np.ndindex(a.shape[1:]):
        lengths = [np.linalg.norm(v[:, i, j]) for v in (a, t)]
        x, y = (v[:, i, j] / n if n > 1e-6 else 0.0 * v[:, i, j] for v, n in zip((a, t), lengths))
        each.append(((x - y) ** 2).sum())
    return float(np.mean(each))


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_scipy_s_dct_without_the_direct_component():
    a, t = maps(4, 5, 3, 6) + 2, maps(4, 5, 3, 6, seed=1) - 1
    expected = [by_scipy(x, y) for x, y in zip(a.numpy(), t.numpy())]
    np.testing.assert_allclose(distances(a, t), expected, rtol=1e-12)
    # and the loss of the method: at 49 positions for each image
    loss = normalized_distance(remove_direct(a), remove_direct(t), "mean")
    assert float(loss) == pytest.approx(49 * np.mean(expected))


def test_known_distances():
    a = maps(2, 3, 4, 4)
    assert distances(a, 3 * a + 5).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert distances(a, -a).tolist() == pytest.approx([4, 4])
    assert distances(torch.full_like(a, 7), a).tolist() == pytest.approx([1, 1])  # nothing but a direct component
    x, y = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    x[0, 0], y[0, 1] = torch.tensor([[1.0, -1], [1, -1]]), torch.tensor([[1.0, 1], [-1, -1]])
    assert distances(x, y).tolist() == pytest.approx([2])


def rows(x: torch.Tensor) -> np.ndarray:
    """(N, D, H, W) to rows of alternative components."""
    x = x.numpy() - x.numpy().mean((2, 3), keepdims=True)
    return np.moveaxis(x, 1, 3).reshape(-1, x.shape[1])


def ridge_by_lstsq(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The same least squares with the ridge as further rows."""
    strength = STRENGTH * (x**2).mean() * len(x)
    both = np.vstack([x, np.sqrt(strength) * np.eye(x.shape[1])]), np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
    return np.linalg.lstsq(*both)[0]


def test_the_linear_map_is_ridge_regression():
    x, y = maps(6, 4, 3, 3), maps(6, 5, 3, 3, seed=1)
    y[:, :4] += x
    linear = LinearMap()
    linear.add(x[:2], y[:2])
    linear.add(x[2:], y[2:])
    np.testing.assert_allclose(linear.fit(), ridge_by_lstsq(rows(x), rows(y)), rtol=1e-9)


def test_the_linear_map_finds_a_linear_relation_on_another_grid():
    x = maps(40, 3, 6, 6)
    true = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cells = x.unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5))  # 6x6 to 3x3
    y = torch.einsum("bdhw,de->behw", cells, true) + 4
    linear = LinearMap()
    linear.add(x[:20], y[:20])
    assert distances(mapped(x[20:], y[20:], linear.fit()), y[20:]).max() < 1e-5
    assert distances(mapped(x[20:], y[20:].flip(0), linear.fit()), y[20:].flip(0)).mean() > 1


def test_the_plane_is_numpy_s_svd():
    x = maps(12, 30) * torch.linspace(3, 0.1, 30)
    plane, shares = principal_plane(x)
    _, values, right = np.linalg.svd(x.numpy())
    assert shares == pytest.approx(((values**2) / (values**2).sum())[:2].tolist())
    for mine, theirs in zip(plane.T.numpy(), right):
        assert abs(mine @ theirs) == pytest.approx(1)
        points = x.numpy() @ mine
        assert points[np.abs(points).argmax()] > 0


def test_labels_leave_out_what_is_common(tmp_path):
    assert labels([tmp_path / "CAP" / "seed0", tmp_path / "DFM" / "seed0"]) == ["CAP/seed0", "DFM/seed0"]
    assert labels([tmp_path / "a", tmp_path / "a" / "b"]) == ["a", "a/b"]
    assert labels([tmp_path / "one"]) == ["one"]


# ---------------------------------------------------------------- runs and the command


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def made(root):
    return trained_runs(root, "plain", "fd", "cap", "scalekd", data={"image_size": 64})


@pytest.fixture(scope="module")
def trained(root, made):
    return {name: root / name for name in made}


def projected(name, run, student, teacher):
    """Each projector's map, called by hand."""
    m = run.distiller.methods
    if name == "cap":
        return {"cap.ori": m["cap"].student_caps["ori"](student.final)}
    if name == "fd":
        return {"fd.s4": m["fd"].projectors["s4"](student.final)}
    if name == "plain":
        return {}
    m = m["scalekd"]
    proxies = {v: teacher.resume(3, m.proxy_caps[v](student.maps[2])) for v in ("ori", "alt")}
    return {f"scalekd.{v}": m.student_caps[v](student.final, proxies[v]) for v in proxies}


def test_distances_of_runs_worked_out_again(cli, made, trained, tmp_path):
    out = tmp_path / "out"
    runs = [trained[name] for name in ("cap", "scalekd", "fd", "plain")]
    result = cli("analyze", "distance", *runs, "--batch", 5, "--out", out)
    assert result.code == 0, result.err
    assert "scalekd.alt" in result.out and "12 of 12 images" in result.out
    with open(out / "distance.csv", newline="") as file:
        written = list(csv.DictReader(file))
    found = json.loads((out / "results.json").read_text())
    assert [r["own"] for r in found["runs"]] == ["cap.ori", "scalekd.alt", "fd.s4", None]
    order = [row["image"] for row in written if row["run"] == "cap" and row["space"] == LINEAR]
    assert len(set(order)) == 12 and order != sorted(order)

    images = made["cap"].val_images
    places = {images.source.where(i): i for i in range(12)}
    pixels = torch.stack([images[0, places[name]].image for name in order]) / 255
    d = made["cap"].distiller
    with torch.no_grad():
        teacher = d.teacher_view((pixels - d.teacher_mean) / d.teacher_std, resumable=True)
    for of_run in found["runs"]:
        name, view = of_run["run"], made[of_run["run"]].distiller.student_view
        with torch.no_grad():
            student = view((pixels - d.student_mean) / d.student_std)
            expected = projected(name, made[name], student, teacher)
        x = torch.nn.functional.interpolate(student.final.double(), (4, 4), mode="bilinear")  # from 2x2
        y = teacher.final.double()
        expected[LINEAR] = torch.empty_like(y)
        for half in (0, 1):
            fitted = torch.from_numpy(ridge_by_lstsq(rows(x[1 - half :: 2]), rows(y[1 - half :: 2])))
            centred = x[half::2] - x[half::2].mean((2, 3), keepdim=True)
            expected[LINEAR][half::2] = torch.einsum("bdhw,de->behw", centred, fitted)
        assert set(of_run["spaces"]) == set(expected)
        for space, maps_there in expected.items():
            values = [float(r["distance"]) for r in written if (r["run"], r["space"]) == (name, space)]
            again = [by_scipy(a, t) for a, t in zip(maps_there.double().numpy(), y.numpy())]
            np.testing.assert_allclose(values, again, rtol=1e-3, err_msg=f"{name} {space}")
            assert of_run["spaces"][space]["median"] == pytest.approx(np.median(values))


def test_files_of_two_runs(cli, trained, tmp_path):
    out = tmp_path / "out"
    result = cli("analyze", "distance", trained["cap"], trained["scalekd"], "--images", 6, "--out", out)
    assert result.code == 0 and "6 of 12 images" in result.out and "nearer" in result.out
    names = [f"{n}.{form}" for n in ("distance", "projection") for form in ("csv", "png", "svg")]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "results.json", "summary.md"])
    for name in ("distance", "projection"):
        assert ElementTree.parse(out / f"{name}.svg").getroot().tag.endswith("svg")
    found = json.loads((out / "results.json").read_text())
    with open(out / "distance.csv", newline="") as file:
        values = {(r["run"], r["space"], r["image"]): float(r["distance"]) for r in csv.DictReader(file)}
    images = {image for *_, image in values}
    nearer = [values["scalekd", "scalekd.alt", i] < values["cap", "cap.ori", i] for i in images]
    assert found["runs"][1]["nearer_than_first"]["own"] == pytest.approx(100 * np.mean(nearer))
    with open(out / "projection.csv", newline="") as file:
        points = list(csv.DictReader(file))
    assert {(p["panel"], p["of"]) for p in points} == {
        ("differences", "cap"), ("differences", "scalekd"), ("features", "teacher"), ("features", "cap"),
        ("features", "scalekd"),
    }  # fmt: skip
    for p in points:  # a projected difference is no longer than the distance itself
        if p["panel"] == "differences":
            whole = values[p["of"], found["projection"]["space"][p["of"]], p["image"]]
            assert float(p["x"]) ** 2 + float(p["y"]) ** 2 <= whole * (1 + 1e-5)
    assert "| cap | cap.ori |" in (out / "summary.md").read_text()


def test_one_run_over_other_images(cli, trained, image_folder):
    result = cli("analyze", "distance", trained["fd"], "--data", image_folder / "train", "--images", 5, "--batch", 1)
    assert result.code == 0 and f"5 of 24 images of {image_folder / 'train'}" in result.out and "fd.s4" in result.out


def test_the_projectors_run_as_trained(trained):
    runs = open_runs([trained["scalekd"]], None, None, 12, CPU)
    (pixels, _), t = next(runs.batches()), runs.trained[0]
    with torch.no_grad():
        calls = projector_calls(t.methods, t.student.features(pixels), runs.teacher.features(pixels))
    assert {name: call.stage for name, call in calls.items()} == {
        "scalekd.ori": 4, "scalekd.alt": 4, "scalekd.proxy_ori": 3, "scalekd.proxy_alt": 3,
    }  # fmt: skip
    assert calls["scalekd.alt"].output.shape == (12, *runs.teacher.view.shapes.final)
    assert not any(m._forward_hooks for m in t.methods.modules())


def test_a_projector_that_serves_both_views_stands_under_each(root, trained):
    trained_runs(root, "shared", data={"image_size": 64})
    runs = open_runs([root / "shared"], None, None, 12, CPU)
    (pixels, _), t = next(runs.batches()), runs.trained[0]
    with torch.no_grad():
        calls = projector_calls(t.methods, t.student.features(pixels), runs.teacher.features(pixels))
    assert [*calls] == ["scalekd.ori", "scalekd.alt", "scalekd.proxy_ori", "scalekd.proxy_alt"]
    assert calls["scalekd.ori"] is not calls["scalekd.alt"] and calls["scalekd.alt"].stage == 4
    assert calls["scalekd.ori"].projector is calls["scalekd.alt"].projector is t.methods["scalekd"].student_caps["both"]
    assert calls["scalekd.proxy_ori"].output is calls["scalekd.proxy_alt"].output


def test_a_run_with_the_first_view_and_without_the_teacher_s_norm(root, trained):
    """It has no projector for the second view, and none onto the map that is compared."""
    trained_runs(root, "released", data={"image_size": 64})
    runs = open_runs([root / "released"], None, None, 12, CPU)
    (pixels, _), t = next(runs.batches()), runs.trained[0]
    with torch.no_grad():
        calls = projector_calls(t.methods, t.student.features(pixels), runs.teacher.features(pixels))
    assert [*calls] == ["scalekd.ori", "scalekd.proxy_ori", "scalekd.proxy_alt"]
    (found,) = analyze([root / "released"], None, None, CPU)["runs"]
    assert found["own"] is None and [*found["spaces"]] == [LINEAR]


def changed_copy(folder, to, change):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    change(recipe)
    to.mkdir()
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (to / "last.pt").write_bytes((folder / "last.pt").read_bytes())
    return to


@pytest.mark.parametrize("student", [{"weights": "nowhere.safetensors"}, {"weights": "nowhere.pth", "prefix": "net."}])
def test_a_run_whose_student_started_from_a_file_that_is_gone(trained, tmp_path, student):
    copy = changed_copy(trained["cap"], tmp_path / "moved", lambda r: r["student"].update(student))
    model = open_runs([copy], None, None, 4, CPU).trained[0].student.view.model
    state = checkpoint.load(copy / "last.pt")["student"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("analysis", ["distance", "similarity"])
def test_analyses_of_a_run_with_a_prefix(cli, trained, tmp_path, analysis):
    start = {"weights": "nowhere.pth", "prefix": "net."}
    copy = changed_copy(trained["cap"], tmp_path / "run", lambda r: r["student"].update(start))
    result = cli("analyze", analysis, copy)
    assert result.code == 0, result.err


def test_errors(cli, trained, tmp_path):
    def error(*words: object) -> str:
        result = cli("analyze", "distance", *words)
        assert result.code == 2 and "Traceback" not in result.err
        return result.err

    cap = trained["cap"]
    assert "no recipe.yaml" in error(tmp_path / "nothing")
    assert "given twice" in error(cap, cap)
    assert "`--images` 0: must be 1 or more" in error(cap, "--images", 0)
    assert "`--images`: must be 2 or more" in error(cap, "--images", 1)
    assert "none of these runs has a teacher" in error(trained["plain"])
    assert "and 6 more and lacks ant, bee, cat" in error(cap, "--data", "fashion-mnist:test")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text((cap / "recipe.yaml").read_text())
    assert "no last.pt" in error(tmp_path / "empty")
    other = changed_copy(cap, tmp_path / "a", lambda r: r.update(seed=3))  # and so another random teacher
    assert "different teachers" in error(cap, other)
    small = changed_copy(cap, tmp_path / "b", lambda r: r["augment"].update(crop_pct=0.5))
    assert "augment.crop_pct: 0.875 and 0.5" in error(cap, small)
    held = changed_copy(cap, tmp_path / "e", lambda r: r["data"].update(val=None))
    assert "data.val: " in (text := error(cap, held)) and "or set `--data`" in text
    wrong = changed_copy(cap, tmp_path / "c", lambda r: r["student"].update(model="test_convnext"))
    assert "does not fit" in error(wrong)
    gone = changed_copy(cap, tmp_path / "d", lambda r: r["data"].update(train="nowhere"))
    assert "cannot be rebuilt" in error(gone) and "data.train" in error(gone)


def test_a_missing_extra_is_reported_before_any_work(cli, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for analysis in ("distance", "similarity"):
        result = cli("analyze", analysis, tmp_path / "nothing", "--out", tmp_path / "out")
        assert result.code == 2 and result.err == f"scalekd: {FIGURES_MISSING}\n".replace("`out`", "`--out`")
