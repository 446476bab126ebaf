"""A check of counted costs against a real step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalekd.cost.attribution import Ledger, charge_step
from scalekd.cost.flops import flop_counter


def assert_the_parts_add_up(distiller):
    """The counted parts of a step add up to a real step, and the gradients are the same."""
    for module in distiller.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # so that both passes use the same statistics
    pixels, targets = torch.rand(4, 3, 48, 48), torch.randint(10, (4,))
    with flop_counter() as counter:
        distiller(pixels, targets)["total"].backward()
    whole = {name: p.grad for name, p in distiller.named_parameters()}
    distiller.zero_grad()
    ledger = Ledger()
    charge_step(distiller, pixels, targets, ledger, half=False)
    assert sum(map(sum, ledger.macs.values())) == pytest.approx(counter.get_total_flops() / 2, rel=1e-12)
    for name, p in distiller.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-6)
