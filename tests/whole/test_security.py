"""The promises of SECURITY.md that no other test covers: untrusted files run no code, names control no output."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from bad_files import Payload
from pages import well_formed
from safetensors.torch import save_file

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config, load_recipe
from scalekd.models.student_file import load_student
from scalekd.train import checkpoint
from scalekd.train.log import read_log

ROOT = Path(__file__).parents[2]
BAD = ["<img src=x onerror=alert(1)>", "[red]\\", "]]><script>", "a\x1b[2J\x1b]0;t\x07b", 'new\nline "&', "\udcff"]
PLAIN = ["losses={ce: {}}", "teacher=null", "train.epochs=1"]
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]")  # but for tabs and line ends


@pytest.fixture
def trace(tmp_path: Path):
    """The file that code in an untrusted file would create."""
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch TRACE']",
        "!!python/object/new:pathlib.Path ['TRACE']",
        "!!python/name:os.system ''",
        "!!python/module:os ''",
    ],
)
def test_yaml_tags_run_no_code(cli, tmp_path, trace, value):
    recipe = tmp_path / "stranger.yaml"
    recipe.write_text(f"name: x\ndata: {value.replace('TRACE', str(trace))}\n")
    with pytest.raises(UserError, match="not valid YAML: could not determine a constructor"):
        load_recipe(str(recipe))
    assert cli("train", recipe, f"optim.lr={value.replace('TRACE', str(trace))}").code == 2


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"checkpoint_path": "FILE"},
        {"pretrained_cfg_overlay": {"file": "FILE"}},
        {"pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"}},
        {"pretrained": True},
        {"cache_dir": "FILE"},
    ],
)
def test_a_recipe_names_weights_in_one_place_only(tiny_recipe, tmp_path, trace, role, kwargs):
    """timm would load what these name, and timm 1.0.20 runs code from a checkpoint_path."""
    torch.save({"x": Payload(trace)}, tmp_path / "stranger.pth")
    text = json.dumps(kwargs).replace("FILE", str(tmp_path / "stranger.pth"))
    tiny_recipe[role]["kwargs"] = json.loads(text)
    with pytest.raises(UserError, match=rf"{role}\.kwargs: {next(iter(kwargs))}: not allowed here; use `weights`"):
        check_config(tiny_recipe, "stranger.yaml")


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp/stranger", "../resnet18"])
def test_a_recipe_names_models_of_timm_only(tiny_recipe, name):
    tiny_recipe["student"]["model"] = name
    with pytest.raises(UserError, match=r"student\.model: timm has no model"):
        check_config(tiny_recipe, "stranger.yaml")


@pytest.fixture
def student(cli, recipe_file, tmp_path):
    """The folder of an exported student."""
    assert cli("train", recipe_file, "--out", tmp_path / "run", "--no-preflight", *PLAIN).code == 0
    return tmp_path / "run"


def test_files_of_a_students_run_hold_no_code(cli, student, image_folder, trace):
    card = student / "student.json"
    for name in ("stranger.pth", "stranger.safetensors"):
        torch.save({"fc.weight": Payload(trace)}, student / name)
        (student / name).with_suffix(".json").write_text(card.read_text())
        result = cli("evaluate", student / name, "--data", image_folder / "val")
        # timm 1.0.20 would run the code of a .pth
        why = "is no exported student" if name.endswith("pth") else "does not fit its card"
        assert result.code == 2 and why in result.err
    for content in (pickle.dumps(Payload(trace)), pickle.dumps(Payload(trace), 0)):
        (student / "last.pt").write_bytes(content)
        assert "damaged or not a checkpoint" in cli("export", student).err
    torch.save({"format": checkpoint.FORMAT, "deployed": Payload(trace)}, student / "best.pt")
    assert "damaged or not a checkpoint" in cli("export", student, "--checkpoint", "best").err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "hf-hub:timm/resnet18.a1_in1k"}, "timm has no model"),
        ({"kwargs": {"checkpoint_path": "x.pth"}}, "checkpoint_path: not allowed here"),
        ({"kwargs": {"pretrained": True}}, "pretrained: not allowed here"),
        ({"kwargs": ["x"]}, "valid dictionary"),
    ],
)
def test_a_students_card_names_a_model_and_nothing_else(student, changes, message):
    card = student / "student.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))
    with pytest.raises(UserError, match=rf"student\.json is not a valid student card: .*{message}"):
        load_student(student)


def test_names_from_outside_steer_neither_terminal_nor_page(cli, recipe_file, image_folder, tmp_path):
    """A whole run on classes and files with hostile names: screen, log, report, card."""
    classes = sorted(os.listdir(image_folder / "train"))
    names = dict(zip(classes, [BAD[0], BAD[3], BAD[5]]))
    for split in ("train", "val"):
        for old, new in names.items():
            (image_folder / split / old).rename(image_folder / split / new)
    for number, new in enumerate((BAD[1], BAD[2], BAD[4])):
        (image_folder / "train" / BAD[0] / f"{number}.png").rename(image_folder / "train" / BAD[0] / f"{new}.png")
    image_folder = image_folder.rename(tmp_path / '<img src=x>&"')
    out = tmp_path / "[red]run\\"
    result = cli("train", recipe_file, "--out", out, "--data", image_folder, *PLAIN)
    assert result.code == 0, result.err
    assert str(out) in result.out
    assert json.loads((out / "student.json").read_text())["classes"] == sorted(names.values())
    report = (out / "report.html").read_text()
    well_formed(report)
    screens = [result, cli("export", out)]
    bad = image_folder / "val" / BAD[3] / f"{BAD[4]}.png"
    bad.write_text("no image")
    screens.append(cli("evaluate", out, "--data", image_folder / "val"))
    assert r"a\x1b[2J\x1b]0;t\x07b" in screens[-1].err and len(screens[-1].err.splitlines()) <= 3
    bad.unlink()
    (image_folder / "val" / BAD[3]).rename(image_folder / "val" / (BAD[3] + "2"))
    screens.append(cli("evaluate", out, "--data", image_folder / "val"))
    assert [s.code for s in screens] == [0, 0, 2, 2]
    for shown in (*(s.out + s.err for s in screens), report, (out / "log.jsonl").read_text()):
        assert not STEERING.search(shown)
    assert "<img" not in report and "&lt;img src=x&gt;&amp;&quot;" in report
    assert len(read_log(out)) == len((out / "log.jsonl").read_text().splitlines())
    assert yaml.safe_load((out / "recipe.yaml").read_text())["name"] == "tiny"


def test_the_preflight_shows_names_as_they_are(cli, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    weights = tmp_path / f"{BAD[1]}[bold] {BAD[3]}.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), weights)
    result = cli("train", recipe_file, "--out", tmp_path / "run", *PLAIN, f"student.weights={json.dumps(str(weights))}")
    assert result.code == 2 and "never trained" in result.err and "Pre-flight" in result.out
    assert r"[red]\[bold] a\x1b[2J\x1b]0;t\x07b.safetensors (sha256" in result.out
    assert not STEERING.search(result.out + result.err)


def test_every_test_that_is_named_is_there():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)`((?:,? (?:and )?`test_\w+`)+)", text)
    assert len(named) >= 6
    for file, tests in named:
        for test in re.findall(r"test_\w+", tests):
            assert f"def {test}(" in (ROOT / file).read_text(), (file, test)
