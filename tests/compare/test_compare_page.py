"""A ladder's tables and plots: the numbers are the summary's, the order is the ladder's, names do no harm."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from comparisons import against, cell, summary
from pages import Balance

from scalekd.compare.page import html, markdown
from scalekd.compare.plot import curve_plot, gain_plot
from scalekd.report.svg import WIDTH, escape

SVG = "{http://www.w3.org/2000/svg}"
NONE = "\N{EN DASH}"
MARK = "◆"


def one_seed() -> dict[str, Any]:
    cnn = {"baseline": cell([7], [55.0]), "kd": cell([7], [56.5], **against(1.5, None, None, None, 1))}
    return summary(seeds=[7], students={"CNN": cnn}, failed=[])


def unfinished() -> dict[str, Any]:
    nothing = {"seconds": None, "steps": None, "reach": None}
    cnn = {
        "baseline": cell([], [], **nothing),
        "kd": cell([], [], **nothing, **against(None, None, None, None, 0)),
    }
    return summary(students={"CNN": cnn}, finished=0, failed=[])


def markdown_tables(text: str) -> list[list[list[str]]]:
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    rows = [[[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block] for block in blocks]
    assert all(len({len(row) for row in table}) == 1 for table in rows)
    return [[table[0], *table[2:]] for table in rows]  # without the rule


def html_tables(text: str) -> list[list[list[str]]]:
    tables = re.findall(r"<table.*?</table>", text)
    rows = [re.findall(r"<tr>(.*?)</tr>", table) for table in tables]
    return [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table] for table in rows]


def groups(svg: str) -> list[ElementTree.Element]:
    """Of every panel with drawings, in order; legends are left out."""
    found = ElementTree.fromstring(svg).findall(f"{SVG}g")
    return [g for g in found if g.find(f"{SVG}path[@class='grid']") is not None]


def dots(panel: ElementTree.Element) -> list[tuple[float, str]]:
    """(position, class) of every mean."""
    return [
        (float(re.findall(r"[-.\d]+", g.attrib["transform"])[0]), g.find(f"{SVG}path").attrib["class"])
        for g in panel.findall(f"{SVG}g")
    ]


def scale(panel: ElementTree.Element) -> list[tuple[float, float]]:
    """(position, value) of the horizontal ticks, from their texts."""
    grid = [float(re.match(r"M([-.\d]+)", e.attrib["d"])[1]) for e in panel.iterfind(f"{SVG}path[@class='grid']")]
    texts = {float(e.attrib["x"]): e.text for e in panel.iterfind(f"{SVG}text[@text-anchor='middle']")}
    return [(x, float(texts[x])) for x in grid]


def position(panel: ElementTree.Element, value: float) -> Any:
    (x0, v0), *_, (x1, v1) = scale(panel)
    return pytest.approx(x0 + (value - v0) * (x1 - x0) / (v1 - v0), abs=0.06)


def words(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# ---------------------------------------------------------------- tables

RESULTS = [
    ["method", "CNN", "CNN, gain", "Mixer", "Mixer, gain"],
    ["baseline", "56.00 ± 2.48", NONE, "41.00 ± 2.48", NONE],
    ["kd", "57.10 ± 2.61", f"+1.10 ± 0.25 {MARK}", "41.67 ± 2.58", "+0.67 ± 0.72"],
    ["crd", "55.80 ± 16.50 (n=2)", "-0.20 ± 3.80 (n=2)", NONE, NONE],
]
SEEDS_OF_CNN = [
    ["method", "seed 0", "seed 1", "seed 2", "p", "p, Holm", "reaches", "steps", "seconds"],
    ["baseline", "55.00", "56.00", "57.00", NONE, NONE, "80%", "900", "40.2"],
    ["kd", "56.10", "57.00", "58.20", "0.0031", "0.0062", "80%", "900", "40.2"],
    ["crd", "54.50", NONE, "57.10", "0.6300", "0.6300", "80%", "900", "40.2"],
]


def test_the_tables_hold_the_summary():
    results, cnn, mixer = markdown_tables(markdown(summary()))
    assert results == RESULTS
    assert cnn == SEEDS_OF_CNN
    assert mixer[3] == ["crd", *[NONE] * 8]
    assert html_tables(html(summary()))[:3] == [results, cnn, mixer]


def test_order_is_the_ladders():
    whole = summary()
    whole["students"] = {name: dict(reversed(methods.items())) for name, methods in reversed(whole["students"].items())}
    results, first, _ = markdown_tables(markdown(whole))
    assert results[0] == ["method", "Mixer", "Mixer, gain", "CNN", "CNN, gain"]
    assert [row[0] for row in results[1:]] == [row[0] for row in first[1:]] == ["crd", "kd", "baseline"]
    assert [word for word in words(gain_plot(whole)) if word in ("CNN", "Mixer", "crd", "kd")] == [
        *("Mixer", "crd", "kd"),
        *("CNN", "crd", "kd"),
    ]


def test_a_method_of_one_student_only():
    whole = summary()
    del whole["students"]["CNN"]["crd"]
    whole["students"]["Mixer"]["dkd"] = whole["students"]["Mixer"]["kd"]
    results, cnn, _ = markdown_tables(markdown(whole))
    assert [row[0] for row in results] == ["method", "baseline", "kd", "crd", "dkd"]
    assert results[4] == ["dkd", NONE, NONE, "41.67 ± 2.58", "+0.67 ± 0.72"]
    assert [row[0] for row in cnn] == ["method", "baseline", "kd"]


def test_one_seed():
    results, details = markdown_tables(markdown(one_seed()))
    assert results[1:] == [["baseline", "55.00", NONE], ["kd", "56.50", "+1.50"]]
    assert details[0] == ["method", "seed 7", "reaches", "steps", "seconds"]
    assert "no interval and no test" in markdown(one_seed())
    assert "t-test" not in markdown(one_seed())


def test_no_finished_run():
    results, details = markdown_tables(markdown(unfinished()))
    assert results[1:] == [["baseline", NONE, NONE], ["kd", NONE, NONE]]
    assert details[2] == ["kd", *[NONE] * 6]
    assert "0 of 18 planned runs finished" in markdown(unfinished())
    assert "no finished run" in words(gain_plot(unfinished()))
    assert curve_plot(unfinished()) is None


def test_other_seeds_than_the_baseline():
    whole = summary()
    whole["students"]["CNN"]["crd"] = cell([5], [54.0], **against(None, None, None, None, 0))
    results, cnn, _ = markdown_tables(markdown(whole))
    assert results[3][1:3] == ["54.00 (n=1)", NONE]
    assert cnn[0][1:5] == ["seed 0", "seed 1", "seed 2", "seed 5"]
    assert cnn[3][1:5] == [NONE, NONE, NONE, "54.00"]
    assert "no seed in common with the baseline" in words(gain_plot(whole))


def test_no_baseline():
    whole = summary()
    for methods in whole["students"].values():
        del methods["baseline"]
        methods["kd"] |= against(None, None, None, None, 0)
        methods["crd"] |= against(None, None, None, None, 0)
    assert markdown_tables(markdown(whole))[0][1] == ["kd", "57.10 ± 2.61", NONE, "41.67 ± 2.58", NONE]
    html(whole)
    assert curve_plot(whole)


def test_tiny_p_values_and_null_cells():
    whole = summary()
    whole["students"]["CNN"]["kd"] |= {"p": 1e-9, "p_holm": float("nan"), "seconds": None}
    row = markdown_tables(markdown(whole))[1][2]
    assert row[4:] == ["<0.0001", NONE, "80%", "900", NONE]
    assert MARK not in "".join(markdown_tables(markdown(whole))[0][2])


def test_what_was_run_and_the_facts():
    text = markdown(summary())
    assert text.startswith("# The paper's ladder\n\nAll methods, two students.\n\nEqual samples.\n\n")
    assert "3 methods, 2 students, 3 seeds (0, 1, 2): 14 of 18 planned runs finished, 1 failed." in text
    assert "The teacher: 84.20 top-1 %." in text
    assert "teacher:" not in markdown(summary(teacher_top1=None))
    assert "- CNN, crd, seed 1: `RuntimeError: nan in the loss`" in text
    assert "Failed runs" not in markdown(summary(failed=[])) + html(summary(failed=[]))
    facts = [
        "command: `scalekd compare ladder.yaml`",
        "machine: CPU, 2 threads",
        "versions: scalekd 0.3.0, torch 2.6.0",
    ]
    facts += ["commit: abc123", "wall time: 20.6 min", "time of all runs: 1 h 12 min"]
    assert text.endswith("\n".join(f"- {fact}" for fact in facts) + "\n")
    assert html_tables(html(summary()))[-1][1] == ["CNN, crd, seed 1", "RuntimeError: nan in the loss"]
    assert "<dt>time of all runs</dt><dd>1 h 12 min</dd>" in html(summary())


def test_the_legend_explains_what_is_there():
    text = markdown(summary())
    for words_ in (
        "Student's t over seeds",
        "paired by seed",
        "paired t-test",
        "Holm's correction",
        "weak",
        "n is the number",
    ):
        assert words_ in text
    whole = summary()
    for methods in whole["students"].values():
        del methods["crd"]
    assert "n is the number" not in markdown(whole)


# ---------------------------------------------------------------- plots


def test_dots_follow_the_values():
    cnn, mixer = groups(gain_plot(summary()))
    assert scale(cnn) == scale(mixer)
    assert len(scale(cnn)) >= 3
    steps = [b - a for (_, a), (_, b) in zip(scale(cnn), scale(cnn)[1:])]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert dots(cnn) == [(position(cnn, 1.1), "mark s0"), (position(cnn, -0.2), "hollow")]
    assert dots(mixer) == [(position(mixer, 2 / 3), "hollow")]
    zero = cnn.find(f"{SVG}path[@class='zero']").attrib["d"]
    assert float(zero[1:].split()[0]) == position(cnn, 0)


def test_intervals_and_seeds_follow_the_values():
    cnn, mixer = groups(gain_plot(summary()))
    spans = [re.fullmatch(r"M([-.\d]+) [.\d]+H([-.\d]+)", e.attrib["d"]) for e in mixer.iter(f"{SVG}path")]
    low, high = next((float(s[1]), float(s[2])) for s in spans if s)
    assert (low, high) == (position(mixer, 2 / 3 - 0.72), position(mixer, 2 / 3 + 0.72))
    seeds = [float(e.attrib["d"][1:].split()[0]) for e in cnn.iterfind(f"{SVG}path[@class='seed']")]
    # kd's three and those two of crd that the baseline has too
    assert seeds == [position(cnn, gain) for gain in (1.1, 1.0, 1.2, -0.5, 0.1)]


def test_a_method_that_fell_apart_does_not_press_the_others_together():
    whole = summary()
    whole["students"]["CNN"]["crd"] |= {"top1": [24.5, 25.0], "gain": -31.25, "gain_ci95": 1.0}
    cnn, _ = groups(gain_plot(whole))
    assert scale(cnn)[0][1] > -5
    assert dots(cnn) == [(position(cnn, 1.1), "mark s0")]
    assert "-31.25" in words(gain_plot(whole))


def test_nothing_is_drawn_outside():
    whole = summary()
    whole["students"]["CNN"]["kd"]["gain_ci95"] = 80.0  # two seeds can do this
    cnn, _ = groups(gain_plot(whole))
    assert scale(cnn)[-1][1] < 10
    for path in cnn.iter(f"{SVG}path"):
        if path.attrib["class"] in ("range", "seed", "grid", "zero"):
            assert all(0 <= float(x) <= WIDTH for x in re.findall(r"[MH]([-.\d]+)", path.attrib["d"]))


def test_curves_of_the_baseline_and_the_best_few():
    whole = summary()
    baseline, kd = (whole["students"]["CNN"][name] for name in ("baseline", "kd"))
    others = {f"m{i}": kd | {"gain": gain} for i, gain in enumerate((0.1, 0.5, 0.3, 0.4, 0.2))}
    whole["students"] = {"CNN": {"baseline": baseline, **others}, "Mixer": {"m9": cell([], [])}}
    drawn = curve_plot(whole)
    assert [word for word in words(drawn) if re.fullmatch(r"baseline|m\d", word)] == [
        "baseline",
        "m1",
        "m2",
        "m3",
        "m4",
    ]
    (panel,) = groups(drawn)
    line = panel.find(f".//{SVG}polyline").attrib["points"].split()
    assert len(line) == len(baseline["curve"])
    ticks = {e.text: float(e.attrib["x"]) for e in panel.iterfind(f"{SVG}text[@text-anchor='middle']")}
    levels = {e.text: float(e.attrib["y"]) - 5 for e in panel.iterfind(f"{SVG}text[@text-anchor='end']")}
    bottom, top = min(levels, key=float), max(levels, key=float)
    x, y = map(float, line[-1].split(","))
    samples, top1 = baseline["curve"][-1]
    assert x == pytest.approx(ticks["0"] + (ticks["2k"] - ticks["0"]) * samples / 2000, abs=0.1)
    share = (top1 - float(bottom)) / (float(top) - float(bottom))
    assert y == pytest.approx(levels[bottom] + share * (levels[top] - levels[bottom]), abs=0.1)


# ---------------------------------------------------------------- files


def test_files_are_well_formed_offline_and_fit_a_phone():
    for whole in (summary(), one_seed(), unfinished()):
        text = html(whole)
        parser = Balance()
        parser.feed(text)
        parser.close()
        assert not parser.open
        for drawing in re.findall(r'<svg class="figure".*?</svg>(?=</figure>|<ul)', text, re.DOTALL):
            ElementTree.fromstring(drawing)
        assert "http" not in text.replace("http-equiv", "")
        assert not re.search(r"<(script|link|img|iframe)|\ssrc=|@import|url\((?!#)", text)
        assert 'name="viewport"' in text
        assert "prefers-color-scheme: dark" in text
        assert text.count("<table") == text.count('<div class="scroll" tabindex="0"><table')
        for drawing in (gain_plot(whole), curve_plot(whole) or "<svg/>"):
            assert "http" not in drawing.replace('xmlns="http://www.w3.org/2000/svg"', "")
            assert not re.search(r"\b(nan|inf)\b", drawing)
            ElementTree.fromstring(drawing)


def test_names_from_outside_do_no_harm():
    bad = "<b>|`*_x_\x00\ud800&"
    kd = cell([0], [2.0], **against(1.0, None, None, None, 1))
    students = {bad: {bad: cell([0], [1.0]), bad + "2": kd}}
    failed = [{"student": bad, "method": bad, "seed": 0, "error": bad + "\n# " + bad}]
    names = {"title": bad, "about": ["# " + bad], "command": bad, "machine": bad, "versions": {bad: bad}}
    whole = summary(students=students, seeds=[0], baseline=bad, metric=bad, commits=[bad], failed=failed, **names)
    text = html(whole)
    parser = Balance()
    parser.feed(text)
    assert not parser.open
    assert "<b>" not in text
    assert text.count(escape(bad)) > 10
    for drawing in (gain_plot(whole), curve_plot(whole)):
        assert any(word.startswith("<b>|") for word in words(drawing))

    text = markdown(whole)
    assert "\x00" not in text and "\ud800" not in text
    outside_code = re.sub(r"(`` .* ``)", "", text)
    assert not re.search(r"(?<!\\)<b>", outside_code)
    assert "\n\\# \\<b>" in text
    assert [len(row) for row in markdown_tables(text)[0]] == [3, 3, 3]


def test_names_stay_readable_in_markdown():
    whole = summary(title="scalekd_no_fft: p < 0.05, it's 5 %")
    assert markdown(whole).startswith("# scalekd_no_fft: p < 0.05, it's 5 %\n")
    about = {
        line: markdown(summary(about=[line])).split("\n\n")[1] for line in ("1. a", "1.5 min", "> a", "a - b", "- a")
    }
    assert list(about.values()) == ["1\\. a", "1.5 min", "\\> a", "a - b", "\\- a"]
