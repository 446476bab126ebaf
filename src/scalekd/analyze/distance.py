"""How far a student's alternative components are from its teacher's: `scalekd analyze distance`, docs/how-to/analyze.md.

ScaleKD's Figures 3 and 6: "feature distance distributions of alternative components for the last stage features". The
alternative component of a map is the map without its direct component: DCT, zero at (0, 0), inverse DCT, which is the
map less each channel's mean over positions. Then each position's vector is scaled to length 1, as in the method's loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder, write_text
from scalekd.common.markdown import table_row
from scalekd.methods.distance import EPS, remove_direct
from scalekd.methods.projectors import Resample
from scalekd.models.stages import Features

from .distance_figures import draw_distances, draw_projection
from .figures import figure_class, write_csv, write_figure
from .runs import Runs, Trained, open_runs, projector_calls

STRENGTH = 1e-3  # of the ridge
POINTS = 500  # images drawn, at most
NUMBERS = 2**25  # that the drawn images' maps may hold, for each run and space: 128 MiB
LINEAR = "linear map"  # the space that is the same for all runs

# ---------------------------------------------------------------- the distance


def directions(maps: Tensor) -> Tensor:
    """The alternative component of maps (B, D, H, W), each position's vector scaled to length 1, or 0 if it is 0.

    In float64: what rounding leaves of a map that is the same everywhere must not count as a direction.
    """
    return F.normalize(remove_direct(maps.double()), dim=1, eps=EPS)


def distances(a: Tensor, t: Tensor) -> Tensor:
    """(B,): the squared distance of the `directions` of maps (B, D, H, W), averaged over positions; 2 - 2 cos.

    0: the same directions; 2: unrelated; 4: opposite. A position without direction on one side counts 1.
    """
    return (directions(a) - directions(t)).square().sum(1).mean((1, 2))


class LinearMap:
    """The linear map, the same at all positions, that takes one model's alternative components to another's.

    Least squares with a ridge, over what was added. It needs no training, so it serves every run alike.
    """

    def __init__(self) -> None:
        self.xx: Any = 0.0  # (ds, ds)
        self.xy: Any = 0.0  # (ds, dt)

    def add(self, maps: Tensor, target: Tensor) -> None:
        """Student maps (B, ds, h, w) and teacher maps (B, dt, H, W)."""
        x, y = by_position(alternative(maps, target)), by_position(remove_direct(target))
        self.xx = self.xx + x.T @ x
        self.xy = self.xy + x.T @ y

    def fit(self) -> Tensor:
        """(ds, dt)"""
        return solve_ridge(self.xx, self.xy, STRENGTH)


def alternative(maps: Tensor, target: Tensor) -> Tensor:
    """The alternative component of `maps` on the grid of `target`, in float64."""
    return remove_direct(Resample((target.shape[2], target.shape[3]))(maps.double()))


def mapped(maps: Tensor, target: Tensor, fitted: Tensor) -> Tensor:
    """Student maps (B, ds, h, w) on the grid of `target` and through the linear map (ds, dt): (B, dt, H, W)."""
    return torch.einsum("bdhw,de->behw", alternative(maps, target), fitted)


def by_position(maps: Tensor) -> Tensor:
    """(B, D, H, W) to (B * H * W, D), in float64."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2).double()


def solve_ridge(xx: Tensor, xy: Tensor, strength: float) -> Tensor:
    """The W that makes |x W - y|^2 + strength * mean(x^2) * n * |W|^2 least. xx: x'x; xy: x'y; n: rows of x."""
    ridge = strength * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return torch.linalg.solve(xx + ridge, xy)


# ---------------------------------------------------------------- runs


@torch.no_grad()
def analyze(
    folders: Sequence[Path],
    data: str | None,
    images: int | None,
    device: torch.device,
    *,
    batch: int = 32,
    out: Path | None = None,
) -> dict[str, Any]:
    """Distances of the runs' students from their teacher, over the same images, and points in a plane.

    data, images: see `open_runs`. out: where the figures are to go, asked for here so that a missing package is told
    at once. Raises `UserError`.
    """
    if out is not None:
        figure_class()
    runs = open_runs(folders, data, images, batch, device)
    if len(runs.images) < 2:
        raise UserError("a linear map is fitted on half of the images: --images 2 or more")
    teacher = runs.teacher.view
    for view in (teacher, *(t.student.view for t in runs.trained)):
        if view.refusal or view.shapes.final is None:
            raise UserError(str(view.refusal))
        if view.shapes.final[1:] == (1, 1):
            raise UserError(f"{view.name}: its last map has one position, so nothing but the direct component")
    measured, kept = _measured(runs)
    found = [_summary(t, measured[t.label]) for t in runs.trained]
    own = all(run["own"] for run in found)
    space = {run["run"]: run["own"] if own else LINEAR for run in found}
    return runs.known() | {
        "runs": _beside_first(found, measured),
        "distances": {t.label: {s: v.tolist() for s, v in measured[t.label].items()} for t in runs.trained},
        "image_names": [runs.images.source.where(i) for i in runs.images.indices],
        "projection": _projection(kept, space),
    }


def _measured(runs: Runs) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """By run and space: distances (images,); and the directions of the first images, flat, beside the teacher's."""
    fitted = _linear_maps(runs)
    final = runs.teacher.view.shapes.final
    assert final is not None
    points = min(POINTS, NUMBERS // math.prod(final))
    measured: dict[str, dict[str, list[Tensor]]] = {t.label: {} for t in runs.trained}
    kept: dict[str, dict[str, list[Tensor]]] = {t.label: {} for t in runs.trained} | {"teacher": {"": []}}
    done = 0
    for pixels, _ in runs.batches():
        teacher = runs.teacher.features(pixels)
        assert teacher.final is not None
        draw = max(0, min(len(pixels), points - done))
        kept["teacher"][""].append(_flat(teacher.final[:draw]))
        for t in runs.trained:
            for space, maps in _spaces(t, pixels, teacher, fitted[t.label], done).items():
                measured[t.label].setdefault(space, []).append(distances(maps, teacher.final).cpu())
                kept[t.label].setdefault(space, []).append(_flat(maps[:draw]))
        done += len(pixels)
    whole = [{run: {s: torch.cat(v) for s, v in of.items()} for run, of in all_.items()} for all_ in (measured, kept)]
    return whole[0], whole[1]


def _linear_maps(runs: Runs) -> dict[str, list[Tensor]]:
    """By run: the map for images of even place in the order, fitted on those of odd place, and the other way round."""
    halves = {t.label: [LinearMap(), LinearMap()] for t in runs.trained}
    done = 0
    for pixels, _ in runs.batches():
        target = runs.teacher.features(pixels).final
        assert target is not None
        even = (done + torch.arange(len(pixels), device=pixels.device)) % 2 == 0
        for t in runs.trained:
            maps = t.student.features(pixels).final
            assert maps is not None
            halves[t.label][0].add(maps[~even], target[~even])
            halves[t.label][1].add(maps[even], target[even])
        done += len(pixels)
    return {label: [half.fit() for half in of_run] for label, of_run in halves.items()}


def _spaces(t: Trained, pixels: Tensor, teacher: Features, fitted: list[Tensor], done: int) -> dict[str, Tensor]:
    """The student's maps, shaped like the teacher's final map, by the space they are compared in."""
    student = t.student.features(pixels)
    assert student.final is not None and teacher.final is not None
    calls = projector_calls(t.methods, student, teacher)
    maps = {name: call.output for name, call in calls.items() if call.stage == 4}
    both = [mapped(student.final, teacher.final, w) for w in fitted]
    odd = (done + torch.arange(len(pixels), device=pixels.device)) % 2 == 1
    return maps | {LINEAR: torch.where(odd[:, None, None, None], both[1], both[0])}


def _flat(maps: Tensor) -> Tensor:
    """(B, D, H, W) to (B, D * H * W), scaled so that squared distances of rows are the `distances` of the maps."""
    return directions(maps).flatten(1).float().cpu() / math.sqrt(maps.shape[2] * maps.shape[3])


# ---------------------------------------------------------------- summaries and planes


def _summary(t: Trained, of_run: dict[str, Tensor]) -> dict[str, Any]:
    """own: the space of the run's own projector; of several, that of the view without direct component."""
    own = [space for space in of_run if space != LINEAR]
    chosen = next((space for space in own if space.endswith(".alt")), own[0] if own else None)
    return t.known() | {"own": chosen, "spaces": {space: statistics(values) for space, values in of_run.items()}}


def statistics(values: Tensor) -> dict[str, float]:
    v = values.double().numpy()
    quantiles = np.quantile(v, [0.05, 0.25, 0.5, 0.75, 0.95])
    names = ("q05", "q25", "median", "q75", "q95")
    spread = float(v.std(ddof=1)) if len(v) > 1 else 0.0
    return {"mean": float(v.mean()), "std": spread} | dict(zip(names, quantiles.tolist()))


def _beside_first(found: list[dict[str, Any]], measured: dict[str, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Adds `nearer_than_first`, by kind of space: the % of images that are nearer than in the first run."""
    first = found[0]
    for run in found[1:]:
        run["nearer_than_first"] = {}
        for kind, mine, theirs in (("own", run["own"], first["own"]), ("linear", LINEAR, LINEAR)):
            if mine and theirs:
                nearer = measured[run["run"]][mine] < measured[first["run"]][theirs]
                run["nearer_than_first"][kind] = 100 * float(nearer.double().mean())
    return found


def _projection(kept: dict[str, dict[str, Tensor]], space: dict[str, str]) -> dict[str, Any]:
    """Points in two planes. `differences`: student less teacher, all runs together, not centred, so that (0, 0) is no
    distance. `features`: the teacher's own plane, centred at its mean, with the students in it."""
    teacher = kept["teacher"][""]
    students = {run: kept[run][chosen] for run, chosen in space.items()}
    differences = {run: points - teacher for run, points in students.items()}
    plane, shares = principal_plane(torch.cat(list(differences.values())))
    centre = teacher.mean(0)
    own_plane, own_shares = principal_plane(teacher - centre)
    seen = {"teacher": teacher} | students
    return {
        "method": "PCA: the two directions of largest variance, by singular value decomposition",
        "images": len(teacher),
        "space": space,
        "differences": {"share": shares, "points": {run: (d @ plane).tolist() for run, d in differences.items()}},
        "features": {
            "share": own_shares,
            "points": {who: ((p - centre) @ own_plane).tolist() for who, p in seen.items()},
        },
    }


def principal_plane(x: Tensor) -> tuple[Tensor, list[float]]:
    """Rows x (M, K) to the two right singular vectors (K, 2) of the largest values, and their shares of the energy.

    By way of the M x M matrix of inner products, as K may be a hundred thousand. Signs: the row with the largest
    coordinate has a positive one.
    """
    gram = (x @ x.T).double()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:2].clamp(min=0), vectors.flip(1)[:, :2]
    strongest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(strongest < 0, -1.0, 1.0)
    whole = gram.diagonal().sum().clamp(min=torch.finfo(torch.float64).tiny)
    plane = x.T @ (vectors / values.sqrt().clamp(min=torch.finfo(torch.float64).tiny)).to(x.dtype)
    return plane, (values / whole).tolist()


# ---------------------------------------------------------------- what is shown and written


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("run", "space", "median", "mean", "middle half", "nearer"):
        is_name = column in ("run", "space")
        table.add_column(column, overflow="fold", no_wrap=not is_name, justify="left" if is_name else "right")
    for cells in _rows(found):
        table.add_row(*cells)
    console.print(table, markup=False, highlight=False)
    console.print("", *_notes(found), sep="\n", markup=False, highlight=False, soft_wrap=True)


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for run in found["runs"]:
        for space, s in run["spaces"].items():
            nearer = run.get("nearer_than_first", {}).get("linear" if space == LINEAR else "own")
            told = f"{nearer:.0f} %" if nearer is not None and space in (run["own"], LINEAR) else ""
            middle = f"{s['q25']:.4f} to {s['q75']:.4f}"
            rows.append([run["run"], space, f"{s['median']:.4f}", f"{s['mean']:.4f}", middle, told])
    return rows


def _notes(found: dict[str, Any]) -> list[str]:
    notes = [
        "Squared distance of the alternative components' directions, averaged over positions, by image: 0 the same, "
        "2 unrelated.",
        f"Space: METHOD.VIEW is the run's own projector; {LINEAR}: one fitted to the teacher on other images.",
    ]
    if len(found["runs"]) > 1:
        notes.append(f"nearer: images on which the student is nearer to the teacher than {found['runs'][0]['run']}'s.")
    notes += [
        f"{run['run']} is not finished: step {run['step']} of {run['of_steps']}."
        for run in found["runs"]
        if run["step"] < run["of_steps"]
    ]
    return [*notes, f"{found['images']} of {found['of_images']} images of {found['data']}."]


def write(found: dict[str, Any], folder: Path) -> None:
    """results.json, summary.md, and the data and pictures of distances and projection. Raises `UserError`."""
    make_folder(folder)
    plain = {key: value for key, value in found.items() if key not in ("distances", "image_names")}
    plain["projection"] = {
        key: value if key not in ("differences", "features") else {"share": value["share"]}
        for key, value in found["projection"].items()
    }
    write_text(folder / "results.json", json.dumps(plain, indent=2) + "\n")
    write_text(folder / "summary.md", markdown(found))
    rows = (
        [run, space, name, value]
        for run, spaces in found["distances"].items()
        for space, values in spaces.items()
        for name, value in zip(found["image_names"], values)
    )
    write_csv(folder / "distance.csv", ["run", "space", "image", "distance"], rows)
    points = (
        [panel, who, name, x, y]
        for panel in ("differences", "features")
        for who, xy in found["projection"][panel]["points"].items()
        for name, (x, y) in zip(found["image_names"], xy)
    )
    write_csv(folder / "projection.csv", ["panel", "of", "image", "x", "y"], points)
    write_figure(draw_distances(found, LINEAR), folder, "distance")
    write_figure(draw_projection(found), folder, "projection")


def markdown(found: dict[str, Any]) -> str:
    p = found["projection"]
    lines = [
        f"# Distance of alternative components from {found['teacher']}",
        "",
        "| run | space | median | mean | middle half | nearer |",
        "|---|---|---|---|---|---|",
        *map(table_row, _rows(found)),
        "",
        *(f"- {note}" for note in _notes(found)),
        f"- projection.png: {p['method']}; of {p['images']} images, drawn with seed {found['order_seed']}. Left: student "
        f"less teacher, not centred; the plane holds {100 * sum(p['differences']['share']):.0f} % of the squared "
        f"distances. Right: the teacher's plane, {100 * sum(p['features']['share']):.0f} % of its variance.",
        "",
        "![Distances](distance.png)",
        "![Projection](projection.png)",
    ]
    return "\n".join(lines) + "\n"
