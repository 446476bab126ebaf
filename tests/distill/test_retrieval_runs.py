"""Whole runs with an embedding: figures of retrieval, the best checkpoint by one of them, files, cards and commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from labelled_sets import write_sets
from safetensors.torch import load_file
from small_images import write_images
from whole_runs import CPU, TINY, changed, events, start

import scalekd
from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.data.batches import Batch
from scalekd.distill.build import build
from scalekd.distill.evaluate import evaluate_retrieval
from scalekd.heads.retrieval import RETRIEVAL_FIGURES
from scalekd.models.embedding_head import add_embedding_head
from scalekd.models.features import pooled
from scalekd.models.options import Embedding
from scalekd.models.student_file import ONNX_MISSING, load_student
from scalekd.train import checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/train and images/val; run, trained without labels, and both, with `ce` beside; their recipes."""
    root = tmp_path_factory.mktemp("retrieval")
    write_images(root / "images" / "train", per_class=8)
    write_images(root / "images" / "val", per_class=5, seed=1)
    from scalekd.cli.app import main

    for name, recipe in recipes(root).items():
        (root / f"{name}.yaml").write_text(json.dumps(recipe))
        assert main(["train", str(root / f"{name}.yaml"), "--out", str(root / name), "--device", "cpu"]) == 0
    return root


def recipes(root: Path) -> dict[str, dict[str, Any]]:
    data = {"train": str(root / "images" / "train"), "val": str(root / "images" / "val")}
    plain = changed(TINY, data=data, losses={"embed": {}}, student={"embedding": {"dim": 16, "kind": "mlp"}})
    plain = changed(plain, train={"epochs": 3, "best_by": "map_at_r", "export": "best"})
    both = changed(plain, losses={"ce": {}, "embed": {"relational": 0.5}}, student={"embedding": {"dim": 8}})
    return {"run": plain, "both": changed(both, train={"epochs": 1, "best_by": "recall_at_5"})}


@pytest.fixture
def recipe(root: Path) -> dict[str, Any]:
    return recipes(root)["run"]


def test_the_best_checkpoint_is_that_of_the_chosen_figure(root, cli):
    history = events(root / "run", "validation")
    assert all(RETRIEVAL_FIGURES.keys() < event.keys() and event["queries"] == 15 for event in history)
    best = max(history, key=lambda event: (event["map_at_r"], -event["step"]))
    summary, state = json.loads((root / "run" / "summary.json").read_text()), checkpoint.load(root / "run" / "best.pt")
    assert state["step"] == best["step"] == summary["exported_step"] and state["map_at_r"] == best["map_at_r"]
    assert summary["best_map_at_r"] == best["map_at_r"] and summary["top1"] == best["top1"]
    out = cli("export", root / "run", "--checkpoint", "best").out
    assert f"exported: the best weights, mAP@R {best['map_at_r']:.2f} %" in out


def test_the_chosen_figure_and_no_other_writes_the_checkpoint(root, tmp_path, recipe, monkeypatch):
    from scalekd.distill.run import DistillationRun

    first = dict.fromkeys(("recall_at_5", "recall_at_10", "map_at_r", "top1", "top5"), 1.0)
    scores = iter([first | {"recall_at_1": a, "knn": b, "images": 15} for a, b in ((3.0, 1.0), (2.0, 2.0), (1.0, 3.0))])
    monkeypatch.setattr(DistillationRun, "validate", lambda *_: next(scores))
    start(changed(recipe, train={"best_by": "knn"}), tmp_path / "knn")
    state = checkpoint.load(tmp_path / "knn" / "best.pt")
    assert (state["knn"], state["step"], state["best_by"]) == (3.0, 9, "knn")


def test_figures_are_those_of_the_exported_student_and_of_its_embeddings(root, tmp_path):
    found = scalekd.evaluate_retrieval(root / "run", data=root / "images" / "val", device="cpu")
    best = max(events(root / "run", "validation"), key=lambda event: (event["map_at_r"], -event["step"]))
    assert found.figures == pytest.approx({key: best[key] for key in RETRIEVAL_FIGURES}, abs=1e-6)
    assert (found.queries, found.left_out, found.gallery) == (15, 0, 15)
    for key, (low, high) in found.intervals.items():
        assert 0 <= low <= found.figures[key] <= high <= 100, key

    embedded = scalekd.embed(root / "run", root / "images" / "val", out=tmp_path / "e.npy", device="cpu")
    names = np.array([Path(name).parent.name for name in embedded.images])
    unit = embedded.features / np.linalg.norm(embedded.features, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit.T - 3 * np.eye(15)), axis=1)
    for k in (1, 5):
        right = (names[order[:, :k]] == names[:, None]).any(1).mean()
        assert found.figures[f"recall_at_{k}"] == pytest.approx(100 * right)
    assert np.array_equal(np.load(tmp_path / "e.npy"), embedded.features) and embedded.features.shape == (15, 16)


@pytest.mark.parametrize("name", ["run", "both"])
def test_files_for_timm_give_the_embedding(root, name, monkeypatch):
    """By the code of the model card, in the run's folder."""
    student, card = load_student(root / name)
    assert card["embedding"] == recipes(root)[name]["student"]["embedding"] | (
        {"kind": "linear"} if name == "both" else {}
    )
    image = next((root / "images" / "val").rglob("*.png"))
    code = re.search(r"```python\n(.*?)```", (root / name / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(root / name)
    made: dict[str, Any] = {}
    exec(code.replace("image.png", str(image)), made)
    embedded = scalekd.embed(".", image, device="cpu").features[0]
    assert made["embedding"][0].detach().numpy() == pytest.approx(embedded / np.linalg.norm(embedded), abs=1e-6)
    assert ("logits" in made) == (name == "both")
    config = json.loads((root / name / "config.json").read_text())
    assert config["embedding"]["file"] == "embedding.safetensors" and config["embedding"]["dim"] == len(embedded)
    loaded = timm.create_model(f"local-dir:{root / name}", pretrained=True).eval()
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(pooled(loaded, images), pooled(student, images))


def test_push_has_a_file_for_the_head(root, cli):
    done = cli("push", root / "run", "ada/birds", "--dry-run")
    assert done.code == 0 and "embedding.safetensors" in done.out, done.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "both"])
def test_onnx_gives_the_same_embedding(root, name, cli):
    pytest.importorskip("onnxruntime", reason=ONNX_MISSING)
    pytest.importorskip("onnxscript", reason=ONNX_MISSING)
    assert cli("export", root / name, "--checkpoint", "best", "--onnx").code == 0
    file = root / name / "student.onnx"
    one, other = (scalekd.embed(path, root / "images" / "val", device="cpu").features for path in (root / name, file))
    assert one.shape == (15, 8 if name == "both" else 16) and np.abs(one - other).max() < 1e-5 and one.std() > 1e-3
    figures = [
        scalekd.evaluate_retrieval(p, data=root / "images" / "val", device="cpu").figures for p in (root / name, file)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
    if name == "both":
        results = [scalekd.evaluate(p, data=root / "images" / "val", device="cpu") for p in (root / name, file)]
        assert results[0].loss == pytest.approx(results[1].loss, abs=1e-4)


def test_a_classifier_and_an_embedding_together(root, cli):
    last = events(root / "both", "validation")[-1]
    assert {"top1", "top5", "loss", *RETRIEVAL_FIGURES} < last.keys() and "neighbours" not in last
    measured = json.loads(cli("evaluate", root / "both", "--data", root / "images" / "val", "--json").out)
    assert measured["top1"] == pytest.approx(last["top1"]) and measured["loss"] == pytest.approx(last["loss"], abs=1e-4)
    shown = cli("evaluate", root / "both", "--data", root / "images" / "val", "--retrieval").out
    assert f"recall@5   {last['recall_at_5']:6.2f} %  [" in shown and "15 queries among 15 images" in shown
    page = (root / "both" / "report.html").read_text()
    assert "recall@5: " in page and "mAP@R" in page and "15 validation images query each other" in page
    refused = cli("quantize", root / "both")
    assert refused.code == 2 and "has an embedding head" in refused.err


def test_two_processes_see_the_figures_of_one(monkeypatch):
    torch.manual_seed(0)
    batches = [
        Batch(torch.randint(0, 256, (7, 3, 48, 48), dtype=torch.uint8), torch.randint(0, 3, (7,))) for _ in range(5)
    ]
    model = timm.create_model("test_resnet", num_classes=0)
    add_embedding_head(model, Embedding(dim=6))
    inputs = torch.full((1, 3, 1, 1), 0.4), torch.full((1, 3, 1, 1), 0.2), CPU, False
    alone = evaluate_retrieval(model, batches, *inputs)
    parts: list[Any] = []
    monkeypatch.setattr(parallel, "gather", lambda mine: (parts.append(mine), [mine])[1])
    for rank in (0, 1):
        evaluate_retrieval(model, batches[rank::2], *inputs)
    assert [len(part) for part in parts] == [3, 2]
    monkeypatch.setattr(parallel, "gather", lambda mine: parts)
    together = evaluate_retrieval(model, batches[::2], *inputs)
    assert together == pytest.approx(alone, abs=1e-9) and 0 < alone["map_at_r"] < 100 and alone["images"] == 35
    assert model.training


def test_a_student_with_a_head_teaches_its_embedding(root, tmp_path, recipe):
    taught = changed(recipe, student={"embedding": {"dim": 16}}, teacher=None) | {
        "teacher": {"model": str(root / "run")}
    }
    run = build(check_config(taught, "test"), CPU)
    assert run.config.teacher.embedding.dim == 16 and not list(run.distiller.methods["embed"].parameters())
    images = torch.rand(2, 3, 48, 48)
    teacher = run.distiller.teacher_features(images)
    exported, card = load_student(root / "run")
    mean, std = (torch.tensor(card[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    wanted = exported.embedding_head(pooled(exported, (images - mean) / std))
    torch.testing.assert_close(teacher.embedding, wanted)
    # a student that starts from these weights starts with the head too, if it is of the same size
    again = changed(recipe, student={"model": str(root / "run")})
    weights = load_file(root / "run" / "student.safetensors")
    for embedding, same in (({"dim": 16, "kind": "mlp"}, True), ({"dim": 4}, False)):
        student = build(check_config(changed(again, student={"embedding": embedding}), "test"), CPU).student
        assert torch.equal(student.conv1[0].weight, weights["conv1.0.weight"])
        state = {k: v for k, v in student.state_dict().items() if "embedding_head" in k}
        assert (
            all(torch.equal(v, weights[k]) for k, v in state.items())
            if same
            else state["embedding_head.weight"].shape[0] == 4
        )
    with pytest.raises(UserError, match=r"teacher.embedding: .* has no embedding head of 4 numbers"):
        build(check_config(changed(taught, teacher={"embedding": {"dim": 4}}), "test"), CPU)
    plain = changed(taught, losses={"ce": {}, "fd": {}}, student={"embedding": None}, train={"best_by": None})
    assert build(check_config(plain, "test"), CPU).has_classifier


def test_embeddings_of_images_with_sets_of_labels(recipe, tmp_path):
    write_sets(tmp_path / "sets", 24)
    write_sets(tmp_path / "val", 12, seed=1)
    data = {key: str(tmp_path / key / "labels.csv:separator=pipe") for key in ("sets", "val")}
    sets = changed(recipe, data={"train": data["sets"], "val": data["val"]}, losses={"bce": {}, "embed": {}})
    run = start(changed(sets, train={"best_by": "f1_macro", "epochs": 1}), tmp_path / "run")
    logged = events(tmp_path / "run", "validation")[-1]
    assert "map" in logged and "recall_at_1" not in logged and run.chooser == "f1_macro"


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"train": {"best_by": "recall@1"}}, "does not compute `recall@1`. Did you mean `recall_at_1`"),
        ({"train": {"best_by": "map"}}, "train.best_by: this run does not compute `map`."),
        ({"train": {"patience": 3}}, "train.patience: 3 validations without a better one cannot occur in a run of 3"),
        ({"train": {"patience": 1, "eval_every": 9}}, "cannot occur in a run of 1 validation; lower it"),
        ({"losses": {"fd": {}}}, "student.embedding: no loss trains it; add embed"),
        ({"student": {"embedding": {"dim": 0}}}, "student.embedding.dim"),
        ({"student": {"embedding": {"kind": "linaer"}}}, "student.embedding.kind"),
        ({"student": {"model": "deit_tiny_distilled_patch16_224"}}, "no single vector of pooled features"),
        ({"teacher": {"embedding": {}}}, "teacher.embedding: random has no embedding head of 128 numbers"),
    ],
)  # fmt: skip
def test_wrong_recipes(recipe, tmp_path, cli, sections, message):
    (tmp_path / "r.yaml").write_text(json.dumps(changed(recipe, **sections)))
    done = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err, done.err
    assert len(done.err.strip().splitlines()) <= 2 and not (tmp_path / "run").exists()


def test_too_few_validation_images(recipe, tmp_path):
    write_images(tmp_path / "few", per_class=3, seed=7)
    with pytest.raises(UserError, match=r"9 validation images: recall@10 needs 11 or more"):
        build(check_config(changed(recipe, data={"val": str(tmp_path / "few")}), "test"), CPU)


def test_galleries(root, tmp_path, cli):
    val = root / "images" / "val"
    write_images(tmp_path / "few", per_class=2)
    (tmp_path / "one" / "ant").mkdir(parents=True)
    for folder in ("other", "partly"):
        write_images(tmp_path / folder, per_class=5, seed=3)
        (tmp_path / folder / "cat").rename(tmp_path / folder / "dog")
    for name in ("ant", "bee"):
        (tmp_path / "other" / name).rename(tmp_path / "other" / f"no-{name}")
    (tmp_path / "one" / "ant" / "0.png").write_bytes((val / "ant" / "0.png").read_bytes())

    def told(*options: object, data: Path = val) -> str:
        done = cli("evaluate", root / "run", "--data", data, *options)
        assert done.code == 2 and len(done.err.strip().splitlines()) <= 2, done.err
        return done.err

    assert "`--gallery` has no class of the queries: dog, no-ant, no-bee there, ant, bee, cat in `--data`" in told(
        "--retrieval", "--gallery", tmp_path / "other"
    )
    assert "`--gallery`: a query has 6 images to find, fewer than the 10" in told(
        "--retrieval", "--gallery", tmp_path / "few"
    )
    assert "`--data`: a query has 5 images to find" in told("--retrieval", data=tmp_path / "few")
    assert "has a single class, ant" in told("--retrieval", data=tmp_path / "one")
    assert "--gallery goes with --retrieval" in told("--gallery", val)
    assert "must end in .png" in told("--retrieval", "--sheet", tmp_path / "sheet.pdf")

    sheet = tmp_path / "sheet.png"
    done = cli(
        "evaluate", root / "run", "--data", val, "--gallery", tmp_path / "partly", "--retrieval", "--sheet", sheet
    )
    assert done.code == 0 and "10 queries among 15 images; 5 images without an image of the class to find" in done.out
    from PIL import Image

    assert Image.open(sheet).width > 1000
    # the queries are in this gallery too, and each finds the others only
    found = scalekd.evaluate_retrieval(root / "run", data=val, gallery=val, device="cpu")
    alone = scalekd.evaluate_retrieval(root / "run", data=val, device="cpu")
    assert found.figures == alone.figures and (found.in_both, alone.in_both) == (15, 0)
