"""The commit in a run's provenance is that of scalekd's own repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

from scalekd.common.provenance import commit_of


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *who, *command], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def package(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


def test_a_commit_is_of_scalekds_own_repository(tmp_path):
    ours = package(tmp_path / "ours" / "src" / "scalekd")
    assert commit_of(ours) is None
    git(tmp_path / "ours", "init")
    git(tmp_path / "ours", "commit", "--allow-empty", "-m", "x")
    assert commit_of(ours) is None  # not tracked
    git(tmp_path / "ours", "add", ".")
    git(tmp_path / "ours", "commit", "-m", "x")
    head = git(tmp_path / "ours", "rev-parse", "HEAD")
    assert commit_of(ours) == head[:12]
    (ours / "new.py").write_text("")
    assert commit_of(ours) == f"{head[:12]}+"


def test_a_repository_around_the_environment_is_another(tmp_path, monkeypatch):
    theirs = package(tmp_path / "theirs" / ".venv" / "lib" / "site-packages" / "scalekd")
    vendored = package(tmp_path / "theirs" / "vendor" / "src" / "scalekd")
    git(tmp_path / "theirs", "init")
    git(tmp_path / "theirs", "add", ".")
    git(tmp_path / "theirs", "commit", "-m", "x")
    assert commit_of(theirs) is commit_of(vendored) is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs" / ".git"))
    assert commit_of(package(tmp_path / "alone" / "src" / "scalekd")) is None
