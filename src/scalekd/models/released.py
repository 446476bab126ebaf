"""Weights that others released, as an exported student: read, recognised, renamed, checked. docs/how-to/released-weights.md."""

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

from . import mixer  # noqa: F401 - adds a name to timm's
from .inputs import usual_size
from .options import Model
from .released_keys import EXTRAS, KWARGS, RULES, SIGNS, TIMM
from .weights.match import adapted as through_timm

State = dict[str, Tensor]
MOST_NAMES = 12  # of each kind, in an error


@dataclass
class Found:
    """The student's own tensors, and how they were found."""

    state: State
    entry: str  # where in the file, such as `state_dict_ema`
    beside: int  # tensors that are not the student's
    notes: list[str] = field(default_factory=list)  # what was assumed or left out, for a person


# ---------------------------------------------------------------- the file


# An entry of averaged weights beside the one of plain weights.
AVERAGED = ("state_dict_ema", "model_ema", "ema")
PLAIN = ("state_dict", "model")


def find_student(contents: dict[str, Any], file: Path, ema: bool) -> Found:
    """The tensors of the student, without prefixes. Raises `UserError` if there are none.

    Averaged weights are preferred. mmengine writes them into `state_dict` and the plain ones into `ema_state_dict`.
    """
    entry, notes = "the file itself", []
    for _ in range(3):  # a wrapper may be in a wrapper
        averaged = next((k for k in AVERAGED if isinstance(contents.get(k), dict)), None)
        plain = next((k for k in PLAIN if isinstance(contents.get(k), dict)), None)
        if plain and isinstance(contents.get("ema_state_dict"), dict):
            averaged, plain = plain, "ema_state_dict"
        chosen = (averaged or plain) if ema else (plain or averaged)
        if chosen is None:
            break
        if averaged and plain:
            kept, other = (
                ("averaged", "--no-ema takes the others") if ema else ("plain", "without --no-ema the averaged")
            )
            notes.append(f"`{averaged}` (averaged) and `{plain}` (plain): the {kept} weights are taken; {other}")
        entry, contents = chosen, contents[chosen]
    state = {str(k): v for k, v in contents.items() if isinstance(v, Tensor)}
    everything = len(state)
    for prefix in ("module.", "_orig_mod.", "student.", "module."):
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = inside or state  # beside `student.` stand `teacher.`, projectors and `steps`
    if not state:
        raise UserError(f"{file} holds no named tensors: {shortened(', '.join(map(str, contents)) or 'it is empty')}")
    return Found(state, entry, everything - len(state), notes)


# ---------------------------------------------------------------- names


def recognise(state: State) -> str:
    return next((naming for naming, key in SIGNS.items() if key in state), TIMM)


def renamed(found: Found, naming: str, spec: Model, file: Path) -> tuple[State, list[str], dict[str, Any]]:
    """(tensors under timm's names, keys that no rule knows, arguments that the tensors ask for).

    The user's own arguments, `spec.kwargs`, decide where a file fits two models. Adds to `found.notes`.
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
            found.notes.append(f"left out: {printable(key)} and its like: {reason}")
        elif not reason:
            left.append(key)
    kwargs = dict(KWARGS.get(naming, {}))
    for name, default in kwargs.items():
        if name not in chosen:
            found.notes.append(
                f"assumed, as the tensors do not tell: {name}={default}; --kwargs '{{{name}: ...}}' changes it"
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
    """The last dimension, 4C, from the order of nn.Unfold (channel, row, column) to timm's (column, row, channel).

    It holds the 2x2 neighbours that a Swin merges: weight and bias of the norm (4C) and the reduction (2C, 4C).
    """
    if value.shape[-1] % 4:
        return value  # of no merging; the check tells its shape
    channels = value.shape[-1] // 4
    return value.unflatten(-1, (channels, 2, 2)).movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3).contiguous()


def vit_kwargs(state: State, chosen: dict[str, Any], notes: list[str], file: Path) -> dict[str, Any]:
    """Class token and final norm. Takes out of `state` what mmclassification keeps of a class token that is not used.

    Without a class token it still has the parameter, at its initial zeros, and a row for it in the position table.
    """
    if "norm.weight" in state and "fc_norm.weight" in state:
        raise UserError(
            f"{file} is a ViT with a norm before the average over its tokens and another after it (ln1, ln2); "
            "timm's has one of them, so it is not imported"
        )
    after = "fc_norm.weight" in state
    token = state.get("cls_token")
    if chosen.get("class_token", token is not None and bool(token.any())):
        return {"class_token": True} | ({"global_pool": "avg", "fc_norm": True} if after else {})
    positions = state.get("pos_embed")
    if token is not None:
        del state["cls_token"]
        notes.append("left out: cls_token, which is not used (it is all zeros), and its row of pos_embed")
        if positions is not None and math.isqrt(positions.shape[1] - 1) ** 2 == positions.shape[1] - 1:
            state["pos_embed"] = positions[:, 1:].contiguous()
    return {"class_token": False, "global_pool": "avg", "fc_norm": after}


# ---------------------------------------------------------------- the model that fits


def mixer_sizes(model_name: str, state: State) -> dict[str, Any]:
    """The sizes of `mlp_mixer`, which has none of its own."""
    if model_name != "mlp_mixer" or "stem.proj.weight" not in state:
        return {}
    width, _, patch, _ = state["stem.proj.weight"].shape
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    return {"patch_size": patch, "embed_dim": width, "num_blocks": len(blocks)}


def image_size(state: State, model_name: str, given: dict[str, Any]) -> tuple[int, int]:
    """(height, width) that the student was made for: given, or from tokens and patches, or timm's for the name.

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
    """The rows of the classifier. Raises `UserError` if the file has none under the model's name for it."""
    cfg = timm.get_pretrained_cfg(model_name)
    names = (cfg and cfg.classifier) or "head"
    name = names if isinstance(names, str) else names[0]
    # some files are named as timm's models once were, or as the models that timm's are made after
    heads = [f"{n}.weight" for n in (name, name.split(".")[0]) if f"{n}.weight" in state]
    if not heads:
        raise UserError(
            f"{file} has no {name}.weight, the classifier of {model_name}; it has {shortened(', '.join(state), 200)}.\n"
            "Name the model that the weights were made with, and give the file of the whole classifier."
        )
    return len(state[heads[0]])


def adapted(state: State, student: nn.Module) -> State:
    """Through timm's own filter for older names. Raises `UserError` where that would resize a tensor."""
    try:
        new = through_timm(dict(state), student)
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError, TypeError):
        return state  # of another model; `check` tells how
    resized = [k for k in state.keys() & new.keys() if state[k].shape != new[k].shape and state[k].ndim > 1]
    return new | {k: state[k] for k in resized}  # `check` tells their shapes


def check(student: nn.Module, state: State, left: list[str], what: str) -> None:
    """Every tensor of the student is in `state` with its shape, and nothing is left over. Raises `UserError`."""
    wanted = student.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted([*left, *(state.keys() - wanted.keys())])
    shapes = [
        f"{k} is {tuple(state[k].shape)} in the file, {tuple(wanted[k].shape)} in the model"
        for k in sorted(wanted.keys() & state.keys())
        if wanted[k].shape != state[k].shape
    ]
    told = [
        f"{len(names)} {kind}: " + printable(", ".join(names[:MOST_NAMES])) + ", ..." * (len(names) > MOST_NAMES)
        for kind, names in (("missing", missing), ("left over", extra), ("of another shape", shapes))
        if names
    ]
    if told:
        remedy = "Name the model that the weights were made with; --kwargs gives arguments of it."
        raise UserError("\n".join([f"{what}:", *told, remedy]))


# ---------------------------------------------------------------- the card


def preprocessing(student: nn.Module, naming: str) -> dict[str, Any]:
    """How images reach the student in `evaluate`: timm's for its own names, else the ScaleKD configs'."""
    if naming == TIMM:
        own = resolve_model_data_config(student)
        return {
            k: list(own[k]) if k in ("mean", "std") else own[k] for k in ("mean", "std", "interpolation", "crop_pct")
        }
    # short edge 256, centre 224
    mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    return {"mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 0.875}
