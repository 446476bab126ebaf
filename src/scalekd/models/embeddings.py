"""Outputs that are no classes: the image embeddings of CLIP and its like, which timm keeps where a classifier would be."""

from __future__ import annotations

import timm
from timm.data import infer_imagenet_subset

CLASS_LISTS = {19_168: "ImageNet Winter21", 115_217: "Bamboo"}  # of weights in timm, beside the lists that timm knows


def is_embedding(name: str, outputs: int) -> bool:
    """Whether so many outputs of a timm model's pre-trained weights are an embedding. name: with or without a tag.

    timm does not say it, so it is inferred: some pre-trained weights of that architecture have as many outputs, and
    no list of classes that such weights were trained on is so long.
    """
    if not outputs or outputs in CLASS_LISTS or infer_imagenet_subset({"num_classes": outputs}):
        return False
    architecture = name.split(".")[0]
    known = [timm.get_pretrained_cfg(tagged) for tagged in timm.list_pretrained(f"{architecture}.*")]
    return any(cfg is not None and cfg.num_classes == outputs for cfg in known)
