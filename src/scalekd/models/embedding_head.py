"""A head for embeddings: a layer or two after the pooled features, as the module `embedding_head` of a timm model.

The model's classifier and its `forward` stay as they are. `features.embedded` gives the embedding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .options import Embedding

State = dict[str, Tensor]

NAME = "embedding_head"
PREFIX = f"{NAME}."


def embedding_head(width: int, options: Embedding) -> nn.Module:
    """Pooled features (B, width) to embeddings (B, dim): a linear layer or, for `mlp`, two with a GELU between them."""
    if options.kind == "linear":
        return nn.Linear(width, options.dim)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, options.dim))


def add_embedding_head(model: Any, options: Embedding) -> nn.Module:
    """Gives a timm model a head with initial values, on the device and in the type of its parameters; returns the head."""
    like = next(model.parameters())
    setattr(model, NAME, embedding_head(pooled_width(model), options).to(like.device, like.dtype))
    head: nn.Module = getattr(model, NAME)
    return head


def pooled_width(model: Any) -> int:
    """Channels of a timm model's pooled features."""
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def embedding_of(model: Any, pooled: Tensor) -> Tensor:
    """The embedding (B, E) of pooled features (B, D); these themselves for a model without a head."""
    head = getattr(model, NAME, None)
    return pooled if head is None else head(pooled)


def has_embedding_head(model: nn.Module) -> bool:
    return getattr(model, NAME, None) is not None


def head_state(state: State, prefix: str = "") -> State:
    """The tensors of the head in a model's state or in a file, with the head's own names. prefix: in front of the model's."""
    start = prefix + PREFIX
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}


def without_head(state: State) -> State:
    """The tensors of a state or a file that are not a head's."""
    return {key: value for key, value in state.items() if f".{PREFIX}" not in f".{key}"}
