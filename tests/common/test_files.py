"""The files of a run on a full or read-only disk, and after the run is killed between any two writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import launcher
import pytest
from whole_runs import assert_same, changed, events, final_state

from scalekd.common.errors import UserError
from scalekd.common.files import replacing, write_text
from scalekd.train import folder as run_folder

ALL = [
    "recipe.yaml", "provenance.json", "student.json", "log.jsonl", "best.pt", "last.pt",
    "student.safetensors", "report.html", "summary.json",
]  # fmt: skip


@pytest.fixture
def recipe_file(recipe_file: Path, tiny_recipe: dict) -> Path:
    """One epoch without a teacher: these tests only look at files."""
    recipe = changed(tiny_recipe, losses={"ce": {}}, teacher=None, train={"epochs": 1, "batch_size": 12}, track=[])
    recipe_file.write_text(json.dumps(recipe))
    return recipe_file


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path):
    path = tmp_path / "card.json"
    write_text(path, "old")
    with replacing(path) as file:
        file.write(b"new \xc3\xa9")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == b"new \xc3\xa9"
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(bytes(1 // 0))
    assert path.read_bytes() == b"new \xc3\xa9" and os.listdir(tmp_path) == ["card.json"]


@pytest.mark.parametrize("number, message", [(errno.ENOSPC, "free some space"), (errno.EACCES, "you can write to")])
def test_a_failed_write_gives_an_error_and_leaves_the_old_file(tmp_path, monkeypatch, number, message):
    path = tmp_path / "card.json"
    write_text(path, "old")

    def failing(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match=rf"cannot write .*card\.json: {os.strerror(number)}.*{message}"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["card.json"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_takes_the_place_of_no_fifo_and_no_device(tmp_path, linked):
    path = pipe = tmp_path / "answers.csv"
    if linked:  # as /dev/stdout is a link
        path, pipe = tmp_path / "link.csv", tmp_path / "pipe"
        path.symlink_to(pipe)
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"cannot write .*{path.name}: it is a FIFO, not a plain file"):
        write_text(path, "new")
    assert pipe.is_fifo() and path.is_symlink() == linked and len(os.listdir(tmp_path)) == 1 + linked
    device = tmp_path / "device"
    device.symlink_to(os.devnull)
    with pytest.raises(UserError, match="it is a device, not a plain file"):
        write_text(device, "new")
    assert device.is_symlink()


FULL = """
import resource, sys
import scalekd.distill.build  # PyTorch writes files of its own when it is imported
from scalekd.cli.app import main
limits = [int(limit) for limit in sys.argv[1].split(",")]
for i, limit in enumerate(limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # no file may grow beyond
    code = main(["train", sys.argv[2], "--out", f"{sys.argv[3]}/{i}", "--no-preflight"])
    print(f"\\n{code}", file=sys.stderr)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(main(["train", sys.argv[2], "--out", f"{sys.argv[3]}/{i}", "--no-preflight"]), file=sys.stderr)
"""


@pytest.mark.slow
def test_files_that_may_not_grow(recipe_file, cli, tmp_path):
    """The system limits the size of each file; without the limit, the same command finishes the run."""
    recipe = json.loads(recipe_file.read_text())
    recipe["train"] |= {"epochs": 8, "eval_every": 8}
    recipe_file.write_text(json.dumps(recipe | {"track": ["tensorboard"]}))
    assert cli("train", recipe_file, "--out", tmp_path / "whole").code == 0
    refused = {100: "recipe.yaml", 3_000: "log.jsonl", 20_000: "best.pt"}
    size = {name: (tmp_path / "whole" / name).stat().st_size for name in ALL}
    assert max(size[name] for name in ALL[:3]) < 3_000 < size["log.jsonl"] < 20_000 < size["best.pt"]
    command = [
        launcher.stand_ins() / "python",
        "-c",
        FULL,
        ",".join(map(str, refused)),
        str(recipe_file),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)  # what it prints may grow: pipes
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert [line for line in lines if line.isdigit()] == ["2", "0"] * len(refused), lines
    messages = [line for line in lines if line.startswith("scalekd: ")]
    for i, (message, name) in enumerate(zip(messages, refused.values(), strict=True)):
        folder = tmp_path / str(i)
        assert f"cannot write {folder / name}: " in message and "free some space" in message
        assert_same(final_state(folder), final_state(tmp_path / "whole"))
        assert set(os.listdir(tmp_path / "whole")) <= set(os.listdir(folder))
        assert not [left for left in os.listdir(folder) if left.endswith(".part")]
        assert [e["step"] for e in events(folder, "step")] == list(range(1, 17))
    assert done.stdout.count("tensorboard failed and is switched off") == 1  # its file has 3,000 to 20,000 bytes


class Killed(BaseException):
    """A process that is killed runs no `except Exception`."""


@pytest.mark.slow
def test_a_run_that_is_killed_between_any_two_files_goes_on(cli, recipe_file, tmp_path, monkeypatch):
    assert cli("train", recipe_file, "--out", tmp_path / "whole").code == 0
    replace, tried = os.replace, 0
    while True:
        taken, folder = 0, tmp_path / f"{tried}"

        def killed(source, target, at=tried):
            nonlocal taken
            if taken == at:
                raise Killed
            taken += 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr(Path, "unlink", lambda self, **_: None)  # a killed process does not tidy up
            with contextlib.suppress(Killed):
                assert cli("train", recipe_file, "--out", folder, "--no-preflight").code == 0
                break
        assert any(name.endswith(".part") for name in os.listdir(folder))
        again = cli("train", recipe_file, "--out", folder, "--no-preflight")
        assert again.code == 0, again.err
        assert_same(final_state(folder), final_state(tmp_path / "whole"))
        assert set(ALL) <= set(os.listdir(folder))
        tried += 1
    assert tried >= len(ALL) - 1  # all but the log are renamed into place


def test_a_run_that_goes_on_keeps_what_made_its_first_part(cli, recipe_file, tmp_path):
    cli("train", recipe_file, "--out", tmp_path / "run")
    for workers in (1, 0):
        (tmp_path / "run" / "summary.json").unlink()
        assert cli("train", recipe_file, "--out", tmp_path / "run", f"data.workers={workers}").code == 0
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [sorted(b) for b in made["before"]] == [sorted(made.keys() - {"before"})] * 2
    assert {"command", "git", "torch", "scalekd", "seeds"} <= made.keys()
    assert made["seeds"] == {"seed": 0, "data.seed": 0}


# The folder itself


@pytest.mark.parametrize("changes", ["data.workers=1", "track=[]", "train.save_minutes=3", "train.skip_nonfinite=2"])
def test_what_does_not_change_a_run_may_differ(cli, recipe_file, tmp_path, changes):
    cli("train", recipe_file, "--out", tmp_path / "run", "track=[tensorboard]")
    result = cli("train", recipe_file, "--out", tmp_path / "run", changes)
    assert "holds this run, and it is finished" in result.err
    assert "a run of another recipe" in cli("train", recipe_file, "--out", tmp_path / "run", changes, "seed=1").err


def test_a_recipe_without_newer_fields_is_the_same_run(cli, recipe_file, tmp_path):
    cli("train", recipe_file, "--out", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if "track" not in line))
    assert "holds this run, and it is finished" in cli("train", recipe_file, "--out", tmp_path / "run").err
    recipe.write_text("no recipe")
    assert (
        "a run of another recipe (first difference: `no recipe`"
        in cli("train", recipe_file, "--out", tmp_path / "run").err
    )


def test_a_folder_without_permission_is_rejected_before_the_preflight(cli, recipe_file, tmp_path, monkeypatch):
    """`os.access` is patched because tests may run as root, who can write anywhere."""
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: path != tmp_path)
    for folder in (tmp_path / "run", tmp_path / "new" / "run"):
        result = cli("train", recipe_file, "--out", folder)
        assert (
            result.code == 2
            and result.out == ""
            and f"cannot write to {folder}: no permission in {tmp_path}" in result.err
        )


def test_a_folder_that_cannot_be_listed(cli, recipe_file, tmp_path, monkeypatch):
    whole = Path.iterdir

    def refused(self):
        if self == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return whole(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    result = cli("train", recipe_file, "--out", tmp_path)
    assert result.code == 2 and f"cannot use {tmp_path}: " in result.err and "Permission denied" in result.err


def test_one_process_at_a_time_in_a_folder(cli, recipe_file, tmp_path):
    """Another process holds the lock; data workers of an ended run do not."""
    hold = "import sys, pathlib; from scalekd.common.files import in_use\n"
    hold += "with in_use(pathlib.Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"1\n"
    train = ["train", recipe_file, "--out", tmp_path / "run", "teacher=null", "losses={ce: {}}", "--no-preflight"]
    refused = cli(*train)
    assert (
        refused.code == 2
        and f"another process is training in {tmp_path / 'run'}; wait for it, stop it, or choose another folder with `--out`"
        in refused.err
    )
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    other.kill()
    other.wait()
    assert cli(*train).code == 0
