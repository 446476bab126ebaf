"""The gradient of each loss at the student, and `balance`: weights of the losses that follow it.

The value of a loss says little about its pull. A feature loss of 14 beside a cross-entropy of 4 may have ten times its
gradient, or a tenth. So the norm of each loss's gradient at the student's backbone (all its parameters but the
classifier's) is measured now and then. With `balance` every loss on feature maps gets the factor

    weight * norm of the reference's gradient / norm of its own gradient

The reference is the sum of the other losses, those on labels and logits, with their weights. They compare probabilities,
so their scale does not depend on the teacher; that of feature maps does. A feature loss of weight 0.5 thus pulls half as
hard as all of them together throughout the run. Without other losses the first one is the reference. GradNorm (Chen et
al., ICML 2018, arXiv:1711.02257) equalises gradient norms too, with weights that are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common import parallel

EARLY = 5  # steps at the start that are all measured: gradients change fastest there
SMALLEST = 1e-12  # a norm below it is of a loss that does not reach the backbone, as behind a classifier of zeros


class Gradients(nn.Module):
    """Measures the norm of each loss's gradient at the student's backbone.

    Its buffers are its state: they are saved in checkpoints, and are equal in all processes.

    Args:
        names: of the losses, as in `Distiller.methods`.
        every: steps between measurements.
        momentum: of the running mean of the logarithms of the norms; the first measurements are averaged.
    """

    log_norms: Tensor  # (losses,): running mean of the logarithm of each loss's gradient norm; `Balance` has one more
    counts: Tensor  # of the same shape: measurements so far

    def __init__(self, names: Iterable[str], every: int, momentum: float, more: int = 0):
        super().__init__()
        self.names, self.every, self.momentum = list(names), every, momentum
        self.register_buffer("log_norms", torch.zeros(len(self.names) + more))
        self.register_buffer("counts", torch.zeros(len(self.names) + more))
        self.sums: dict[str, list[Tensor]] = {}  # gradients of the current step, summed over its micro-batches

    def due(self, step: int) -> bool:
        """Whether the gradients are measured in this step, counted from 0."""
        return step % self.every == 0

    def factors(self) -> Tensor:
        """(losses,): the factor of each loss, 1."""
        return torch.ones_like(self.log_norms)

    def norms(self) -> Tensor:
        """(losses,): the norm of each loss's gradient without its factor; 0 if it was not measured."""
        return torch.where(self.counts > 0, self.log_norms.exp(), 0.0)[: len(self.names)]

    def shares(self) -> Tensor:
        """(losses,): the norm of each loss's gradient, with its factor, as a share of the sum of these norms."""
        pulls = self.factors() * self.norms()
        return pulls / pulls.sum().clamp_min(SMALLEST)

    def scaled(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of `Distiller.forward` as they are minimised, with their sum as `total`."""
        return terms

    def measure(self, terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], scale: Tensor) -> None:
        """Adds the gradient of each loss in a micro-batch. The graph of `terms` is kept.

        scale: a factor of all losses, for half precision.
        """
        for name in self.names:
            own = [value for term, value in terms.items() if term != "total" and loss_of(term) == name]
            total = scale * torch.stack(own).sum()
            found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            added = [p.new_zeros(()) if g is None else g for g, p in zip(found, parameters)]
            before = self.sums.get(name)
            self.sums[name] = added if before is None else [a + b for a, b in zip(before, added)]

    @torch.no_grad()
    def update(self, scale: Tensor) -> None:
        """Ends a measured step: takes the norms of the gradients, summed over micro-batches and processes, into the state.

        scale: as for `measure`.
        """
        norms = torch.stack([_norm(gradient) for gradient in self._gradients()]) / scale
        self.sums = {}
        good = norms.isfinite() & (norms > SMALLEST)
        logs = torch.where(good, norms, 1.0).log().to(self.log_norms)
        keep = (self.counts / (self.counts + 1)).clamp_max(self.momentum)
        self.log_norms.copy_(torch.where(good, keep * self.log_norms + (1 - keep) * logs, self.log_norms))
        self.counts += good

    def _gradients(self) -> list[list[Tensor]]:
        """The summed gradients whose norms are taken."""
        return [self.sums[name] for name in self.names]


class Balance(Gradients):
    """Scales the losses so that their gradients at the student's backbone have the norms that `weights` ask for.

    A loss whose gradient was not measured yet has the factor 0: the first step trains on the reference alone. The last
    entry of the state is the reference.

    Args:
        weights: the weight of each loss, by its name in `Distiller.methods`. Its terms are built with weight 1.
        reference: the names of the losses whose factors are their weights.
        every, momentum: as for `Gradients`.
    """

    weights: Tensor  # (losses,)

    def __init__(self, weights: Mapping[str, float], reference: Iterable[str], every: int, momentum: float):
        super().__init__(weights, every, momentum, more=1)
        self.reference = [self.names.index(name) for name in reference]
        self.register_buffer("weights", torch.tensor(list(weights.values())), persistent=False)

    def due(self, step: int) -> bool:
        """Whether the gradients are measured in this step, counted from 0."""
        return step < EARLY or super().due(step)

    def factors(self) -> Tensor:
        """(losses,): the factor of each loss."""
        known = (self.counts[:-1] > 0) & (self.counts[-1] > 0)
        factors = self.weights * (self.log_norms[-1] - self.log_norms[:-1]).exp()
        factors = torch.where(known, factors, 0.0)
        factors[self.reference] = self.weights[self.reference]
        return factors

    def scaled(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms times the factors of their losses, and their sum as `total`."""
        factors = dict(zip(self.names, self.factors().unbind()))
        scaled = {name: value * factors[loss_of(name)] for name, value in terms.items() if name != "total"}
        return scaled | {"total": torch.stack(list(scaled.values())).sum()}

    def _gradients(self) -> list[list[Tensor]]:
        own = super()._gradients()
        weighted = [[self.weights[i] * part for part in own[i]] for i in self.reference]
        return [*own, [torch.stack(parts).sum(dim=0) for parts in zip(*weighted)]]


def _norm(gradient: Sequence[Tensor]) -> Tensor:
    """The norm of a gradient's sum over all processes."""
    if parallel.world() > 1:
        return parallel.sum_over_processes(torch.cat([part.flatten().float() for part in gradient])).norm()
    return torch.nn.utils.get_total_norm([part.float() for part in gradient])


def loss_of(term: str) -> str:
    """The loss that a term belongs to: `scalekd@swin` of `scalekd@swin.s4`."""
    return term.partition(".")[0]


def backbone_parameters(student: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a timm model but those of its classifier."""
    get_classifier: Callable[[], Any] = getattr(student, "get_classifier", tuple)
    heads = get_classifier()
    modules = heads if isinstance(heads, tuple | list) else (heads,)
    own = {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    return [p for p in student.parameters() if p.requires_grad and id(p) not in own]
