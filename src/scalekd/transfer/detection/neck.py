"""torchvision's feature pyramid network on a `Pyramid`, which detectors take as their backbone."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from scalekd.transfer.pyramid import Pyramid


class PyramidFPN(nn.Module):
    """x `(B, C, H, W)` to maps `(B, width, ...)`: one for each map of the pyramid, and the coarser ones of `extra`."""

    def __init__(self, pyramid: Pyramid, width: int, extra: ExtraFPNBlock):
        super().__init__()
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(pyramid.channels, width, extra)
        self.out_channels = width  # torchvision reads it

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.pyramid(x))))
