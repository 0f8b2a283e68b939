"""The page needs nothing else, says what the report says, and shows text as text."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dat_deploy.errors import OutputError
from dat_deploy.validate import ValidationReport, validate
from dat_deploy.validate.page import html_from_report, write_page


@pytest.fixture(scope="module")
def report(demo_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> ValidationReport:
    """With everything that a page can show: labelled images, one that cannot be read, and a trace."""
    data = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for index in range(12):
        path = data / ("Bag" if index % 2 else "Coat") / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (28, 28, 3), np.uint8)).save(path)
    (data / "Bag" / "torn <b>.png").write_bytes(b"no picture")
    return validate(str(demo_onnx), data=data, batches=[1, 2], trace=True, gates={"unreadable": 10})


@pytest.fixture(scope="module")
def page(report: ValidationReport) -> str:
    return html_from_report(report)


class Tags(HTMLParser):
    """Every tag and what it refers to; complains where one is closed that is not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "path", "use", "rect", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_refers_to_nothing_outside(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in tags.links)
    assert "script" not in tags.seen
    assert not re.search(r"url\((?!#)|@import", page)


def test_the_page_says_what_the_report_says(report: ValidationReport, page: str) -> None:
    assert "<strong>Passed.</strong>" in page
    for check in report.checks:
        assert f"<td>{check.name}</td>" in page
    for row in report.drift:
        assert f"<td>{row.block}</td>" in page
    assert report.accuracy is not None
    assert report.accuracy.engine is not None
    assert f"{report.accuracy.engine.top1.percent:.2f} %" in page
    assert page.count("<svg") == 2  # error by block and drift; nothing flips
    assert report.engine.weights_sha256 in page


def test_the_points_are_drawn_on_photographs(page: str) -> None:
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 2
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_the_trace_has_every_block_and_small_errors(report: ValidationReport) -> None:
    assert report.trace is not None
    names = [row.block for row in report.trace.errors]
    assert names[0] == "patch_proj"
    assert names[-1] == "cls_head"
    assert sum(".attns." in name for name in names) == 9
    assert all(row.error < 1e-5 and row.rounded is None for row in report.trace.errors)


def test_file_names_are_text(page: str) -> None:
    assert "torn &lt;b&gt;.png" in page
    assert "torn <b>" not in page


def test_a_failed_report_says_so_and_marks_the_row(report: ValidationReport) -> None:
    first, *others = report.checks
    failed = replace(report, checks=(replace(first, error=1.0), *others))
    page = html_from_report(failed)
    assert "<strong>Failed.</strong>" in page
    assert page.count('<tr class="failed">') == 1
    assert page.count('<tr class="ok">') == len(others)


def test_flips_are_listed_and_drawn(report: ValidationReport) -> None:
    assert report.accuracy is not None
    from dat_deploy.validate.accuracy import Flip

    flip = Flip(report.accuracy.data.images[0], "Coat", "Coat", "Bag", 0.25, 0.5)
    page = html_from_report(replace(report, accuracy=replace(report.accuracy, flips=(flip,))))
    assert page.count("<svg") == 3
    assert '<td>Bag</td>\n<td class="n">0.25</td><td class="n">0.5</td>' in page


def test_a_page_is_not_written_over_without_force(
    report: ValidationReport, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dat_deploy.validate.page.html_from_report",
        lambda given: page if given is report else pytest.fail("another report"),
    )
    path = tmp_path / "report.html"
    write_page(report, path)
    with pytest.raises(OutputError):
        write_page(report, path)
    write_page(report, path, force=True)
    assert path.read_text() == page
    assert page.startswith("<!doctype html>")
