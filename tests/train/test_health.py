"""Losses and gradients that are not finite: reported with step and files, saved to reproduce them, or skipped."""

from __future__ import annotations

import math

import pytest
from PIL import Image
from whole_runs import CPU, assert_same, changed, events, final_state, start

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.distill.distiller import Distiller
from scalekd.runs.nonfinite import load_report
from scalekd.train import checkpoint, engine
from scalekd.train.health import NonFinite
from scalekd.train.resume import Progress, snapshot


@pytest.fixture
def recipe(light_recipe, image_folder):
    """One image is white, and augmentation does not change it."""
    Image.new("RGB", (40, 40), "white").save(image_folder / "train" / "ant" / "0.png")
    return light_recipe | {"augment": {"crop": "none", "flip": 0.0}}


def spoil_loss(losses):
    losses["kd"] = losses["kd"] * math.nan
    losses["total"] = losses["total"] * math.nan


def spoil_gradient(losses):
    losses["total"] = losses["total"] + (losses["kd"] * 0).sqrt()


@pytest.fixture(params=[spoil_loss, spoil_gradient], ids=["loss", "gradient"])
def spoiled(request, monkeypatch):
    """Makes the loss or gradient of a batch with the white image not finite. Yields the name in the error."""
    real = Distiller.forward

    def forward(self, images, targets):
        losses = real(self, images, targets)
        if (images == 1).all(dim=(1, 2, 3)).any():
            request.param(losses)
        return losses

    monkeypatch.setattr(Distiller, "forward", forward)
    return {spoil_loss: "kd", spoil_gradient: "gradient"}[request.param]


def white_steps(recipe) -> list[int]:
    """The steps, counted from 1, whose batch contains the white image."""
    run = build(check_config(recipe, "test"), CPU)
    sampler = run.train_sampler()
    return [step + 1 for step in range(6) if any(i == 0 for keys in sampler.keys_of(step) for _, i in keys)]


def test_a_run_stops_with_term_step_files_and_state(recipe, spoiled, image_folder, tmp_path):
    recipe = changed(recipe, train={"accumulate": 2})
    step = white_steps(recipe)[0]
    with pytest.raises(UserError) as caught:
        start(recipe, tmp_path / "run")
    report = tmp_path / "run" / f"nonfinite-step-{step}.pt"
    assert f"not finite: {spoiled} in step {step}, on {image_folder}" in str(caught.value)
    assert str(report) in str(caught.value) and "train.skip_nonfinite=10" in str(caught.value)
    content = checkpoint.load(report)
    assert str(image_folder / "train" / "ant" / "0.png") in content["files"] and len(content["files"]) == 8
    assert (content["terms"], content["step"]) == ([spoiled], step)
    run, batches, number = load_report(report, CPU)
    with pytest.raises(NonFinite) as again:
        engine.train_step(run.distiller, batches, run, number - 1, checked=True)
    assert (again.value.terms, again.value.step) == ([spoiled], step)


def test_the_state_in_the_report_is_the_one_before_the_step(recipe, spoiled, tmp_path, monkeypatch):
    """Bit for bit, including the running statistics of batch norms."""
    recipe = changed(recipe, train={"save_minutes": 0})
    step = white_steps(recipe)[0]
    with pytest.raises(UserError, match="not finite"):
        start(recipe, tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / f"nonfinite-step-{step}.pt")["state"]
    state["progress"].pop("elapsed")
    if step == 1:
        fresh = snapshot(build(check_config(recipe, "test"), CPU), Progress())
        assert_same(state["student"], dict(fresh["student"]))
    else:
        saved = final_state(tmp_path / "run")
        assert_same(state["student"], saved["student"])
        assert state["progress"] == saved["progress"]


def test_a_gpu_goes_back_and_finds_the_step(recipe, spoiled, tmp_path, monkeypatch):
    """Losses are read every 50 steps, so the weights are no longer finite when the error is noticed."""
    monkeypatch.setattr(engine, "looks_at_every_step", lambda run: False)
    step = white_steps(recipe)[0]
    with pytest.raises(UserError, match=f"not finite: {spoiled} in step {step}, on "):
        start(changed(recipe, train={"log_every": 50}), tmp_path / "run")
    assert all(v.isfinite().all() for v in final_state(tmp_path / "run")["student"].values())
    assert checkpoint.load(tmp_path / "run" / f"nonfinite-step-{step}.pt")["step"] == step


def test_steps_are_skipped_when_asked(recipe, spoiled, tmp_path):
    recipe = changed(recipe, train={"skip_nonfinite": 2})
    run = start(recipe, tmp_path / "run")
    assert [(e["step"], e["terms"]) for e in events(tmp_path / "run", "skipped")] == [
        (step, [spoiled]) for step in white_steps(recipe)
    ]
    assert all(v.isfinite().all() for v in run.distiller.state_dict().values())
    state = final_state(tmp_path / "run")
    assert (state["progress"]["skipped"], state["progress"]["step"]) == (2, 6)
    assert all(math.isfinite(v) for e in events(tmp_path / "run", "step") for v in e["losses"].values())


def test_no_more_steps_are_skipped_than_asked(recipe, spoiled, tmp_path):
    step = white_steps(recipe)[1]
    with pytest.raises(UserError, match=f"not finite: {spoiled} in step {step}"):
        start(changed(recipe, train={"skip_nonfinite": 1}), tmp_path / "run")
    assert final_state(tmp_path / "run")["progress"]["skipped"] == 1  # resuming does not reset the count


def test_finite_steps_do_not_depend_on_the_check(light_recipe, tmp_path, monkeypatch):
    start(light_recipe, tmp_path / "checked")
    monkeypatch.setattr(engine, "looks_at_every_step", lambda run: False)
    start(light_recipe, tmp_path / "unchecked")
    assert_same(final_state(tmp_path / "checked"), final_state(tmp_path / "unchecked"))


def test_the_norm_of_the_gradient_is_logged(light_recipe, tmp_path):
    start(changed(light_recipe, train={"clip_grad": 1e-3}), tmp_path / "run")
    assert all(e["grad_norm"] > 0.01 for e in events(tmp_path / "run", "step"))  # before clipping
