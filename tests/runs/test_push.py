"""`scalekd push`: the folder for the Hub is made and checked here; only the calls that send are replaced."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from exported_students import exported
from safetensors import safe_open

import scalekd
from scalekd.models.student_file import load_student
from scalekd.report.card import OURS
from scalekd.report.hub_card import hub_card

README = f"""---
library_name: timm
license: mit
datasets:
- ada/birds
---

# Mine

In this folder:

```python
import timm

student = timm.create_model("local-dir:.", pretrained=True).eval()
```

My words.

{OURS}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "run"
    folder.mkdir()
    exported(folder, "test_vit", (48, 48), kwargs={"class_token": False, "global_pool": "avg"})
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for the Hub, which keeps what it is sent."""
    hub = SimpleNamespace(folder=tmp_path / "sent", calls=[], private=True)

    def create_repo(self: Any, repo: str, **options: Any) -> str:
        hub.calls.append((repo, options))
        return f"https://hub/{repo}"

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **_: Any) -> None:
        shutil.copytree(folder_path, hub.folder)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_: SimpleNamespace(private=hub.private))
    return hub


def test_push(run, hub, cli, monkeypatch):
    result = cli("push", run, "ada/birds", "--private")
    assert result.code == 0 and "uploaded: https://hub/ada/birds" in result.out, result.err
    assert hub.calls == [("ada/birds", {"private": True, "exist_ok": True})]
    assert sorted(p.name for p in hub.folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    student, _ = load_student(run)
    images = torch.randn(2, 3, 48, 48)
    monkeypatch.setattr(
        timm.models._hub,
        "hf_hub_download",
        lambda repo_id, filename, **_: {"ada/birds": str(hub.folder / filename)}[repo_id],
    )
    for name in (f"local-dir:{hub.folder}", "hf-hub:ada/birds"):
        loaded = timm.create_model(name, pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(loaded(images), student(images))
        assert loaded.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    text = (hub.folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["license"], front["pipeline_tag"]) == (
        "timm",
        "unknown",
        "image-classification",
    )
    assert 'timm.create_model("hf-hub:ada/birds", pretrained=True)' in text and "ant, bee, cat" in text


def test_the_paths_of_this_machine_stay_here(run, hub):
    student, card = load_student(run)
    from scalekd.models.student_file import export_student

    private = run.parent / "private"
    private.mkdir(exist_ok=True)
    export_student(student, private / "student.safetensors", card | {"provenance": {"command": "/home/ada/secret"}})
    scalekd.push(private, "ada/birds")
    for file in hub.folder.iterdir():
        assert b"secret" not in file.read_bytes()
    with safe_open(hub.folder / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses a file without it


def test_dry_run_sends_nothing(run, hub, cli, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = cli("push", run, "ada/birds", "--dry-run")
    assert result.code == 0 and hub.calls == [] and not hub.folder.exists()
    assert "nothing was sent" in result.out and "model.safetensors" in result.out
    found = scalekd.push(run, "ada/birds", dry_run=True)
    assert found.url is None and set(found.files) == {"README.md", "config.json", "model.safetensors"}


def test_a_card_that_a_person_wrote_is_sent(run):
    _, card = load_student(run)
    text = hub_card(card, "ada/birds", README)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit" and front["datasets"] == ["ada/birds"] and "timm" in front["tags"]
    assert "My words." in text and text.count("```") == 2
    assert "local-dir" not in text and "In this folder" not in text and "Written by scalekd" not in text
    assert 'create_model("hf-hub:ada/birds"' in text
    old = README.replace('"local-dir:.", pretrained=True', '"test_vit", checkpoint_path="student.safetensors"')
    assert hub_card(card, "ada/birds", old) == text
    assert hub_card(card, "ada/birds", "only words").endswith("---\n\nonly words\n")


@pytest.mark.parametrize("name", ["birds", "ada/bir ds", "a/b/c", "ada/..", "ada/-x-"])
def test_a_name_that_is_no_name(run, hub, cli, name):
    result = cli("push", run, name)
    assert (
        result.code == 2
        and "is no name on the Hub. Write USER/NAME" in result.err
        and ".." not in result.err.replace(name, "")
    )
    assert len(result.err.splitlines()) <= 2
    assert hub.calls == []


def test_mistakes(run, hub, cli, monkeypatch, tmp_path):
    assert "is no folder" in cli("push", tmp_path / "none", "ada/birds").err
    assert "has no student.safetensors" in cli("push", tmp_path, "ada/birds").err
    hub.private = False
    result = cli("push", run, "ada/birds", "--private")
    assert result.code == 2 and "exists and is public; nothing was sent" in result.err and not hub.folder.exists()

    def refused(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    result = cli("push", run, "ada/birds")
    assert result.code == 2 and "the Hub cannot be reached: no route. The files are only" in result.err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = cli("push", run, "ada/birds")
    assert result.code == 2 and "no token" in result.err and "hf auth login" in result.err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = cli("push", run, "ada/birds")
    assert result.code == 2 and "HF_HUB_OFFLINE is set" in result.err and "`--dry-run`" in result.err


def test_a_student_that_timm_loads_differently_is_not_sent(run, hub, cli, monkeypatch):
    from scalekd.runs import push

    other, _ = exported(run.parent, "test_vit", (48, 48), kwargs={"class_token": False, "global_pool": "max"})
    monkeypatch.setattr(push, "load_timm_folder", lambda _: other)
    result = cli("push", run, "ada/birds")
    assert result.code == 2 and "with other logits; nothing was sent" in result.err and hub.calls == []
