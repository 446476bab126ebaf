"""The methods, students, teachers and tries that lab/ladders.py writes into ladder files."""

from __future__ import annotations

from typing import Any

Losses = dict[str, Any]

HEADS = [3, 3]
RATES = (1e-3, 3e-3, 9e-3, 2.7e-2)
OWN_RATE = 3e-3
FACTORS = (0.3, 1, 3, 10)
BEYOND = {FACTORS[0]: (0.03, 0.1), FACTORS[-1]: (30, 100)}
KD = {"half": (0.5, 0.5, 1), "T 1": (0.1, 0.9, 1), "T 2": (0.1, 0.9, 2), "T 4": (0.1, 0.9, 4)}
KD_FORMS: dict[str, tuple[Losses, dict[str, tuple[float, float, float]]]] = {  # label -> options of kd, its four tries
    "KD standardised": (
        {"standardize": True},
        {"T 1": (0.1, 0.9, 1), "T 2": (0.1, 0.9, 2), "T 2 x10": (0.1, 9, 2), "T 4": (0.1, 0.9, 4)},
    ),
    "WTTM": ({"variant": "wttm"}, {"T 2": (1, 1, 2), "T 2 x3": (1, 3, 2), "T 4": (1, 1, 4), "T 4 x3": (1, 3, 4)}),
}
NO_TEACHER: dict[str, Any] = {"teacher": None, "losses": {"ce": {}}}
OWN_DATA: dict[str, Any] = {  # the losses of the recipe own-data, without label smoothing; not searched
    "losses": {"ce": {}, "dist": {"weight": 2}, "fd": {"weight": 0.5}},
    "balance": {},
}
SOFT_DIST: dict[str, dict[str, Any]] = {
    "DIST T 4": {"losses": {"ce": {}, "dist": {"weight": 2, "tau": 4}}},
    "own-data T 4": {"losses": {"ce": {}, "dist": {"weight": 2, "tau": 4}, "fd": {"weight": 0.5}}, "balance": {}},
}

PUBLISHED = {"shared": False, "expansion": 4}
LADDER: dict[str, Losses] = {  # ScaleKD paper, Tables 1 and 9: label -> the method's losses at factor 1
    "FD (s4)": {"fd": {"stages": [4], "projector": "linear"}},
    "FD (s3+s4)": {"fd": {"stages": [3, 4], "projector": "linear"}},
    "Conv": {"fd": {"stages": [4], "projector": "conv"}},
    "CAP": {"cap": {"heads": 3}},
    "Dual-Path CAP": {"dfm": {"heads": 3, "views": "dual_path"}},
    "DFM": {"dfm": {"heads": 3}},
    "DFM (Dir + Alt)": {"dfm": {"heads": 3, "views": "dir_alt"}},
    "TPP own queries": {"tpp": {"heads": HEADS, "adaptive_queries": False}},
    "TPP": {"tpp": {"heads": HEADS}},
    "ScaleKD": {"scalekd": {"heads": HEADS} | PUBLISHED},
}
OTHERS: dict[str, Losses] = {  # Tables 7 and 13, and vanillaKD's variants
    "BKD": {"bkd": {}},
    "DKD": {"dkd": {}},
    "DIST": {"dist": {}},
    "AT": {"at": {}},
    "OFD": {"ofd": {}},
    "RKD": {"rkd": {}},
    "CRD": {"crd": {"negatives": 2048}},
    "CC": {"cc": {}},
    "SRRL": {"srrl": {}},
    "ReviewKD": {"reviewkd": {"width": 96}},
    "MGD": {"mgd": {}},
    "DiffKD": {"diffkd": {}},
    "OFA": {"ofa": {}},
}
NEWER: dict[str, Losses] = {  # methods since ScaleKD, and those for foundation models
    "WKD-L": {"wkd_l": {}},
    "WKD-F": {"wkd_f": {}},
    "VkD": {"vkd": {}},
    "RSD": {"rsd": {}},
    "FM": {"fm": {}},
}
LABEL_FREE: dict[str, Losses] = {  # each alone, at its default weight
    "FitNet": {"fd": {}},
    "CAP": {"cap": {"heads": 3}},
    "ScaleKD": {"scalekd": {"heads": HEADS} | PUBLISHED},
    "RKD": {"rkd": {}},
    "VkD": {"vkd": {}},
    "RSD": {"rsd": {}},
    "FM": {"fm": {}},
    "FM, per channel": {"fm": {"standardise": "channel"}},
    "FM, as Proteus": {"fm": {"standardise": "none", "loss": "mse", "class_weight": 1, "patch_weight": 1, "hidden": 0}},
    "Embed": {"embed": {}},
}

EVERY_STUDENT = ("KD", "FitNet", "DKD", "DIST", "AT", "RKD", "DiffKD", "OFA")  # those of Table 7 and the best known
VARIANTS = ("KD", "DKD", "DIST")  # the methods that vanillaKD compares over the amount of data

FORMS: dict[str, Losses] = {  # cheaper projectors: docs/explanation/performance-tables.md
    "shared": {"shared": True},
    "shared, narrow": {"shared": True, "expansion": 1},
    "separable, shared": {"tokens": "separable", "shared": True},
    "reduced, shared": {"tokens": "reduced", "shared": True},
    "reduced, shared, narrow": {"tokens": "reduced", "shared": True, "expansion": 1},
}
NARROW = "shared, narrow"  # as good as the published form in `forms`; compared again with more seeds

STUDENTS: dict[str, Any] = {
    "CNN": {},
    "MLP": {
        "student": {
            "model": "mlp_mixer",
            "kwargs": {"patch_size": 8, "embed_dim": 64, "num_blocks": 4},
            "mean": [0.25],
            "std": [0.33],
        }
    },
    "ViT": {
        "student": {
            "model": "vit_tiny_patch16_224",
            "kwargs": {
                "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "class_token": False, "global_pool": "avg"
            },
            "mean": [0.25],
            "std": [0.33],
        }
    },
}  # fmt: skip
WIDE = {"student": {"model": "vit_wide_last", "kwargs": {"last_dim": 96, "last_heads": 3}}}
LIFT = {"student": {"model": "vit_lift", "kwargs": {"last_dim": 96}}}
DISTILLED = {
    "student": {"model": "deit_tiny_distilled_patch16_224", "kwargs": {"class_token": True, "global_pool": "token"}}
}
VIT_FORMS: dict[str, dict[str, Any]] = {
    "WideLast": WIDE,
    "Lift": LIFT,
    "DeiT": DISTILLED,
}  # methods that change the ViT
VIT_TRIES: dict[str, dict[str, Losses]] = {
    "WideLast": {f"x{factor:g}": {"ce": {}, "mse": {"weight": factor}} for factor in FACTORS},
    "Lift": {f"x{factor:g}": {"ce": {}, "mse": {"weight": factor, "lifted": True}} for factor in FACTORS},
    "DeiT": {
        "hard, half": {"ce": {"weight": 0.5}, "deit": {"weight": 0.5}},
        "hard, 0.9": {"ce": {"weight": 0.1}, "deit": {"weight": 0.9}},
        "soft, half": {"ce": {"weight": 0.5}, "deit": {"weight": 0.5, "kind": "soft"}},
        "soft, T 3": {"ce": {"weight": 0.9}, "deit": {"weight": 0.1, "kind": "soft", "temperature": 3}},
    },
}
LONG = {"ViT": STUDENTS["ViT"] | {"data": {"limit": 8000}}}  # four times the samples; with fewer the ViT hardly learns

PITFALL = {  # label -> images and augmentation, 24,000 samples in each
    f"{images} {strength}": {
        "data": {"limit": images},
        "train": {"epochs": 24000 // images},
        "augment": augment,
    }
    for images in (500, 2000, 8000)
    for strength, augment in (
        ("weak", {}),
        ("strong", {"crop": "random_resized", "scale": [0.6, 1.0], "pad": 4, "erase": 0.25, "mixup": 0.2}),
    )
}
TEACHERS = {  # smaller ones than base.yaml's; cut so that the last stage is the last block
    "small": {"kwargs": {"patch_size": 2, "embed_dim": 48, "depth": 4, "num_heads": 3}, "cuts": [0, 1, 2, 3]},
    "middle": {"kwargs": {"patch_size": 2, "embed_dim": 66, "depth": 5, "num_heads": 3}, "cuts": [0, 2, 3, 4]},
}
