"""Tests the papers' claims on a finished ladder, each as a paired difference between two of its rows.

    python lab/order.py docs/results/lab/ladder

Differences are taken seed by seed, with half the width of their 95 % interval (Student's t). A claim holds if the
interval lies above zero, is contradicted if it lies below, and is open otherwise. ◆ marks p < 0.05 in a paired t-test
after Holm's correction for the claims about one student. Writes order.json and order.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from scalekd.compare.results import Record, against, correct, read_records

Rows = dict[str, dict[str, Any]]  # claim as text -> the difference found


class Claim(NamedTuple):
    better: str
    worse: str
    paper: dict[str, float]
    """Student here -> points in the paper. Tables 1 and 9: ResNet-50 (CNN) and Mixer-S (MLP) with a Swin-S teacher. Table 7:
    ResNet-50 (CNN) and Swin-T (ViT); Table 13: MobileNet-V1; there the other methods have teachers and lengths of their own."""

    def __str__(self) -> str:
        return f"{self.better} over {self.worse}"


SCALEKD = "ScaleKD with KD"
TABLE_13 = {
    "KD": 70.68,
    "AT": 70.72,
    "OFD": 71.25,
    "RKD": 71.23,
    "CRD": 71.40,
    "DKD": 72.05,
    "SRRL": 72.49,
    "ReviewKD": 72.56,
    "DIST": 73.24,
    "MGD": 73.35,
    "DiffKD": 73.62,
}
CLAIMS = {
    "ladder": [  # ScaleKD paper, Tables 1 and 9
        Claim("CAP", "FD (s4)", {"CNN": 0.44, "MLP": 0.15}),
        Claim("CAP", "Conv", {"CNN": 0.35}),
        Claim("Dual-Path CAP", "CAP", {"CNN": 0.25}),
        Claim("DFM", "Dual-Path CAP", {"CNN": 0.39}),
        Claim("DFM", "DFM (Dir + Alt)", {"CNN": 0.28}),
        Claim("DFM", "CAP", {"CNN": 0.64, "MLP": 1.39}),
        Claim("TPP", "TPP own queries", {"CNN": 0.12}),
        Claim("TPP", "CAP", {"CNN": 0.75, "MLP": 1.25}),
        Claim("ScaleKD", "DFM", {"CNN": 0.79, "MLP": 0.82}),
        Claim("ScaleKD", "TPP", {"CNN": 0.68, "MLP": 0.96}),
        Claim("ScaleKD", "FD (s3+s4)", {"CNN": 1.56, "MLP": 1.92}),
        Claim(SCALEKD, "ScaleKD", {"CNN": 0.32, "MLP": 0.35}),
        Claim(SCALEKD, "KD", {}),
    ],
    "beta": [  # Figure 4: the best in the middle, and the original view above the alternative one
        Claim("beta 0.6", "beta 0", {}),
        Claim("beta 0.6", "beta 1", {}),
        Claim("beta 1", "beta 0", {}),
    ],
    "sizes": [  # Table 2: a larger teacher is better, and more so with ScaleKD
        Claim(f"{SCALEKD} large", f"{SCALEKD} small", {"CNN": 0.48}),
        Claim(f"{SCALEKD} large", f"{SCALEKD} middle", {"CNN": 0.30}),
        *(Claim(f"{method} large", f"{method} small", {}) for method in ("KD", "ScaleKD")),
        *(Claim(f"{SCALEKD} {size}", f"KD {size}", {}) for size in ("small", "middle", "large")),
    ],
    "pitfall": [  # vanillaKD: on small data its variants are ahead of KD, on enough of it, with strong augmentation, not
        Claim("DKD", "KD", {}),
        Claim("DIST", "KD", {}),
    ],
    "methods": [  # Table 7
        Claim(SCALEKD, "KD", {}),
        Claim(SCALEKD, "FitNet", {}),
        Claim(SCALEKD, "DKD", {}),
        Claim(SCALEKD, "DIST", {"CNN": 1.83, "ViT": 1.50}),
        Claim(SCALEKD, "AT", {}),
        Claim(SCALEKD, "RKD", {}),
        Claim(SCALEKD, "DiffKD", {"CNN": 1.53, "ViT": 1.30}),
        Claim(SCALEKD, "OFA", {"CNN": 0.70}),
        Claim(SCALEKD, "ScaleKD", {}),
    ],
    "cnn-methods": [  # Table 13
        *(Claim(SCALEKD, worse, {"CNN": round(74.21 - top1, 2)}) for worse, top1 in TABLE_13.items()),
        *(Claim(SCALEKD, worse, {}) for worse in ("FitNet", "BKD", "CC", "OFA")),
    ],
}
CLAIMS["vit"] = [
    *CLAIMS["ladder"],
    Claim(SCALEKD, "FD (s4)", {}),
    *(claim for claim in CLAIMS["methods"] if claim.worse in ("DKD", "DIST", "AT", "RKD", "DiffKD", "OFA")),
]


def main(out: Path) -> None:
    by_row: dict[tuple[str, str], dict[int, Record]] = {}
    for record in read_records(out):
        by_row.setdefault((record["student"], record["method"]), {})[record["seed"]] = record
    claims, students = CLAIMS[out.name], list(dict.fromkeys(student for student, _ in by_row))
    found = {
        student: {str(c): against(by_row[student, c.better], by_row[student, c.worse]) for c in claims}
        for student in students
    }
    for rows in found.values():
        correct(rows)
    listed = [
        {"student": student, "better": c.better, "worse": c.worse, "paper": c.paper.get(student)} | rows[str(c)]
        for student, rows in found.items()
        for c in claims
    ]
    (out / "order.json").write_text(json.dumps(listed, indent=1) + "\n")
    (out / "order.md").write_text("\n".join(page(out, claims, found)))


def page(out: Path, claims: list[Claim], found: dict[str, Rows]) -> list[str]:
    of_paper = [student for student in found if any(student in c.paper for c in claims)]
    head = ["claim", *(f"paper, {student}" for student in of_paper), *(f"here, {student}" for student in found)]
    lines = [f"# {out.name}: where the paper's order holds", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for claim in claims:
        paper = [f"{claim.paper[s]:+.2f}" if s in claim.paper else "" for s in of_paper]
        here = [cell_text(rows[str(claim)]) for rows in found.values()]
        lines.append(f"| {' | '.join([str(claim), *paper, *here])} |")
    seeds = {row["pairs"] for rows in found.values() for row in rows.values()}
    lines += [
        "",
        f"Points of top-1, {'/'.join(map(str, sorted(seeds)))} seeds, ± half the 95 % interval of the paired difference.",
    ]
    lines += ["holds: the interval is above zero; against: below; open: neither. ◆ p < 0.05 after Holm's correction."]
    return [*lines, "", f"Command: `python lab/order.py {out}`.", ""]


def cell_text(row: dict[str, Any]) -> str:
    low, high = row["gain"] - row["gain_ci95"], row["gain"] + row["gain_ci95"]
    verdict = "holds" if low > 0 else "against" if high < 0 else "open"
    sure = " ◆" if row["p_holm"] is not None and row["p_holm"] < 0.05 else ""
    return f"{row['gain']:+.2f} ± {row['gain_ci95']:.2f} {verdict}{sure}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
