from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from scalekd.cost.flops import CPU_ATTENTION, flop_counter

HEADS, QUERIES, KEYS, DIM = 3, 7, 5, 8
PRODUCT = 2 * HEADS * QUERIES * KEYS * DIM  # of an image, as FLOPs


@pytest.mark.parametrize("known", [True, False], ids=["as installed", "a release without the CPU's kernel"])
def test_attention_on_a_cpu_is_counted(known, monkeypatch):
    if not known:
        for kernel in CPU_ATTENTION:
            monkeypatch.delitem(flop_registry, kernel, raising=False)
    q, k, v = (torch.randn(2, HEADS, n, DIM, requires_grad=True) for n in (QUERIES, KEYS, KEYS))
    with flop_counter() as counter:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert counter.get_total_flops() == 2 * 2 * PRODUCT
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (2 + 5) * PRODUCT  # the backward pass computes the weights once more


def test_all_else_is_the_counter_of_pytorch():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    counts = []
    for counter in (flop_counter(), FlopCounterMode(display=False)):
        with counter:
            model(torch.randn(2, 3, 8, 8)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
