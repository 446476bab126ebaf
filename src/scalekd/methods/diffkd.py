"""`diffkd`: knowledge diffusion (Huang et al., 2023)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.models.stages import Features, MapShape, Shapes

from .projectors import Norm, Resample, make_norm
from .shared import check_features, check_positive, check_stages, full_precision, stage_map

TIMES = 1000  # time steps of the diffusion
FIRST, LAST = 1e-4, 0.02  # noise variances at the first and last time, linear between, as in DDPM


class DiffKD(nn.Module):
    """`diffkd`: mimic the teacher's map with the student's, denoised by a diffusion model of the teacher's maps.

    Huang et al., NeurIPS 2023 (arXiv:2305.15712), on maps only; the paper also denoises logits. Each of `stages` has a
    `Denoising` module and three terms, all mean squared differences:

    - `s4`, ...: between the student's denoised map and the teacher's code, times `alpha`. Only this term trains the
      student.
    - `s4_noise`: between the noise added to the teacher's code at a random time and the diffusion model's prediction.
    - `s4_code`: between the teacher's map and its decoded code. Absent with `latent` 0.

    Noise and times come from torch's global generator.

    Args:
        stages: stages 1 to 4; stage 4 is the map after the final norm. Default the last.
        alpha: weight of the first term. Default 1.
        latent: channels of the code. None: half of the teacher's, as in the authors' code. 0: the code is the teacher's
            map itself.
        steps: denoising steps (DDIM), 1 to 500, from time 500 down. Default 5, as in the authors' code.
        norm: `batch`: BatchNorm, as in the authors' code. It removes what all images of a batch share. In denoising
            they share the time, so the model knows the time only in `s4_noise`, where each image has its own.
            `layer`: over the channels of each position, which keeps the time.

    Raises:
        ValueError: no teacher, a model without maps, or an option out of range.
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
        teacher = check_features(student, teacher)
        check_positive("diffkd", alpha=alpha)
        check_stages("diffkd", stages)
        if latent is not None and latent < 0:
            raise ValueError(f"diffkd: latent is {latent}; use a number of channels, or 0 for no code")
        if not 1 <= steps <= TIMES // 2:
            raise ValueError(f"diffkd: steps is {steps}; use 1 to {TIMES // 2}")
        self.stages = tuple(stages)
        self.alpha = alpha
        self.denoisings = nn.ModuleDict(
            {
                f"s{stage}": Denoising(stage_map(student, stage), stage_map(teacher, stage), latent, steps, norm)
                for stage in stages
            }
        )

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """The terms of each stage, `alpha` applied. The targets are not used."""
        assert teacher is not None
        losses: dict[str, Tensor] = {}
        for stage in self.stages:
            denoising = self.denoisings[f"s{stage}"]
            assert isinstance(denoising, Denoising)
            code = full_precision(stage_map(teacher, stage).detach())
            if denoising.encode is not None and denoising.decode is not None:
                full, code = code, full_precision(denoising.encode(code))
                losses[f"s{stage}_code"] = F.mse_loss(full_precision(denoising.decode(code)), full)
                code = code.detach()  # otherwise the code would adapt to the student
            losses[f"s{stage}"] = self.alpha * F.mse_loss(denoising(stage_map(student, stage)), code)
            losses[f"s{stage}_noise"] = denoising.noise_loss(code)
        return losses


class Denoising(nn.Module):
    """A diffusion model of one teacher map, and the layers that let it denoise a student's map.

    - Diffusion model: predicts the noise in `(B, C, H, W)`. A learned vector for the time is added, followed by two
      bottleneck blocks, a 1x1 convolution and a norm.
    - Student: its map is resampled to the teacher's grid and goes through a 1x1 convolution to C channels.
    - Noise adapter: a bottleneck block, the mean over positions, a linear layer and a softmax give a fraction g for
      each image. Denoising starts from `g * map + (1 - g) * noise`. A 1x1 convolution and a norm follow.
    - Autoencoder: `encode` (1x1 convolution, norm) and `decode` (1x1 convolution), None with `latent` 0.

    Args:
        student, teacher: map shapes `(ds, h, w)` and `(dt, H, W)`.
        latent, steps, norm: as for `DiffKD`.
    """

    kept: Tensor  # (TIMES,), fraction of the variance that is not noise at each time

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
        self.out: nn.Module = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), make_norm(norm, channels))
        spacing = TIMES // 2 // steps
        self.times = [spacing * i for i in reversed(range(steps))]
        self.register_buffer("kept", torch.linspace(1 - FIRST, 1 - LAST, TIMES).cumprod(dim=0), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Checkpoints from before the last norm was added: rebuild the layer that they were trained with, so that reports
        # and analyses show the run as it was. Such a run cannot be resumed (train/resume.py).
        if f"{prefix}out.weight" in state_dict:
            like = self.time.weight
            self.out = nn.Conv2d(like.shape[1], like.shape[1], 1, device=like.device, dtype=like.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Denoises a student map `(B, ds, h, w)` to `(B, C, H, W)`. Values between layers are in float32 or float64."""
        x = full_precision(self.align(x))
        share = full_precision(self.adapter(x)).softmax(dim=1)[:, 0, None, None, None]
        x = share * x + (1 - share) * noise_like(x)
        for i, time in enumerate(self.times):
            noise = self.predicted_noise(x, torch.full((1,), time, device=x.device))
            kept = self.kept[time]
            # the last step ends at the clean map: all of its variance is kept
            kept_next = self.kept[self.times[i + 1]] if i + 1 < len(self.times) else torch.ones_like(kept)
            clean = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
            x = kept_next.sqrt() * clean + (1 - kept_next).sqrt() * noise
        return full_precision(self.out(x))

    def noise_loss(self, code: Tensor) -> Tensor:
        """Mean squared difference of random noise and its prediction from `code`, `(B, C, H, W)`, plus that noise."""
        times = torch.randint(TIMES, (len(code),), device=code.device)
        noise = noise_like(code)
        kept = self.kept[times][:, None, None, None]
        return F.mse_loss(self.predicted_noise(kept.sqrt() * code + (1 - kept).sqrt() * noise, times), noise)

    def predicted_noise(self, x: Tensor, times: Tensor) -> Tensor:
        """The predicted noise."""
        return full_precision(self.guess(x + self.time(times)[:, :, None, None]))


def noise_like(x: Tensor) -> Tensor:
    """Normal noise of the shape of `x`. It depends on the seed only; `randn_like` also depends on the memory format."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions with norms, with `channels / reduction` channels inside, at least 4."""

    def __init__(self, channels: int, reduction: int, norm: Norm) -> None:
        super().__init__()
        inner = max(4, channels // reduction)  # a norm over one channel would remove everything
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
