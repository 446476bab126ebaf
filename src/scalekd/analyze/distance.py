"""Measures how far students' alternative components are from their teacher's: `scalekd analyze distance`.

ScaleKD's Figures 3 and 6: "feature distance distributions of alternative components for the last stage features". The
alternative component of a map is the map without its direct component: DCT, zero at (0, 0), inverse DCT. This subtracts
each channel's mean over positions. The vector of each position is then scaled to length 1, as in the method's loss.
docs/how-to/analyze.md.
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
from .tables import closing_notes, print_table

STRENGTH = 1e-3  # of the ridge
POINTS = 500  # images in the projection, at most
NUMBERS = 2**25  # floats that the maps of these images may take per run and space: 128 MiB
LINEAR = "linear map"  # the space that every run has

# ---------------------------------------------------------------- the distance


def directions(maps: Tensor) -> Tensor:
    """The alternative component of maps (B, D, H, W), with the vector of each position scaled to length 1, or 0.

    In float64, because rounding errors of a constant map must not count as a direction.
    """
    return F.normalize(remove_direct(maps.double()), dim=1, eps=EPS)


def distances(a: Tensor, t: Tensor) -> Tensor:
    """The squared distances (B,) of the `directions` of maps (B, D, H, W), averaged over positions: 2 - 2 cos.

    0: the same directions. 2: unrelated. 4: opposite. A position without a direction in one of the maps counts as 1.
    """
    return (directions(a) - directions(t)).square().sum(1).mean((1, 2))


class LinearMap:
    """A linear map, the same at all positions, from one model's alternative components to another's.

    Fitted by least squares with a ridge to the maps that were added.
    """

    def __init__(self) -> None:
        self.xx: Any = 0.0  # (ds, ds)
        self.xy: Any = 0.0  # (ds, dt)

    def add(self, maps: Tensor, target: Tensor) -> None:
        """Adds student maps (B, ds, h, w) and teacher maps (B, dt, H, W)."""
        x, y = by_position(alternative(maps, target)), by_position(remove_direct(target))
        self.xx = self.xx + x.T @ x
        self.xy = self.xy + x.T @ y

    def fit(self) -> Tensor:
        """The matrix (ds, dt)."""
        return solve_ridge(self.xx, self.xy, STRENGTH)


def alternative(maps: Tensor, target: Tensor) -> Tensor:
    """The alternative component of `maps` on the grid of `target`, in float64."""
    return remove_direct(Resample((target.shape[2], target.shape[3]))(maps.double()))


def mapped(maps: Tensor, target: Tensor, fitted: Tensor) -> Tensor:
    """Student maps (B, ds, h, w) on the grid of `target` (B, dt, H, W), through the linear map (ds, dt)."""
    return torch.einsum("bdhw,de->behw", alternative(maps, target), fitted)


def by_position(maps: Tensor) -> Tensor:
    """(B, D, H, W) to (B * H * W, D), in float64."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2).double()


def solve_ridge(xx: Tensor, xy: Tensor, strength: float) -> Tensor:
    """The W that minimises |x W - y|^2 + strength * mean(x^2) * n * |W|^2. xx: x'x. xy: x'y. n: rows of x."""
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
    """Distances of the runs' students from their teacher on the same images, and projections to a plane.

    data, images, batch: see `open_runs`. out: the folder for figures; if given, a missing matplotlib is reported at once.
    Raises `UserError`.
    """
    if out is not None:
        figure_class()
    runs = open_runs(folders, data, images, batch, device)
    if len(runs.images) < 2:
        raise UserError("`images`: must be 2 or more, because a linear map is fitted on half of the images")
    teacher = runs.teacher.view
    for view in (teacher, *(t.student.view for t in runs.trained)):
        if view.refusal or view.shapes.final is None:
            raise UserError(str(view.refusal))
        if view.shapes.final[1:] == (1, 1):
            raise UserError(f"{view.name}: its last map has a single position, so it has no alternative component")
    measured, kept = _measured(runs)
    results = [_summary(t, measured[t.label]) for t in runs.trained]
    all_own = all(run["own"] for run in results)
    space = {run["run"]: run["own"] if all_own else LINEAR for run in results}
    return runs.known() | {
        "runs": _compared_with_first(results, measured),
        "distances": {t.label: {s: v.tolist() for s, v in measured[t.label].items()} for t in runs.trained},
        "image_names": [runs.images.source.where(i) for i in runs.images.indices],
        "projection": _projection(kept, space),
    }


def _measured(runs: Runs) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """By run and space: the distances (images,), and the flattened directions of the first images and the teacher's."""
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
    return _joined(measured), _joined(kept)


def _joined(batches: dict[str, dict[str, list[Tensor]]]) -> dict[str, dict[str, Tensor]]:
    return {run: {space: torch.cat(v) for space, v in spaces.items()} for run, spaces in batches.items()}


def _linear_maps(runs: Runs) -> dict[str, list[Tensor]]:
    """By run: the map for images with an even index, fitted on those with an odd index, and the reverse."""
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
    return {label: [half.fit() for half in both] for label, both in halves.items()}


def _spaces(t: Trained, pixels: Tensor, teacher: Features, fitted: list[Tensor], done: int) -> dict[str, Tensor]:
    """By space: the student's maps, with the shape of the teacher's final map. done: images before this batch."""
    student = t.student.features(pixels)
    assert student.final is not None and teacher.final is not None
    calls = projector_calls(t.methods, student, teacher)
    maps = {name: call.output for name, call in calls.items() if call.stage == 4 and _onto_final(t, name)}
    both = [mapped(student.final, teacher.final, w) for w in fitted]
    odd = (done + torch.arange(len(pixels), device=pixels.device)) % 2 == 1
    return maps | {LINEAR: torch.where(odd[:, None, None, None], both[1], both[0])}


def _onto_final(t: Trained, call: str) -> bool:
    """Whether a projector of stage 4 is trained on the teacher's map after its final norm."""
    return getattr(t.methods[call.partition(".")[0]], "teacher_norm", True)


def _flat(maps: Tensor) -> Tensor:
    """Maps (B, D, H, W) as rows (B, D * H * W) whose squared distances are the `distances` of the maps."""
    return directions(maps).flatten(1).float().cpu() / math.sqrt(maps.shape[2] * maps.shape[3])


# ---------------------------------------------------------------- summaries and projections


def _summary(t: Trained, by_space: dict[str, Tensor]) -> dict[str, Any]:
    """`own`: the space of the run's own projector; the alternative view if there are several."""
    own = [space for space in by_space if space != LINEAR]
    chosen = next((space for space in own if space.endswith(".alt")), own[0] if own else None)
    return t.known() | {"own": chosen, "spaces": {space: statistics(values) for space, values in by_space.items()}}


def statistics(values: Tensor) -> dict[str, float]:
    v = values.double().numpy()
    quantiles = np.quantile(v, [0.05, 0.25, 0.5, 0.75, 0.95])
    names = ("q05", "q25", "median", "q75", "q95")
    spread = float(v.std(ddof=1)) if len(v) > 1 else 0.0
    return {"mean": float(v.mean()), "std": spread} | dict(zip(names, quantiles.tolist()))


def _compared_with_first(results: list[dict[str, Any]], measured: dict[str, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Adds `nearer_than_first`, by kind of space: the % of images that are nearer to the teacher than in the first run."""
    first = results[0]
    for run in results[1:]:
        run["nearer_than_first"] = {}
        for kind, mine, theirs in (("own", run["own"], first["own"]), ("linear", LINEAR, LINEAR)):
            if mine and theirs:
                nearer = measured[run["run"]][mine] < measured[first["run"]][theirs]
                run["nearer_than_first"][kind] = 100 * float(nearer.double().mean())
    return results


def _projection(kept: dict[str, dict[str, Tensor]], space: dict[str, str]) -> dict[str, Any]:
    """Points in two planes.

    `differences`: student minus teacher, of all runs together, not centred, so (0, 0) is zero distance. `features`: the
    students and the teacher in the teacher's own plane, centred at its mean.
    """
    teacher = kept["teacher"][""]
    students = {run: kept[run][chosen] for run, chosen in space.items()}
    differences = {run: points - teacher for run, points in students.items()}
    plane, shares = principal_plane(torch.cat(list(differences.values())))
    centre = teacher.mean(0)
    own_plane, own_shares = principal_plane(teacher - centre)
    models = {"teacher": teacher} | students
    return {
        "method": "PCA: the two directions of largest variance, by singular value decomposition",
        "images": len(teacher),
        "space": space,
        "differences": {"share": shares, "points": {run: (d @ plane).tolist() for run, d in differences.items()}},
        "features": {
            "share": own_shares,
            "points": {name: ((p - centre) @ own_plane).tolist() for name, p in models.items()},
        },
    }


def principal_plane(x: Tensor) -> tuple[Tensor, list[float]]:
    """The two right singular vectors (K, 2) of x (M, K) with the largest values, and their shares of the energy.

    Computed from the M x M matrix of inner products, because K may be 100,000. The signs are such that the coordinate
    with the largest absolute value is positive.
    """
    gram = (x @ x.T).double()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:2].clamp(min=0), vectors.flip(1)[:, :2]
    strongest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(strongest < 0, -1.0, 1.0)
    whole = gram.diagonal().sum().clamp(min=torch.finfo(torch.float64).tiny)
    plane = x.T @ (vectors / values.sqrt().clamp(min=torch.finfo(torch.float64).tiny)).to(x.dtype)
    return plane, (values / whole).tolist()


# ---------------------------------------------------------------- output


def show(found: dict[str, Any], console: Console) -> None:
    print_table(console, COLUMNS, ("run", "space"), _rows(found), _notes(found))


COLUMNS = ("run", "space", "median", "mean", "middle half", "nearer")


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for run in found["runs"]:
        for space, s in run["spaces"].items():
            nearer = run.get("nearer_than_first", {}).get("linear" if space == LINEAR else "own")
            share = f"{nearer:.0f} %" if nearer is not None and space in (run["own"], LINEAR) else ""
            middle = f"{s['q25']:.4f} to {s['q75']:.4f}"
            rows.append([run["run"], space, f"{s['median']:.4f}", f"{s['mean']:.4f}", middle, share])
    return rows


def _notes(found: dict[str, Any]) -> list[str]:
    notes = [
        "Squared distance of the directions of the alternative components per image, averaged over positions. 0: the "
        "same, 2: unrelated.",
        f"space: METHOD.VIEW is the run's own projector; {LINEAR} is fitted to the teacher on other images.",
    ]
    if len(found["runs"]) > 1:
        notes.append(
            f"nearer: share of images on which the student is nearer to the teacher than {found['runs'][0]['run']}'s."
        )
    return notes + closing_notes(found)


def write(found: dict[str, Any], folder: Path) -> None:
    """Writes results.json, summary.md, and the data and figures of distances and projections. Raises `UserError`."""
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
        [panel, model, name, x, y]
        for panel in ("differences", "features")
        for model, xy in found["projection"][panel]["points"].items()
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
        table_row(COLUMNS),
        "|" + "---|" * len(COLUMNS),
        *map(table_row, _rows(found)),
        "",
        *(f"- {note}" for note in _notes(found)),
        f"- projection.png: {p['method']}; {p['images']} images, drawn with seed {found['order_seed']}. Left: student "
        f"minus teacher, not centred; the plane holds {100 * sum(p['differences']['share']):.0f} % of the squared "
        f"distances. Right: the teacher's plane, {100 * sum(p['features']['share']):.0f} % of its variance.",
        "",
        "![Distances](distance.png)",
        "![Projection](projection.png)",
    ]
    return "\n".join(lines) + "\n"
