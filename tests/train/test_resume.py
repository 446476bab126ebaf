"""A run that is stopped anywhere and resumed equals the run that never stopped, bit for bit."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml
from small_images import write_images
from whole_runs import CPU, TINY, Interrupted, assert_same, changed, events, final_state, start

from scalekd.cli.app import main
from scalekd.common.errors import UserError
from scalekd.common.stop import StopRequest
from scalekd.config.recipe import check_config
from scalekd.distill.rebuild import load_trained, rebuild
from scalekd.train import checkpoint, engine, folder
from scalekd.train.log import read_log


def assert_same_runs(a, b):
    assert_same(final_state(a), final_state(b))
    assert_same(*(checkpoint.load(folder / "best.pt") for folder in (a, b)))
    losses = [[(e["step"], e["losses"], e["grad_norm"]) for e in events(folder, "step")] for folder in (a, b)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 2)])
def test_interrupted_run_is_the_uninterrupted_one(random_recipe, tmp_path, workers, accumulate):
    """With checkpoints in the middle of an epoch and log lines that span the stops."""
    recipe = changed(
        random_recipe,
        data={"workers": workers},
        train={"accumulate": accumulate, "save_minutes": 0, "log_every": 2},
    )
    start(recipe, tmp_path / "whole")
    for stop in (1, 2, 3, 5):
        with pytest.raises(Interrupted):
            start(recipe, tmp_path / "parts", stop)
    start(recipe, tmp_path / "parts")
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")
    assert [e["step"] for e in events(tmp_path / "parts", "resumed")] == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("adamw", "float32"),
        ("lamb", "bf16"),
        ("nesterov", "float32"),
        ("lion", "bf16"),
        ("adafactor", "float32"),
        ("adafactor", "bf16"),
    ],
)
def test_optimisers_go_on(light_recipe, tmp_path, optimizer, precision):
    recipe = changed(
        light_recipe, optim={"name": optimizer}, train={"save_minutes": 0, "precision": precision, "clip_grad": 1.0}
    )
    start(recipe, tmp_path / "whole")
    for stop in (2, 5):
        with pytest.raises(Interrupted):
            start(recipe, tmp_path / "parts", stop)
    start(recipe, tmp_path / "parts")
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")


def test_methods_with_a_state_of_their_own_go_on(tiny_recipe, tmp_path):
    """crd keeps a queue, mgd draws masks, diffkd draws noise, vkd turns a random matrix, rsd has a batch norm."""
    recipe = changed(
        tiny_recipe,
        losses={"ce": {}, "crd": {"negatives": 20}, "mgd": {}, "diffkd": {}, "vkd": {}, "rsd": {}},
        train={"save_minutes": 0},
    )
    start(recipe, tmp_path / "whole")
    for stop in (2, 4):
        with pytest.raises(Interrupted):
            start(recipe, tmp_path / "parts", stop)
    start(recipe, tmp_path / "parts")
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")


def test_older_checkpoints_go_on_with_the_average_that_they_began(random_recipe, tmp_path):
    """Checkpoints without `ema_power` are of runs whose decay was 1 - s^(-2/3)."""
    recipe = changed(
        random_recipe, losses={"ce": {}, "kd": {}}, data={"workers": 0}, train={"save_minutes": 0, "ema": 0.9}
    )
    for name, power in (("new", 1.0), ("old", 2 / 3)):
        with pytest.raises(Interrupted):
            start(recipe, tmp_path / name, stop_at=3)
        last = tmp_path / name / "last.pt"
        state = checkpoint.load(last)
        assert state["ema_power"] == 1.0
        if name == "old":
            del state["ema_power"]
            checkpoint.save(last, state)
        run = start(recipe, tmp_path / name)
        assert run.ema.warmup_power == checkpoint.load(last)["ema_power"] == power
        assert run.ema.get_decay(5) == pytest.approx(1 - 5**-power)


def test_older_diffkd_is_not_resumed_but_shown(tiny_recipe, tmp_path):
    """Its last convolution had no norm: the methods' layers follow the checkpoint, the optimiser cannot."""
    recipe = changed(tiny_recipe, losses={"ce": {}, "kd": {}, "diffkd": {}}, train={"save_minutes": 0})
    with pytest.raises(Interrupted):
        start(recipe, tmp_path, stop_at=2)
    state = checkpoint.load(tmp_path / "last.pt")
    methods = {k: v for k, v in state["methods"].items() if ".out." not in k}
    weight = state["methods"]["diffkd.denoisings.s4.out.0.weight"]
    state["methods"] = methods | {
        "diffkd.denoisings.s4.out.weight": weight,
        "diffkd.denoisings.s4.out.bias": weight[:, 0, 0, 0],
    }
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(UserError, match=r"`diffkd` had no norm after its last convolution.*\n.*Delete it"):
        start(recipe, tmp_path)
    run = rebuild(check_config(recipe, "test"), CPU)
    assert load_trained(run, state, tmp_path / "last.pt") == 2
    torch.testing.assert_close(run.distiller.methods["diffkd"].denoisings["s4"].out.weight, weight)


def test_without_checkpoints_between_validations(light_recipe, tmp_path):
    start(light_recipe, tmp_path / "whole")
    for stop in (1, 5):  # before the first checkpoint: restarts; then resumes from the end of epoch 1
        with pytest.raises(Interrupted):
            start(light_recipe, tmp_path / "parts", stop)
    start(light_recipe, tmp_path / "parts")
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")
    assert [e["step"] for e in read_log(tmp_path / "parts") if e["event"] == "resumed"] == [0, 3]
    assert [e["step"] for e in events(tmp_path / "parts", "validation")] == [3, 6]


# ---------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A folder with a recipe in `light.yaml` and its run in `whole`, which no signal stopped."""
    root = tmp_path_factory.mktemp("uninterrupted")
    write_images(root / "train", per_class=8)
    write_images(root / "val", per_class=4, seed=1)
    data = {"train": str(root / "train"), "val": str(root / "val")}
    (root / "light.yaml").write_text(yaml.safe_dump(changed(TINY, losses={"ce": {}, "kd": {}}, data=data)))
    assert main(["train", str(root / "light.yaml"), "--out", str(root / "whole"), "--no-preflight"]) == 0
    return root


@pytest.fixture
def command(cli, uninterrupted, tmp_path):
    """`command("parts")` -> the result of `scalekd train` into that folder."""
    return lambda name: cli("train", uninterrupted / "light.yaml", "--out", tmp_path / name, "--no-preflight")


def kill_before(monkeypatch, function: str, call: int, number: int) -> None:
    """Sends this process a signal when `engine.FUNCTION` is called for the n-th time."""
    real, calls = getattr(engine, function), []

    def killing(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(engine, function, killing)


@pytest.mark.parametrize(
    ("number", "code", "function", "call", "step"),
    [  # every signal twice, every moment once or twice
        (signal.SIGTERM, 75, "train_step", 1, 1),
        (signal.SIGINT, 130, "train_step", 1, 1),
        (signal.SIGUSR1, 75, "train_step", 5, 5),
        (signal.SIGTERM, 75, "train_step", 6, 6),
        (signal.SIGINT, 130, "validate", 1, 3),
        (signal.SIGUSR1, 75, "validate", 1, 3),
    ],
)
def test_signals_save_and_exit(command, uninterrupted, tmp_path, monkeypatch, number, code, function, call, step):
    kill_before(monkeypatch, function, call, number)
    stopped = command("parts")
    assert stopped.code == code
    assert f"stopped by {number.name} after step {step} (saved); run the same command again" in stopped.err
    assert final_state(tmp_path / "parts")["progress"]["step"] == step
    assert not (tmp_path / "parts" / "summary.json").exists()
    monkeypatch.undo()
    again = command("parts")
    assert again.code == 0 and f"resumes from step {step} of 6" in again.out
    assert_same_runs(tmp_path / "parts", uninterrupted / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signals_before_training_end_at_once(command, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "write_folder", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    stopped = command("run")
    assert stopped.code == 75 and "stopped by SIGTERM before the first step" in stopped.err
    assert command("run").code == 75  # the folder can be used again


def test_a_second_interrupt_does_not_wait():
    with StopRequest() as stop:
        stop.wait_for_step, stop.saved = True, 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert "no checkpoint yet" in stop.unsaved()
        stop.saved = 4
        assert "resumes from step 4" in stop.unsaved()


def test_another_thread_catches_nothing():
    handlers = []

    def enter():
        with StopRequest() as stop:
            handlers.append(stop.before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [{}]


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_rotate(light_recipe, tmp_path):
    start(changed(light_recipe, train={"save_minutes": 0}), tmp_path / "run")
    steps = [checkpoint.load(tmp_path / "run" / f"{n}.pt")["progress"]["step"] for n in ("last", "previous")]
    assert steps == [6, 5]
    assert {p.name for p in (tmp_path / "run").glob("*.pt*")} == {"last.pt", "previous.pt", "best.pt"}


@pytest.mark.parametrize("damage", ["a bit", "half", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(light_recipe, tmp_path, damage, capsys):
    recipe = changed(light_recipe, train={"save_minutes": 0})
    start(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "parts", 5)
    last = tmp_path / "parts" / "last.pt"
    raw = last.read_bytes()
    if damage == "gone":  # killed between the two renames
        last.unlink()
    else:
        middle = len(raw) // 2
        last.write_bytes(raw[:middle] + (b"" if damage == "half" else bytes([raw[middle] ^ 1]) + raw[middle + 1 :]))
    start(recipe, tmp_path / "parts")
    assert [(e["step"], e["checkpoint"]) for e in events(tmp_path / "parts", "resumed")] == [(4, "previous.pt")]
    assert (tmp_path / "parts" / "last.pt.damaged").exists() == (damage != "gone")
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")


def test_the_same_step_is_not_logged_twice(light_recipe, tmp_path):
    recipe = changed(light_recipe, train={"save_minutes": 0})
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "run", 5)
    (tmp_path / "run" / "last.pt").unlink()  # back to step 4
    start(recipe, tmp_path / "run")
    assert [e["step"] for e in read_log(tmp_path / "run") if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_checkpoint_of_another_run_is_refused(light_recipe, plain_recipe, tmp_path):
    start(changed(light_recipe, train={"epochs": 1}), tmp_path / "run")
    with pytest.raises(UserError, match=r"last\.pt belongs to a run of another recipe"):
        start(plain_recipe, tmp_path / "run")
    (tmp_path / "run" / "best.pt").replace(tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt does not fit this recipe"):
        start(light_recipe, tmp_path / "run")
