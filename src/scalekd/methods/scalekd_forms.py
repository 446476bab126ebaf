"""`cap`, `dfm`, `tpp` and `scalekd`: the parts of ScaleKD by name, each with the options that apply to it."""

from __future__ import annotations

from typing import Literal

from scalekd.models.stages import Shapes

from .distance import ALPHA, Reduction
from .projectors import SOFTMAX_SCALE, Norm, Tokens
from .scalekd import BETA, ScaleKD, StudentViews, can_share, view_weights

TwoViews = Literal["dual_path", "all_alt", "dir_alt"]


def cap(
    student: Shapes,
    teacher: Shapes | None,
    *,
    alpha: float = ALPHA,
    heads: int | None = None,
    norm: Norm = "batch",
    reduction: Reduction = "mean",
    tokens: Tokens = "conv",
    expansion: int = 4,
    attention_scale: float = SOFTMAX_SCALE,
    norm_eps: float | None = None,
    student_norm: bool = True,
    teacher_norm: bool = True,
    skip: bool = False,
    grad_checkpointing: bool = False,
) -> ScaleKD:
    """`cap`: match stage 4 through a cross attention projector (eq. 1).

    `heads`: number of heads of that CAP. For the other options see `ScaleKD`.
    """
    return ScaleKD(
        student,
        teacher,
        views="single",
        tpp=False,
        alpha=alpha,
        heads=None if heads is None else (heads,),
        norm=norm,
        reduction=reduction,
        tokens=tokens,
        expansion=expansion,
        attention_scale=attention_scale,
        norm_eps=norm_eps,
        student_norm=student_norm,
        teacher_norm=teacher_norm,
        skip=skip,
        grad_checkpointing=grad_checkpointing,
    )


def dfm(
    student: Shapes,
    teacher: Shapes | None,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    views: TwoViews = "all_alt",
    heads: int | None = None,
    norm: Norm = "batch",
    reduction: Reduction = "mean",
    tokens: Tokens = "conv",
    expansion: int = 4,
    attention_scale: float = SOFTMAX_SCALE,
    norm_eps: float | None = None,
    student_norm: bool = True,
    teacher_norm: bool = True,
    shared: bool = False,
    skip: bool = False,
    grad_checkpointing: bool = False,
) -> ScaleKD:
    """`dfm`: `cap` in two views (eq. 3).

    `heads`: number of heads of each CAP. For the other options see `ScaleKD`.
    """
    _check_two_views("dfm", views)
    return ScaleKD(
        student,
        teacher,
        views=views,
        tpp=False,
        alpha=alpha,
        beta=beta,
        heads=None if heads is None else (heads,),
        norm=norm,
        reduction=reduction,
        tokens=tokens,
        expansion=expansion,
        attention_scale=attention_scale,
        norm_eps=norm_eps,
        student_norm=student_norm,
        teacher_norm=teacher_norm,
        shared=shared,
        skip=skip,
        grad_checkpointing=grad_checkpointing,
    )


def tpp(
    student: Shapes,
    teacher: Shapes | None,
    *,
    alpha: float = ALPHA,
    adaptive_queries: bool = True,
    heads: tuple[int, int] | None = None,
    norm: Norm = "batch",
    reduction: Reduction = "mean",
    tokens: Tokens = "conv",
    expansion: int = 4,
    attention_scale: float = SOFTMAX_SCALE,
    norm_eps: float | None = None,
    student_norm: bool = True,
    teacher_norm: bool = True,
    skip: bool = False,
    grad_checkpointing: bool = False,
) -> ScaleKD:
    """`tpp`: `cap` and the proxy path, in one view (eq. 4).

    `heads`: (stage 3, stage 4). For the other options see `ScaleKD`.
    """
    return ScaleKD(
        student,
        teacher,
        views="single",
        tpp=True,
        adaptive_queries=adaptive_queries,
        alpha=alpha,
        heads=heads,
        norm=norm,
        reduction=reduction,
        tokens=tokens,
        expansion=expansion,
        attention_scale=attention_scale,
        norm_eps=norm_eps,
        student_norm=student_norm,
        teacher_norm=teacher_norm,
        skip=skip,
        grad_checkpointing=grad_checkpointing,
    )


def scalekd(
    student: Shapes,
    teacher: Shapes | None,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    views: TwoViews = "all_alt",
    adaptive_queries: bool = True,
    heads: tuple[int, int] | None = None,
    norm: Norm = "batch",
    reduction: Reduction = "mean",
    tokens: Tokens = "conv",
    expansion: int = 1,
    shared: bool | None = None,
    attention_scale: float = SOFTMAX_SCALE,
    norm_eps: float | None = None,
    student_norm: bool = True,
    teacher_norm: bool = True,
    student_views: StudentViews = "both",
    skip: bool = False,
    grad_checkpointing: bool = False,
) -> ScaleKD:
    """`scalekd`: CAP, DFM and TPP (eq. 5 without its task and KD terms); by default one narrow projector for each path.

    By default `expansion` is 1, and `shared` is True if there are two different views. This teaches as well as the
    published form (docs/explanation/laboratory.md) at less than half of its added cost
    (docs/explanation/performance-tables.md). The published form is `shared=False, expansion=4`, as in the recipes for the
    paper's rows. For the options see `ScaleKD`.
    """
    _check_two_views("scalekd", views)
    if shared is None:
        shared = can_share(views, view_weights(views, alpha, beta))
    return ScaleKD(
        student,
        teacher,
        views=views,
        tpp=True,
        adaptive_queries=adaptive_queries,
        alpha=alpha,
        beta=beta,
        heads=heads,
        norm=norm,
        reduction=reduction,
        tokens=tokens,
        expansion=expansion,
        attention_scale=attention_scale,
        norm_eps=norm_eps,
        student_norm=student_norm,
        teacher_norm=teacher_norm,
        student_views=student_views,
        shared=shared,
        skip=skip,
        grad_checkpointing=grad_checkpointing,
    )


def _check_two_views(method: str, views: str) -> None:
    if views == "single":
        raise ValueError(f"{method} needs two views. For one view, use {'cap' if method == 'dfm' else 'tpp'}")
