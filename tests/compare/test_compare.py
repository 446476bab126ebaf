"""`scalekd compare`: the runs of a ladder, which of them are run or reused, and the statistics."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import statistics
import time
from pathlib import Path

import comparisons
import launcher
import pytest
import timm
import torch
import yaml
from damage import some_of
from rich.console import Console
from safetensors.torch import save_file
from scipy import stats
from whole_runs import TINY

from scalekd.common.errors import UserError
from scalekd.common.intervals import half_width
from scalekd.common.stop import Stopped, StopRequest
from scalekd.compare import runner
from scalekd.compare.compare import settled
from scalekd.compare.ladder import Job, chosen, jobs, ladder_names, load_ladder
from scalekd.compare.page import markdown
from scalekd.compare.progress import Board
from scalekd.compare.report import report_comparison
from scalekd.compare.results import held_values, known_records, read_records, recipe_of, summary, write_records
from scalekd.compare.runner import Place, places, run_all
from scalekd.compare.same_inputs import check_finished
from scalekd.compare.shared_outputs import Outputs
from scalekd.config.recipe import check_config, load_recipe
from scalekd.data.batches import listed
from scalekd.data.fingerprint import fingerprint
from scalekd.data.split import open_split
from scalekd.models.weights.match import sha256_of
from scalekd.train import hardware

METHODS = {
    "none": {"teacher": None, "losses": {"ce": {}}},
    "KD": {"losses": {"ce": {}, "kd": {}}},
    "FD (s4)": {"losses": {"ce": {}, "fd": {}}},
}


@pytest.fixture
def ladder_file(tmp_path, tiny_recipe):
    """`ladder_file(**fields)` -> the path of a ladder on the tiny recipe, two seeds of one epoch."""
    tiny_recipe["train"]["epochs"] = 1
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))

    def write(**fields):
        values = {"name": "try", "recipe": "tiny.yaml", "methods": METHODS, "baseline": "none", "seeds": [0, 1]}
        path = tmp_path / "ladder.yaml"
        path.write_text("# A try.\n# command:  scalekd compare\n" + yaml.safe_dump(values | fields, sort_keys=False))
        return str(path)

    return write


# which runs


def test_every_combination_seed_by_seed(ladder_file):
    file = ladder_file(students={"A": {}, "B": {"student": {"model": "test_resnet", "kwargs": {"act_layer": "silu"}}}})
    planned = jobs(load_ladder(file), ["optim.lr=0.5"])
    assert [(j.seed, j.student, j.method) for j in planned] == [
        (seed, student, method) for seed in (0, 1) for student in "AB" for method in METHODS
    ]
    assert {j.config.seed for j in planned[:6]} == {0} and {j.config.optim.lr for j in planned} == {0.5}
    assert planned[0].config.teacher is None and planned[1].config.teacher is not None
    assert planned[3].config.student.kwargs == {"act_layer": "silu"} and list(planned[4].config.losses) == ["ce", "kd"]
    assert len({str(j.folder) for j in planned}) == 12


def test_runs_that_cannot_be_compared_are_rejected(ladder_file):
    features = METHODS | {"features": {"losses": {"fd": {}}}}
    with pytest.raises(UserError, match=r"features: 1 problem\n  - losses: none reads the student's logits"):
        jobs(load_ladder(ladder_file(methods=features)))
    chain = METHODS | {"chain": {"assistant": {"student": {"model": "test_vit"}}, "losses": {"ce": {}, "kd": {}}}}
    with pytest.raises(UserError, match=r"chain: 1 problem\n  - assistant: a comparison trains no assistants"):
        jobs(load_ladder(ladder_file(methods=chain)))


def test_runs_share_the_head_that_they_fit(ladder_file, tmp_path):
    ladder = load_ladder(ladder_file(set={"teacher": {"head": "fit"}}))
    first, *_, last = settled(jobs(ladder), tmp_path / "out", Place("cpu", 1))
    assert first.config.teacher is None and last.config.teacher.head == str(tmp_path / "out" / "head")
    ladder = load_ladder(ladder_file(set={"teacher": {"head": "fit"}}, students={"A": {}, "B": {"data": {"limit": 9}}}))
    with pytest.raises(UserError, match=r"B, KD: 1 problem\n  - teacher.head: `fit` fits one head for all runs"):
        jobs(ladder)


def test_the_seed_replaces_its_placeholder(ladder_file):
    file = ladder_file(
        set={"data": {"seed": "{seed}", "limit": 6}, "student": {"weights": "w-{seed}.pt"}}, seeds=[4, 7]
    )
    planned = jobs(load_ladder(file))
    assert [(j.seed, j.config.data.seed, j.config.student.weights) for j in planned[::3]] == [
        (4, 4, "w-4.pt"),
        (7, 7, "w-7.pt"),
    ]


def test_a_part_of_a_ladder_keeps_its_baseline(ladder_file):
    ladder = load_ladder(ladder_file())
    assert list(chosen(ladder, [], ["KD"], 1).methods) == ["none", "KD"]
    assert chosen(ladder, [], [], 1).seeds == (0,) and chosen(ladder, [], [], 4).seeds == (0, 1, 2, 3)
    for students, methods, seeds, message in (
        ([], ["KDD"], None, "`KDD`. Did you mean `KD`"),
        (["A"], [], None, "no student `A`"),
        ([], [], 0, "`seeds` 0: must be 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            chosen(ladder, students, methods, seeds)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"baseline": "nonee"}, "no method `nonee`. Did you mean `none`"),
        (
            {"methods": {"a": {"lossses": {}}}, "baseline": "a"},
            "`lossses` is not a recipe section.*Did you mean `losses`",
        ),
        ({"methods": {"a": {"seed": 3}}, "baseline": "a"}, "`seed` is not a recipe section"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": []}, "one or more"),
        ({"basline": "none"}, "basline: unknown. Did you mean `baseline`"),
        ({"methods": {"../up": {}}}, "methods"),
        ({"methods": {"a b": {}, "a_b": {}}, "baseline": "a b"}, "the same folder name"),
    ],
)
def test_errors_in_a_ladder(ladder_file, fields, message):
    with pytest.raises(UserError, match=message):
        load_ladder(ladder_file(**fields))


def test_errors_of_all_runs_are_reported_together(ladder_file):
    methods = METHODS | {"x": {"losses": {"kdd": {}}}, "y": {"losses": {"kd": {"temprature": 2}}}}
    with pytest.raises(UserError) as error:
        jobs(load_ladder(ladder_file(methods=methods)))
    assert "test_resnet, x" in str(error.value) and "Did you mean `kd`" in str(error.value)
    assert "test_resnet, y" in str(error.value) and "Did you mean `temperature`" in str(error.value)


@pytest.mark.parametrize("override", ["losses.kd.temperature=2", "losses.ce.weight=2", "train.epochs=9"])
def test_an_override_that_the_ladder_would_undo_is_rejected(ladder_file, override):
    methods = {k: v | {"train": {"epochs": 3}} for k, v in METHODS.items()}
    with pytest.raises(UserError, match="has no effect: the ladder sets"):
        jobs(load_ladder(ladder_file(methods=methods)), [override])


def test_an_override_of_the_teacher_leaves_the_baseline_without(ladder_file):
    planned = jobs(load_ladder(ladder_file()), ["teacher.model=test_vit2", "teacher.kwargs={}"])
    assert [j.config.teacher and j.config.teacher.model for j in planned[:3]] == [None, "test_vit2", "test_vit2"]


@pytest.mark.parametrize("name", ladder_names())
def test_shipped_ladders_load(name):
    ladder = load_ladder(name)
    assert ladder.name == name
    planned = jobs(ladder)
    assert len(planned) == len(ladder.seeds) * len(ladder.methods) * max(1, len(ladder.students))
    assert load_recipe(ladder.recipe)


def test_the_ladder_in_the_docs_loads(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "compare.md").read_text()
    (tmp_path / "mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    planned = jobs(load_ladder(str(tmp_path / "mine.yaml")))
    assert {(j.student, j.method) for j in planned} >= {("small", "no teacher"), ("large", "ScaleKD")}
    assert {j.config.train.epochs for j in planned} == {50}


def test_places(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert places(1, "cpu") == [Place("cpu", 1)] and len(places(None, "cpu")) == len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [p.device for p in places(3, "cpu")] == ["cpu"] * 3
    assert places(1, "cpu")[0].threads == len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match="`jobs` 0: must be 1 or more"):
        places(0, "cpu")


# which runs are started, and which are reused


def compare(*options):
    return launcher.start("-m", "scalekd", "compare", *options, "--device", "cpu", fork_server=True)


def finish(process):
    out, err = process.communicate(timeout=250)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_comparison_and_a_second_call_that_repeats_nothing(ladder_file, tmp_path, image_folder):
    out = tmp_path / "out"
    trained = timm.create_model("test_vit", depth=4, img_size=48).state_dict()
    save_file({k: v + 0.1 * torch.rand_like(v[:1]) for k, v in trained.items()}, tmp_path / "vit.safetensors")
    file = ladder_file(set={"teacher": {"weights": str(tmp_path / "vit.safetensors"), "head": "fit"}})
    code, text, err = finish(compare(file, "--out", out, "--seeds", "1", "--jobs", "2", "--share-teacher"))
    assert code == 0, err
    assert text.count("seed 0: top-1") == 3 and "3 of 3 runs finished" in text
    made = json.loads((out / "summary.json").read_text())
    for method in METHODS:
        folder = out / "runs" / "test_resnet" / method.replace(" ", "_").replace("(", "_").replace(")", "_") / "seed-0"
        assert made["students"]["test_resnet"][method]["top1"] == [
            json.loads((folder / "summary.json").read_text())["top1"]
        ]
    assert made["about"][0] == "A try." and made["finished"] == 3 and made["failed"] == []
    assert "KD" in (out / "summary.md").read_text() and "<html" in (out / "report.html").read_text()
    assert not (out / "outputs").exists()

    held = {"head.safetensors", "head.json"}
    assert {p.name for p in out.rglob("head.*")} == held and {p.parent for p in out.rglob("head.*")} == {out / "head"}

    before = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}
    code, text, err = finish(compare(file, "--out", out, "--seeds", "1"))
    assert code == 0 and "3 of them already finished" in text
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()} == before

    next((image_folder / "train").rglob("*.png")).unlink()  # more runs would not be comparable with the finished ones
    code, text, err = finish(compare(file, "--out", out, "--seeds", "2"))
    assert code == 2 and "the images changed since" in err and "data.train has 23 images, 24 before" in err

    # the records replace deleted folders; a record with another recipe does not count
    (out / "runs").rename(tmp_path / "away")
    ladder = load_ladder(file)

    def known(part, overrides=()):
        return known_records(out, settled(jobs(part, overrides), out, Place("cpu", 1)))

    assert len(known(chosen(ladder, [], [], 1))) == 3 and known(ladder, ["optim.lr=0.3"]) == {}
    assert len(known(ladder, ["train.save_minutes=3"])) == 3  # the same runs


@pytest.mark.slow
def test_a_run_fails_and_the_others_finish(ladder_file, tmp_path, image_folder):
    weights = tmp_path / "none.safetensors"
    methods = METHODS | {
        "broken": {"losses": {"ce": {}, "kd": {}}, "teacher": TINY["teacher"] | {"weights": str(weights)}}
    }
    code, text, err = finish(compare(ladder_file(methods=methods, seeds=[0]), "--out", tmp_path / "out", "--jobs", "2"))
    assert code == 1, err
    assert "failed: test_resnet broken seed 0" in text and "none.safetensors" in text
    assert "3 of 4 runs finished" in text
    (failed,) = json.loads((tmp_path / "out" / "summary.json").read_text())["failed"]
    assert failed["method"] == "broken"


@pytest.mark.slow
def test_a_stopped_comparison_resumes(ladder_file, tmp_path):
    file = ladder_file(methods={k: METHODS[k] for k in ("none", "KD")}, seeds=[0])
    options = (file, "train.epochs=9", "--out", tmp_path / "out", "--jobs", "1")
    process = compare(*options)
    runs = tmp_path / "out" / "runs"
    end = time.monotonic() + 120
    while time.monotonic() < end and not any('"step"' in log.read_text() for log in runs.rglob("log.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, text, err = finish(process)
    assert code == 75 and "stopped" in err, (text, err)
    code, text, err = finish(compare(*options))
    assert code == 0 and "2 of 2 runs finished" in text
    assert any('"resumed"' in log.read_text() for log in runs.rglob("log.jsonl"))


@pytest.mark.slow
def test_a_killed_comparison_ends_its_runs_and_resumes(ladder_file, tmp_path):
    file = ladder_file(methods={k: METHODS[k] for k in ("none", "KD")}, seeds=[0])
    options = (file, "train.epochs=9", "--out", tmp_path / "out", "--jobs", "1")
    process = compare(*options)
    runs = tmp_path / "out" / "runs"
    end = time.monotonic() + 120
    while time.monotonic() < end and not any('"step"' in log.read_text() for log in runs.rglob("log.jsonl")):
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    code, text, err = finish(compare(*options))  # at once: the run of the first call may still be saving
    assert code == 0 and "2 of 2 runs finished" in text, (text, err)
    (folder,) = runs.rglob("none/seed-0")
    assert '"resumed"' in (folder / "log.jsonl").read_text()


@pytest.mark.slow
def test_logit_and_feature_methods_share_one_teacher_pass(ladder_file, tmp_path):
    out, methods = tmp_path / "out", METHODS | {"CE again": {"teacher": None, "losses": {"ce": {"smoothing": 0.1}}}}
    options = (ladder_file(methods=methods, seeds=[0]), "--out", out, "--jobs", "1", "--share-teacher")
    code, text, err = finish(compare(*options, "--methods", "KD,FD (s4)"))
    assert code == 0 and "keeps the teacher's outputs" in text and (out / "outputs").is_dir(), err
    events = {
        log.parent.parent.name: json.loads(line)
        for log in (out / "runs").rglob("log.jsonl")
        for line in log.read_text().splitlines()
        if '"teacher_outputs"' in line
    }
    # the first micro-batch of a run is always computed, to know what is stored
    assert {name: (e["computed"], e["read"]) for name, e in events.items()} == {"KD": (3, 0), "FD__s4_": (1, 2)}


def test_outputs_stay_for_the_rest_of_the_ladder(ladder_file, tmp_path):
    planned = jobs(load_ladder(ladder_file()))
    now, later = planned[:2], planned[2:3]
    file, screen = tmp_path / "outputs" / "seed-0-abc.outputs", Console(file=io.StringIO(), width=200)
    file.parent.mkdir()
    file.write_bytes(b"x" * 5000)
    outputs = Outputs(tmp_path, now, later)
    assert outputs.losses == ["ce", "kd"]
    outputs.remove_done(0, now)
    outputs.finish(screen)
    assert file.exists() and "for the ladder's other 1 runs" in screen.file.getvalue()
    outputs = Outputs(tmp_path, later, [])
    outputs.remove_done(0, later)
    outputs.finish(screen)
    assert not file.parent.exists()


def test_stopped_after_some_runs(ladder_file, tmp_path, monkeypatch):
    class Ended:
        exitcode = 0

        def start(self):
            started.append(self)

        def join(self, timeout=None):
            if len(started) == 4:
                stop.number = signal.SIGTERM

        terminate = start

    started, stop = [], StopRequest()
    monkeypatch.setattr(runner.SERVER, "Process", lambda **_: Ended())
    monkeypatch.setattr(runner.SERVER, "set_forkserver_preload", lambda _: None)
    planned = jobs(load_ladder(ladder_file()))
    with pytest.raises(Stopped, match="stopped by SIGTERM after 4 of 6 runs; run the same command"):
        run_all(planned, lambda _: tmp_path, None, [], [Place("cpu", 1)], lambda *_: None, lambda _: None, stop)


def test_labels_that_share_a_folder(ladder_file):
    file = ladder_file(students={"r 18": {}, "r_18": {}})
    with pytest.raises(UserError, match="students: `r 18` and `r_18` give the same folder name"):
        load_ladder(file)


def test_escape_codes_do_not_reach_the_terminal(ladder_file, cli, tmp_path):
    file = ladder_file(title="\x1b]0;owned\x07 red", seeds=[0], methods={"none": METHODS["none"]})
    planned = jobs(load_ladder(file))
    (tmp_path / "out").mkdir()
    write_records(tmp_path / "out", {planned[0]: record(planned[0], 50.0)})
    result = cli("compare", file, "--out", tmp_path / "out", "--device", "cpu")
    texts = [result.out, result.err, *(p.read_text() for p in (tmp_path / "out").glob("summary.*"))]
    assert result.code == 0 and all("\x1b" not in text and "\x07" not in text for text in texts)


def test_auto_keeps_the_values_of_the_runs_that_began(ladder_file, tmp_path, monkeypatch):
    planned = jobs(load_ladder(ladder_file(set={"train": {"precision": "auto", "channels_last": "auto"}})))
    monkeypatch.setattr(hardware, "bf16_instructions", lambda: "none")
    fresh = settled(planned, tmp_path, Place("cpu", 2))
    assert {(j.config.train.precision, j.config.train.channels_last) for j in fresh} == {("float32", True)}
    folder = tmp_path / "runs" / planned[0].folder
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("train: {precision: bf16, channels_last: false}")
    held = settled(planned, tmp_path, Place("cpu", 2))
    assert {(j.config.train.precision, j.config.train.channels_last) for j in held} == {("bf16", False)}


def test_a_renamed_row_finds_its_records(ladder_file, tmp_path):
    old = jobs(load_ladder(ladder_file(methods={"none": METHODS["none"], "old": METHODS["KD"]}, seeds=[0])))
    write_records(tmp_path, {job: record(job, 50.0) for job in old})
    new = jobs(load_ladder(ladder_file(methods={"none": METHODS["none"], "KD": METHODS["KD"]}, seeds=[0])))
    assert {job.method for job in known_records(tmp_path, new)} == {"none", "KD"}


def test_how_long_it_takes(ladder_file, tmp_path, cli):
    ladder = load_ladder(ladder_file())
    planned = jobs(ladder)
    assert "6 runs, 6 epochs in total" in cli("compare", ladder_file(), "--dry-run").out
    screen, records = Console(file=io.StringIO(), width=200), {}
    board = Board(ladder, planned, records, tmp_path, screen, 2)
    with board:
        log = tmp_path / "runs" / planned[0].folder / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text('{"event": "step", "step": 1, "steps": 9, "left_s": 600.0}\n')
        board.show({planned[0]: time.monotonic()})
        assert "about 30.0 min for 6 runs" in screen.file.getvalue()
        # the first run of a seed computes the teacher's outputs and takes longer than the others
        for job, seconds in zip(planned, (100.0, 10.0, 10.0), strict=False):
            records[job] = record(job, 50.0) | {"seconds": seconds}
            board.show({planned[len(records)]: time.monotonic()})
        board.ended(planned[2], records[planned[2]], None)
        assert board._expected(planned[3]) == 100.0
        records[planned[3]] = record(planned[3], 50.0) | {"seconds": 100.0}
        assert board._expected(planned[4]) == 10.0


def test_torchrun_is_rejected(ladder_file, tmp_path):
    command = ["-m", "scalekd", "compare", ladder_file(), "--out", tmp_path / "out"]
    done = launcher.run(*command, env=os.environ | {"WORLD_SIZE": "2"})
    assert done.returncode == 2 and "without torchrun" in done.stderr and not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_rejected(ladder_file, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    code, _, err = finish(compare(ladder_file(), "--out", tmp_path / "full"))
    assert code == 2 and "holds no comparison" in err
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]


# the statistics


def record(job, top1, curve=()):
    made = {"machine": "m", "git": "abc", "scalekd": "1", "torch": "2", "timm": "1"}
    return {
        "student": job.student, "method": job.method, "seed": job.seed, "top1": top1, "seconds": 10.0 * (job.seed % 100),
        "steps": 9, "curve": list(curve), "made": made, "recipe": recipe_of(job),
    }  # fmt: skip


@pytest.fixture
def ladder(ladder_file):
    return load_ladder(ladder_file(seeds=[0, 1, 2, 3]))


TOP1 = {"none": [50.0, 52.0, 51.0, 49.0], "KD": [51.0, 52.5, 52.0, 51.5], "FD (s4)": [50.5, 52.0, 50.0, 50.0]}


def test_means_intervals_and_tests_are_those_of_scipy(ladder):
    planned = jobs(ladder)
    rows = summary(ladder, planned, {j: record(j, TOP1[j.method][j.seed]) for j in planned})["students"]["test_resnet"]
    for method, values in TOP1.items():
        low, high = stats.t.interval(0.95, 3, statistics.mean(values), stats.sem(values))
        assert math.isclose(rows[method]["mean"], (low + high) / 2)
        assert math.isclose(rows[method]["ci95"], (high - low) / 2)
        assert rows[method]["seconds"] == 15
    p = {m: stats.ttest_rel(TOP1[m], TOP1["none"]).pvalue for m in ("KD", "FD (s4)")}
    for method, value in p.items():
        assert math.isclose(rows[method]["p"], value)
        assert math.isclose(rows[method]["gain"], statistics.mean(TOP1[method]) - 50.5)
    assert p["KD"] < p["FD (s4)"]
    assert math.isclose(rows["KD"]["p_holm"], 2 * p["KD"])
    assert math.isclose(rows["FD (s4)"]["p_holm"], max(2 * p["KD"], p["FD (s4)"]))
    assert "gain" not in rows["none"]


def test_gains_use_the_seeds_that_both_have(ladder):
    planned = [j for j in jobs(ladder) if (j.method, j.seed) not in {("none", 0), ("KD", 3)}]
    rows = summary(ladder, planned, {j: record(j, TOP1[j.method][j.seed]) for j in planned})["students"]["test_resnet"]
    assert rows["KD"]["pairs"] == 2 and math.isclose(rows["KD"]["gain"], ((52.5 - 52) + (52 - 51)) / 2)


def test_one_seed_and_none(ladder):
    planned = jobs(ladder)
    first = {j: record(j, 50.0) for j in planned if j.seed == 0 and j.method != "KD"}
    rows = summary(ladder, planned, first)["students"]["test_resnet"]
    assert rows["KD"]["mean"] is None and rows["KD"]["gain"] is None and rows["KD"]["top1"] == []
    assert rows["FD (s4)"]["gain"] == 0 and rows["FD (s4)"]["p"] is None and rows["FD (s4)"]["ci95"] is None
    assert half_width([1.0]) is None
    json.dumps(rows, allow_nan=False)


def test_equal_gains_are_not_tested(ladder):
    planned = jobs(ladder)
    rows = summary(ladder, planned, {j: record(j, 50.0 + (j.method == "KD")) for j in planned})["students"][
        "test_resnet"
    ]
    assert rows["KD"]["p"] is None and rows["KD"]["gain"] == 1
    json.dumps(rows, allow_nan=False)


def test_curves_are_means_at_the_samples_that_all_seeds_have(ladder):
    planned = [j for j in jobs(ladder) if j.method == "KD" and j.seed < 2]
    curves = {0: [(8, 10.0), (16, 20.0)], 1: [(8, 20.0), (16, 40.0), (24, 50.0)]}
    rows = summary(ladder, planned, {j: record(j, 1.0, curves[j.seed]) for j in planned})
    assert rows["students"]["test_resnet"]["KD"]["curve"] == [[8, 15.0], [16, 30.0]]


def test_samples_to_reach_the_baselines_final_top1(ladder):
    curves = {"none": [(10, 20.0), (20, 40.0)], "KD": [(10, 30.0), (20, 50.0)], "FD (s4)": [(10, 10.0), (20, 39.0)]}
    planned = [j for j in jobs(ladder) if j.seed == 0]
    rows = summary(ladder, planned, {j: record(j, 1.0, curves[j.method]) for j in planned})["students"]["test_resnet"]
    assert rows["none"]["reach"] == 1 and rows["KD"]["reach"] == 0.75 and rows["FD (s4)"]["reach"] is None


def test_records_of_other_methods_stay(ladder, tmp_path):
    planned = jobs(ladder)
    write_records(tmp_path, {j: record(j, 1.0) for j in planned if j.method == "KD"})
    write_records(tmp_path, {j: record(j, 2.0) for j in planned if j.method == "none"})
    assert len(read_records(tmp_path)) == 8
    assert {r["top1"] for r in read_records(tmp_path) if r["method"] == "KD"} == {1.0}


def test_runs_of_another_comparison_count_if_their_recipe_is_the_same(ladder_file, tmp_path):
    first = jobs(load_ladder(ladder_file(name="first")))
    (tmp_path / "a").mkdir()
    write_records(tmp_path / "a", {j: record(j, 10.0 + j.seed) for j in first})
    methods = {
        "nothing": METHODS["none"],
        "KD T 2": {"losses": {"ce": {}, "kd": {"temperature": 2}}},
        "KD": METHODS["KD"],
    }
    second = jobs(load_ladder(ladder_file(name="second", methods=methods, baseline="nothing", seeds=[1, 2])))
    assert known_records(tmp_path / "b", second) == {}
    found = known_records(tmp_path / "b", second, [tmp_path / "a"])
    assert {(j.method, j.seed): r["top1"] for j, r in found.items()} == {("nothing", 1): 11.0, ("KD", 1): 11.0}
    assert all(r["method"] == j.method and r["from"] == str(tmp_path / "a") for j, r in found.items())
    assert known_records(tmp_path / "b", jobs(load_ladder(ladder_file()), ["optim.lr=0.7"]), [tmp_path / "a"]) == {}
    (tmp_path / "b").mkdir()
    write_records(tmp_path / "b", found)
    assert known_records(tmp_path / "b", second) == found  # reused records are known without the other comparison


def test_damaged_results_give_a_message(ladder_file, tmp_path):
    ladder = load_ladder(ladder_file(seeds=[0]))
    planned = jobs(ladder)
    write_records(tmp_path, {job: record(job, 50.0) for job in planned[:1]})
    (tmp_path / "summary.json").write_text(json.dumps(comparisons.summary()))
    for name, content in some_of(tmp_path, ["results.jsonl", "summary.json"], 20):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        try:
            held_values(tmp_path)
            known = known_records(tmp_path, planned) | known_records(tmp_path / "none", planned, [tmp_path])
            facts = {
                "about": [],
                "command": "",
                "versions": {},
                "teacher_top1": None,
                "wall_seconds": 1.0,
                "failed": [],
            }
            markdown(summary(ladder, planned, known, **facts))
            report_comparison(tmp_path)
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{name}: {content[:3000]!r}") from error
        (tmp_path / name).write_bytes(before)


def test_finished_runs_with_other_images_or_teachers_do_not_count(ladder_file, tmp_path, image_folder):
    """Those of another comparison too, whose runs have other labels."""
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(b"1")
    methods = METHODS | {"KD": {"losses": {"ce": {}, "kd": {}}, "teacher": TINY["teacher"] | {"weights": str(weights)}}}
    first = jobs(load_ladder(ladder_file(name="first", methods=methods, seeds=[0])))
    (tmp_path / "a").mkdir()
    write_records(tmp_path / "a", {j: record(j, 10.0) for j in first})
    split = open_split(first[0].config.data)
    data = {
        part: fingerprint(listed(source, indices))
        for part, source, indices in (
            ("train", split.train, split.train_indices),
            ("val", split.val, split.val_indices),
        )
    }
    for job in first:
        (tmp_path / "a" / "runs" / job.folder).mkdir(parents=True)
        inputs = {"data": data, "teacher": {"teacher": [sha256_of(weights), None]}, "versions": {}}
        (tmp_path / "a" / "runs" / job.folder / "inputs.json").write_text(json.dumps(inputs))
    methods = {"nothing": methods["none"], "other": methods["KD"]}
    second = jobs(load_ladder(ladder_file(name="second", methods=methods, baseline="nothing", seeds=[0])))
    found = known_records(tmp_path / "b", second, [tmp_path / "a"])
    check_finished(found, tmp_path / "b")
    weights.write_bytes(b"2")
    with pytest.raises(UserError, match=r"the teacher changed since .*/KD/seed-0 was finished: the weights of teacher"):
        check_finished(found, tmp_path / "b")
    weights.write_bytes(b"1")
    next((image_folder / "train").rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"the images changed since .*/none/seed-0 .*\n.*without `known`"):
        check_finished(found, tmp_path / "b")


def test_records_of_a_version_with_fewer_options_are_known(ladder_file, tmp_path):
    planned = jobs(load_ladder(ladder_file(methods={"none": METHODS["none"], "KD": METHODS["KD"]})))
    records = {j: record(j, 1.0) for j in planned}
    for record_ in records.values():
        for options in record_["recipe"]["losses"].values():
            options.pop("temperature", None)
    (tmp_path / "a").mkdir()
    write_records(tmp_path / "a", records)
    assert set(known_records(tmp_path / "b", planned, [tmp_path / "a"])) == set(planned)


def test_1_equals_1_0_and_large_seeds_stay_distinct(ladder_file, tmp_path):
    methods = {"none": METHODS["none"], "KD": {"losses": {"ce": {}, "kd": {"weight": 2}}}}
    planned = jobs(load_ladder(ladder_file(methods=methods, seeds=[2**62])))
    records = {j: record(j, 1.0) for j in planned}
    for record_ in records.values():
        record_["recipe"]["losses"].get("kd", {})["weight"] = 2
    (tmp_path / "a").mkdir()
    write_records(tmp_path / "a", records)
    assert set(known_records(tmp_path / "b", planned, [tmp_path / "a"])) == set(planned)
    next_one = jobs(load_ladder(ladder_file(methods=methods, seeds=[2**62 + 1])))
    assert known_records(tmp_path / "b", next_one, [tmp_path / "a"]) == {}


def test_a_job_is_known_by_its_labels():
    config = check_config(TINY, "x")
    assert Job("a", "b", 0, config) == Job("a", "b", 0, config.model_copy(update={"seed": 1}))
