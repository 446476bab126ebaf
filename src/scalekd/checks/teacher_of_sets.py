"""Pre-flight check of a teacher on images with sets of labels: its mAP on a sample, and whether its sigmoids mean anything."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from scalekd.common.set_figures import Scores, mean_average_precision

from .model import Check
from .statistical_tests import Sample

SHUFFLES = 20  # orders of the labels that chance is judged by


def accuracy_on_sets(
    name: str, logits: torch.Tensor, sample: Sample, reads_logits: list[str], known: float | None = None
) -> Check:
    """The teacher's mAP on a sample, with a warning if it is at chance level or its probabilities are of no use.

    Args:
        name: of the check.
        logits: (N, classes) of the sample, whose targets are (N, classes) of 0 and 1.
        reads_logits: the losses that learn from its logits.
        known: its mAP in % on all validation images, as `scalekd head` measured it.
    """
    truth = sample.targets > 0.5
    if not truth.any():
        return Check(name, "ok", f"none of {len(truth)} validation images has a label")
    found = mean_average_precision(Scores(logits, truth))
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(truth), generator=generator) for _ in range(SHUFFLES)]
    chance = [mean_average_precision(Scores(logits, truth[order])) for order in orders]
    text = f"mAP {found:.1f} % on {len(truth)} validation images ({sum(chance) / SHUFFLES:.1f} % by chance)"
    text += f" (known: {known:.1f} %)" if known is not None else ""
    if found <= max(chance):
        return Check(
            name, "warn", text, "It is not better than with shuffled labels: check its weights and class order"
        )
    share = truth.double().mean(0).clamp(1e-6, 1 - 1e-6).logit().expand(truth.shape)
    own, constant = (F.binary_cross_entropy_with_logits(x.double(), truth.double()).item() for x in (logits, share))
    if own > constant and reads_logits:
        text += (
            f"; the binary cross entropy of its sigmoids is {own:.3f}, that of the classes' frequencies {constant:.3f}"
        )
        fix = (
            f"{', '.join(reads_logits)} would teach these probabilities. A teacher trained with a softmax ranks images well, but "
            "its sigmoids say nothing: use feature methods, or train it with bce or asl first"
        )
        return Check(name, "warn", text, fix)
    return Check(name, "ok", text)
