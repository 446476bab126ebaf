"""The report of one run: what was answered, against independent counts; what is left out; the model card."""

from __future__ import annotations

import io
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import timm
import torch
import yaml
from comparisons import summary
from pages import cells, step, validation, well_formed
from PIL import Image
from small_images import write_images
from trained_runs import trained_runs

from scalekd.common.errors import UserError
from scalekd.distill.run import DistillationRun
from scalekd.models.student_file import export_student, load_student
from scalekd.report import evaluate as looking
from scalekd.report import run as reporting
from scalekd.report.answer_sections import answer_sections
from scalekd.report.card import FILES
from scalekd.report.evaluate import STUDENT, TEACHER, Seen, look, wrong_examples
from scalekd.report.hub_card import hub_card
from scalekd.report.predictions import by_class, confusion_matrix, confusions, difference
from scalekd.report.run import write_run_report
from scalekd.report.svg import escape
from scalekd.runs.students import student_card

FACTS = {"data": "24 images", "machine": "a CPU"}
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "cost"
SUMMARY = {"top1": 75.0, "top5": 100.0, "seconds": 60.0, "steps": 6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, DistillationRun]]:
    """Folders `scalekd` and `plain` with a log and an exported student, and the runs as they stood at their end."""
    root = tmp_path_factory.mktemp("runs")
    built = trained_runs(root, "scalekd", "plain")
    for name, run in built.items():
        card = student_card(run) | {"top1": 75.0}
        export_student(run.deployed, root / name / "student.safetensors", card)
        log = [
            step(3, ce=1.0, kd=2.0, total=3.0),
            step(6, ce=0.5, kd=1.0, total=1.5),
            validation(2, 75.0) | {"images": 12},
        ]
        (root / name / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
        (root / name / "summary.json").write_text(json.dumps(SUMMARY))
    return root, built


@pytest.fixture
def without_costs(monkeypatch) -> None:
    """They are counted in seconds, and have tests of their own."""

    def refuse(*args: Any, **options: Any) -> None:
        raise UserError("a test")

    monkeypatch.setattr(reporting, "cost", refuse)


def copied(runs: tuple[Path, dict[str, DistillationRun]], name: str, to: Path) -> Path:
    to.mkdir()
    for file in (runs[0] / name).iterdir():
        if file.name not in ("report.html", "report.json", "README.md"):
            (to / file.name).write_bytes(file.read_bytes())
    return to


def pixels_of(run: DistillationRun) -> tuple[torch.Tensor, np.ndarray]:
    samples = [run.val_images[0, i] for i in range(len(run.val_images))]
    return torch.stack([s.image for s in samples]) / 255, np.array([s.target for s in samples])


@torch.no_grad()
def answers_of(run: DistillationRun) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student's and teacher's answers to the validation images, in their order, and the truth."""
    d, (pixels, targets) = run.distiller, pixels_of(run)
    student = run.deployed.eval()((pixels - d.student_mean) / d.student_std).argmax(1).numpy()
    teacher = d.teacher_view.model((pixels - d.teacher_mean) / d.teacher_std).argmax(1).numpy()
    return student, teacher, targets


# ---------------------------------------------------------------- what is looked at


def test_answers_classes_and_confusions(runs):
    run = runs[1]["scalekd"]
    seen = look(run, run.deployed)
    student, teacher, targets = answers_of(run)
    assert (seen.images, seen.of_images) == (12, 12) and not seen.notes
    assert seen.results[STUDENT]["top1"] == pytest.approx(100 * np.mean(student == targets))
    assert seen.results[TEACHER]["top1"] == pytest.approx(100 * np.mean(teacher == targets))
    assert seen.results[STUDENT]["agreement"] == pytest.approx(100 * np.mean(student == teacher))
    for row in by_class(seen):
        of_class = targets == run.classes.index(row["class"])
        assert row["images"] == of_class.sum() == 4
        assert row["top1"][STUDENT] == pytest.approx(100 * np.mean(student[of_class] == targets[of_class]))
    for pair in confusions(seen, 20):
        i, j = run.classes.index(pair["class"]), run.classes.index(pair["taken_for"])
        assert pair["images"] == sum((t, s) == (i, j) for t, s in zip(targets, student)) > 0
        assert pair["teacher"] == sum((t, s) == (i, j) for t, s in zip(targets, teacher))
    assert sum(pair["images"] for pair in confusions(seen, 20)) == sum(student != targets) > 0


def test_few_images_per_class_and_calibration(runs):
    run = runs[1]["scalekd"]
    seen = look(run, run.deployed)
    for result in seen.results.values():
        result["bins"] = [b | {"images": min(b["images"], 9)} for b in result["bins"]]
    page = "".join(answer_sections(seen))
    assert "4 images per class are few." in page and "no curve" in page and "perfect calibration" not in page
    page = "".join(answer_sections(replace(seen, of_images=13)))
    assert "4 images per class are few; `scalekd report --images` uses more." in page
    seen.results[STUDENT]["bins"][0] |= {"images": 10, "confidence": 0.4, "accuracy": 0.3}
    assert "perfect calibration" in "".join(answer_sections(seen))


def test_the_matrix_has_a_row_for_each_class():
    columns = {"target": np.array([0, 0, 1, 2, 2, 2]), "predicted": np.array([0, 1, 1, 0, 2, 2])}
    assert confusion_matrix(columns, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_differences_are_those_of_the_pairs():
    before, after = np.array([1.0, 0, 0, 1, 0]), np.array([1.0, 1, 0, 0, 1])
    gains = [0.0, 100.0, 0.0, -100.0, 100.0]
    found = difference(before, after)
    assert found["gain"] == pytest.approx(20.0)
    assert found["half_width"] == pytest.approx(1.96 * statistics.stdev(gains) / 5**0.5)


def test_frequencies_are_those_of_the_last_maps(runs):
    run = runs[1]["scalekd"]
    seen, (pixels, _) = look(run, run.deployed), pixels_of(run)
    with torch.no_grad():
        final = run.distiller.teacher_view((pixels - run.distiller.teacher_mean) / run.distiller.teacher_std).final
    energy = scipy.fft.dctn(final.double().numpy(), norm="ortho", axes=(2, 3)) ** 2
    shares = energy[:, :, 0, 0].sum(1) / energy.sum((1, 2, 3))
    assert seen.spectra[TEACHER]["direct_share"]["mean"] == pytest.approx(shares.mean(), rel=1e-5)
    assert np.shape(seen.cka) == (4, 4) and set(seen.distances) == {
        f"scalekd.{p}{v}" for p in ("", "proxy_") for v in ("ori", "alt")
    }


def test_it_stops_when_its_time_is_up(runs, monkeypatch):
    monkeypatch.setattr(looking, "BATCH", 4)
    run = runs[1]["scalekd"]
    seen = look(run, run.deployed, seconds=0)
    assert seen.images == 4 and "Stopped after 0 s." in seen.notes
    assert look(run, run.deployed, most=6).images == 6


def seen_of(student: list[int], teacher: list[int], sure: list[float], run: DistillationRun) -> Seen:
    """What two models answered to the run's validation images."""
    targets = pixels_of(run)[1]
    columns = {}
    for label, predicted, confidence in ((STUDENT, student, [0.5] * 12), (TEACHER, teacher, sure)):
        said = np.array(predicted)
        columns[label] = {
            "predicted": said,
            "confidence": np.array(confidence),
            "target": targets,
            "right": said == targets,
        }
    return Seen(12, 12, run.classes, columns, {})


def test_examples_are_what_the_teacher_gets_and_the_student_does_not(runs):
    run = runs[1]["scalekd"]
    pixels, targets = pixels_of(run)
    wrong = [(t + 1) % 3 for t in targets]
    student, teacher = [*wrong[:6], *targets[6:]], [*targets[:5], *wrong[5:]]
    found = wrong_examples(run.val_images, range(12), seen_of(student, teacher, [0.1 * i for i in range(12)], run))
    # images 0 to 4, the most confident first, at most three of a class: 0 to 3 are of one class
    assert [e.teacher_confidence for e in found] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [e.target for e in found] == [run.classes[targets[i]] for i in (4, 3, 2, 1)]
    assert [e.student for e in found] == [run.classes[wrong[i]] for i in (4, 3, 2, 1)]
    shown = np.asarray(Image.open(io.BytesIO(found[0].picture)))
    assert found[0].kind == "png" and np.array_equal(shown, (255 * pixels[4]).round().byte().permute(1, 2, 0).numpy())
    assert str(run.val_images.source.where(run.val_images.indices[4])) == found[0].name


# ---------------------------------------------------------------- the end of a run


def test_the_end_of_a_run(runs, tmp_path, capsys):
    folder = copied(runs, "scalekd", tmp_path / "run")
    write_run_report(folder, SUMMARY, FACTS, runs[1]["scalekd"])
    assert capsys.readouterr().err == ""
    page = (folder / "report.html").read_text()
    well_formed(page)
    for told in (
        "test_resnet taught by test_vit",
        "75.00 %",
        "Comparison with the teacher",
        "Confusions",
        "Calibration",
        "24 images",
    ):
        assert told in page
    assert not re.search(r"<(script|link|iframe)|@import|url\((?!#)|http(?!-equiv)", page)
    assert all(src.startswith("data:image/") for src in re.findall(r'src="([^"]*)"', page))
    known = json.loads((folder / "report.json").read_text())
    assert known["facts"] == FACTS and known["accuracy"][0]["model"] == STUDENT
    parts = {p["part"]: p for p in known["parts"]}
    run = runs[1]["scalekd"]
    assert parts["student"]["params"] == sum(p.numel() for p in run.deployed.parameters())
    assert parts["student"]["gmacs"] > 0 and parts["scalekd"]["gmacs"] is None


@pytest.mark.parametrize("broken", ["look", "_write"])
def test_a_report_that_fails_does_not_fail_its_run(runs, tmp_path, monkeypatch, capsys, broken):
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("boom")

    folder = copied(runs, "scalekd", tmp_path / "run")
    monkeypatch.setattr(reporting, broken, fail)
    write_run_report(folder, SUMMARY, FACTS, runs[1]["scalekd"])
    if broken == "look":
        assert "The evaluation on images failed: boom" in (folder / "report.html").read_text()
    else:
        told = capsys.readouterr().err
        assert "no report: boom" in told and f"scalekd report {folder}" in told


# ---------------------------------------------------------------- scalekd report


def test_again_from_the_folder(cli, runs, tmp_path, monkeypatch):
    asked: list[Any] = []

    def counted(config: Any, *, classes: int) -> dict[str, Any]:  # `cost` takes seconds, and has tests of its own
        asked.append((config.student.model, list(config.losses), classes))
        return json.loads((RESULTS / "swin-s-resnet50.json").read_text())

    monkeypatch.setattr(reporting, "cost", counted)
    folder = copied(runs, "scalekd", tmp_path / "run")
    write_run_report(folder, SUMMARY, FACTS, runs[1]["scalekd"])
    before = json.loads((folder / "report.json").read_text())
    told = cli("report", folder, "--baseline", runs[0] / "plain")
    assert told.code == 0 and told.out.splitlines()[-1] == f"report {folder / 'report.html'}", told.err
    after = json.loads((folder / "report.json").read_text())
    assert after["facts"] == FACTS and after["classes"] == [
        row | {"top1": row["top1"] | {name: top1 for name, top1 in later["top1"].items() if name not in row["top1"]}}
        for row, later in zip(before["classes"], after["classes"])
    ]
    for name, found in before["distances"].items():
        assert after["distances"][name] == pytest.approx(found)
    assert asked == [("test_resnet", ["ce", "kd", "scalekd"], 3)]
    page = (folder / "report.html").read_text()
    well_formed(page)
    assert ["the same pair with fd", "76.74", "12.91", "8.21", "86.22"] in cells(page)
    assert len(page.encode()) < 2_000_000
    baseline = next(row for row in after["accuracy"] if row["model"] not in (STUDENT, TEACHER))
    student, _, targets = answers_of(runs[1]["scalekd"])
    theirs, _ = load_student(runs[0] / "plain")
    pixels, d = pixels_of(runs[1]["scalekd"])[0], runs[1]["plain"].distiller
    with torch.no_grad():
        said = theirs((pixels - d.student_mean) / d.student_std).argmax(1).numpy()
    assert baseline["gain"] == pytest.approx(100 * np.mean((student == targets).astype(float) - (said == targets)))


def test_a_run_that_is_not_there_yet(cli, runs, tmp_path, without_costs):
    folder = copied(runs, "scalekd", tmp_path / "run")
    for file in ("last.pt", "student.safetensors", "summary.json"):
        (folder / file).unlink()
    told = cli("report", folder)
    assert told.code == 0 and "no checkpoint" in told.out
    page = (folder / "report.html").read_text()
    well_formed(page)
    assert "Not finished: step 6" in page and "scalekd export" in page and "Comparison with the teacher" not in page
    assert not (folder / "README.md").exists()


def test_data_that_are_gone_and_others_in_their_place(cli, runs, tmp_path, without_costs):
    folder = copied(runs, "scalekd", tmp_path / "run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs[0] / "images"), str(tmp_path / "gone")))
    told = cli("report", folder)
    assert told.code == 0 and "No evaluation on images: data.train" in told.out and "--data SOURCE" in told.out
    write_images(tmp_path / "others", per_class=2, seed=7)
    told = cli("report", folder, "--data", tmp_path / "others")
    assert told.code == 0 and json.loads((folder / "report.json").read_text())["of_images"] == 6
    (tmp_path / "others" / "cat").rename(tmp_path / "others" / "dog")
    told = cli("report", folder, "--data", tmp_path / "others")
    assert told.code == 2 and "has other classes than the run: it has dog and lacks cat" in told.err


def test_a_comparison(cli, tmp_path):
    compared = summary()
    (tmp_path / "summary.json").write_text(json.dumps(compared))
    of_run = tmp_path / "runs" / "R 18" / "KD" / "seed-0"
    of_run.mkdir(parents=True)
    (of_run / "report.html").write_text("")
    assert cli("report", tmp_path, "--out", tmp_path / "pages" / "all.html").code == 0
    page = (tmp_path / "pages" / "all.html").read_text()
    assert escape(compared["title"]) in page and 'href="../runs/R%2018/KD/seed-0/report.html"' in page
    told = cli("report", tmp_path, "--baseline", tmp_path, "--images", "5")
    assert told.code == 2 and "leave out `--baseline` and `--images`" in told.err


def test_figures_of_an_analysis(cli, runs, tmp_path, without_costs):
    folder = copied(runs, "plain", tmp_path / "run")
    (tmp_path / "analysis").mkdir()
    assert "has no figures" in cli("report", folder, "--analysis", tmp_path / "analysis").err
    Image.new("L", (4, 4)).save(tmp_path / "analysis" / "distance.png")
    assert cli("report", folder, "--analysis", tmp_path / "analysis").code == 0
    page = (folder / "report.html").read_text()
    well_formed(page)
    assert 'alt="distance"' in page
    (tmp_path / "analysis" / "large.png").write_bytes(bytes(1_000_001))
    assert "more than 1 MB" in cli("report", folder, "--analysis", tmp_path / "analysis").err


def test_errors(cli, runs, tmp_path, without_costs):
    folder = copied(runs, "scalekd", tmp_path / "run")
    assert "neither a run nor a comparison" in cli("report", tmp_path).err
    assert "`--images` 0: must be 1 or more" in cli("report", folder, "--images", "0").err
    other = copied(runs, "plain", tmp_path / "other")
    card = json.loads((other / "student.json").read_text())
    (other / "student.json").write_text(json.dumps(card | {"classes": ["a", "b", "c"]}))
    assert "trained for other classes" in cli("report", folder, "--baseline", other).err
    (folder / "recipe.yaml").write_text("- no mapping")
    told = cli("report", folder)
    assert told.code == 2 and "is not a recipe" in told.err


# ---------------------------------------------------------------- the model card


def test_the_card_loads_the_student(runs, tmp_path, monkeypatch):
    folder = copied(runs, "scalekd", tmp_path / "run")
    write_run_report(folder, SUMMARY, FACTS, runs[1]["scalekd"])
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["library_name"] == "timm" and told["model-index"][0]["results"][0]["metrics"][0]["value"] == 75.0
    assert "75.00 [46.77, 91.11], 12 images" in text and "ant, bee, cat" in text
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3)).astype(np.uint8))
    image.save(folder / "image.png")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], names)
    model, card = load_student(folder)
    shown = timm.data.create_transform((3, 48, 48), interpolation=card["interpolation"], crop_pct=card["crop_pct"],
                                       mean=card["mean"], std=card["std"])  # fmt: skip
    logits = model(shown(image)[None])
    assert torch.equal(names["logits"], logits) and names["label"] == card["classes"][logits[0].argmax()]
    assert FILES in text and FILES not in hub_card(card, "ada/birds", (folder / "README.md").read_text())


def test_a_card_that_a_person_wrote_is_kept(runs, tmp_path):
    folder = copied(runs, "plain", tmp_path / "run")
    (folder / "README.md").write_text("mine")
    write_run_report(folder, SUMMARY, FACTS, runs[1]["plain"])
    assert (folder / "README.md").read_text() == "mine"
