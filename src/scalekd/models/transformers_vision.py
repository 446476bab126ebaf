"""`transformers_vision`, a timm model name for vision transformers of Hugging Face transformers, as teachers.

`TransformersVision` has the interface of timm's models, so that everything works with it that works with a ViT of timm. The
keyword argument `config` holds the content of the model's config.json. transformers is imported when the first model is
built; `pip install scalekd[transformers]` installs it. It runs no code from a model's folder and needs no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .token_maps import to_map, to_tokens
from .transformers_families import FAMILIES, NAME, OTHERS, Family, without_code


class TransformersVision(nn.Module):
    """A vision transformer of transformers with timm's interface.

    Its pooled features are the class token after the final norm (DINOv2, DINOv3, ViT), or the output of the attention
    pooling (SigLIP), or what `pool` says.

    Args:
        config: the content of config.json.
        pool: what the classifier of the model reads, if it is not the usual of its family: `class`, `mean`, or
            `class and mean`, the class token and the mean of the patches.
        num_classes: outputs of the classifier, a linear layer; 0 for none.
        in_chans: channels of the images.
        img_size: (height, width) in pixels, multiples of the patch size.

    Raises:
        ValueError: a model type that is not in `FAMILIES`, another pooling than the family has, or an image size that does
            not suit the patches.
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        pool: str | None = None,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise ValueError(f"transformers models of type {kind} are not supported; supported: {', '.join(FAMILIES)}")
        self.family = FAMILIES[kind]
        self.pool = pool or self.family.pools
        if self.pool not in (self.family.pools, self.family.classified):
            raise ValueError(
                f"pool is {pool}; models of type {kind} pool {self.family.pools} or {self.family.classified}"
            )
        if self.pool == "attention" and not config.get("vision_use_head", True):
            self.pool = "mean"
        self.backbone = _model(config, in_chans, self.family)
        own = self.backbone.config
        self.num_classes, self.in_chans, self.patch = num_classes, in_chans, own.patch_size
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size or ())
        if any(side % self.patch for side in size):
            raise ValueError(f"image size {size[0]}x{size[1]} is not a multiple of the patch size {self.patch}")
        with_class = self.family.pools == "class"
        self.num_prefix_tokens = 1 + getattr(own, "num_register_tokens", 0) if with_class else 0
        self.embed_dim = self.num_features = self.head_hidden_size = own.hidden_size
        self.feature_info = [
            {"num_chs": self.embed_dim, "reduction": self.patch, "module": f"{self.family.layers}.{i}"}
            for i in range(own.num_hidden_layers)
        ]
        width = self.embed_dim * (2 if self.pool == "class and mean" else 1)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = attrgetter(self.family.layers)(self.backbone)
        return layers

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `(B, C, H, W)` to logits `(B, classes)`, or pooled features `(B, D)` without a classifier."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised images to tokens after the final norm, `(B, P + N, D)`."""
        tokens, _ = self.forward_intermediates(images, indices=[])
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens after the final norm to logits, or with `pre_logits` to the classifier's input."""
        if self.pool == "class":
            pooled = tokens[:, 0]
        elif self.pool == "class and mean":
            patches = tokens[:, self.num_prefix_tokens :]
            pooled = torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)
        elif self.pool == "attention":
            pooled = self.backbone.head(tokens)
        else:
            pooled = tokens.mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Sequence[int],
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
    ) -> tuple[Tensor, list[Any]]:
        """The tokens after the final norm, and the maps `(B, D, H, W)` after the layers `indices`, as timm's models."""
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        more = {"interpolate_pos_encoding": True} if self.family.interpolates else {}
        tokens = self.backbone.embeddings(images, **more)
        maps: list[Any] = []
        for i, layer in enumerate(self.layers):
            tokens = self.through(layer, tokens, grid)
            if i in indices:
                prefix = self.num_prefix_tokens
                x = to_map(tokens, prefix, grid)
                maps.append((x, tokens[:, :prefix]) if return_prefix_tokens else x)
        return self.final_norm(tokens), maps

    def through(self, layer: nn.Module, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens `(B, P + N, D)` of a grid after one layer."""
        if not hasattr(self.backbone, "rope_embeddings"):
            return layer(tokens, None)
        height, width = (side * self.patch for side in grid)
        pixels = tokens.new_zeros(1).expand(1, self.in_chans, height, width)  # only their shape is used
        return layer(tokens, None, position_embeddings=self.backbone.rope_embeddings(pixels))

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Tokens after the final norm."""
        return getattr(self.backbone, self.family.norm)(tokens)

    def get_classifier(self) -> nn.Module:
        return self.head


def transformers_tail(model: Any, index: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
    """A tail as in `tails.py`."""
    tokens, grid = to_tokens(x, prefix), x.shape[-2:]
    for layer in model.layers[index + 1 :]:
        tokens = model.through(layer, tokens, grid)
    return to_map(model.final_norm(tokens) if end else tokens, model.num_prefix_tokens, grid)


def _model(config: Mapping[str, Any], channels: int, family: Family) -> Any:
    """The model of transformers with initial values."""
    transformers = _transformers()
    made = transformers.AutoConfig.for_model(**without_code(config) | {"num_channels": channels})
    more = {"add_pooling_layer": False} if family.model == "ViTModel" else {}
    return getattr(transformers, family.model)._from_config(made, attn_implementation="sdpa", **more)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError('models of transformers need transformers: pip install "scalekd[transformers]"') from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of model.safetensors under the names that `TransformersVision` has.

    transformers itself renames those of its older versions and of models with a classifier. What it does not know keeps its
    name, so that the check of the weights reports it.
    """
    assert isinstance(model, TransformersVision)
    transformers = _transformers()
    head = {f"head.{name}": state[f"classifier.{name}"] for name in ("weight", "bias") if f"classifier.{name}" in state}
    encoder = {k: v for k, v in state.items() if not k.startswith((*OTHERS, "classifier."))}
    more = {"add_pooling_layer": False} if model.family.model == "ViTModel" else {}
    loaded, report = getattr(transformers, model.family.model).from_pretrained(
        None, config=model.backbone.config, state_dict=dict(encoder), output_loading_info=True, **more
    )
    missing = set(report["missing_keys"])
    found = {f"backbone.{name}": v for name, v in loaded.state_dict().items() if name not in missing}
    return found | head | {name: state[name] for name in report["unexpected_keys"] if name in state}


# register_model requires this name
default_cfgs = generate_default_cfgs(
    {
        f"{NAME}.untrained": {
            "num_classes": 0,
            "input_size": (3, 224, 224),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "classifier": "head",
        }
    }
)


@register_model
def transformers_vision(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A vision transformer of transformers; `config` is the content of its config.json."""
    return build_model_with_cfg(TransformersVision, NAME, pretrained, feature_cfg={"feature_cls": "getter"}, **kwargs)
