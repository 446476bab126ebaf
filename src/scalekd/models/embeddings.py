"""Detects image embeddings: the outputs of CLIP-like models, which timm stores in place of a classifier."""

from __future__ import annotations

import timm
from timm.data import infer_imagenet_subset

CLASS_LISTS = {
    19_168: "ImageNet Winter21",
    115_217: "Bamboo",
}  # class lists of weights in timm that `infer_imagenet_subset` does not know


def is_embedding(name: str, outputs: int) -> bool:
    """Whether this number of outputs is that of an embedding. name: a timm name, with or without a tag.

    timm does not say so. It is inferred: pre-trained weights of this architecture have the same number of outputs, and
    it is the length of no known class list.
    """
    if not outputs or outputs in CLASS_LISTS or infer_imagenet_subset({"num_classes": outputs}):
        return False
    architecture = name.split(".")[0]
    known = [timm.get_pretrained_cfg(tagged) for tagged in timm.list_pretrained(f"{architecture}.*")]
    return any(cfg is not None and cfg.num_classes == outputs for cfg in known)
