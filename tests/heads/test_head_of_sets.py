"""`scalekd head` on sets of labels: the solver and the choices against others, and the whole road to an evaluated student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from labelled_sets import slow_map, write_sets
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.special import expit, log_expit

import scalekd
from scalekd.common.errors import UserError
from scalekd.heads import linear as head_solver
from scalekd.heads.linear import choose, fit, held_out_parts, listed
from scalekd.heads.page import warnings
from scalekd.heads.scores import before_and_after, best_temperature, scores
from scalekd.runs import heads as run_head
from scalekd.train.log import read_log

TABLE = "labels.csv:separator=pipe"


def sets(n: int = 80, width: int = 6, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy features of unequal scale, and sets of 0 to 3 classes."""
    random = np.random.default_rng(seed)
    y = random.random((n, classes)) < np.linspace(0.5, 0.15, classes)
    x = (random.normal(size=(n, width)) + 1.2 * y @ np.eye(classes, width)) * np.logspace(-1, 2, width) + 3
    return torch.from_numpy(x), torch.from_numpy(y).float()


def by_scipy(x: np.ndarray, y: np.ndarray, strength: float, queries: np.ndarray | None = None) -> np.ndarray:
    """Logits (N, C) of logistic regressions, one class after the other, each written anew and solved by BFGS."""
    mean, std = x.mean(0), x.std(0)
    z = (x - mean) / std
    asked = z if queries is None else (queries - mean) / std
    columns = []
    for truth in y.T:

        def loss(p: np.ndarray, truth: np.ndarray = truth) -> tuple[float, np.ndarray]:
            logits = z @ p[:-1] + p[-1]
            error = expit(logits) - truth
            value = -(truth * log_expit(logits) + (1 - truth) * log_expit(-logits)).sum()
            return value + strength / 2 * (p[:-1] ** 2).sum(), np.append(z.T @ error + strength * p[:-1], error.sum())

        found = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="BFGS", options={"gtol": 1e-9}).x
        columns.append(asked @ found[:-1] + found[-1])
    return np.stack(columns, 1)


# ---------------------------------------------------------------- the solver and the choices


@pytest.mark.parametrize("strength", [0.3, 3.0, 1000.0])
def test_the_solver_finds_what_scipy_finds_class_by_class(strength):
    x, y = sets()
    assert np.abs(fit(x, y, 3, strength)(x).numpy() - by_scipy(x.numpy(), y.numpy(), strength)).max() < 1e-5


def test_a_class_of_every_image_is_fitted():
    x, y = sets()
    y[:, 1] = 1
    head = fit(x, y, 3, 1.0)
    assert head(x)[:, 1].min() > 10 and head.weight[1].abs().max() < 1e-3


def test_parts_leave_an_image_of_each_class_in_every_fit():
    targets = [(0, 1), (0,), (0, 1), (0,), (2,), (0, 1, 3), (), (), (0,), (1,), (), (0, 3)]
    for seed in range(20):
        parts = held_out_parts(targets, seed)
        held = [i for part in parts for i in part]
        assert len(held) == len(set(held)) >= 8
        for part in parts:
            assert {c for i in set(range(len(targets))) - set(part) for c in targets[i]} == {0, 1, 2, 3}
    y = torch.zeros(12, 4)
    for i, target in enumerate(targets):
        y[i, list(target)] = 1
    assert listed(y) == targets


def test_the_strength_has_the_best_map_of_folds_by_hand(monkeypatch):
    monkeypatch.setattr(head_solver, "STRENGTHS", (3000.0, 30.0, 0.3))
    x, y = sets(n=60, width=20, seed=3)
    parts = held_out_parts(listed(y), 5)
    order, maps = [i for part in parts for i in part], {}
    for strength in head_solver.STRENGTHS:
        logits = [
            by_scipy(np.delete(x.numpy(), p, 0), np.delete(y.numpy(), p, 0), strength, x.numpy()[p]) for p in parts
        ]
        maps[strength] = slow_map(np.concatenate(logits), y.numpy()[order] > 0.5)
    choice = choose(x, y, 3, 5)
    tried = {row["strength"]: row["map"] for row in choice.tried}
    assert len(tried) > 1 and tried == pytest.approx({s: maps[s] for s in tried}, abs=1e-6)
    assert choice.strength == max(maps, key=lambda s: maps[s])
    assert choice.held_out["after"]["map"] == choice.held_out["before"]["map"] == pytest.approx(maps[choice.strength])
    assert choice.held_out["after"]["nll"] < choice.held_out["before"]["nll"]


def test_the_search_goes_on_while_map_or_likelihood_gets_better(monkeypatch):
    strengths = (1000.0, 100.0, 10.0, 1.0, 0.1)
    monkeypatch.setattr(head_solver, "STRENGTHS", strengths)
    given = iter([(50.0, 3.0), (60.0, 3.5), (58.0, 2.0), (59.0, 2.5), (90.0, 1.0)])  # mAP, loss
    zero = head_solver.Linear(torch.zeros(3, 6).double(), torch.zeros(3).double())
    monkeypatch.setattr(head_solver, "fit", lambda *_: zero)
    monkeypatch.setattr(head_solver, "scores", lambda *_: dict(zip(("map", "nll"), next(given))))
    choice = choose(*sets(), 3, 0)
    assert choice.strength == 100.0 and [row["strength"] for row in choice.tried] == list(strengths[:4])


def test_scores_temperature_and_threshold_against_numpy():
    x, y = sets(n=200)
    logits = 5 * fit(x, y, 3, 1.0)(x)
    truth, p = y.numpy() > 0.5, expit(logits.numpy())
    found = scores(logits, y, 0.3)
    assert found["map"] == pytest.approx(slow_map(p, truth)) and found["images"] == 200
    assert found["nll"] == pytest.approx(-np.where(truth, log_expit(logits), log_expit(-logits)).mean())
    bins = np.ceil(p * 15)
    gaps = [abs(truth[bins == b].sum() - p[bins == b].sum()) for b in range(1, 16)]
    assert found["ece"] == pytest.approx(100 * sum(gaps) / p.size)
    hits = (p >= 0.3) & truth
    assert found["f1_micro"] == pytest.approx(200 * hits.sum() / ((p >= 0.3).sum() + truth.sum()))
    temperature = best_temperature(logits, y)
    grid = np.exp(np.arange(0, 3, 0.005))
    losses = [-np.where(truth, log_expit(logits / t), log_expit(-logits / t)).mean() for t in grid]
    assert temperature == pytest.approx(grid[np.argmin(losses)], rel=0.01) and temperature > 2
    both = before_and_after(logits, y, temperature, 0.3)
    assert both["before"] == scores(logits, y, both["before"]["threshold"])
    assert both["before"]["f1_macro"] == both["after"]["f1_macro"] and both["after"]["threshold"] == 0.3
    assert both["after"]["nll"] < both["before"]["nll"]


def test_one_image_of_each_class_or_no_error_choose_nothing():
    x, y = torch.randn(3, 6).double(), torch.eye(3)
    unchosen = choose(x, y, 3, 0)
    assert (unchosen.strength, unchosen.temperature, unchosen.threshold) == (head_solver.UNCHOSEN, 1.0, 0.5)
    empty = choose(torch.randn(5, 6).double(), torch.cat([y, torch.zeros(2, 3)]), 3, 0)
    assert empty.held_out == {} and empty.threshold == 0.5  # only images without a label can be held out
    x, y = sets()
    right = choose(y.double() * 100 + 1e-3 * torch.randn(80, 3).double(), y, 3, 0)
    assert right.temperature == 1.0 and "all held-out images are correct" in warnings(right)[-1]


# ---------------------------------------------------------------- from a table to a student


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """A folder with train/, val/, w.safetensors and head/, fitted on them; not to be changed."""
    root = tmp_path_factory.mktemp("head-of-sets")
    write_sets(root / "train", 36)
    write_sets(root / "val", 18, seed=1)
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=0, depth=4).state_dict()
    state = {k: v + 0.1 * torch.rand_like(v[:1]) if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, root / "w.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_solver, "STRENGTHS", (100.0, 10.0))
        patch.chdir(root)
        fitted = _fit(root, "head")
    assert fitted.top1 is None and fitted.map == fitted.card["validation"]["after"]["map"]
    return root


def _fit(root: Path, out: str, **options):
    given = {"weights": str(root / "w.safetensors"), "kwargs": {"depth": 4}, "image_size": 48, "crop_pct": 0.875}
    given |= {"data": str(root / "train" / TABLE), "val": str(root / "val" / TABLE), "device": "cpu"}
    return scalekd.fit_head("test_vit", out=root / out, cache=root / "cache", **given | options)


def test_from_a_table_through_a_head_to_a_student(fitted, cli, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(head_solver, "STRENGTHS", (100.0, 10.0))
    monkeypatch.chdir(fitted)
    given = ["--weights", "w.safetensors", "--kwargs", "{depth: 4}", "--image-size", 48, "--crop-pct", 0.875]
    tables = ["--data", Path("train") / TABLE, "--val", Path("val") / TABLE]
    shown = cli("head", "test_vit", *tables, *given, "--cache", "cache", "--out", tmp_path / "head")
    assert shown.code == 0, shown.err
    card = json.loads((tmp_path / "head" / "head.json").read_text())
    assert (
        "36 images with sets of 3 classes" in shown.out
        and "mAP % macro F1 micro F1" in shown.out
        and "AP %" in shown.out
    )
    assert "losses.kd.probabilities=sigmoid" in shown.out and f"at threshold {card['threshold']:g}" in shown.out
    assert card["head_sha256"] == json.loads((fitted / "head" / "head.json").read_text())["head_sha256"]
    figures = {row["class"]: row["ap"] for row in card["by_class"]}
    assert np.mean(list(figures.values())) == pytest.approx(card["validation"]["after"]["map"])

    use = ["teacher.weights=w.safetensors", f"teacher.head={tmp_path / 'head'}", "teacher.kwargs={depth: 4}"]
    use += ["losses={bce: {}, kd: {probabilities: sigmoid}}", "train.epochs=1"]
    shown = cli("train", recipe_file, *tables, *use, "--out", tmp_path / "run")
    told = " ".join(shown.out.split())
    assert shown.code == 0, shown.err
    # the teacher of the run is as good as its head was
    known = card["validation"]["after"]["map"]
    assert f"mAP {known:.1f} % on 18 validation images" in told and f"(known: {known:.1f} %)" in told
    assert all(event["loss.kd"] > 0 for event in read_log(tmp_path / "run") if "loss.kd" in event)
    shown = cli("evaluate", tmp_path / "run", "--data", Path("val") / TABLE, "--json")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(shown.out)["map"] == pytest.approx(summary["map"], abs=1e-4)


def test_a_run_fits_a_head_of_sets_itself(fitted, cli, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(head_solver, "STRENGTHS", (10.0,))
    monkeypatch.chdir(tmp_path)
    asked = [f"teacher.weights={fitted / 'w.safetensors'}", "teacher.head=fit", "teacher.kwargs={depth: 4}"]
    asked += [
        "losses={bce: {}, kd: {probabilities: sigmoid}, fd: {}}",
        "train.epochs=1",
        "teacher.cuts=null",
        "balance={}",
    ]
    tables = ["--data", fitted / "train" / TABLE, "--val", fitted / "val" / TABLE]
    shown = cli("train", recipe_file, *tables, *asked, "--out", "run", "--no-preflight")
    assert shown.code == 0, shown.err
    assert json.loads(Path("run/head/head.json").read_text())["multi_label"] is True
    monkeypatch.setattr(run_head, "fit_head", None)  # losses that do not suit are told before the fit
    shown = cli("train", recipe_file, *tables, *asked[:3], "losses={ce: {}, kd: {}}", "--out", "other")
    assert shown.code == 2 and shown.err.count("needs one class per image") == 2 and not Path("other/head").exists()


def test_the_card_s_figures_are_those_of_the_model_with_the_head(fitted):
    from scalekd.data.sources.open import open_source
    from scalekd.models.fitted_head import build_with_head
    from scalekd.models.options import Model

    card = json.loads((fitted / "head" / "head.json").read_text())
    spec = Model(
        model="test_vit", weights=str(fitted / "w.safetensors"), kwargs={"depth": 4}, head=str(fitted / "head")
    )
    model, _ = build_with_head(spec, channels=3, image_size=(48, 48), classes=3, where="teacher")
    transform = timm.data.create_transform((3, 48, 48), crop_pct=0.875, interpolation=card["interpolation"],
                                           mean=card["mean"], std=card["std"])  # fmt: skip
    source = open_source(str(fitted / "val" / TABLE), "data")
    with torch.no_grad():
        logits = model.eval()(torch.stack([transform(source[i][0].convert("RGB")) for i in range(len(source))])).numpy()
    truth = np.array([[c in target for c in range(3)] for target in source.targets])
    figures = card["validation"]["after"]
    assert figures["map"] == pytest.approx(slow_map(logits, truth), abs=1e-6)
    assert figures["nll"] == pytest.approx(-np.where(truth, log_expit(logits), log_expit(-logits)).mean(), abs=1e-3)
    found = expit(logits) >= card["threshold"]
    recall = {c: (found & truth)[:, i].sum() / truth[:, i].sum() for i, c in enumerate(card["classes"])}
    assert {row["class"]: row["recall"] for row in card["by_class"]} == pytest.approx(
        {c: 100 * r for c, r in recall.items()}
    )


def test_draws_and_labels_that_are_missing(fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(head_solver, "STRENGTHS", (10.0,))
    root = Path(shutil.copytree(fitted, tmp_path / "own"))
    card = _fit(root, "draws", limit=9, draws=2).card
    assert card["draws"]["map"][0] == card["validation"]["after"]["map"] and len(card["draws"]["map"]) == 2
    rows = ["path,labels", *(f"{i}.png,ant|bee" for i in range(8)), *(f"{i}.png,cat|ant|bee" for i in range(8, 16))]
    (root / "train" / "labels.csv").write_text("\n".join(rows) + "\n")
    _fit(root, "always", verbose=True)
    assert "every labelled image has ant, bee" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("scalekd.data.split.by_class", lambda labels, seed: list(range(len(labels))))
    with pytest.raises(UserError, match=r"no labelled images of 1 of the 3 classes: cat; data.limit 5 leaves them out"):
        _fit(root, "limited", limit=5)
