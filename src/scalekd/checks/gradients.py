"""The pre-flight's check of how much of the loss, and of the gradient at the student, each loss has."""

from __future__ import annotations

import torch

from scalekd.common.seeds import seed_everything
from scalekd.distill.balance import Balance, Gradients, backbone_parameters, loss_of
from scalekd.distill.run import DistillationRun
from scalekd.train.run import AUTOCAST

from .model import Check

ATTENTION = ("cap", "dfm", "tpp", "scalekd")  # losses with cross attention projectors
SHORT = 400  # steps: at 270 these losses gained nothing or harmed, at 480 (the demo) they helped
LITTLE = 0.1  # of the gradient: a loss on the labels that has less hardly matters


def length_check(run: DistillationRun) -> list[Check]:
    """A warning if a run is too short for the cross attention projectors of its losses."""
    slow = [name for name in run.config.losses if name in ATTENTION]
    if not slow or run.total_steps >= SHORT:
        return []
    text = f"{run.total_steps} steps are few for {' and '.join(slow)}: its projectors start untrained"
    fix = "In trials of 270 steps it gained nothing, and at the papers' weights harmed. Train longer, or use dist, kd or fd"
    return [Check("length", "warn", text, fix)]


def gradient_check(run: DistillationRun) -> Check:
    """The shares of each loss on a real batch, and a warning if the losses without a teacher have little.

    Does not change the run.
    """
    values, gradients = _measured(run)
    total, pulls = sum(values.values()), sum(gradients.values())
    shares = {name: pull / pulls for name, pull in gradients.items()} if pulls else {}
    text = "share of the loss and of the gradient at the student: " + ", ".join(
        f"{name} {values[name] / total:.0%} and {shares[name]:.0%}" for name in shares
    )
    if isinstance(run.distiller.gradients, Balance):
        return Check("losses", "ok", f"{text} (with `balance`)")
    own = [n for n, m in run.distiller.methods.items() if not getattr(m, "needs_teacher", True) and gradients[n]]
    rest = sum(shares[name] for name in own)
    if own and rest < LITTLE:
        largest = max(shares, key=lambda name: shares[name])
        on_maps = getattr(run.distiller.methods[largest], "needs_maps", True)
        fix = f"Lower losses.{largest}.weight" + on_maps * ", or set balance={} to weight it by its gradient"
        return Check("losses", "warn", f"{text}. Little is left for {' and '.join(own)}", fix)
    return Check("losses", "ok", text)


def _measured(run: DistillationRun) -> tuple[dict[str, float], dict[str, float]]:
    """The value of each loss, and the norm of its gradient, both with its weight, on one batch at initial weights."""
    d, precision = run.distiller, run.config.train.precision
    before = [b.clone() for b in d.buffers()]
    batch = next(run.train_batches(run.train_sampler(steps=1), workers=0))
    d.train()
    d.eager = True
    seed_everything(run.config.seed, "pre-flight")
    with torch.autocast(run.device.type, AUTOCAST[precision], enabled=precision != "float32"):
        terms = d(*run.inputs(batch))
    meter = d.gradients if isinstance(d.gradients, Balance) else Gradients(d.methods, 1, 0.0).to(run.device)
    one = torch.ones((), device=run.device)
    meter.measure(terms, backbone_parameters(run.student), one)
    meter.update(one)
    norms, factors = meter.norms().tolist(), meter.factors().tolist()
    with torch.no_grad():
        for buffer, value in zip(d.buffers(), before):
            buffer.copy_(value)
    d.eager = False
    values = dict.fromkeys(meter.names, 0.0)
    for name, value in terms.items():
        if name != "total":
            values[loss_of(name)] += value.item()
    scaled = {name: value * factor for (name, value), factor in zip(values.items(), factors)}
    return scaled, {name: norm * factor for name, norm, factor in zip(meter.names, norms, factors)}
