"""The vision transformers of Hugging Face transformers that `transformers_vision` can build. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NAME = "transformers_vision"


class Family(NamedTuple):
    """Where a family of models has its parts, and what it pools: `class`, `class and mean`, `mean` or `attention`."""

    model: str  # class in transformers
    layers: str
    norm: str
    classified: str  # what its model with a classifier pools
    pools: str = "class"  # what it pools otherwise
    interpolates: bool = False  # other image sizes than the configuration's need an argument


FAMILIES = {  # by `model_type`
    "dinov2": Family("Dinov2Model", "encoder.layer", "layernorm", "class and mean"),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "encoder.layer", "layernorm", "class and mean"),
    "dinov3_vit": Family("DINOv3ViTModel", "model.layer", "norm", "class"),
    "vit": Family("ViTModel", "layers", "layernorm", "class", interpolates=True),
    "siglip_vision_model": Family(
        "SiglipVisionModel", "encoder.layers", "post_layernorm", "mean", pools="attention", interpolates=True
    ),
}
# tensors of a file that are not part of the image encoder, by the start of their names
OTHERS = ("text_model.", "logit_scale", "logit_bias", "pooler.", "vit.pooler.")


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the architecture: no labels, and nothing that names code to load."""
    left_out = ("auto_map", "attn_implementation", "quantization_config", "architectures", "dtype", "torch_dtype")
    labels = ("id2label", "label2id", "num_labels", "problem_type", "transformers_version")
    return {key: value for key, value in config.items() if key[:1] != "_" and key not in (*left_out, *labels)}
