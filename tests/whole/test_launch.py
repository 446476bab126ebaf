"""Runs the launch files: with torchrun, and with substitutes for SLURM's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launcher
import pytest
import yaml
from whole_runs import assert_same, changed, events, final_state, start

LAUNCH = Path(__file__).parents[2] / "launch"
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

# Starts the command twice with SLURM's variables and exits with the highest exit code.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" &
    pids+=($!)
done
echo "${pids[@]}" > "$STATE/pids"
for pid in "${pids[@]}"; do wait "$pid"; code=$((code > $? ? code : $?)); done
exit $code
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$STATE/requeued"; fi
"""


@pytest.mark.parametrize("name", ["one-node.sh", "several-nodes.sh", "slurm.sbatch"])
def test_launch_files_are_valid_shell(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name]).returncode == 0


def with_run(name: str, folder: Path, *words: object) -> Path:
    """A copy of the launch file with its RUN line replaced, as a user would edit it."""
    lines = (LAUNCH / name).read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("RUN=(")]
    lines[at] = f"RUN=({' '.join(map(str, words))})"
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


@pytest.fixture
def warm() -> dict[str, str]:
    """An environment where `torchrun`, and what it starts, and `scalekd` start warm (tests/launcher.py)."""
    stand_ins = launcher.stand_ins()
    return ENVIRONMENT | {"PATH": f"{stand_ins}:{ENVIRONMENT['PATH']}", "PYTHON_EXEC": str(stand_ins / "python")}


@pytest.fixture
def recipe_path(light_recipe, tmp_path) -> Path:
    path = tmp_path / "light.yaml"
    path.write_text(yaml.safe_dump(changed(light_recipe, train={"epochs": 4})))
    return path


@pytest.mark.slow
def test_one_node_and_two_processes_are_one_with_two_accumulated_micro_batches(random_recipe, tmp_path):
    """Equal up to rounding: batch norm sees the same micro-batches, mixup and drop path draw the same random numbers."""
    recipe = changed(random_recipe, optim={"name": "momentum", "lr": 0.01}, train={"accumulate": 1})
    recipe["train"].pop("ema")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    two, one = tmp_path / "two", tmp_path / "one"
    script = with_run("one-node.sh", tmp_path, tmp_path / "recipe.yaml", "--out", two, "--no-preflight")
    done = subprocess.run(["bash", script], env=ENVIRONMENT | {"GPUS": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start(changed(recipe, train={"accumulate": 2}), one)
    for a, b in zip(events(two, "step"), events(one, "step"), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)


@pytest.mark.slow
def test_two_nodes_on_one_machine(recipe_path, tmp_path, warm):
    script = with_run("several-nodes.sh", tmp_path, recipe_path, "--out", tmp_path / "run")
    environment = warm | {"GPUS": "1", "NODES": "2", "FIRST": f"127.0.0.1:{20000 + os.getpid() % 10000}"}
    nodes = [subprocess.Popen(["bash", script], env=environment | {"NODE": str(i)}) for i in range(2)]
    assert [node.wait(200) for node in nodes] == [0, 0]
    assert len(events(tmp_path / "run", "finished")) == 1


@pytest.mark.slow
def test_slurm_saves_on_its_signal_and_asks_to_be_queued_again(recipe_path, tmp_path, warm):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = warm | {
        "PATH": f"{tools}:{warm['PATH']}",
        "STATE": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    whole = with_run("slurm.sbatch", tmp_path, recipe_path, "--out", tmp_path / "whole")
    assert subprocess.run(["bash", whole], env=environment).returncode == 0
    assert not (tmp_path / "requeued").exists()

    parts = with_run("slurm.sbatch", tmp_path, recipe_path, "--out", tmp_path / "parts")
    job = subprocess.Popen(["bash", parts], env=environment)
    while not ((tmp_path / "parts" / "log.jsonl").is_file() and events(tmp_path / "parts", "step")):
        assert job.poll() is None
        time.sleep(0.002)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    assert job.wait(60) == 75
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert subprocess.run(["bash", parts], env=environment).returncode == 0
    assert len(events(tmp_path / "parts", "finished")) == 1
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
