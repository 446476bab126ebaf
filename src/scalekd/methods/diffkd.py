"""`diffkd`: knowledge diffusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

from .projectors import Norm, Resample, make_norm
from .shared import check_features, check_stages, full_precision, stage_map

TIMES = 1000  # of the diffusion, with the noise variances of DDPM: 1e-4 to 0.02, linear
FIRST, LAST = 1e-4, 0.02


class DiffKD(nn.Module):
    """`diffkd`: mimic the teacher's map with the student's, denoised by a diffusion model of the teacher's maps.

    Huang et al., NeurIPS 2023 (arXiv:2305.15712), on maps; the paper has it on logits too. For each of `stages`
    a `Denoising` and three terms of weight 1:

    - `s4`, ...: the mean squared difference of the denoised student's map and the teacher's code, times `alpha`.
      The student gets its gradient from this one alone.
    - `s4_noise`: that of the noise put on the teacher's code, at a random time, and the diffusion model's guess.
    - `s4_code`: that of the teacher's map and its code decoded. None with `latent` 0.

    Noise and times come from torch's global generator.

    Args:
        stages: stages 1 to 4; stage 4 is the map after the final norm. Default the last.
        alpha: weight of the first term. Default 1.
        latent: channels of the code. None: half of the teacher's, as in the authors' code. 0: no code, the
            teacher's map itself.
        steps: of denoising (DDIM), 1 to 500, from time 500 down. Default 5, as in the authors' code.
        norm: `batch`: BatchNorm, as in the authors' code. It takes out what all images of a batch have in
            common, and with that the time in denoising, which is the same for all; only in `s4_noise`, where each
            image has its own, does the model see it. `layer`, over the channels of each position, keeps it.

    Raises:
        ValueError: no teacher, a model without maps, an option out of range.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        stages: tuple[int, ...] = (4,),
        alpha: float = 1.0,
        latent: int | None = None,
        steps: int = 5,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher, alpha, "mean")
        check_stages("diffkd", stages)
        if latent is not None and latent < 0:
            raise ValueError(f"diffkd: latent is {latent}; it is a number of channels, or 0 for no code")
        if not 1 <= steps <= TIMES // 2:
            raise ValueError(f"diffkd: steps is {steps}; it is 1 to {TIMES // 2}")
        self.stages = tuple(stages)
        self.alpha = alpha
        self.denoisings = nn.ModuleDict(
            {
                f"s{stage}": Denoising(stage_map(student, stage), stage_map(teacher, stage), latent, steps, norm)
                for stage in stages
            }
        )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """The terms of each stage, `alpha` applied. Targets are not looked at."""
        assert teacher is not None
        losses: dict[str, Tensor] = {}
        for stage in self.stages:
            denoising = self.denoisings[f"s{stage}"]
            assert isinstance(denoising, Denoising)
            code = full_precision(stage_map(teacher, stage).detach())
            if denoising.encode is not None and denoising.decode is not None:
                full, code = code, full_precision(denoising.encode(code))
                losses[f"s{stage}_code"] = F.mse_loss(full_precision(denoising.decode(code)), full)
                code = code.detach()  # else the code would follow the student
            losses[f"s{stage}"] = self.alpha * F.mse_loss(denoising(stage_map(student, stage)), code)
            losses[f"s{stage}_noise"] = denoising.noise_loss(code)
        return losses


class Denoising(nn.Module):
    """A diffusion model of one teacher map, and what a student's map needs to be denoised by it.

    The diffusion model guesses the noise in `(B, C, H, W)`: a learned vector for the time is added, then two
    bottleneck blocks, a 1x1 convolution and a norm. A student's map is brought to the teacher's grid and, by a
    1x1 convolution, to C channels; the noise adapter, a bottleneck block, the mean over positions, a linear layer
    and a softmax, finds a share g of each image, and denoising starts from `g * map + (1 - g) * noise`. A 1x1
    convolution follows. `encode` (1x1 convolution, norm) and `decode` (1x1 convolution) are the linear
    autoencoder, None with `latent` 0.

    Args: map shapes of student and teacher; the options as for `DiffKD`.
    """

    kept: Tensor  # (TIMES,), the share of the variance that is not yet noise

    def __init__(self, student: MapShape, teacher: MapShape, latent: int | None, steps: int, norm: Norm) -> None:
        super().__init__()
        channels = max(1, teacher[0] // 2) if latent is None else latent or teacher[0]
        self.encode = self.decode = None
        if latent != 0:
            self.encode = nn.Sequential(nn.Conv2d(teacher[0], channels, 1, bias=False), make_norm(norm, channels))
            self.decode = nn.Conv2d(channels, teacher[0], 1)
        self.align = nn.Sequential(Resample(teacher[1:]), nn.Conv2d(student[0], channels, 1))
        self.adapter = nn.Sequential(
            Bottleneck(channels, 8, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2)
        )
        self.time = nn.Embedding(TIMES, channels)
        self.guess = nn.Sequential(
            Bottleneck(channels, 4, norm),
            Bottleneck(channels, 4, norm),
            nn.Conv2d(channels, channels, 1, bias=False),
            make_norm(norm, channels),
        )
        self.out = nn.Conv2d(channels, channels, 1)
        spacing = TIMES // 2 // steps
        self.times = [spacing * i for i in reversed(range(steps))]
        self.register_buffer("kept", torch.linspace(1 - FIRST, 1 - LAST, TIMES).cumprod(dim=0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Student map `(B, ds, h, w)` to `(B, C, H, W)`, in float32 at least as all between the layers."""
        x = full_precision(self.align(x))
        share = full_precision(self.adapter(x)).softmax(dim=1)[:, 0, None, None, None]
        x = share * x + (1 - share) * noise_like(x)
        for i, time in enumerate(self.times):
            noise = self._noise(x, torch.full((1,), time, device=x.device))
            kept = self.kept[time]
            # at the last step everything is kept: what is left is the clean map
            kept_next = self.kept[self.times[i + 1]] if i + 1 < len(self.times) else torch.ones_like(kept)
            clean = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
            x = kept_next.sqrt() * clean + (1 - kept_next).sqrt() * noise
        return full_precision(self.out(x))

    def noise_loss(self, code: Tensor) -> Tensor:
        """Mean squared difference of a random noise and the guess from `code`, `(B, C, H, W)`, with that noise on it."""
        times = torch.randint(TIMES, (len(code),), device=code.device)
        noise = noise_like(code)
        kept = self.kept[times][:, None, None, None]
        return F.mse_loss(self._noise(kept.sqrt() * code + (1 - kept).sqrt() * noise, times), noise)

    def _noise(self, x: Tensor, times: Tensor) -> Tensor:
        return full_precision(self.guess(x + self.time(times)[:, :, None, None]))


def noise_like(x: Tensor) -> Tensor:
    """N(0, 1) of the shape of `x`, the same for the same seed; `randn_like` would go by the order in memory."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)


class Bottleneck(nn.Module):
    """`x` + what three convolutions (1x1, 3x3, 1x1) with norms make of it, in `channels / reduction` (4 at least) between."""

    def __init__(self, channels: int, reduction: int, norm: Norm) -> None:
        super().__init__()
        inner = max(4, channels // reduction)  # a norm over one channel would leave nothing
        self.block = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            make_norm(norm, inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            make_norm(norm, inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
            make_norm(norm, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)
