"""Errors end with exit code 2 and up to three lines that say how to fix them, and change no file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from bad_files import Payload, contents
from safetensors.torch import save_file

from scalekd.train import checkpoint, engine
from scalekd.train.health import NonFinite

TINY_VIT = {"depth": 4, "img_size": 48, "num_classes": 3}


@pytest.fixture
def refused(cli, recipe_file, tmp_path) -> Callable[..., str]:
    """`refused("key=value", ...)` -> the error of a `scalekd train` that fails before training and changes no file."""

    def refused(*args: object, recipe: object = recipe_file, out: Path = tmp_path / "run") -> str:
        before = contents(tmp_path)
        message = message_of(cli("train", recipe, "--out", out, *args))
        assert contents(tmp_path) == before
        return message

    return refused


def message_of(result) -> str:
    assert result.code == 2, result
    assert result.err.startswith("scalekd: ") and len(result.err.splitlines()) <= 3, result.err
    return result.err


# Recipes and models


@pytest.mark.parametrize(
    "override, message",
    [
        ("student.model=test_resnt", "Did you mean `test_resnet`"),
        ("losses.scalkd={}", "losses.scalkd: unknown method. Did you mean `scalekd`?"),
        ("losses.kd.temprature=2", "losses.kd.temprature: unknown option. Did you mean `temperature`?"),
        ("losses.fd.stages=[5]", "losses.fd: fd: stages is [5]; use some of the stages 1 to 4"),
        ("student.kwargs.num_classes=5", "num_classes must be the data's 3; remove it"),
        ("student.kwargs.in_chans=1", "in_chans must be data.channels, which is 3; remove it"),
        ("teacher.kwargs.num_classes=5", "kd: test_resnet has 3 classes and test_vit 5. Use a teacher with the same"),
        ("teacher.kwargs.dpeth=4", "teacher.kwargs: test_vit does not accept them"),
        ("teacher.kwargs.depth=3", "it has 3 blocks, but four are needed"),
        ("student.kwargs.block=5", "student: timm cannot create test_resnet"),
        ("teacher.cuts=[0, 1, 2]", "teacher.cuts"),
        ("teacher.kwargs.embed_dim=7", "teacher: timm cannot create test_vit"),
        ("teacher.mean=[0.5]", "teacher.mean has 1 values, but data.channels is 3"),
        ("train.batch_size=1", "batch normalisation needs two or more; raise train.batch_size"),
        ("train.batch_size=25", "train.batch_size 25 is more than the 24 training images; lower it"),
        ("teacher.weights=pretrained", "teacher.weights=/path/to/model.safetensors"),
        ("student.weights=pretrained", "student.weights=/path/to/model.safetensors"),
    ],
)
def test_recipe(refused, override, message):
    assert message in refused(override)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.image_size=7", "test_vit cannot be used at 7x7"),
        ("teacher.cuts=[0, 1, 2, 4]", "must be four block indices, increasing, from 0 to 3"),
        ("student.cuts=[0, 1, 2, 3]", "test_resnet has stages of its own; only plain ViTs and MLPs can be cut"),
    ],
)
def test_a_model_that_cannot_be_seen_as_asked(refused, override, message):
    assert message in refused(override)


def test_a_teacher_that_cannot_be_resumed(refused, cli, recipe_file):
    model = ["teacher.model=ghostnet_050", "teacher.kwargs={}", "data.image_size=64"]
    instead = refused(*model).split("The same method without that stage: ")[1].split()
    assert instead == ["losses.scalekd=off", "losses.dfm={}"]
    assert cli("train", recipe_file, "--dry-run", *model, *instead).code == 0


@pytest.mark.parametrize(
    "losses, stage",
    [
        ("{scalekd: {}}", 4),
        ("{dfm: {}}", 4),
        ("{fd: {projector: cap, stages: [3]}}", 3),
    ],
)
def test_a_student_s_map_of_one_position(refused, losses, stage):
    size = {4: 32, 3: 16}[stage]
    message = refused(f"losses={losses}", f"data.image_size={size}")
    assert f"test_resnet's map of stage {stage} is 1x1" in message and "Use a larger data.image_size, or fd" in message


def test_an_image_size_that_leaves_nothing(refused):
    model = ["student.model=inception_v4", "teacher=null", "losses={ce: {}}", "data.image_size=64"]
    message = refused(*model)
    assert message.endswith("Kernel size can't be greater than actual input size. Use a larger data.image_size.\n")


def test_a_teacher_without_maps(refused):
    message = refused("teacher.model=shvit_s1", "teacher.kwargs={}", "data.image_size=128")
    assert "shvit_s1" in message and "has no stage maps" in message and "Use logit methods (ce, kd)" in message


def test_mixup_needs_pairs(refused):
    assert "even number of images per process and step, not 3; change train.batch_size" in refused(
        "train.batch_size=3", "augment.mixup=1"
    )


def test_weights_that_nobody_named(refused):
    message = refused("teacher.weights=null")
    assert "teacher weights: teacher.weights is not set. Set teacher.weights to `pretrained` or to a file" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(refused):
    assert "`--device` cuda: this machine has no usable GPU; omit `--device` to run on the CPU" in refused(
        "--device", "cuda"
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_no_such_device(refused, device):
    assert f"`--device` {device}: unknown kind of device; choose cpu, cuda or cuda:1" in refused("--device", device)


# Images


def test_a_missing_folder_and_its_nearest_neighbour(refused, image_folder):
    message = refused(f"data.train={image_folder / 'trian'}")
    assert "data.train: no folder" in message and "Did you mean `train`?" in message
    assert "data.val: no folder" in refused(f"data.val={image_folder / 'nowhere' / 'val'}")
    assert "no folder" in refused("--data", image_folder / "train" / "ant" / "0.png")


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an image"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_cannot_be_read(refused, image_folder, split, how):
    bad = image_folder / split / "bee" / "2.png"
    damage(bad, how)
    message = refused("train.batch_size=24")  # one batch has all images
    assert f"cannot read {bad}: " in message and "Remove or replace that file" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_cannot_be_read_by_a_worker(cli, recipe_file, image_folder, tmp_path, split):
    bad = image_folder / split / "bee" / "2.png"
    damage(bad, "truncated")
    before = contents(image_folder)
    message = message_of(cli("train", recipe_file, "--out", tmp_path / "run", "--no-preflight", "data.workers=2"))
    assert f"cannot read {bad}: " in message and contents(image_folder) == before


# Weights


def test_a_missing_file(refused, tmp_path):
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    message = refused(f"teacher.weights={tmp_path / 'techer.safetensors'}")
    assert "teacher.weights: no file" in message and "Did you mean `teacher.safetensors`?" in message
    assert "teacher.weights: no file pretraned. Did you mean `pretrained`?" in refused("teacher.weights=pretraned")


def test_weights_of_another_model(refused, tmp_path):
    path = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    message = refused(f"teacher.weights={path}")
    assert "does not fit teacher.model and its kwargs" in message and "missing" in message and "left over" in message
    path = tmp_path / "vit.pt"
    torch.save(timm.create_model("test_vit", **TINY_VIT | {"num_classes": 4}).state_dict(), path)
    message = refused(f"teacher.weights={path}")
    assert "kd: test_resnet has 3 classes and test_vit 4. Use a teacher with the same classes" in message


@pytest.mark.parametrize("name", ["teacher.safetensors", "teacher.pt", "teacher.pth"])
@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_damaged_weights(refused, tmp_path, name, how):
    path, state = tmp_path / name, timm.create_model("test_vit", **TINY_VIT).state_dict()
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    damage(path, how)
    message = refused(f"teacher.weights={path}")
    assert f"teacher.weights: {path} " in message


@pytest.mark.parametrize("value", [[1, 2], "text", {"head": 3}, {1: 2}, None, torch.ones(2)], ids=repr)
def test_files_that_hold_no_weights(refused, tmp_path, value):
    torch.save(value, tmp_path / "teacher.pt")
    assert "teacher.weights: " in refused(f"teacher.weights={tmp_path / 'teacher.pt'}")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_in_a_weights_file_is_not_run(refused, tmp_path, write):
    trace, path = tmp_path / "trace", tmp_path / "teacher.pt"
    write({"head": Payload(trace)}, path)
    assert f"teacher.weights: {path} " in refused(f"teacher.weights={path}")
    assert not trace.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists()  # the file does hold code


def test_weights_that_were_never_trained(refused, tmp_path):
    path = tmp_path / "fresh.safetensors"
    save_file(timm.create_model("test_vit", **TINY_VIT).state_dict(), path)
    message = refused(f"teacher.weights={path}")
    assert "biases and norms are at their initial values" in message
    assert "never trained; use others, or set teacher.weights=random to start from initial values" in message


# The run's folder


def test_folders_that_hold_something_else(refused, tmp_path):
    folder = tmp_path / "run"
    folder.write_text("a file")
    assert f"{folder} is a file; choose a folder with `--out`" in refused()
    assert "cannot write" in refused(out=folder / "inside")
    assert "cannot write" in refused(out=Path("/proc/scalekd/run"))
    folder.unlink()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert f"{folder} is not empty and holds no run; choose another folder with `--out`" in refused()


def test_folders_that_hold_another_or_a_finished_run(cli, refused, recipe_file, tmp_path):
    assert cli("train", recipe_file, "--out", tmp_path / "run").code == 0
    message = refused("optim.lr=2e-3")
    assert "a run of another recipe (first difference: `lr: 0.001` before, `lr: 0.002` now)" in message
    assert "holds this run, and it is finished.\nChoose another folder with `--out`" in refused()


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_no_whole_checkpoint_left(cli, recipe_file, tmp_path, how):
    command = ["train", recipe_file, "--out", tmp_path / "run", "losses={ce: {}}", "teacher=null"]
    cli(*command)
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed before the end
    files = [tmp_path / "run" / name for name in ("last.pt", "previous.pt")]
    for file in files:
        damage(file, how)
    left = [file.read_bytes() for file in files]
    message = message_of(cli(*command))
    assert "previous.pt" in message and "Delete it to start this run from the beginning, or restore a copy" in message
    assert [file.read_bytes() for file in files] == left


# Losses that are not finite


def test_a_learning_rate_that_explodes(cli, recipe_file, tmp_path):
    message = message_of(cli("train", recipe_file, "--out", tmp_path / "run", "optim.lr=1e30"))
    assert "the loss is not finite: " in message and "Lower optim.lr" in message


def test_the_last_checkpoint_is_from_before(cli, recipe_file, tmp_path, monkeypatch):
    whole, taken = engine.train_step, []

    def failing(*args):
        if len(taken) == 4:
            raise NonFinite(5, ["ce"], before_update=True)
        taken.append(whole(*args))
        return taken[-1]

    command = ["train", recipe_file, "--out", tmp_path / "run"]
    monkeypatch.setattr(engine, "train_step", failing)
    assert "not finite: ce in step 5, on " in message_of(cli(*command))
    assert checkpoint.load(tmp_path / "run" / "last.pt")["progress"]["step"] == 3
    monkeypatch.undo()
    again = cli(*command)
    assert again.code == 0 and "resumes from step 3 of 6" in again.out


def test_a_loss_that_is_not_finite_from_the_start(refused):
    assert "one step: NaN or infinite: ce" in refused("losses.ce.weight=1e300")


# Students


def test_students_that_cannot_be_evaluated(cli, recipe_file, image_folder, tmp_path):
    assert "no student.safetensors" in message_of(cli("evaluate", tmp_path, "--data", image_folder / "val"))
    assert "no last checkpoint to export" in message_of(cli("export", tmp_path))
    cli("train", recipe_file, "--out", tmp_path / "run")
    evaluate = ["evaluate", tmp_path / "run", "--data", image_folder / "val"]
    (image_folder / "val" / "cat").rename(image_folder / "val" / "cow")
    assert "`--data` has other classes than the student" in message_of(cli(*evaluate))
    whole = message_of(cli("evaluate", tmp_path / "run", "--data", image_folder))
    assert f"has several splits; name one of them, such as {image_folder / 'val'}" in whole
    (image_folder / "val" / "cow").rename(image_folder / "val" / "cat")
    damage(image_folder / "val" / "cat" / "0.png", "text")
    assert "cannot read" in message_of(cli(*evaluate))
    damage(tmp_path / "run" / "student.safetensors", "truncated")
    assert "student.safetensors does not fit its card" in message_of(cli(*evaluate))
    (tmp_path / "run" / "student.json").write_text(yaml.safe_dump("no JSON"))
    assert "student.json is not a valid student card" in message_of(cli(*evaluate))
