"""The report: one file that needs nothing beside it, fits a phone, escapes what it is told, and draws honest axes."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.evaluation.report import (
    Commands,
    Curve,
    Curves,
    Facts,
    Filmstrip,
    Picture,
    Pictures,
    PromptCards,
    Section,
    Series,
    Slider,
    Table,
    Text,
    Tiles,
    render_report,
    write_report,
)
from fewstep.evaluation.report.inline import data_url
from fewstep.evaluation.report.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, plot_curve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
PIXEL = data_url(Image.new("RGB", (40, 80), "teal"), 10_000)
HOSTILE = '<script>alert("x")</script> & co'


def curve(*values: float, marks: tuple[tuple[str, float], ...] = ()) -> Curve:
    points = [(float(minute), value) for minute, value in enumerate(values)]
    return Curve("Quality", [Series("generator", points)], "minutes", "distance", marks)


def everything() -> list[Section]:
    """A section of each kind, with long words and wide tables."""
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    head = ["", "evaluations", *(f"a rather long head of column {number}" for number in range(7))]
    return [
        Tiles([("11x", "the teacher's pictures per second")]),
        Pictures([Picture("Teacher", images, 3), Picture(HOSTILE, images, 3)], "Pictures", "From the same noise."),
        PromptCards("Prompts", ["a cat", HOSTILE, "dog"], {"real": images, "teacher": images, "generator": images}),
        Text(["A remark."]), Text(["A chapter."], "Title"), curve(37.8, 3.1, 2.2, marks=(("teacher", 1.64),)),
        Table("Figures", head, [["teacher", "/a/path" * 12, *("2.109 ± 0.010 (1000)",) * 7]], ["In brackets"], ["warning: few"]),
        Curves("Small ones", [curve(3.0, 2.0), curve(1.0, 5.0)], ["A note."], ["A warning."]),
        Filmstrip("Film", [(f"step {step},000", PIXEL) for step in range(12)], "Rows are seeds."),
        Slider("Against", ("generator", PIXEL), ("teacher", PIXEL), "One noise."), Table("Folded", ["", "b"], [["a", "1"]], folded=True),
        Facts([HOSTILE]), Commands([(f"fewstep sample {'x' * 90}", "make pictures")]),
    ]  # fmt: skip


def test_a_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", HOSTILE, everything())
    page = path.read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2 + 3 * 3 + 12 + 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "url(" not in page
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_what_it_is_told_is_escaped() -> None:
    page = render_report(HOSTILE, everything())
    assert "<script" not in page
    assert (
        page.count("&lt;script&gt;") == 2 + 2 + 1 + 3 + 1
    )  # title twice, caption and alt, fact, card: three alts and a caption


def test_light_and_dark_and_phones_are_told_of() -> None:
    page = render_report("x", [])
    assert "width=device-width" in page
    assert "prefers-color-scheme: dark" in page
    assert 'content="light dark"' in page


def test_an_axis_has_no_empty_decades() -> None:
    """Real pictures at 0.012 would stretch the axis over two decades without a point: they are named instead."""
    found = curve(37.8, 5.0, 2.9, marks=(("teacher", 1.64), ("real pictures", 0.0118)))
    plot = plot_curve(found)
    assert plot.scale == "logarithmic"
    assert [text for _, text in plot.y_ticks] == ["2", "5", "10", "20"]
    assert [mark.text for mark in plot.marks] == ["teacher 1.64"]
    assert plot.away == ["real pictures 0.0118"]
    heights = [y for _, y in plot.lines[0].dots] + [mark.y for mark in plot.marks]
    assert min(heights) < TOP + 25
    assert max(heights) > HEIGHT - BOTTOM - 25
    assert "Off the axis: real pictures 0.0118." in render_report("x", [found])


def test_axes_are_labelled_and_points_lie_where_they_should() -> None:
    plot = plot_curve(curve(8.0, 4.0, 2.0))
    (x0, y0), (x1, y1), (x2, y2) = plot.lines[0].dots
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)  # equal factors, equal heights
    page = render_report("x", [curve(8.0, 4.0, 2.0)])
    assert ">minutes</text>" in page
    assert ">distance (log)</text>" in page
    assert ">distance</text>" in render_report("x", [curve(8.0, 7.0)])
    titled = Curve("distance against steps", [Series("a", [(0.0, 8.0), (1.0, 2.0)])], "step", "distance")
    assert ">log scale</text>" in render_report("x", [titled])  # a long name does not fit beside the axis


def test_values_that_are_not_positive_have_a_linear_axis() -> None:
    plot = plot_curve(curve(-1.0, 0.0, 3.0, float("nan"), marks=(("zero", 0.0), ("far", 50.0))))
    assert plot.scale == "linear"
    assert [text for _, text in plot.y_ticks] == ["-1", "0", "1", "2", "3"]
    assert len(plot.lines[0].dots) == 3
    assert (len(plot.marks), plot.away) == (1, ["far 50"])


@pytest.mark.parametrize("values", [(), (0.0,), (5.0,), (2.0, 2.0), (1e-9, 1e9)])
def test_any_number_of_points_can_be_drawn(values: tuple[float, ...]) -> None:
    plot = plot_curve(curve(*values))
    assert len(plot.lines[0].dots) == len(values)
    assert 1 <= len(plot.y_ticks) <= 11
    assert all(TOP - 1 <= y <= HEIGHT - BOTTOM + 1 for _, y in plot.lines[0].dots)


def test_names_of_near_marks_do_not_cover_each_other() -> None:
    plot = plot_curve(curve(3.0, 2.0, marks=(("a", 2.00), ("b", 2.01), ("c", 2.02))))
    heights = [mark.text_y for mark in plot.marks]
    assert all(later - earlier >= 15 for earlier, later in itertools.pairwise(heights))


def test_small_numbers_stay_clear_of_the_name_of_the_axis() -> None:
    plot = plot_curve(curve(0.0, 0.00012))
    texts = [text for _, text in plot.y_ticks]
    assert texts[:3] == ["0", "5e-5", "1e-4"]
    assert all(len(text) <= 6 for text in texts)


def test_several_lines_have_a_legend() -> None:
    found = Curve("Loss", [Series("first", [(0, 1), (1, 2)]), Series("second", [(0, 2), (1, 1)])], "step", "loss")
    page = render_report("x", [found])
    assert page.count("<polyline") == 2 + 2  # and in the legend
    assert re.search(r'class="series1"><svg.*?</svg>second', page)
    assert 'class="legend"' not in render_report("x", [curve(1, 2)])


def test_a_line_without_points_keeps_the_colours_of_the_others() -> None:
    found = Curve("Loss", [Series("first", []), Series("second", [(0, 2), (1, 1)])], "step", "loss")
    page = render_report("x", [found])
    assert ">first" not in page
    assert page.count('class="series1"') == 2
    assert 'class="series0"' not in page


def test_intervals_stand_beside_each_other_and_within_the_axis() -> None:
    nan = float("nan")
    lines = [
        Series(name, [(0.0, 5.0), (1.0, 4.0)], [(4.0, 6.0), (nan, nan)] if name == "a" else [(2.0, 9.0), (3.9, 4.1)])
        for name in "ab"
    ]
    plot = plot_curve(Curve("Quality", lines, "step", "distance"))
    assert [len(line.bars) for line in plot.lines] == [1, 2]
    assert plot.lines[0].bars[0][0] != plot.lines[1].bars[0][0]
    _, low, high = plot.lines[1].bars[0]
    assert TOP <= high < plot.lines[1].dots[0][1] < low <= HEIGHT - BOTTOM
    assert render_report("x", [Curve("Quality", lines, "step", "distance")]).count('class="bar"') == 3


def test_pictures_are_exact_where_they_are_small_and_fit_where_not() -> None:
    torch.manual_seed(0)
    noise = Image.fromarray(torch.randint(0, 256, (200, 200, 3), dtype=torch.uint8).numpy())
    assert data_url(noise, 200_000).startswith("data:image/png")
    small = data_url(noise, 8_000)
    assert small.startswith("data:image/jpeg")
    assert 2_000 < len(small) < 8_100


# Machado et al. 2009, severity 1: what people without one kind of cone see of linear RGB
SIGHT = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(linear: Tensor) -> Tensor:
    """CIE Lab of linear RGB, (N, 3)."""
    xyz = linear.clamp(0, 1) @ TO_XYZ.T / torch.tensor([0.9505, 1.0, 1.089])
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116).T
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_of_lines_differ_for_everyone_and_stand_out(scheme: int) -> None:
    css = re.findall(r":root \{(.*?)\}", render_report("x", []), re.DOTALL)[scheme]
    named = dict(re.findall(r"--(\w+): (#\w{6});", css))
    codes = [named[name] for name in ("paper", "accent", "s1", "s2", "s3", "s4", "s5")]
    srgb = torch.tensor([[int(code[at : at + 2], 16) for at in (1, 3, 5)] for code in codes]) / 255
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    light = linear @ TO_XYZ[1] + 0.05
    contrast = torch.maximum(light[1:], light[0]) / torch.minimum(light[1:], light[0])
    assert contrast.min() >= 3
    for sight in SIGHT.values():
        assert torch.pdist(lab(linear[1:] @ torch.tensor(sight).float().T)).min() > 20


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_desktop(tmp_path: Path, scheme: str) -> None:
    from playwright.sync_api import sync_playwright

    path = write_report(tmp_path / "report.html", "A title", everything())
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.set_viewport_size({"width": 1280, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 1280
        page.set_viewport_size({"width": 390, "height": 800})
        shown = "getComputedStyle(document.querySelector('.over')).clipPath"
        assert "50%" in page.evaluate(shown)
        page.fill(".slider input", "80")
        assert "20%" in page.evaluate(shown)
        ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        browser.close()
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (light[0] > light[1]) == (scheme == "dark")
    assert abs(light[0] - light[1]) > 500
