"""Imports released weights as a student: finds, recognises, renames and checks its tensors.

See docs/how-to/released-weights.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.common.text import printable, shortened

from . import added  # noqa: F401 - adds models to timm
from .inputs import usual_size
from .options import Model
from .released_keys import EXTRAS, KWARGS, RULES, SIGNS, TIMM
from .weights.match import adapted as through_timm
from .weights.match import averaged_and_plain, missing_counters

State = dict[str, Tensor]
MOST_NAMES = 12  # most names of a kind in an error


@dataclass
class Found:
    """The student's tensors in a file, and how they were found."""

    state: State
    entry: str  # key in the file, such as `state_dict_ema`
    beside: int  # number of tensors that are not the student's
    notes: list[str] = field(default_factory=list)  # assumptions and ignored tensors, for the user


# ---------------------------------------------------------------- the file


def find_student(contents: dict[str, Any], file: Path, ema: bool) -> Found:
    """The student's tensors, without prefixes. Raises `UserError` if there are none.

    ema: prefer averaged weights, see `averaged_and_plain`.
    """
    entry, notes = "the file itself", []
    for _ in range(3):  # wrappers may be nested
        entries = {key: value for key, value in contents.items() if isinstance(value, dict)}
        averaged, plain = averaged_and_plain(f"{entry}.{name}" for entry, value in entries.items() for name in value)
        chosen = (averaged or plain) if ema else (plain or averaged)
        if chosen is None:
            break
        if averaged and plain:
            kept, other = (
                ("averaged", "use --no-ema for the plain ones")
                if ema
                else ("plain", "leave out --no-ema for the averaged ones")
            )
            notes.append(
                f"the file has averaged (`{averaged}`) and plain weights (`{plain}`): using the {kept} weights; {other}"
            )
        entry, contents = chosen, contents[chosen]
    state = {str(k): v for k, v in contents.items() if isinstance(v, Tensor)}
    everything = len(state)
    for prefix in ("module.", "_orig_mod.", "student.", "module."):
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = inside or state  # a distiller also has `teacher.`, projectors and `steps`
    if not state:
        raise UserError(
            f"{file} contains no named tensors: {shortened(', '.join(map(str, contents)) or 'it is empty')}"
        )
    return Found(state, entry, everything - len(state), notes)


# ---------------------------------------------------------------- names


def recognise(state: State) -> str:
    """Whose names these tensors have, such as `mmpretrain Swin`; timm's if no other is recognised."""
    return next((naming for naming, key in SIGNS.items() if key in state), TIMM)


def renamed(found: Found, naming: str, spec: Model, file: Path) -> tuple[State, list[str], dict[str, Any]]:
    """The tensors with timm's names, the keys without a rule, and the model arguments that the tensors imply.

    If a file fits two models, the user's arguments `spec.kwargs` decide. Adds to `found.notes`.
    """
    chosen = spec.kwargs
    state: State = {}
    left = []
    rules = RULES.get(naming, [(r"(.*)", r"\1")])
    for key, value in found.state.items():
        rule = next((r for r in rules if re.fullmatch(r[0], key)), None)
        reason = next((why for pattern, why in EXTRAS.items() if re.fullmatch(pattern, key)), None)
        if rule and not reason:
            state[re.sub(rule[0], rule[1], key)] = value
        elif reason and reason not in "".join(found.notes):
            found.notes.append(f"ignored: {printable(key)} and similar: {reason}")
        elif not reason:
            left.append(key)
    kwargs = dict(KWARGS.get(naming, {}))
    for name, default in kwargs.items():
        if name not in chosen:
            found.notes.append(
                f"assumed: {name}={default}, which the tensors do not show; change it with --kwargs '{{{name}: ...}}'"
            )
    if naming == "mmpretrain Swin":
        state = {k: patches_merged(v) if ".downsample." in k else v for k, v in state.items()}
    if naming == "mmpretrain ConvNeXt" and not chosen.get("head_norm_first", True):
        state = {k.replace("norm_pre.", "head.norm."): v for k, v in state.items()}
    pooled = not any(key.startswith("attn_pool.") for key in state)
    timm_vit = naming == TIMM and spec.model.startswith(("vit_", "deit")) and pooled
    if naming == "mmpretrain ViT" or (timm_vit and "pos_embed" in state and "cls_token" not in state):
        kwargs |= vit_kwargs(state, chosen, found.notes, file)
    return state, left, kwargs


def patches_merged(value: Tensor) -> Tensor:
    """Reorders the last dimension, 4C, from nn.Unfold's (channel, row, column) to timm's (column, row, channel).

    It holds the 2x2 neighbours that a Swin merges: weight and bias of the norm (4C) and the reduction (2C, 4C).
    """
    if value.shape[-1] % 4:
        return value  # not a merging layer; `check` reports its shape
    channels = value.shape[-1] // 4
    return value.unflatten(-1, (channels, 2, 2)).movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3).contiguous()


def vit_kwargs(state: State, chosen: dict[str, Any], notes: list[str], file: Path) -> dict[str, Any]:
    """Arguments for the class token and the final norm of a ViT. Removes an unused class token from `state`.

    Without a class token mmclassification still stores the parameter, at its initial zeros, and its row of the position
    table.
    """
    if "norm.weight" in state and "fc_norm.weight" in state:
        raise UserError(
            f"{file} is a ViT with norms both before and after the average over its tokens (ln1, ln2); timm's ViT has only one, "
            "so it cannot be imported"
        )
    after = "fc_norm.weight" in state
    token = state.get("cls_token")
    if chosen.get("class_token", token is not None and bool(token.any())):
        return {"class_token": True} | ({"global_pool": "avg", "fc_norm": True} if after else {})
    positions = state.get("pos_embed")
    if token is not None:
        del state["cls_token"]
        notes.append("ignored: cls_token, which is unused (all zeros), and its row of pos_embed")
        if positions is not None and math.isqrt(positions.shape[1] - 1) ** 2 == positions.shape[1] - 1:
            state["pos_embed"] = positions[:, 1:].contiguous()
    return {"class_token": False, "global_pool": "avg", "fc_norm": after}


# ---------------------------------------------------------------- the model that fits


def mixer_sizes(model_name: str, state: State) -> dict[str, Any]:
    """Patch size, width and depth for `mlp_mixer`, from the tensors; {} for other models."""
    if model_name != "mlp_mixer" or "stem.proj.weight" not in state:
        return {}
    width, _, patch, _ = state["stem.proj.weight"].shape
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    return {"patch_size": patch, "embed_dim": width, "num_blocks": len(blocks)}


def image_size(state: State, model_name: str, given: dict[str, Any]) -> tuple[int, int]:
    """The student's input (height, width): from `given`, from the numbers of tokens and patches, or timm's default.

    Adds the patch size of a ViT to `given`.
    """
    size = given.get("img_size")
    if size is not None:
        return (size, size) if isinstance(size, int) else tuple(size)
    tokens = 0
    if "pos_embed" in state and "patch_embed.proj.weight" in state:
        prefix = sum(state[k].shape[1] for k in ("cls_token", "dist_token", "reg_token") if k in state)
        tokens, patch = state["pos_embed"].shape[1] - prefix, state["patch_embed.proj.weight"].shape[-1]
        given.setdefault("patch_size", patch)
    elif "blocks.0.mlp_tokens.fc1.weight" in state and "stem.proj.weight" in state:
        tokens, patch = state["blocks.0.mlp_tokens.fc1.weight"].shape[1], state["stem.proj.weight"].shape[-1]
    if tokens and math.isqrt(tokens) ** 2 == tokens:
        return math.isqrt(tokens) * patch, math.isqrt(tokens) * patch
    return usual_size(model_name)


def class_count(model_name: str, state: State, file: Path) -> int:
    """The number of classes. Raises `UserError` if the file has no classifier with the model's name for it."""
    cfg = timm.get_pretrained_cfg(model_name)
    names = (cfg and cfg.classifier) or "head"
    name = names if isinstance(names, str) else names[0]
    # some files have names of older timm versions, or of the original models
    heads = [f"{n}.weight" for n in (name, name.split(".")[0]) if f"{n}.weight" in state]
    if not heads:
        raise UserError(
            f"{file} has no {name}.weight, the classifier of {model_name}; it has {shortened(', '.join(state), 200)}.\n"
            "Use the model that the weights were trained with, and a file that includes the classifier."
        )
    return len(state[heads[0]])


def adapted(state: State, student: nn.Module) -> State:
    """The tensors after timm's filter for older names. Tensors that it would resize stay as they are."""
    try:
        new = through_timm(dict(state), student)
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError, TypeError):
        return state  # another model; `check` reports how
    resized = [k for k in state.keys() & new.keys() if state[k].shape != new[k].shape and state[k].ndim > 1]
    return new | {k: state[k] for k in resized}  # `check` reports their shapes


def check(student: nn.Module, state: State, left: list[str], what: str) -> State:
    """`state` with the counters of batch norms that it lacks (`missing_counters`).

    Raises `UserError` if another tensor of the student is missing in `state` or of another shape, or any is left over.
    """
    state = state | missing_counters(state, student)
    wanted = student.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted([*left, *(state.keys() - wanted.keys())])
    shapes = [
        f"{k} is {tuple(state[k].shape)} in the file, {tuple(wanted[k].shape)} in the model"
        for k in sorted(wanted.keys() & state.keys())
        if wanted[k].shape != state[k].shape
    ]
    faults = [
        f"{len(names)} {kind}: " + printable(", ".join(names[:MOST_NAMES])) + ", ..." * (len(names) > MOST_NAMES)
        for kind, names in (("missing", missing), ("left over", extra), ("of another shape", shapes))
        if names
    ]
    if faults:
        remedy = "Use the model that the weights were trained with; set its arguments with `kwargs`."
        raise UserError("\n".join([f"{what}:", *faults, remedy]))
    return state


# ---------------------------------------------------------------- the card


def preprocessing(student: nn.Module, naming: str) -> dict[str, Any]:
    """The evaluation preprocessing: timm's for timm's names, else that of the ScaleKD configs."""
    if naming == TIMM:
        own = resolve_model_data_config(student)
        return {
            k: list(own[k]) if k in ("mean", "std") else own[k] for k in ("mean", "std", "interpolation", "crop_pct")
        }
    # resize the short edge to 256, crop the centre 224
    mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    return {"mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 0.875}
