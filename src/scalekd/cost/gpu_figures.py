"""What `benchmarks/gpu.py` measured on GPUs, for plans of runs on the same cards.

`gpus.json` next to this file has, for each card by its name in `plan.GPUS`, the device and the table that it comes from,
and the measured steps. `benchmarks/gpu_table.py` writes it; there is none as long as no GPU was measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("gpus.json")
Interval = list[float]


class Figures(NamedTuple):
    """Measured steps of one card that are like those of a recipe."""

    device: str  # its name in PyTorch
    table: str  # the page with the measurements
    steps: int
    utilisation: Interval  # [least, most] share of the card's peak
    memory: Interval  # [least, most] of the measured peak over the counted memory


def figures(gpu: str, half: bool, compiled: bool, peak: float, file: Path | None = None) -> Figures | None:
    """The figures of a card for steps in half precision or float32; None if it was not measured in that precision.

    compiled: with torch.compile; steps without are taken if there are none. peak: of the card, in FLOP/s.
    """
    file = file or FILE
    card = json.loads(file.read_text()).get(gpu) if file.is_file() else None
    if card is None:
        return None
    steps = [step for step in card["steps"] if step["half"] == half]
    steps = [step for step in steps if step["compiled"] == compiled] or [s for s in steps if not s["compiled"]]
    if not steps:
        return None
    shares = [step["images_per_s"] * step["flops_per_image"] / peak for step in steps]
    memory = [step["peak_mb"] / step["counted_mb"] for step in steps]
    return Figures(card["device"], card["table"], len(steps), [min(shares), max(shares)], [min(memory), max(memory)])


def card_of(device: str, memory_gb: float, cards: dict[str, float]) -> str | None:
    """The name in `cards`, which maps names to GB, of a device that PyTorch names `device`; None if it is none of them."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"\brtx ", "rtx", device.lower()))
    alike = [name for name in cards if name.partition("-")[0] in words]
    return min(alike, key=lambda name: abs(cards[name] - memory_gb), default=None)
