"""ScaleKD (Fan et al., NeurIPS 2024, arXiv:2411.06786): one class with all parts of the paper.

Recipes use the functions in `scalekd_forms.py`, each with the options that apply to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalekd.models.stages import Features, Shapes

from .distance import ALPHA, Reduction, normalized_distance, only_direct, remove_direct
from .projectors import SOFTMAX_SCALE, CrossAttentionProjector, Norm, Tokens
from .shared import check_choice, check_features, check_positions, check_positive, full_precision

BETA = 0.571  # released configurations: 0.08 / (0.08 + 0.06); the paper's best is 0.6 (Fig. 4)

StudentViews = Literal["both", "first"]

VIEWS = {  # names of the views; the first has weight beta, the second 1 - beta
    "single": ("ori",),
    "dual_path": ("ori", "ori2"),
    "all_alt": ("ori", "alt"),
    "dir_alt": ("dir", "alt"),
}
SHARED = "both"  # name of a CAP that serves both views
TRANSFORMS = {"ori": full_precision, "ori2": full_precision, "alt": remove_direct, "dir": only_direct}


class ScaleKD(nn.Module):
    """Match the teacher's final map, in up to two views and along up to two paths.

    Student path (eq. 1): student stage 4 -> CAP. Proxy path (`tpp`, eq. 4): student stage 3 -> CAP with
    learned queries, shaped like teacher stage 3 -> the teacher's own frozen last stage. Both are compared
    with the teacher's final map by `normalized_distance`. Every view has its own CAPs (eq. 3), and all views go
    through the teacher's last stage as one batch. Terms: `ori`, `alt`, ... by view for the student path, `proxy_ori`,
    ... for the proxy path.

    Args:
        views: `single`: the original features. `all_alt` (DFM): the original features, and the features
            without direct component. `dir_alt` (Table 17): the direct component alone, and the features
            without it. `dual_path` (Table 9c): the original features twice.
        tpp: add the proxy path.
        adaptive_queries: the proxy path's output, not detached, is the query of the student path's CAP
            (Table 9d). Otherwise that CAP has learned queries. With `tpp` only; None means True.
        alpha: weight of each path. Default 0.14 (released configurations; the paper's text says 1).
        beta: weight of the first view, in [0, 1]; the second has 1 - beta. A view with weight 0 is not built. With two
            views only; None means 0.571 (released configurations; the paper says 0.6).
        heads: attention heads of the CAPs at (stage 3, stage 4) with `tpp`, otherwise at (stage 4,). None: a head size
            as close to 64 as possible. The authors use: Swin-S 3, 6; Swin-B 8, 16; Swin-L 16, 24, and 8, 8
            for a ViT-B student.
        norm: norm of the CAPs' student branch; the released configuration of Swin-T has `layer`.
        reduction: `mean` (default): 49 x the mean over positions, so that the released `alpha` is valid on any grid.
            `sum`: the sum over positions, as released; the same at 7x7.
        tokens: convolution from the student's map to the tokens of the CAPs, see `make_tokens`. Default `conv`, as
            released.
        expansion: hidden channels of the CAPs' feed-forward block, as a multiple of the teacher's. Default 4, as
            released.
        shared: one CAP per path serves both views, which halves the cost of the method. Default False: eq. 3 has one
            for each view. With two different views only.
        attention_scale: factor of the CAPs' attention logits. Default 5; released configurations have 5, 1 or 0.2.
        norm_eps: eps of that norm. None: 1e-5 for `batch`, 1e-6 for `layer`; the release has 1e-5 for both.
        student_norm: False takes the student's stage 4 before its final norm, as the released configurations of Mixers.
            Default True. No effect for students without a norm there, such as ResNets.
        teacher_norm: False takes the teacher's stage 4 before its final norm, as target and as the end of the proxy
            path, as the released configurations of BEiT teachers. Default True.
        student_views: `first`: the student path has the first view only, as in the released configurations of Swin-S.
            The proxy path keeps both. Default `both`. With `tpp` and two views only.
        skip: the CAPs add a linear projection of the student's own position to their output. Default False, as
            published.
        grad_checkpointing: use less memory and more time. Activations after the CAPs' convolutions and in the teacher's
            last stage are computed again in the backward pass, view by view. The values are the same. Default False.

    `tokens`, `expansion` and `shared` can make the method cheaper than published (costs in
    docs/explanation/performance-tables.md). The published form is the default of this class, but not of `scalekd`.

    Raises:
        ValueError: no teacher; a model without maps; `tpp` with a teacher whose last stage cannot be run alone; a
            student's map of one position; a view without direct component on a teacher's 1x1 grid; an option that is
            out of range or would be ignored.
    """

    def __init__(
        self,
        student: Shapes,
        teacher: Shapes | None,
        *,
        views: Literal["single", "dual_path", "all_alt", "dir_alt"] = "all_alt",
        tpp: bool = True,
        adaptive_queries: bool | None = None,
        alpha: float = ALPHA,
        beta: float | None = None,
        heads: tuple[int, ...] | None = None,
        norm: Norm = "batch",
        reduction: Reduction = "mean",
        tokens: Tokens = "conv",
        expansion: int = 4,
        shared: bool = False,
        attention_scale: float = SOFTMAX_SCALE,
        norm_eps: float | None = None,
        student_norm: bool = True,
        teacher_norm: bool = True,
        student_views: StudentViews = "both",
        skip: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        teacher = check_features(student, teacher)
        check_positive("ScaleKD", alpha=alpha)
        check_choice("ScaleKD", "reduction", reduction, ("mean", "sum"))
        check_choice("ScaleKD", "student_views", student_views, ("both", "first"))
        self.weights = view_weights(views, alpha, beta)
        _check_path(student, teacher, views, tpp, adaptive_queries)
        _check_views(teacher, self.weights)
        _check_heads(heads, tpp)
        _check_two(views, self.weights, shared, student_views == "first", tpp)
        self.adaptive = tpp and adaptive_queries is not False
        self.reduction: Reduction = reduction
        self.grad_checkpointing = grad_checkpointing
        heads_3, heads_4 = (None, None) if heads is None else (heads[0], heads[-1])
        build = partial(
            CrossAttentionProjector,
            norm=norm,
            tokens=tokens,
            expansion=expansion,
            attention_scale=attention_scale,
            norm_eps=norm_eps,
            skip=skip,
            grad_checkpointing=grad_checkpointing,
        )
        self.student_norm, self.teacher_norm = student_norm, teacher_norm
        self.cap_of = {view: SHARED if shared else view for view in self.weights}
        self.student_path = tuple(self.weights)[: 1 if student_views == "first" else None]  # the views of that path
        ends = _stage_4(student, student_norm), _stage_4(teacher, teacher_norm)
        of_student = partial(build, *ends, heads=heads_4, learned_queries=not self.adaptive)
        of_proxy = partial(build, student.maps[2], teacher.maps[2], heads=heads_3)
        keys = dict.fromkeys(self.cap_of[view] for view in self.student_path)
        self.student_caps = nn.ModuleDict({key: of_student() for key in keys})
        keys = dict.fromkeys(self.cap_of.values() if tpp else ())
        self.proxy_caps = nn.ModuleDict({key: of_proxy() for key in keys})

    def forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]:
        """One scalar per view and path, with weights applied. The targets are not used."""
        assert teacher is not None
        proxies = self._proxies(student, teacher)
        stage_4 = _stage_4(student, self.student_norm)
        mimics = {key: cap(stage_4, proxies[key] if self.adaptive else None) for key, cap in self.student_caps.items()}
        losses = {}
        for view, weight in self.weights.items():
            transform, key = TRANSFORMS[view], self.cap_of[view]
            target = transform(_stage_4(teacher, self.teacher_norm).detach())
            if view in self.student_path:
                losses[view] = weight * normalized_distance(transform(mimics[key]), target, self.reduction)
            if proxies:
                distance = normalized_distance(transform(proxies[key]), target, self.reduction)
                losses[f"proxy_{view}"] = weight * distance
        return losses

    def _proxies(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        """The final map of the proxy path, `(B, dt, H, W)`, for each of its CAPs; empty without `tpp`."""
        if not self.proxy_caps:
            return {}
        assert teacher.resume is not None
        maps = {key: cap(student.maps[2]) for key, cap in self.proxy_caps.items()}
        if self.grad_checkpointing and torch.is_grad_enabled():
            # one pass per view, so that only one view's activations are recomputed at a time; the teacher is not random
            run_on = partial(checkpoint, teacher.resume, 3, use_reentrant=False, preserve_rng_state=False)
            return {key: run_on(stage_3, end=self.teacher_norm) for key, stage_3 in maps.items()}
        final = teacher.resume(3, torch.cat(list(maps.values())), end=self.teacher_norm)  # one pass for all views
        return dict(zip(maps, final.chunk(len(maps)), strict=True))


def _stage_4(model: Shapes | Features, norm: bool) -> Any:
    """The map of stage 4, or its shape, after or before the model's final norm."""
    return model.final if norm else model.maps[3]


def _check_path(student: Shapes, teacher: Shapes, views: str, tpp: bool, adaptive_queries: bool | None) -> None:
    """Raises ValueError if the paths cannot be built for these models."""
    if tpp and not teacher.can_resume:
        name, instead = ("tpp", "cap") if views == "single" else ("scalekd", "dfm")
        raise ValueError(
            f"{name} runs the teacher's last stage alone, which is not supported for {teacher.model} "
            f"(`scalekd docs methods`).\nThe same method without that stage: losses.{name}=off losses.{instead}={{}}"
        )
    check_positions(student, (3, 4) if tpp else (4,))
    if adaptive_queries is not None and not tpp:
        raise ValueError("adaptive_queries is an option with tpp only")


def _check_views(teacher: Shapes, weights: dict[str, float]) -> None:
    assert teacher.final is not None
    if "alt" in weights and teacher.final[1] * teacher.final[2] == 1:
        raise ValueError(
            f"{teacher.model} has a 1x1 final map, which is 0 without its direct component. "
            "Use a larger image size, or cap or tpp"
        )


def _check_two(views: str, weights: dict[str, float], shared: bool, first: bool, tpp: bool) -> None:
    """Raises ValueError for options that need two views, and for `student_views: first` without the proxy path."""
    if shared and not can_share(views, weights):
        raise ValueError("shared needs two different views")
    if first and not (tpp and len(weights) == 2):
        raise ValueError("student_views: first needs the proxy path and two views with a weight")


def _check_heads(heads: tuple[int, ...] | None, tpp: bool) -> None:
    if heads is not None and len(heads) != (2 if tpp else 1):
        raise ValueError(f"heads is {list(heads)}; give (stage 3, stage 4) with tpp, otherwise (stage 4,)")


def view_weights(views: str, alpha: float, beta: float | None) -> dict[str, float]:
    """The weight of each view with a positive weight. Raises ValueError."""
    if views not in VIEWS:
        raise ValueError(f"views is {views!r}; choose from {', '.join(VIEWS)}")
    if views == "single":
        if beta is not None:
            raise ValueError("beta is an option with two views only")
        return {"ori": alpha}
    beta = BETA if beta is None else beta
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta} and must be in [0, 1]")
    first, second = VIEWS[views]
    weights = {first: alpha * beta, second: alpha * (1 - beta)}
    return {view: weight for view, weight in weights.items() if weight > 0}


def can_share(views: str, weights: dict[str, float]) -> bool:
    """Whether there are two different views, which one CAP can serve."""
    return len(weights) == 2 and views != "dual_path"
