"""Every shipped recipe has a complete header, matches its row in the papers, can be built, and takes a step."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from small_images import write_images
from torch import nn

from scalekd.cli.app import main
from scalekd.config.listing import IMAGENET_IMAGES, entry, listed, table
from scalekd.config.recipe import Config, load_recipe
from scalekd.config.recipe_files import header, recipe_names, recipe_text
from scalekd.cost.pairs import PaperModel, measure
from scalekd.distill.build import build, make_optimizer
from scalekd.models.unfilled import unfilled
from scalekd.train.optim import make_schedule
from scalekd.train.run import AUTOCAST

NAMES = recipe_names()
DOC = Path(__file__).parents[2] / "docs" / "reference" / "recipes.md"
load = functools.cache(load_recipe)  # what a shipped recipe says does not change in between


def test_there_are_recipes():
    assert {"demo", "demo-teacher", "own-data", "own-teacher"} < set(NAMES) and len(NAMES) > 40


# ---------------------------------------------------------------- headers, the list, `show`


@pytest.mark.parametrize("name", NAMES)
def test_the_header_is_complete(name):
    fields = header(recipe_text(name))
    assert all(fields.values()), f"empty: {[field for field, text in fields.items() if not text]}"
    assert load(name).name == name
    assert name in fields["command"].split(), "its command is for another recipe"
    assert re.match(r"(MEASURED|SHORT RUN|NOT RUN)\b", fields["status"])
    assert all(len(line) <= 120 for line in recipe_text(name).splitlines() if line.startswith("#"))


@pytest.mark.parametrize("name", [n for n in NAMES if "=" in recipe_text(n)])
def test_overrides_that_a_header_names_load(name):
    for lines in re.findall(r"(?:^#   \w\S*=.*\n)+", recipe_text(name), re.MULTILINE):
        load_recipe(name, lines.replace("#", "").split())
    smaller = re.search(r"^# smaller: +(.+?)    \(", recipe_text(name), re.MULTILINE)
    assert (smaller is not None) == name.endswith("-1gpu")
    if smaller:
        full, less = load(name), load_recipe(name, smaller[1].split())
        share = less.train.batch_size / full.train.batch_size
        scale = share if full.optim.name == "momentum" else math.sqrt(share)  # linear for SGD, else square root
        assert share < 1 and less.optim.lr == pytest.approx(full.optim.lr * scale, rel=2e-3)
        parts = [c.train.batch_size // c.train.accumulate for c in (full, less)]
        assert parts[0] == parts[1]  # what batch norm sees at a time
        if full.train.ema:
            assert less.train.ema == pytest.approx(full.train.ema**share, abs=1e-7)


def test_a_base_is_at_most_two_steps_away():
    bases = {e["name"]: e["base"] for e in listed()}
    assert all(bases.get(bases.get(base)) is None for base in bases.values())


@pytest.mark.parametrize("name", NAMES)
def test_recipes_show_prints_what_loads(name, capsys, tmp_path):
    assert main(["recipes", "show", name]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "copy.yaml").write_text(shown)
    assert load_recipe(str(tmp_path / "copy.yaml")) == load(name)
    assert entry(str(tmp_path / "copy.yaml")) == entry(name) | {"base": None}
    assert (
        all(f"  # `{loss}`: " in shown for loss in load(name).losses) and len(max(shown.splitlines(), key=len)) <= 120
    )


def test_recipes_show_says_how_much_there_is_to_do(capsys):
    main(["recipes", "show", "imagenet-swin-l-resnet50-advanced-1gpu"])
    shown = " ".join(capsys.readouterr().out.replace("#", "").split())
    assert "625 steps per epoch, 187,500 in total, of 2048 images each, 32 x 64; 384,350,100 images in total" in shown
    assert 300 * IMAGENET_IMAGES == 384_350_100
    main(["recipes", "show", "own-data"])
    assert "steps per epoch" not in capsys.readouterr().out  # unknown for your own images


def test_recipes_show_json(capsys):
    main(["recipes", "show", "imagenet-swin-l-resnet50-advanced-600", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["base"] == "imagenet-swin-l-resnet50-advanced" and shown["recipe"]["train"]["epochs"] == 600
    assert shown["amount"] == {"steps_per_epoch": 625, "steps": 375_000, "images_seen": 768_700_200}


def test_the_list_has_what_a_reader_chooses_by():
    by_name = {e["name"]: e for e in listed()}
    chosen = by_name["imagenet-baseline-vit-base14-advanced"]
    assert (chosen["student"], chosen["teacher"], chosen["epochs"], chosen["batch"], chosen["losses"]) == (
        "vit_base_patch16_224", None, 300, 1024, {"ce": {"smoothing": 0.1}},
    )  # fmt: skip
    lines = table(list(by_name.values())).splitlines()
    assert sum(line.startswith("  imagenet-") for line in lines) == sum(n.startswith("imagenet-") for n in NAMES)
    at = next(i for i, line in enumerate(lines) if line.startswith("  imagenet-swin-l-convnext-tiny-advanced "))
    assert lines[at].endswith("[NOT RUN]") and "; the paper: 84.16 %" in lines[at + 1]


def test_the_table_in_the_docs_is_that_of_the_headers():
    wanted = [f"| `{e['name']}` | {e['stands_for']} | {e['expected']} | {e['status']} |" for e in listed()]
    rows = [line for line in DOC.read_text().splitlines() if re.match(r"\| `[\w-]+` \|", line)]
    assert rows == wanted


# ---------------------------------------------------------------- the papers' tables, written down once more

KINDS = {
    "cnn": ("resnet50", "mobilenetv1", "convnext-tiny"),
    "mlp": ("mixer-s", "mixer-b", "mixer-b14"),
    "vit": ("vit-small", "vit-base", "vit-base14", "swin-tiny", "eva02-small"),
}
KIND = {student: kind for kind, students in KINDS.items() for student in students}
TABLE_10B = {  # batch, optimiser, rate, weight decay, warm-up, drop path, RandAugment
    "cnn": (2048, "lamb", 5e-3, 0.02, 5, 0.05, "rand-m7-mstd0.5"),
    "mlp": (1536, "adamw", 7e-4, 0.07, 20, 0.1, "rand-m9-mstd0.5"),
    "vit": (1024, "adamw", 1e-3, 0.05, 20, 0.1, "rand-m9-mstd0.5"),
}
ALONE = {  # top-1 without teacher
    "traditional": {"resnet50": 76.55, "mobilenetv1": 69.63},
    "advanced": {
        "resnet50": 78.64, "mobilenetv1": 72.10, "convnext-tiny": 82.14, "mixer-s": 74.02, "mixer-b": 76.44,
        "mixer-b14": 76.62, "vit-small": 79.90, "vit-base": 81.80, "vit-base14": 82.02, "swin-tiny": 81.18,
        "eva02-small": 81.12,
    },
}  # fmt: skip
TAUGHT = {  # by ScaleKD
    ("swin-l", "mobilenetv1", "advanced"): 75.15,
    ("swin-l", "resnet50", "advanced"): 82.03,
    ("swin-l", "resnet50", "advanced-600"): 82.55,
    ("swin-l", "convnext-tiny", "advanced"): 84.16,
    ("swin-l", "mixer-s", "advanced"): 78.63,
    ("swin-l", "mixer-b", "advanced"): 81.96,
    ("swin-l", "vit-small", "advanced"): 83.93,
    ("swin-l", "swin-tiny", "advanced"): 83.80,
    ("swin-l", "vit-base", "advanced"): 85.53,
    ("beit-l", "resnet50", "advanced"): 82.34,
    ("beit-l", "mixer-b14", "advanced"): 82.89,
    ("beit-l", "vit-base14", "advanced"): 86.43,
    ("beit-l", "eva02-small", "advanced"): 86.22,
    ("swin-s", "resnet50", "traditional"): 79.62,
    ("swin-b", "resnet50", "traditional"): 79.80,
    ("swin-l", "resnet50", "traditional"): 80.10,
    ("swin-s", "resnet50", "advanced"): 81.43,
    ("swin-b", "resnet50", "advanced"): 81.77,
    ("swin-l", "mobilenetv1", "traditional"): 74.21,
    ("swin-s", "mixer-s", "advanced"): 77.59,
}
TOP1 = {"swin-s": 83.02, "swin-b": 85.16, "swin-l": 86.24, "beit-l": 88.58}
NOT_IN_THE_PAPER = ("swin-l", "vit-small", "traditional")
ROW = re.compile(r"imagenet-(baseline|swin-[sbl]|beit-l)-(.+)-((?:advanced|traditional)(?:-600)?)(-1gpu)?")
SCALEKD = {m.groups(): n for n in NAMES if (m := ROW.fullmatch(n))}


def test_every_row_has_its_recipe():
    alone = {("baseline", student, strategy) for strategy, students in ALONE.items() for student in students}
    assert {row[:3] for row in SCALEKD} == alone | set(TAUGHT) | {NOT_IN_THE_PAPER}
    vanilla = {f"imagenet-beitv2-b-{s}-{a}" for s in ("resnet50", "vit-tiny", "vit-small", "convnextv2-tiny") for a in ("a1", "a2")}  # fmt: skip
    others = {n for n in NAMES if n.startswith("imagenet-")} - set(SCALEKD.values())
    released = {n for n in others if n.endswith("-released")}
    assert {n.removesuffix("-released") for n in released} < set(SCALEKD.values())
    dino = {f"imagenet-{t}-a2" for t in ("dinov2-l-vit-small", "dinov3-7b-vit-small", "dinov3-7b-resnet50")}
    more = {"imagenet-beitv2-b-resnet50-a2-1gpu", "imagenet-bit-resnet50-funmatch"}
    assert others - released == vanilla | dino | more


@pytest.mark.parametrize("row", SCALEKD, ids=SCALEKD.get)
def test_a_recipe_of_scalekd_is_its_row(row):
    teacher, student, strategy, _ = row
    config, fields = load(SCALEKD[row]), header(recipe_text(SCALEKD[row]))
    augment, train, optim, schedule = config.augment, config.train, config.optim, config.schedule
    kind = KIND[student]
    smoothing = config.losses["ce"].get("smoothing", 0.0)
    drop_path = config.student.kwargs.get("drop_path_rate", 0.0)
    assert (augment.crop, augment.scale, augment.flip) == ("random_resized", (0.08, 1.0), 0.5)
    assert (augment.mixup, augment.cutmix, augment.color_jitter) == (0, 0, 0)
    if strategy == "traditional":  # Table 10a
        assert (train.batch_size, train.epochs, optim.name, optim.lr) == (256, 100, "momentum", 0.1)
        assert (optim.momentum, optim.weight_decay, schedule.warmup_epochs) == (0.9, 1e-4, 0)
        assert (schedule.name, schedule.milestones, schedule.decay_rate) == ("multistep", (30, 60, 90), 0.1)
        assert (drop_path, smoothing, augment.auto_augment, augment.erase) == (0, 0, None, 0)
    else:
        batch, name, lr, decay, warmup, path, policy = TABLE_10B[kind]
        assert (train.batch_size, optim.name, optim.lr, optim.weight_decay) == (batch, name, lr, decay)
        assert (schedule.name, schedule.warmup_epochs, drop_path, augment.auto_augment) == (
            "cosine",
            warmup,
            path,
            policy,
        )
        assert (optim.betas, optim.eps, smoothing, augment.erase) == ((0.9, 0.999), 1e-8, 0.1, 0.25)
        assert train.epochs == (600 if strategy.endswith("600") else 300)
        assert train.clip_grad == (1.0 if kind == "mlp" else 5.0)
        averaged = student.startswith(("vit", "eva02")) or student in ("mixer-s", "convnext-tiny")
        assert train.ema == (0.9999 if averaged else None)
    if teacher == "baseline":
        assert fields["expected"] == f"{ALONE[strategy][student]:.2f} % top-1"
        assert config.teacher is None and list(config.losses) == ["ce"]
        return
    assert config.teacher.top1 == TOP1[teacher] and config.teacher.weights == "pretrained"
    assert [config.losses[n].get("weight", 1.0) for n in ("ce", "kd", "scalekd")] == [0.5, 0.5, 1.0]
    assert config.losses["kd"]["temperature"] == 1.0
    if row[:3] == NOT_IN_THE_PAPER:
        assert fields["expected"] == "unknown"
        return
    alone = ALONE[strategy.removesuffix("-600")][student]
    assert fields["expected"].startswith(f"{TAUGHT[row[:3]]:.2f} % top-1 (baseline {alone:.2f} %")


@pytest.mark.parametrize("row", [r for r in SCALEKD if r[0] == "baseline"], ids=SCALEKD.get)
def test_a_baseline_is_its_pair_without_the_teacher(row):
    alone = load(SCALEKD[row])
    taught = load(entry(alone.name)["base"])
    same = {"name", "teacher", "losses"}
    assert alone.model_dump(exclude=same) == taught.model_dump(exclude=same)
    assert alone.losses["ce"].get("smoothing") == taught.losses["ce"].get("smoothing")


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("-1gpu")])
def test_a_recipe_for_one_gpu_differs_in_accumulation_only(name):
    one, full = load(name), load(name.removesuffix("-1gpu"))
    train = full.train.model_copy(update={"accumulate": one.train.accumulate})
    assert one == full.model_copy(update={"name": name, "train": train}) and one.train.accumulate > 1


@pytest.mark.parametrize("name", [n for n in NAMES if "-dinov" in n])
def test_a_dino_teacher_has_its_size_and_the_strategy_of_vanillakd(name):
    config = load(name)
    found = measure(PaperModel(config.teacher.model, {"img_size": 224}))
    label = next(label for label in TEACHER_GMACS if f"-{label}-" in name)
    assert f"{found['gmacs']:.2f}" == f"{TEACHER_GMACS[label]:.2f}"
    same = load("imagenet-beitv2-b-" + name.partition(f"-{label}-")[2])
    other = {"name", "teacher"}
    assert config.model_dump(exclude=other) == same.model_dump(exclude=other)


@pytest.mark.parametrize("name", [n for n in NAMES if "-beitv2-b-" in n])
def test_a_recipe_of_vanillakd_is_its_command(name):
    config, first = load(name), "-a1" in name
    augment, optim, schedule = config.augment, config.optim, config.schedule
    assert (config.train.epochs, optim.weight_decay, augment.mixup) == ((600, 0.01, 0.2) if first else (300, 0.02, 0.1))
    assert config.losses == {"bce": {"smoothing": 0.1} if first else {}, "kd": {"temperature": 1.0}}
    assert (config.train.batch_size, optim.name, optim.lr) == (2048, "lamb", 5e-3)
    assert (schedule.name, schedule.warmup_epochs, schedule.warmup_lr) == ("cosine", 5, 1e-6)
    assert (augment.cutmix, augment.auto_augment, augment.crop_pct) == (1.0, "rand-m7-mstd0.5", 0.95)
    assert config.student.kwargs == {"drop_path_rate": 0.05} and augment.color_jitter == augment.erase == 0
    assert augment.repeats == 3


# GMACs of one image, as `scalekd pairs` measures them (tests/cost/test_pairs.py), and Table 15's days on 8 V100
TEACHER_GMACS = {
    "swin-s": 8.74, "swin-b": 15.43, "swin-l": 34.48, "beit-l": 81.01, "beitv2-b": 17.56, "bit": 45.81, "dinov2-l": 81.01,
    "dinov3-7b": 1362.74, "baseline": 0,
}  # fmt: skip
STUDENT_GMACS = {
    "mobilenetv1": 0.57, "resnet50": 4.09, "convnext-tiny": 4.46, "mixer-s": 3.78, "mixer-b": 12.60, "vit-small": 4.57,
    "swin-tiny": 4.49, "vit-base": 17.47, "mixer-b14": 16.42, "vit-base14": 23.07, "eva02-small": 15.45,
    "vit-tiny": 1.25, "convnextv2-tiny": 4.46,
}  # fmt: skip
TABLE_15 = {"ScaleKD": {"Swin-S": 2.10, "Swin-B": 2.53, "Swin-L": 3.51}, "FD": {"Swin-S": 1.67, "Swin-B": 1.83, "Swin-L": 2.24}}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("imagenet-")])
def test_the_cost_is_scaled_as_the_docs_say(name):
    cost = header(recipe_text(name))["cost"]
    if stated := re.match(r"([\d.]+) days on 8 V100", cost):
        assert float(stated[1]) == TABLE_15["ScaleKD"][{"s": "Swin-S", "b": "Swin-B", "l": "Swin-L"}[name[14]]]
        return
    about = re.match(r"about ([\d.]+) V100-days", cost)
    scaled = re.search(r"Table 15's (\w+) row for (Swin-[SBL])", cost)
    if not scaled:
        assert float(about[1]) == round(8 * 2.10) and "8 x the 2.10 days" in cost
        return
    teacher, student = re.match(
        r"imagenet-(baseline|swin-\w|beit-l|beitv2-b|bit|dinov2-l|dinov3-7b)-(.+?)-(?:adv|trad|a1|a2|fun)", name
    ).groups()
    work = TEACHER_GMACS[teacher] + 3 * STUDENT_GMACS[student]
    row = TEACHER_GMACS[scaled[2].lower()] + 3 * STUDENT_GMACS["resnet50"]
    days = 8 * TABLE_15[scaled[1]][scaled[2]] * load(name).train.epochs / 100 * work / row
    assert float(about[1]) == pytest.approx(days, abs=0.6 if days > 10 else 0.06)


# ---------------------------------------------------------------- built and stepped

SCALEKD_TERMS = {"scalekd.ori", "scalekd.alt", "scalekd.proxy_ori", "scalekd.proxy_alt"}


def terms(name: str) -> set[str]:
    if name in ("demo-teacher", "demo-teacher-finish", "own-teacher") or "-baseline-" in name:
        return {"ce"}
    if "-beitv2-b-" in name or "-dinov" in name:
        return {"bce", "kd"}
    if name.endswith("resnet50-advanced-released"):
        return {"bce", "kd"} | SCALEKD_TERMS
    if name == "imagenet-swin-s-resnet50-traditional-released":
        return {"ce"} | SCALEKD_TERMS - {"scalekd.alt"}
    if name == "imagenet-bit-resnet50-funmatch":
        return {"kd"}
    if name == "own-images":
        return SCALEKD_TERMS
    if name == "own-retrieval":
        return {"embed.cosine", "embed.relational"}
    if name == "own-labels":
        return {"bce", "fd.s4"}
    if name == "own-data":
        return {"ce", "dist.inter", "dist.intra", "fd.s4"}
    return {"ce", "kd"} | SCALEKD_TERMS


def combination(config: Config) -> str:
    """Student, teacher and losses, without what changes no shape: drop path, smoothing, factors, place of a norm."""
    parts: dict[str, Any] = config.model_dump(mode="json", include={"student", "teacher", "losses"})
    for key in ("drop_path_rate", "act_layer", "fc_norm"):
        parts["student"]["kwargs"].pop(key, None)
    for options in parts["losses"].values():
        for key in ("smoothing", "alpha", "beta", "reduction", "attention_scale", "norm_eps"):
            options.pop(key, None)
    return json.dumps([parts, config.data.image_size, config.data.channels], sort_keys=True)


GROUPS: dict[str, list[str]] = {}
for _name in NAMES:
    GROUPS.setdefault(combination(load(_name)), []).append(_name)
# One recipe of each combination is stepped. Recipes of one combination differ in schedule, optimiser, augmentation
# and batch, and in what `combination` leaves out; every recipe's are built below.
STEPPED = [pytest.param(names[0], marks=pytest.mark.slow if "-l-" in names[0] else []) for names in GROUPS.values()]


@functools.cache
def drop_paths(model: str, kwargs: str) -> bool:
    """Whether the student, built with the recipe's own arguments, has any."""
    with unfilled():
        student = timm.create_model(model, **json.loads(kwargs))
    return any(type(m).__name__.startswith("DropPath") and m.drop_prob > 0 for m in student.modules())


@pytest.mark.parametrize("name", NAMES)
def test_student_optimiser_and_schedule_are_built(name):
    config = load(name)
    assert drop_paths(config.student.model, json.dumps(config.student.kwargs)) == (
        config.student.kwargs.get("drop_path_rate", 0.0) > 0
    )
    optimizer = make_optimizer(config, SimpleNamespace(student=nn.Linear(2, 2), methods=nn.Linear(2, 2)))
    schedule = make_schedule(config, optimizer, steps_per_epoch=10)
    rates = []
    for step in [*range(0, 10 * config.train.epochs, 5), 10 * config.train.epochs - 1]:
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    warmup = config.schedule.warmup_epochs
    assert rates[0] == pytest.approx(config.schedule.warmup_lr if warmup else config.optim.lr)
    assert max(rates) <= config.optim.lr * (1 + 1e-6) and max(rates) > 0.9 * config.optim.lr
    assert rates[-1] < 0.01 * config.optim.lr + config.schedule.min_lr


WHOLE = "imagenet-swin-l-resnet50-advanced"


def small(name: str, folder: Path) -> list[str]:
    """Overrides: few small images, random weights, and large teachers with fewer blocks.

    Widths, heads, stages and the blocks of a ViT teacher's last stage are the recipe's, but DINO teachers with a published
    classifier are small. ResNet teachers are whole.
    ResNet-50 as student is whole in `WHOLE`, which has its projectors; in the others it has a quarter of the widths.
    """
    overrides = ["train.batch_size=2", "data.workers=0", "train.sync_batchnorm=false"]
    if name.startswith("demo"):
        overrides += ["student.weights=random"]
        return [*overrides, "data.train=fashion-mnist:train", "data.val=fashion-mnist:test", "data.limit=10"]
    write_images(folder, per_class=20 if name == "own-retrieval" else 4)
    config = load(name)
    teacher = config.teacher.model if config.teacher else ""
    size = 56 if "beit-l" in name or "14" in name else 64  # patches of 14 pixels, or of 16
    if config.data.train is None:
        write_images(folder.with_name("pool"), per_class=2, seed=1)
        overrides += [f"data.unlabelled={folder.with_name('pool')}", f"data.val={folder}", "student.weights=random"]
    else:
        overrides += [f"data.train={folder}", "data.val=null", "student.weights=random"]
    if name == "own-retrieval":
        overrides.append("data.val_fraction=0.2")  # 12 images query each other
    if teacher.startswith("vit_small"):
        overrides += ["teacher.kwargs={depth: 4}", "teacher.image_size=56"]
    if config.student.model in ("resnet50", "resnet50d") and name != WHOLE:
        overrides.append("student.kwargs.channels=[16, 32, 64, 128]")
    overrides.append(f"data.image_size={84 if 'eva02' in name else size}")
    if teacher.startswith("swin_") and name.startswith("imagenet-"):
        overrides.append("teacher.kwargs={depths: [1, 1, 2, 1]}")
    if teacher.startswith("eva_large"):
        first, *_, end = config.teacher.cuts[-2:]
        overrides += [
            "teacher.kwargs={depth: 5}",
            f"teacher.cuts=[0, 1, 2, {2 + end - first}]",
            "teacher.image_size=56",
        ]
    if teacher.startswith("beitv2"):
        overrides.append("teacher.kwargs={depth: 2}")
    if "dinov" in teacher and name.startswith("imagenet-"):
        return overrides + published_teacher(config.teacher.model, folder)
    return overrides + (["teacher.weights=random", "teacher.head=null"] if teacher else [])  # so it has our classes


def published_teacher(model: str, folder: Path) -> list[str]:
    """Overrides: a narrow teacher of the family, and a classifier in a file, as it is published, for our classes."""
    size = 56 if "14" in model else 64
    kwargs = {"depth": 4, "embed_dim": 32, "num_heads": 2}
    weights, head = folder.with_name("backbone.pth"), folder.with_name("linear_head.pth")
    torch.save(timm.create_model(model, img_size=size, **kwargs).state_dict(), weights)
    torch.save(nn.Linear(2 * 32, len(list(folder.iterdir()))).state_dict(), head)
    return [
        f"teacher.kwargs={kwargs}",
        f"teacher.image_size={size}",
        f"teacher.weights={weights}",
        f"teacher.head={head}",
    ]


@pytest.mark.parametrize("name", STEPPED)
def test_a_recipe_is_built_and_stepped(name, tmp_path, cheap_initial_values):
    config = load_recipe(name, small(name, tmp_path))
    run = build(config, torch.device("cpu"))
    images, targets = run.inputs(next(run.train_batches(run.train_sampler(steps=1), workers=0)))
    run.distiller.train()
    dtype = AUTOCAST[run.config.train.precision]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = run.distiller(images, targets)
    losses["total"].backward()

    assert set(losses) == terms(name) | {"total"}
    assert all(value.isfinite() for value in losses.values())
    student = run.distiller.student
    first, head = next(student.parameters()), getattr(student.get_classifier(), "weight", None)
    assert (head is None) == (name in ("own-images", "own-retrieval"))
    if (
        "-baseline-mixer" in name
    ):  # timm's Mixers start with a head of zeros: nothing comes through it at the first step
        assert not head.any()
        first = head
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.abs().max() > 0
    assert [name for name, p in run.distiller.named_parameters() if p.grad is None] == []
    if "scalekd" in config.losses and (heads := config.losses["scalekd"].get("heads")):
        method = run.distiller.methods["scalekd"]
        assert {cap.heads for cap in method.proxy_caps.values()} == {heads[0]}
        assert {cap.heads for cap in method.student_caps.values()} == {heads[1]}
