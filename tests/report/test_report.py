"""The HTML report: numbers, drawing, escaping, and logs that are short, resumed or broken."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pages import cells, step, validation, well_formed

from scalekd.common.intervals import share_interval
from scalekd.common.text import tick_text
from scalekd.report.curves import ReportRun
from scalekd.report.folder import RunFolder
from scalekd.report.series import events_of, figure_points, loss_points, thin, time_use
from scalekd.report.several_runs import write_report
from scalekd.report.svg import LEFT, RIGHT, Axis, Curve, escape, log_ticks, nice_ticks, percent_axis, value_axis


def run(label: str, events: list[dict[str, Any]] | None = None, top1: tuple[float, ...] = (90.0,)) -> ReportRun:
    return ReportRun(label, events or [], list(top1), [100.0] * len(top1), {"ce": {}})


def write(tmp_path: Path, runs: list[ReportRun], **options: Any) -> str:
    path = tmp_path / "new" / "report.html"
    write_report(path, **({"title": "Runs", "runs": runs, "facts": {"student": "resnet10t"}} | options))
    return path.read_text(encoding="utf-8")


def lines(figure: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = (e.attrib["points"].split() for e in figure.iter("polyline"))
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in points)] for points in found]


def test_table(tmp_path):
    # mean 92, deviations -1, 0, +1: sample standard deviation 1; gain 92 - 90
    kd = run("kd", [step(10, speed=1234.0)], (91.0, 92.0, 93.0))
    kd.losses, kd.seconds = {"ce": {}, "kd": {"temperature": 2.0, "weight": 0.5}}, [3600.0, 3700.0, 3800.0]
    page = write(tmp_path, [run("baseline"), kd], teacher_top1=94.806)
    well_formed(page)
    assert cells(page) == [
        ["run", "top-1 (%)", "gain (points)", "time", "images/s", "seeds", "losses"],
        ["teacher", "94.81", "–", "–", "–", "–", "–"],  # noqa: RUF001
        ["baseline", "90.00", "–", "1.7 min", "–", "1", "ce"],  # noqa: RUF001
        ["kd", "92.00 ± 1.00", "+2.00", "1 h 01 min", "1,234", "3", "ce, kd (temperature 2.0, weight 0.5)"],
    ]
    assert "<dt>student</dt><dd>resnet10t</dd>" in page


def test_a_known_value_has_its_place_in_the_drawing(tmp_path):
    events = [validation(1, 82.0), validation(2, 85.0), validation(4, 90.0)]
    page = write(tmp_path, [run("baseline", events)], teacher_top1=90.0)
    teacher, curve = lines(well_formed(page)[0])
    # horizontal: 0 to 4 epochs; vertical: 82 to 90 %, with ticks every 2 % from y = 222 up to y = 40
    assert curve == [
        pytest.approx((LEFT + (RIGHT - LEFT) * e / 4, 222 - 182 * (t - 82) / 8), abs=0.06)
        for e, t in ((1, 82), (2, 85), (4, 90))
    ]
    assert teacher == [(LEFT, 40.0), (RIGHT, 40.0)]
    assert "teacher 90.00 %" in page


def test_other_figures_than_top1(tmp_path):
    events = [
        {"event": "validation", "step": 10 * e, "epoch": e, "mask_ap": 10.0 * e, "box_ap": 11.0 * e} for e in (1, 2)
    ]
    figures = {"mask_ap": "mask AP", "box_ap": "box AP"}
    page = write(tmp_path, [run("detector", events, (20.0,))], figures=figures)
    drawn = well_formed(page)
    assert [e.text for f in drawn[:2] for e in f.iter("text") if "AP" in (e.text or "")] == [
        "mask AP (%)",
        "box AP (%)",
    ]
    assert cells(page)[0][1] == "mask AP (%)" and cells(page)[1][1] == "20.00"
    # from 10 to 20 % with ticks every 2 %: the lowest and the highest of the drawing
    assert [y for _, y in lines(drawn[0])[0]] == [222.0, 40.0]


def test_the_interval_of_one_seed():
    # scipy.stats.binomtest(...).proportion_ci(0.95, method="wilson")
    assert share_interval(80.0, 100) == pytest.approx((71.1170, 86.6633), abs=2e-4)
    assert share_interval(80.22, 10000) == pytest.approx((79.427726, 80.989065), abs=1e-4)
    assert share_interval(100.0, 1) == pytest.approx((20.6549, 100.0), abs=1e-3)


def test_the_interval_stands_beside_one_seed_and_not_beside_several(tmp_path):
    events = [validation(1, 80.0) | {"images": 100}]
    page = write(tmp_path, [run("one", events, (80.0,)), run("two", events, (80.0, 82.0))])
    assert [row[1] for row in cells(page)[1:3]] == ["80.00 [71.12, 86.66]", "81.00 ± 1.41"]


def test_a_run_without_a_teacher_logs_no_share_of_one():
    event = step(10, data=0.25)
    del event["teacher_share"]
    assert time_use([event])[1] == pytest.approx((0.25, 0.0, 0.75))


def test_bars_are_as_long_as_the_time(tmp_path):
    page = write(tmp_path, [run("a", [step(10, 1000.0, 0.25, 0.5)]), run("b", [step(10, 500.0, 0.0, 0.0)])])
    bars = [e for e in well_formed(page)[-1].iter("rect") if e.get("height") == "20.0"]
    unit = (RIGHT - 12) / 2  # 2 ms per image is the whole width
    widths = [(e.get("class"), float(e.attrib["width"])) for e in bars]
    assert widths == [
        ("data", pytest.approx(unit / 4, abs=0.1)),
        ("teacher", pytest.approx(unit / 2, abs=0.1)),
        ("rest", pytest.approx(unit / 4, abs=0.1)),
        ("data", 0.0),
        ("teacher", 0.0),
        ("rest", pytest.approx(2 * unit, abs=0.1)),
    ]
    assert "data 25.0%, teacher 50.0%, rest 25.0%" in page


def test_time_shares_are_weighted_by_time():
    # 10 steps at 1000 images/s, then 30 at 500: one and six parts of the time
    seconds, shares = time_use([step(10, 1000.0, 0.7, 0.0), step(40, 500.0, 0.0, 0.7)])
    assert shares == pytest.approx((0.1, 0.6, 0.3))
    assert sum(shares) == pytest.approx(1)
    assert seconds == pytest.approx((10 / 1000 + 30 / 500) / 40)


def test_overlapping_times_are_scaled_to_the_whole():
    _, shares = time_use([step(10, data=0.6, teacher=0.9)])
    assert shares == pytest.approx((0.4, 0.6, 0.0))


def test_intervals_without_numbers_are_left_out_of_the_time():
    assert time_use([step(10, speed=0.0), step(20, data=math.nan), {"event": "step", "step": 30}]) is None
    assert time_use([step(10, speed=math.inf), step(20, 100.0)]) == (0.01, pytest.approx((0.25, 0.5, 0.25)))


def test_a_resumed_run_goes_back_to_its_checkpoint():
    events = [step(10), step(20, ce=5.0), step(30), step(20, ce=2.0), validation(2, 80.0), step(40)]
    assert [e["step"] for e in events_of(events, "step")] == [10, 20, 40]
    assert loss_points(events)["ce"][1] == (20, 2.0)


def test_non_finite_numbers_are_left_out_of_curves(tmp_path):
    events = [step(1, ce=1.0, kd=math.nan), step(2, ce=math.inf, kd=3.0), validation(1, math.nan), validation(2, 80.0)]
    assert loss_points(events) == {"ce": [(1, 1.0)], "kd": [(2, 3.0)]}
    assert figure_points(events, "top1") == [(2, 80.0)]
    assert "teacher nan" not in write(tmp_path, [run("a", events)], teacher_top1=math.nan)
    well_formed(write(tmp_path, [run("a", events)]))


def test_the_total_is_left_out_where_it_repeats_the_only_term():
    assert list(loss_points([step(1, ce=1.0, total=1.0)])) == ["ce"]
    assert list(loss_points([step(1, ce=1.0, kd=1.0, total=2.0)])) == ["ce", "kd", "total"]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"event": "finished"}],
        [validation(1, 50.0)],
        [step(1)],
        [step(1), validation(1, 0.0)],
        [step(1, ce=0.0, kd=-2.0), step(2, ce=1e-12, kd=1e30)],
    ],
)
def test_short_logs(tmp_path, events):
    for runs in ([run("a", events)], [run("a", events, ()), run("b")]):
        page = write(tmp_path, runs)
        well_formed(page)
        assert ("No validation was logged." in page) == (not figure_points(events, "top1"))
        assert ("No training step was logged." in page) == (not loss_points(events))


def test_no_runs(tmp_path):
    well_formed(write(tmp_path, [], facts={}))


def test_everything_from_outside_is_escaped(tmp_path):
    bad = "<script>alert('1')</script>&\"\x00\ud800"
    events = [step(1, **{bad: 1.0, "ce": 2.0}), validation(1, 50.0)]
    odd = ReportRun(bad, events, [50.0], [1.0], {bad: {bad: bad}})
    page = write(tmp_path, [odd], title=bad + "%STYLE%", facts={bad: bad})
    well_formed(page)
    assert "<script" not in page
    assert page.count(escape(bad)) >= 10
    assert "\x00" not in page


def test_offline_and_small(tmp_path):
    terms = ["ce", "kd", "scalekd.ori", "scalekd.alt", "scalekd.proxy_ori", "scalekd.proxy_alt", "total"]
    events = [step(i, **{name: 1 + 0.5 * math.sin(i) for name in terms}) for i in range(1, 3000)]
    events += [validation(e, 50 + e / 10) for e in range(1, 301)]
    page = write(tmp_path, [run(f"run {i}", events) for i in range(16)])
    assert len(page.encode()) < 500_000
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"<(script|link|img|iframe)|\ssrc=|@import|url\((?!#)", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_ticks():
    assert nice_ticks(0, 30) == [0, 10, 20, 30]
    assert nice_ticks(82.3, 94.8) == [80, 85, 90, 95]
    assert nice_ticks(0, 2, least_step=1) == [0, 1, 2]
    assert log_ticks(0.002, 3.0) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert log_ticks(0.3, 15.0) == pytest.approx([0.2, 0.5, 1, 2, 5, 10, 20])
    assert [tick_text(v) for v in (0, 0.05, 1500, 20000, 1.5e6, -2000)] == ["0", "0.05", "1.5k", "20k", "1.5M", "-2k"]


@pytest.mark.parametrize(
    "low, high", [(0, 0), (5, 5), (-3, 7), (1e-9, 2e-9), (1.0, 1.0 + 1e-15), (0, 1e7), (99.9, 100)]
)
def test_ticks_enclose_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] < ticks[-1]
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12


def test_axes():
    assert not value_axis([1.0, 20.0]).log
    assert not value_axis([0.0, 200.0]).log
    assert value_axis([0.01, 1.0]).log
    assert Axis([1, 10, 100], 200, 0, log=True).at(10) == pytest.approx(100)


def test_thin_keeps_means_and_the_last_point():
    points = [(float(i), 2.0 * i) for i in range(1001)]
    few = thin(points, 100)
    assert len(few) <= 102
    assert few[0] == (5.0, 10.0)
    assert few[-1] == points[-1]
    assert thin(points[:100], 100) == points[:100]


@pytest.mark.parametrize("values", [[97.0, 99.0, 100.0, 100.0], [100.0], [99.999, 100.0], [0.0]])
def test_a_percent_axis_ends_within_0_and_100(values):
    axis, _ = percent_axis([Curve(list(enumerate(values)), "run", 0)], 0.75)
    assert 0 <= axis.ticks[0] <= min(values[len(values) // 4 :]) and max(values) <= axis.ticks[-1] <= 100


def test_a_percent_axis_covers_all_points_above_and_says_if_some_are_below():
    falling = Curve(list(enumerate([80.0, 50.0, 52.0, 51.0, 50.0])), "run", 0)
    axis, below = percent_axis([falling], 0.75)
    assert axis.ticks[-1] >= 80 and not below
    axis, below = percent_axis([Curve(list(enumerate([2.0, 50.0, 52.0, 51.0, 54.0])), "run", 0)], 0.75)
    assert axis.ticks[0] > 2 and below


def test_title_and_top5(tmp_path):
    folder = RunFolder(tmp_path / "photos-2", {"name": "own-data"}, "", [], {}, {}, {}, {"classes": list("abcde")}, [])
    assert folder.title == "photos-2 (recipe own-data)"
    validation = {"event": "validation", "step": 1, "epoch": 1, "top1": 50.0, "top5": 100.0}
    assert list(replace(folder, events=[validation]).figures) == ["top1"]
    six = replace(folder, events=[validation], card={"classes": list("abcdef")}, path=tmp_path / "own-data")
    assert list(six.figures) == ["top1", "top5"] and six.title == "own-data"
