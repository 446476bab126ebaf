"""The methods by their name in a recipe."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .at import AttentionTransfer
from .bkd import BKD
from .cc import CC
from .crd import CRD
from .deit import DeiT
from .diffkd import DiffKD
from .dist import DIST
from .dkd import DKD
from .embed import Embed
from .fd import FD
from .fm import FM
from .logits import KD, Asymmetric, BinaryCrossEntropy, CrossEntropy
from .mgd import MGD
from .mse import MSE
from .ofa import OFA
from .ofd import OFD
from .reviewkd import ReviewKD
from .rkd import RKD
from .rsd import RSD
from .scalekd_forms import cap, dfm, scalekd, tpp
from .srrl import SRRL
from .vkd import VkD
from .wkd_f import WKDF
from .wkd_l import WKDL

METHODS: dict[str, Callable[..., nn.Module]] = {
    "ce": CrossEntropy,
    "bce": BinaryCrossEntropy,
    "asl": Asymmetric,
    "kd": KD,
    "bkd": BKD,
    "dkd": DKD,
    "dist": DIST,
    "wkd_l": WKDL,
    "deit": DeiT,
    "fd": FD,
    "fm": FM,
    "embed": Embed,
    "cap": cap,
    "dfm": dfm,
    "tpp": tpp,
    "scalekd": scalekd,
    "rkd": RKD,
    "cc": CC,
    "srrl": SRRL,
    "at": AttentionTransfer,
    "ofd": OFD,
    "crd": CRD,
    "reviewkd": ReviewKD,
    "mgd": MGD,
    "ofa": OFA,
    "diffkd": DiffKD,
    "wkd_f": WKDF,
    "mse": MSE,
    "vkd": VkD,
    "rsd": RSD,
}
