"""Nothing leaves the machine unasked: what commands send, seen from Python and from the kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import scalekd

WATCHED = """
import sys
calls = open(sys.argv[1], "w")
def note(event, args):
    if event.startswith(("socket.connect", "socket.send", "socket.get", "urllib.")):
        if getattr(args and args[0], "family", 0) != 1:  # AF_UNIX: between processes of this machine
            print(event, args, file=calls, flush=True)
sys.addaudithook(note)  # sees all of Python, and not what compiled libraries do
from scalekd.cli.app import main
root, new = sys.argv[2:]
for command in (
    ["train", f"{root}/tiny.yaml", "--out", new],
    ["export", new, "--onnx"],
    ["evaluate", new, "--data", f"{root}/val"],
    ["report", new],
    ["recipes"],
    ["cost", f"{root}/tiny.yaml"],
):
    assert main(command) == 0, command
"""
NAMES = re.compile(r"AF_INET.*(connect|send)|(connect|send\w*)\(.*AF_INET")


def watched(root: Path, folder: Path, program: str, strace: bool) -> tuple[str, str]:
    """Runs a program with a new home folder: (network calls in Python, those of the whole process tree if `strace`)."""
    calls, system = folder / "calls.txt", folder / "strace.txt"
    tracer = ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(system)]
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(folder)}
    command = [sys.executable, "-c", program, str(calls), str(root), str(folder / "run")]
    done = subprocess.run(
        (tracer if strace else []) + command, env=env, cwd=folder, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    traced = system.read_text() if strace else ""
    return calls.read_text(), "\n".join(line for line in traced.splitlines() if NAMES.search(line))


def strace_works() -> bool:
    command = ["strace", "-f", "--seccomp-bpf", "-o", os.devnull, "true"]
    return shutil.which("strace") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_commands_send_nothing(finished, tmp_path):
    """Python's own calls always; those of compiled libraries, such as onnxruntime, where strace is installed."""
    pytest.importorskip("onnxscript")
    python, system = watched(finished, tmp_path, WATCHED, strace_works())
    assert python == system == ""
    assert (tmp_path / "run" / "student.onnx").is_file()
    assert not (tmp_path / ".cache" / "Microsoft").exists()  # where onnxruntime keeps what its telemetry will send


def test_the_watch_sees_calls(tmp_path):
    ask = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('127.0.0.1', 9))\n"
    python, system = watched(tmp_path, tmp_path, WATCHED.split("from scalekd")[0] + ask, strace_works())
    assert "socket.connect" in python and (not strace_works() or "AF_INET" in system)


def test_onnxruntime_is_imported_in_one_place():
    """Where its telemetry is switched off before the import. Parts of it are imported after a call of that function."""
    source = Path(scalekd.__file__).parent
    texts = {str(f.relative_to(source)): f.read_text() for f in source.rglob("*.py")}
    whole = {file: text for file, text in texts.items() if re.search(r"(import|from) onnxruntime(?!\.)", text)}
    assert list(whole) == ["models/student_file.py"]
    text = whole["models/student_file.py"]
    assert text.count("import onnxruntime") == 1
    assert text.index('"ORT_DISABLE_TELEMETRY"') < text.index("import onnxruntime")
    for text in texts.values():
        for part in re.finditer(r"(import|from) onnxruntime\.", text):
            function = text[: part.start()].rpartition("\ndef ")[2]
            assert re.search(r"^    onnx_runtime\(", function, re.MULTILINE), function
