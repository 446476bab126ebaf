"""`scalekd probe` on sets of labels: mAP of both classifiers, and which images are drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from labelled_sets import slow_map, write_sets
from rich.console import Console
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from scalekd.analyze import probe
from scalekd.analyze.probe_page import markdown
from scalekd.analyze.shots import first_of_each, labelled_sets
from scalekd.common.errors import UserError
from scalekd.data.options import Data
from scalekd.data.split import open_split
from scalekd.heads import linear as head_solver
from scalekd.heads.features import features, named_backbone

CPU = torch.device("cpu")
TABLE = "labels.csv:separator=pipe"
VIT = "test_vit=vit.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("probe-sets")
    write_sets(root / "train", 48)
    write_sets(root / "val", 36, seed=1)
    torch.manual_seed(0)
    state = timm.create_model("test_vit", img_size=32).state_dict()
    save_file({k: v + 0.1 * torch.rand_like(v[:1]) for k, v in state.items()}, root / "vit.safetensors")
    return root


def test_map_is_that_of_scipy_and_of_a_loop(root, monkeypatch, tmp_path):
    monkeypatch.setattr(head_solver, "STRENGTHS", (10.0,))
    monkeypatch.chdir(root)
    data = Data(train=f"train/{TABLE}", val=f"val/{TABLE}", seed=0)
    screen = io.StringIO()
    options = {"shots": [3, "all"], "draws": 2, "image_size": (32, 32), "cache": tmp_path}
    found = probe.probe([VIT], data, tmp_path / "out", CPU, Console(file=screen, width=120), **options)
    split = open_split(data)
    backbone, quiet = named_backbone(VIT, (32, 32), CPU), Console(quiet=True)
    x, y = (t.double().numpy() for t in features(backbone, split.train, range(48), data.train, tmp_path, quiet))
    q, truth = (t.double().numpy() for t in features(backbone, split.val, range(36), data.val, tmp_path, quiet))
    for (n, d), images in labelled_sets(split, [3, "all"], 2, 0).items():
        rows = np.array(images)
        cell = found["models"][VIT]["shots"][str(n)]
        linear = slow_map(by_scipy(x[rows], y[rows], q, 10.0), truth > 0.5)
        assert cell["linear"]["map"][d] == pytest.approx(linear, abs=1e-3)
        assert cell["knn"]["map"][d] == pytest.approx(slow_map(by_votes(x[rows], y[rows], q), truth > 0.5), abs=0.05)
        assert "top1" not in cell["linear"]
    page = markdown(json.loads((tmp_path / "out" / "results.json").read_text()), "probe.svg")
    for text in (page, screen.getvalue()):
        assert "mAP %" in text and "op-1" not in text
    assert "mAP: linear" in screen.getvalue() and "![mAP over labelled images" in page


def by_scipy(x: np.ndarray, y: np.ndarray, asked: np.ndarray, strength: float) -> np.ndarray:
    """Logits of logistic regressions on standardised features, class by class."""
    mean, std = x.mean(0), np.where(x.std(0) > 1e-9, x.std(0), 1)
    z, columns = (x - mean) / std, []
    for truth in y.T:

        def loss(p: np.ndarray, truth: np.ndarray = truth) -> tuple[float, np.ndarray]:
            logits = z @ p[:-1] + p[-1]
            error = expit(logits) - truth
            value = (
                -(truth * log_expit(logits) + (1 - truth) * log_expit(-logits)).sum() + strength / 2 * p[:-1] @ p[:-1]
            )
            return value, np.append(z.T @ error + strength * p[:-1], error.sum())

        p = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B", options={"gtol": 1e-9}).x
        columns.append((asked - mean) / std @ p[:-1] + p[-1])
    return np.stack(columns, 1)


def by_votes(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    rows = []
    for one in asked:
        similarity = x @ one / np.linalg.norm(x, axis=1) / np.linalg.norm(one)
        nearest = np.argsort(-similarity)[:20]
        weights = np.exp((similarity[nearest] - 1) / 0.07)
        rows.append(weights @ y[nearest] / weights.sum())
    return np.stack(rows)


def test_draws_are_nested_and_have_enough_of_every_class(root):
    split = open_split(Data(train=str(root / "train" / TABLE), val=str(root / "val" / TABLE)))
    sets = labelled_sets(split, [1, 2, 5, "all"], 3, seed=4)
    for (n, d), images in sets.items():
        counts = [sum(c in split.train.targets[i] for i in images) for c in range(3)]
        assert len(images) == 48 if n == "all" else min(counts) >= n and len(images) <= 3 * n
        assert n == "all" or set(sets[1, d]) <= set(sets[2, d]) <= set(sets[5, d])
    targets = [(0, 1), (), (0,), (1,), (2, 0)]
    assert first_of_each([2, 0, 1, 4, 3], targets, 1) == [2, 0, 4] and first_of_each(range(5), targets, 2) == [
        0,
        2,
        3,
        4,
    ]
    with pytest.raises(UserError, match=r"1 of 3 classes have fewer than 9 training images: cat \(8\)"):
        labelled_sets(split, [9], 1, 0)


def test_test_images_without_any_label_are_refused(root, tmp_path):
    write_sets(tmp_path / "none", 4, seed=7)
    rows = ["path,labels", *(f"{i}.png," for i in range(3)), "3.png,ant|bee|cat"]
    (tmp_path / "none" / "labels.csv").write_text("\n".join(rows) + "\n")
    val = f"{tmp_path / 'none' / 'labels.csv'}:separator=pipe,empty=keep"
    split = open_split(Data(train=str(root / "train" / TABLE), val=val))
    seed = next(
        s for s in range(50) if not any(split.val.targets[i] for i in probe.some(split.val, split.val_indices, 1, s))
    )
    with pytest.raises(UserError, match="none of the validation images has a label"):
        data = Data(train=str(root / "train" / TABLE), val=val, seed=seed)
        probe.probe([VIT], data, tmp_path / "out", CPU, Console(quiet=True), shots=[1], draws=1, val_limit=1)
