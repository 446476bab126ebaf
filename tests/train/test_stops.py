"""Signals, waits and outages: a run stops saved, with the exit code of the docs, and never hangs."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import launcher
import pytest
import torch
import yaml
from whole_runs import assert_same, changed, final_state

from scalekd.checks import loader
from scalekd.common import stop as stopping
from scalekd.common.errors import UserError
from scalekd.common.files import read_bytes
from scalekd.common.screen import Screen
from scalekd.common.stop import Stopped, StopRequest
from scalekd.data import images as images_module
from scalekd.data import reading, workers
from scalekd.data.batches import Images, train_batches, training_images
from scalekd.data.images import Bad, BadImages, read_file
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.split import open_split


@pytest.fixture
def recipe(light_recipe, tmp_path) -> Path:
    path = tmp_path / "light.yaml"
    path.write_text(yaml.safe_dump(changed(light_recipe, losses={"ce": {}}, teacher=None)))
    return path


def images_of(folder: Path, **more: object) -> Images:
    values = {"train": str(folder / "train"), "val": str(folder / "val"), "image_size": 32, "on_bad_image": "skip"}
    data = Data.model_validate(values | more)
    return training_images(open_split(data), data, Augment(), (0.5,) * 3, (0.2,) * 3, seed=3)


# ---------------------------------------------------------------- signals


def test_a_stop_is_no_exception_and_is_not_lost():
    with pytest.raises(Stopped), StopRequest():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            raise UserError("timm cannot build it") from None
    with pytest.raises(Stopped, match="SIGTERM"), StopRequest():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:  # as a library might
            raise UserError("timm cannot build it") from None


def test_a_pending_signal_stops_what_follows_the_training():
    with pytest.raises(Stopped, match=r"after step 6 \(saved\)"), StopRequest() as stop:
        stop.wait_for_step, stop.saved = True, 6
        os.kill(os.getpid(), signal.SIGTERM)
        stop.at_once()


def test_a_signal_is_answered_while_python_does_not_run(tmp_path):
    code = (
        "import os, signal, threading\nfrom scalekd.common.stop import StopRequest\n"
        "with StopRequest(spoken=True) as stop:\n stop.wait_for_step = True\n"
        " os.kill(os.getpid(), signal.SIGINT)\n import time; time.sleep(0.3); print(stop.number, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2\n" and "SIGINT received: finishing this step and saving; Ctrl-C again" in done.stderr


def test_what_hangs_in_a_library_is_ended(tmp_path):
    code = (
        "import os, signal, threading\nfrom scalekd.common import stop\nstop.PATIENCE = 0.2\n"
        "with stop.StopRequest(spoken=True):\n"
        " try: os.kill(os.getpid(), signal.SIGTERM)\n except BaseException: pass\n"
        " threading.Event().wait(20)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 75


def test_hangup_stops_saved_but_not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    with StopRequest() as stop:
        stop.wait_for_step = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP and stopping.EXIT_CODES[signal.SIGHUP] == 129
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_until_handled(pid: int) -> None:
    """Waits until a process that just started handles signals. SIGTERM: under nohup it leaves SIGHUP ignored."""
    while True:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        if caught is None or int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:  # None: it has ended
            return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_signals_at_many_moments(recipe, tmp_path):
    """Six while a fresh Python imports, and twelve in the runs of processes that have imported."""
    command = ["-m", "scalekd", "train", recipe, "--out"]
    fresh = partial(subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    assert fresh([sys.executable, *command, tmp_path / "whole"]).communicate() == (None, "")
    with_imports, began = time.monotonic() - began, time.monotonic()
    assert launcher.run(*command, tmp_path / "again").returncode == 0
    length = time.monotonic() - began
    moments = [(True, with_imports * i / 9) for i in range(6)] + [(False, length * i / 12) for i in range(12)]
    for i, (imports, moment) in enumerate(moments):
        number, code = [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 129)][i % 3]
        words = [*command, tmp_path / "parts"]
        process = fresh([sys.executable, *words]) if imports else launcher.start(*words)
        wait_until_handled(process.pid)
        time.sleep(moment)
        process.send_signal(number)
        error = process.communicate()[1]
        finished = (tmp_path / "parts" / "summary.json").exists()
        assert process.returncode == (0 if finished else code), error
        assert "Traceback" not in error
        if finished:
            break
    else:
        assert launcher.run(*command, tmp_path / "parts").returncode == 0
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert not (tmp_path / "parts" / "bad-images.txt").exists()


# ---------------------------------------------------------------- the screen


@pytest.mark.slow
@pytest.mark.parametrize("command", ["{} train {} --out {} | true", "{} train {} --out {} > /dev/full"])
def test_a_lost_screen_does_not_end_a_run(recipe, tmp_path, command):
    line = command.format(launcher.stand_ins() / "scalekd", recipe, tmp_path / "run")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_result_that_cannot_be_printed_is_an_error():
    command = f"{launcher.stand_ins() / 'scalekd'} recipes > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "scalekd: cannot write to standard output: No space left on device\n"


def test_a_lost_screen_stays_silent():
    read, write = os.pipe()
    os.close(read)
    screen = Screen(os.fdopen(write, "w"))
    for _ in range(2):
        screen.write("text")
        screen.flush()
    assert isinstance(screen.lost, BrokenPipeError)


# ---------------------------------------------------------------- waiting


def test_stopped_workers_end_the_wait(image_folder, monkeypatch):
    monkeypatch.setattr(workers, "SILENCE", 2.0)
    images = images_of(image_folder)
    batches = train_batches(images, TrainSampler(24, 8, 3, 60), 1, pin=False)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=r"no batch for 2 s.*\n.*data\.workers=0"):
        list(batches)
    assert not worker.is_alive()  # or it would hold up the end of the process


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_ends_while_others_are_killed_raises_nothing(image_folder, monkeypatch):
    """PyTorch's handler of SIGCHLD raises wherever this process is, for example while it is being replaced."""
    images, before, raised = images_of(image_folder), signal.signal, []

    def interrupted(number, handler):
        if number == signal.SIGCHLD and handler == signal.SIG_DFL and not raised:
            raised.append(number)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        return before(number, handler)

    batches = train_batches(images, TrainSampler(24, 8, 3, 60), 1, pin=False)
    next(batches)
    (worker,), handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal, "signal", interrupted)
    batches.close()
    assert raised and not worker.is_alive() and signal.getsignal(signal.SIGCHLD) is handler


def test_a_wait_answers_signals(image_folder, monkeypatch):
    images = images_of(image_folder)
    with StopRequest() as stop:
        stop.wait_for_step = True
        batches = train_batches(images, TrainSampler(24, 8, 3, 60), 1, pin=False)
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            list(batches)


def test_a_copied_loader_does_not_kill_the_workers(image_folder):
    """A worker of another loader holds a copy of this one, and may collect it."""
    batches = train_batches(images_of(image_folder), TrainSampler(24, 8, 3, 6), 2, pin=False)
    next(batches)
    started = multiprocessing.active_children()
    copied = multiprocessing.get_context("fork").Process(target=batches.close)
    copied.start()
    copied.join(20)
    assert copied.exitcode == 0 and all(process.exitcode is None for process in started)
    next(batches)  # PyTorch's own end of the copy would have ended them
    batches.close()
    assert all(process.exitcode == -signal.SIGKILL for process in started)


def test_a_worker_that_cannot_send_ends(cli, recipe, tmp_path, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    result = cli("train", recipe, "--out", tmp_path / "run", "--no-preflight", "data.workers=1")
    assert result.code == 2 and "out of shared memory (/dev/shm).\nTry data.workers=0" in result.err
    monkeypatch.undo()
    assert cli("train", recipe, "--out", tmp_path / "run", "--no-preflight", "data.workers=0").code == 0


@pytest.mark.parametrize("free, code", [(10_000, 2), (1 << 40, 0)])
def test_the_preflight_compares_shared_memory(cli, recipe, tmp_path, monkeypatch, free, code):
    monkeypatch.setattr(loader, "_free", lambda: free)
    result = cli("train", recipe, "--dry-run", "data.workers=1")
    assert result.code == code and ("Set data.workers=0 or fewer" in result.err) == (code == 2)


# ---------------------------------------------------------------- outages


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(reading, "WAITS", (0.01,))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_an_outage_is_no_bad_image(cli, recipe, image_folder, tmp_path, monkeypatch, impatient, number):
    log = tmp_path / "run" / "log.jsonl"

    def broken(path, most):
        if log.is_file() and '"step": 2' in log.read_text():
            raise OSError(number, os.strerror(number))
        return read_bytes(path, most)

    monkeypatch.setattr(images_module, "read_bytes", broken)
    command = ["train", recipe, "--out", tmp_path / "run", "--on-bad-image", "skip", "--no-preflight"]
    result = cli(*command)
    assert result.code == 2 and os.strerror(number) in result.err
    assert final_state(tmp_path / "run")["progress"]["step"] == 2
    assert not (tmp_path / "run" / "bad-images.txt").exists()
    monkeypatch.undo()
    assert "resumes from step 2" in cli(*command).out


def test_a_share_that_is_gone_is_an_outage(image_folder, impatient):
    images = images_of(image_folder)
    (image_folder / "train").rename(image_folder / "away")
    assert isinstance(images[0, 0], reading.Outage) and "is mounted" in str(images[0, 0])
    (image_folder / "train" / "ant").mkdir(parents=True)  # an empty mount point
    with pytest.raises(reading.Outage):
        read_file(str(image_folder / "train" / "ant" / "0.png"))


def test_an_outage_that_ends_is_forgotten(tmp_path, impatient):
    calls = []

    def read() -> bytes:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.EIO, "once")
        return b"data"

    assert reading.steadily(read, str(tmp_path / "a.png")) == b"data"


def test_images_that_are_readable_again_leave_the_list(cli, recipe, image_folder, tmp_path):
    victims = [image_folder / "train" / "ant" / f"{i}.png" for i in range(5)]
    kept = [victim.read_bytes() for victim in victims]
    for victim in victims:
        victim.write_bytes(b"")
    command = ["train", recipe, "--out", tmp_path / "run", "--on-bad-image", "skip", "--no-preflight"]
    assert "data.max_bad allows 2" in cli(*command).err
    for victim, data in zip(victims, kept):
        victim.write_bytes(data)
    assert cli(*command).code == 0  # also those that the run did not meet: the files were empty
    assert (tmp_path / "run" / "bad-images.txt").read_text() == ""


@pytest.mark.parametrize("max_bad", [0.01, 1.0])
def test_a_class_without_a_readable_image_is_named(image_folder, max_bad):
    for file in (image_folder / "train" / "bee").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 8 training images of the class bee can be read"):
        list(train_batches(images_of(image_folder, max_bad=max_bad), TrainSampler(24, 8, 3, 3), 0, pin=False))


def test_a_worker_that_was_killed_with_a_lock_holds_up_nothing(image_folder):
    """PyTorch waits for that lock when it ends its workers."""
    batches = train_batches(images_of(image_folder), TrainSampler(24, 8, 3, 30), 1, pin=False)
    next(batches)
    iterator = batches.gi_frame.f_locals["batches"].gi_frame.f_locals["iterator"]
    iterator._workers_done_event._cond.acquire()
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the end of the workers is waited for"))
    signal.alarm(10)
    try:
        batches.close()
        del iterator
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_bad_images_of_all_processes_count(monkeypatch, tmp_path):
    from scalekd.common import parallel

    bad = BadImages("train", 100, 0.03)
    bad.keep_in(tmp_path)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "gather", lambda mine: [mine, [Bad("c", "x"), Bad("d", "x")]])
    bad.add([Bad("a", "x"), Bad("b", "x")])
    with pytest.raises(UserError, match="4 of 100 images cannot be read"):
        bad.exchange()
    assert len((tmp_path / "bad-images.txt").read_text().splitlines()) == 4
