"""A corpus of bad inputs, end to end: each gives a short error without a traceback, and none starts training."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from archives import PNG
from bad_data import ARCHIVES, FOLDERS, GOOD, IMAGES, SETS, Make, Workspace, hf, idx, mnist, shards, sizes, tar
from bad_files import Payload, contents
from safetensors.torch import load_file, save_file
from small_images import write_images
from whole_runs import TINY

from scalekd.cli.app import main
from scalekd.train import checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, tiny.yaml and run/, a finished run on them; the recipe names this folder."""
    folder = tmp_path_factory.mktemp("finished")
    for part, number in (("train", 8), ("val", 4)):
        write_images(folder / "images" / part, per_class=number, seed=number)
    recipe = TINY | {"losses": {"ce": {}}, "teacher": None, "train": TINY["train"] | {"epochs": 1}, "track": []}
    recipe["data"] = TINY["data"] | {part: str(folder / "images" / part) for part in ("train", "val")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "--no-preflight"]) == 0
    return folder


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch) -> Workspace:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(finished, tmp_path / "copy")
    copy, empty = tmp_path / "copy", tmp_path / "bad"
    empty.mkdir()
    text = (copy / "tiny.yaml").read_text().replace(str(finished), str(copy))
    (copy / "tiny.yaml").write_text(text)
    return Workspace(empty, copy / "images", copy / "tiny.yaml", copy / "run")


# ---------------------------------------------------------------- recipes


def recipe(text: str | bytes) -> Make:
    """A recipe file; RECIPE in `text` stands for the valid recipe."""

    def make(workspace: Workspace) -> list[object]:
        file = workspace.folder / "recipe.yaml"
        raw = text if isinstance(text, bytes) else text.encode()
        file.write_bytes(raw.replace(b"RECIPE", workspace.recipe.read_bytes()))
        return ["train", file, "--out", workspace.folder / "run"]

    return make


def given(*overrides: str) -> Make:
    return lambda workspace: list(overrides)


def laughs(first: str, more: str) -> str:
    """A few lines that expand to 2**40 values."""
    return "\n".join(
        ["RECIPE", first, *(more.replace("NEW", f"a{i}").replace("OLD", f"a{i - 1}") for i in range(1, 40))]
    )


NOT_YAML = "is not valid YAML: "
RECIPES = [
    ("broken YAML", recipe("RECIPE\na: [1"), NOT_YAML),
    ("tabs", recipe("RECIPE\na:\n\tb: 1"), NOT_YAML),
    ("tag of a Python object", recipe("name: !!python/object/apply:os.system ['true']"), "could not determine a constructor"),
    ("tag of a Python name", recipe("name: !!python/name:os.system"), "could not determine a constructor"),
    ("unknown tag", recipe("RECIPE\nseed: !x 1"), "could not determine a constructor"),
    ("billion laughs", recipe(laughs("a0: &a0 [x, x]", "NEW: &NEW [*OLD, *OLD]")), "it has more than 100,000 values"),
    ("billion laughs in merges", recipe(laughs("a0: &a0 {x: 1}", "NEW: &NEW {<<: [*OLD, *OLD]}")), "more than 100,000 values"),
    ("alias of what it is in", recipe("RECIPE\nx: &a {b: *a}"), "an alias contains itself"),
    ("alias of nothing", recipe("RECIPE\nx: *a"), "found undefined alias"),
    ("nested too deeply", recipe("a: " + "[" * 2000), "it is nested too deeply"),
    ("key given twice", recipe("RECIPE\nname: again"), "`name` is given twice"),
    ("key with control characters", recipe('RECIPE\n"a\\e[2J": 1'), r"the key 'a\x1b[2J' has characters that cannot be shown"),
    ("two documents", recipe("RECIPE\n---\nRECIPE"), NOT_YAML),
    ("not a mapping", recipe("- a\n- b"), "is not a recipe: it must be a mapping"),
    ("no bytes at all", recipe(""), "is not a recipe: it must be a mapping"),
    ("binary file", recipe(PNG), "cannot be read as text"),
    ("not UTF-8", recipe("name: é".encode("latin-1")), "cannot be read as text"),
    ("folder as a recipe", lambda p: ["train", p.folder], "no recipe `"),
    ("missing recipe", lambda p: ["train", "dmo"], "no recipe `dmo`: not a file and not a shipped recipe. Did you mean `demo`?"),
    ("recipe's text in place of its name", lambda p: ["train", p.recipe.read_text() * 20], "no recipe `"),
    ("unknown key", given("dta=1"), "dta: unknown. Did you mean `data`?"),
    ("unknown key inside", given("optim.rl=1"), "optim.rl: unknown. Valid: "),
    ("thousands of unknown keys", recipe("RECIPE\n" + "\n".join(f"k{i}: 1" for i in range(2000))), "and 1970 more"),
    ("value for a section", given("train=3"), "train: must have keys and values"),
    ("list for a section", given("data=[1]"), "data: must have keys and values"),
    ("text for a number", given("optim.lr=fast"), "optim.lr: Input should be a valid number"),
    ("true for a number", given("train.epochs=yes"), "train.epochs: true and false are not allowed here"),
    ("true for an option", given("losses.ce.smoothing=true"), "losses.ce.smoothing: cannot be true or false"),
    ("half an epoch", given("train.epochs=1.5"), "train.epochs: Input should be a valid integer"),
    ("no epochs", given("train.epochs=0"), "train.epochs: Input should be greater than 0"),
    ("NaN", given("optim.lr=.nan"), "optim.lr: Input should be a finite number"),
    ("infinity", given("augment.mixup=.inf"), "augment.mixup: Input should be a finite number"),
    ("NaN in an option", given("losses.ce.smoothing=.nan"), "losses.ce.smoothing: Input should be a finite number"),
    ("number of thousands of digits", given("seed=0x" + "f" * 5000), "a number has more than 64 bits"),
    ("the same as text", given(f"train.epochs='{'9' * 400}'"), "train.epochs: Input should be less than"),
    ("batch of quintillions", given(f"train.batch_size={10**18}"), "train.batch_size: Input should be less than"),
    ("padding of quintillions", given(f"augment.pad={10**18}"), "augment.pad: Input should be less than"),
    ("image of quintillions of pixels", given(f"data.image_size={10**18}"), "data.image_size: pixels, such as 224"),
    ("deviation of 0", given("student.std=[0, 0, 0]"), "student.std.0: Input should be greater than 0"),
    ("beta of 1", given("optim.betas=[1, 1]"), "optim.betas.0: Input should be less than 1"),
    ("surrogates", recipe('RECIPE\nseed: "\\ud800"'), "seed: "),
    ("model of a surrogate", given('student.model="\\ud800"'), r"timm has no model `\ud800`"),
    ("argument that is no name", given("student.kwargs.a b=1"), "'a b' is not a valid argument name"),
    ("weights of nobody", given("student.weights=~nobody-of-that-name/x"), "student.weights: no file"),
    ("weights of a name too long", given("student.weights=" + "x" * 5000), "student.weights: no file"),
    ("override without a value", given("optim.lr"), "`optim.lr` is not an override: write key=value"),
]  # fmt: skip


# ---------------------------------------------------------------- checkpoints and students


def flipped(raw: bytes) -> bytes:
    """One bit changed, in the middle of the tensors."""
    at = len(raw) // 2
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def resumed(*names: str, change: Callable[[bytes], bytes]) -> Make:
    """Resumes a killed run after the bytes of these checkpoints were changed."""

    def make(workspace: Workspace) -> list[object]:
        (workspace.run / "summary.json").unlink()
        (workspace.run / "previous.pt").unlink(missing_ok=True)
        shutil.copy(workspace.run / "last.pt", workspace.folder / "whole.pt")
        for name in names:
            (workspace.run / name).write_bytes(change((workspace.folder / "whole.pt").read_bytes()))
        return ["train", workspace.run / "recipe.yaml", "--out", workspace.run, "--no-preflight"]

    return make


def state(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A valid checkpoint file with changed content."""

    def rewritten(raw: bytes) -> bytes:
        content = torch.load(io.BytesIO(raw), weights_only=True)
        content = change(content) or content
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    return rewritten


def exported(which: str, change: Callable[[bytes], bytes]) -> Make:
    def make(workspace: Workspace) -> list[object]:
        file = workspace.run / f"{which}.pt"
        file.write_bytes(change(file.read_bytes()))
        return ["export", workspace.run, "--checkpoint", which]

    return make


def evaluated(workspace: Workspace) -> list[object]:
    return ["evaluate", workspace.run, "--data", workspace.images / "val"]


def card(**changes: object) -> Make:
    """The student with a changed card; None removes a key."""

    def make(workspace: Workspace) -> list[object]:
        file = workspace.run / "student.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return evaluated(workspace)

    return make


def student_file(name: str, change: Callable[[bytes], bytes]) -> Make:
    def make(workspace: Workspace) -> list[object]:
        file = workspace.run / name
        file.write_bytes(change(file.read_bytes()))
        return evaluated(workspace)

    return make


def other_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], card_too: bool = True) -> Make:
    """The student with other weights; with `card_too` the checksum is removed from its card."""

    def make(workspace: Workspace) -> list[object]:
        file = workspace.run / "student.safetensors"
        save_file(change(load_file(file)), file)
        return card(sha256=None)(workspace) if card_too else evaluated(workspace)

    return make


def as_pth(workspace: Workspace) -> list[object]:
    torch.save({"x": Payload(workspace.folder / "trace")}, workspace.run / "student.pth")
    return ["evaluate", workspace.run / "student.pth", "--data", workspace.images / "val"]


def mistaken(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    return state(lambda s: change(s["deployed"]) and None)


NOT_WHOLE = "last.pt is damaged or not a checkpoint: "
OTHER_RUN = "last.pt belongs to a run of another recipe (first difference: "
NOT_OF_RUN = "last.pt does not fit this recipe: "
CARD = "student.json is not a valid student card: "
UNFIT = "student.safetensors does not fit its card"
CHECKPOINTS = [
    ("checkpoint cut off", resumed("last.pt", change=lambda raw: raw[:-1]), NOT_WHOLE),
    ("checkpoint of no bytes", resumed("last.pt", change=lambda raw: b""), NOT_WHOLE),
    ("checkpoint with one bit changed", resumed("last.pt", change=flipped), NOT_WHOLE),
    ("checkpoint of text", resumed("last.pt", change=lambda raw: b"text"), NOT_WHOLE),
    ("checkpoint of a pickle with code", resumed("last.pt", change=lambda raw: pickle.dumps(Payload(Path("trace")))), NOT_WHOLE),
    ("checkpoint with code", resumed("last.pt", change=state(lambda s: s | {"x": Payload(Path("trace"))})), NOT_WHOLE),
    ("checkpoints both damaged", resumed("last.pt", "previous.pt", change=flipped), "previous.pt is damaged or not a checkpoint"),
    ("checkpoint of another format", resumed("last.pt", change=state(lambda s: s | {"format": 0})), "last.pt is not a checkpoint of this"),
    ("checkpoint that is a list", resumed("last.pt", change=state(lambda s: [1])), "last.pt is not a checkpoint of this version"),
    ("checkpoint of another recipe", resumed("last.pt", change=state(lambda s: s | {"recipe": s["recipe"].replace("lr: 0.001", "lr: 0.5")})),
     OTHER_RUN + "`lr: 0.5` before, `lr: 0.001` now)"),
    ("checkpoint whose recipe is none", resumed("last.pt", change=state(lambda s: s | {"recipe": 3})), OTHER_RUN),
    ("checkpoint without weights", resumed("last.pt", change=state(lambda s: s.pop("student") and None)), NOT_OF_RUN),
    ("checkpoint beyond the end", resumed("last.pt", change=state(lambda s: s["progress"].update(step=999))), NOT_OF_RUN + "step 999 of 3"),
    ("checkpoint of step -1", resumed("last.pt", change=state(lambda s: s["progress"].update(step=-1))), NOT_OF_RUN + "step -1 of 3"),
    ("checkpoint whose step is text", resumed("last.pt", change=state(lambda s: s["progress"].update(step="x"))), NOT_OF_RUN),
    ("checkpoint whose history is none", resumed("last.pt", change=state(lambda s: s["progress"].update(history=3))), NOT_OF_RUN),
    ("export of a damaged checkpoint", exported("last", flipped), NOT_WHOLE),
    ("export of a checkpoint before any validation", exported("last", state(lambda s: s["progress"].update(history=[]))),
     "last.pt is not a checkpoint of"),
    ("export of an empty checkpoint", exported("best", state(lambda s: {"format": checkpoint.FORMAT})), "best.pt is not a checkpoint of"),
    ("export of another model's", exported("last", mistaken(lambda d: d.popitem())), "last.pt is not a checkpoint of"),
    ("card that is not JSON", student_file("student.json", lambda raw: b"name: no JSON"), CARD),
    ("card that is not text", student_file("student.json", lambda raw: b"\xff\xfe"), CARD),
    ("card that is a list", student_file("student.json", lambda raw: b"[]"), CARD),
    ("card nested without end", student_file("student.json", lambda raw: b"[" * 100_000), CARD),
    ("card without classes", card(classes=None), CARD + "classes: Field required"),
    ("card of other classes", card(classes=["ant", "bee", "cow"]), "`--data` has other classes than the student"),
    ("card of classes in another order", card(classes=["bee", "ant", "cat"]), "`--data` has other classes than the student"),
    ("card of classes that are numbers", card(classes=[1, 2, 3]), CARD + "classes.0: Input should be a valid string"),
    ("card without deviations", card(std=None), CARD + "std: Field required"),
    ("card with a deviation of 0", card(std=[0, 0, 0]), CARD + "std.0: Input should be greater than 0"),
    ("card with two means", card(mean=[0.5, 0.5]), CARD + "Value error, mean and std must each have one value or three"),
    ("card with an image of 0 pixels", card(image_size=[0, 0]), CARD + "image_size.0: Input should be greater than 0"),
    ("card with an unknown interpolation", card(interpolation="x"), CARD),
    ("card with a crop of nothing", card(crop_pct=1e-9), CARD),
    ("card of a model that timm lacks", card(model="resnet_of_mine"), CARD),
    ("card of arguments that fit nothing", card(kwargs={"block": 3}), UNFIT),
    ("weights of another model", card(model="test_vit", sha256=None), UNFIT),
    ("weights for more classes", other_weights(lambda w: w | {"fc.weight": torch.ones(9, w["fc.weight"].shape[1])}), UNFIT),
    ("weights of which one is missing", other_weights(lambda w: {k: v for k, v in w.items() if k != "fc.weight"}), UNFIT),
    ("weights that are not those of the card", other_weights(lambda w: {k: v + 1 for k, v in w.items()}, card_too=False),
     UNFIT),
    ("weights with one bit changed", student_file("student.safetensors", flipped), UNFIT),
    ("weights cut off", student_file("student.safetensors", lambda raw: raw[: len(raw) // 2]), UNFIT),
    ("student that is a .pth with code", as_pth, "is no exported student"),
    ("folder without a student", lambda p: ["evaluate", p.folder, "--data", p.images], "no student.safetensors"),
]  # fmt: skip

WRITTEN_AT_A_START = ("recipe.yaml", "provenance.json", "student.json", "log.jsonl")  # of a resumed run
CASES: list[tuple[str, Make, str]] = [*IMAGES, *FOLDERS, *ARCHIVES, *SETS, *RECIPES, *CHECKPOINTS]


@pytest.mark.parametrize("make, message", [pytest.param(make, message, id=name) for name, make, message in CASES])
def test_gives_an_error_and_does_not_train(cli, workspace, tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(workspace.folder)  # relative paths would be written there
    args = make(workspace)
    if not args or args[0] not in ("train", "export", "evaluate"):
        args = ["train", workspace.recipe, "--out", tmp_path / "run", *args]
    before = contents(tmp_path)
    result = cli(*args)
    assert result.code == 2, result
    assert result.err.startswith("scalekd: ") and message in result.err, result.err
    lines = result.err.splitlines()
    assert len(lines) <= (40 if " problem" in lines[0] else 3) and "Traceback" not in result.out + result.err
    after = contents(tmp_path)
    changed = {path for path in before if after.get(path) != before[path]}
    assert not {path for path in changed if args[0] != "train" or Path(path).name not in WRITTEN_AT_A_START}
    assert not any(Path(path).name in ("last.pt", "summary.json", "trace") for path in after.keys() - before.keys())


def test_valid_inputs_are_accepted(cli, workspace, tmp_path):
    """The inputs are valid before the cases damage them."""
    assert cli("train", workspace.recipe, "--out", tmp_path / "run").code == 0
    assert cli(*evaluated(workspace)).code == 0
    assert cli("export", workspace.run).code == 0
    for given in (tar()(workspace), shards("a\nb\n", **{f"{c}{i}": c.encode() for c in "ab" for i in range(9)})(workspace),
                  hf(*GOOD)(workspace), idx(30, 30)(workspace), mnist(sizes(30, 28, 28) + b"".join(bytes([i]) * 784 for i in range(30)))(workspace)):  # fmt: skip
        assert cli("train", workspace.recipe, "--dry-run", *given).code == 0, given
    assert (
        cli(*resumed("last.pt", change=state(lambda s: s["progress"].update(step=2, history=[])))(workspace)).code == 0
    )


def test_the_corpus_is_large_and_named_once():
    names = [name for name, _, _ in CASES]
    assert len(names) >= 60 and len(set(names)) == len(names)
