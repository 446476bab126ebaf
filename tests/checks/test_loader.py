"""What the data loader workers need, against numbers worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalekd.checks import loader
from scalekd.checks.loader import workers_check

MIB = torch.zeros(2**20, dtype=torch.uint8)  # a training batch of 8 images in 1 MiB


def run_with(workers: int, val_images: int) -> Any:
    train = SimpleNamespace(batch_size=8, accumulate=1)
    config = SimpleNamespace(data=SimpleNamespace(workers=workers), train=train)
    return SimpleNamespace(config=config, total_steps=100, eval_batch_size=8, val_images=range(val_images))


@pytest.mark.parametrize(
    ("workers", "val_images", "told"),
    [
        (1, 8, "1 worker needs 3 MiB of shared memory"),  # 2 training batches and the only one of the validation
        (1, 80, "1 worker needs 3 to 4 MiB of shared memory"),  # up to 2 of the validation
        (2, 80, "2 workers need 5 to 8 MiB of shared memory"),
    ],
)
def test_the_shared_memory_of_workers(monkeypatch, workers, val_images, told):
    monkeypatch.setattr(loader, "count", lambda number: number)
    monkeypatch.setattr(loader, "_free", lambda: 8 * 2**20)
    (check,) = workers_check(run_with(workers, val_images), [MIB])
    assert (check.status, check.text) == ("ok", told)
    monkeypatch.setattr(loader, "_free", lambda: 2**20)
    (check,) = workers_check(run_with(workers, val_images), [MIB])
    assert check.status == "fail" and check.text == f"{told}, and /dev/shm has 1 MiB"
