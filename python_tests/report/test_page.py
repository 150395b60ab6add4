"""The page holds everything itself, shows every layer, and is written whole."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from ldmq_kernels.conversion import summarize
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.planning.pareto import ParetoPoint
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.report.measure import PicturePairs, Timing
from ldmq_kernels.report.page import Fact, Report, render, write_report
from ldmq_kernels.report.pareto import pareto_csv, pareto_figure, pareto_picture
from ldmq_kernels.report.rows import layer_rows, schemes_of, to_csv
from ldmq_kernels.report.svg import scheme_colour
from python_tests.report.analyses import TRIED, made_up_analysis, made_up_result
from python_tests.tiny import tiny_unet


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def report(unet: nn.Module) -> Report:
    result = made_up_result(unet)
    before = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[1] = (before[1] + 0.1).clamp(0, 1)
    return Report(
        title="A <small> model",
        lead="Measured & planned.",
        analysis=result.analysis,
        result=result,
        summary=summarize(unet, result.plan),
        facts=[Fact("0.51x", "bytes of weights")],
        pictures=PicturePairs(["a <b>circle</b>", "a square"], [7, 8], before, after),
        timings=[Timing("one UNet call, batch 4", 0.040, 0.020)],
        notes=["made up"],
    )


@pytest.fixture(scope="module")
def page(unet: nn.Module, report: Report) -> str:
    return render(unet, report)


class Reader(HTMLParser):
    """Collects addresses, rows of the table of layers, and tags that are opened and not closed."""

    VOID = ("meta", "br", "img", "input", "wbr", "hr", "link")
    OPTIONAL = ("th", "tr", "td")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID + self.OPTIONAL:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID + self.OPTIONAL:
            assert self.open.pop() == tag


def test_nothing_comes_from_outside_the_file(page: str) -> None:
    addresses = Reader(page).addresses
    assert sum(address.startswith("data:image/png;base64,") for address in addresses) >= 6
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_every_tag_is_closed(page: str) -> None:
    assert Reader(page).open == []


def test_what_people_wrote_is_text_and_never_markup(page: str) -> None:
    assert "A &lt;small&gt; model" in page
    assert "a &lt;b&gt;circle&lt;/b&gt;" in page
    assert "even w8a16 alone is &lt;too noisy&gt;" in page
    assert "<b>circle" not in page


def test_every_colour_of_a_figure_is_one_that_the_page_defines_light_and_dark(page: str) -> None:
    used = set(re.findall(r"var\((--[\w-]+)\)", page)) - {"--c"}
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert used >= {"--ink", "--muted", "--w8a8-static", "--w8a16"}
    for defined in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", defined))
    assert "#0101" not in page
    assert "#0102" not in page


def test_every_layer_has_its_row(page: str, unet: nn.Module) -> None:
    rows = re.findall(r"<td class=name>(.*?)</td>", page)
    assert [row.replace("<wbr>", "") for row in rows] == list(quantizable_layers(unet))


def test_pairs_are_told_apart_by_their_psnr(page: str) -> None:
    assert "identical, seed 7" in page
    assert re.search(r"2\d\.\d dB, seed 8", page)


def test_target_times_and_bytes_are_told(page: str, report: Report) -> None:
    assert "Asked for 41.5 dB" in page
    assert "reaches 42.2 dB" in page
    assert "2.00x as fast" in page
    assert report.summary is not None
    assert f"{report.summary.bytes_after / 1e6:.2f} MB" in page


def test_without_a_plan_the_page_says_why_and_still_shows_the_noise(unet: nn.Module, report: Report) -> None:
    bare = dataclasses.replace(report, result=None, summary=None, pictures=None, no_plan="90 dB cannot be met.")
    text = render(unet, bare)
    assert "90 dB cannot be met." in text
    assert "Asked for" not in text
    assert "Where the noise comes from" in text


def _points(unet: nn.Module) -> list[ParetoPoint]:
    result = made_up_result(unet)
    points = []
    for cost, db, is_beaten in ((500, 30.0, False), (700, 29.0, True), (900, 44.0, False), (1000, 200.0, False)):
        plan = dataclasses.replace(
            result.plan,
            target={"bytes": cost},
            measured={**result.plan.measured, "weight_bytes": cost, "weight_bytes_fp16": 1000},
        )
        points.append(ParetoPoint(dataclasses.replace(result, plan=plan), cost, db - 0.5, db, is_beaten))
    return points


def test_plans_of_all_sizes_are_drawn_with_their_decibels(unet: nn.Module, report: Report, page: str) -> None:
    text = render(unet, dataclasses.replace(report, pareto=_points(unet)))
    assert "Smaller and larger plans" in text
    assert "4 plans from the smallest" in text
    assert "1 of them turned out worse" in text
    assert Reader(text).open == []
    figure = pareto_figure(_points(unet))
    assert {">30.0<", ">44.0<"} <= set(re.findall(r">[\d.]+<", figure))
    assert ">200.0<" not in figure
    assert ">29.0<" not in figure
    assert "Smaller and larger plans" not in page


def test_a_picture_of_its_own_has_colours_and_no_variables(unet: nn.Module) -> None:
    picture = pareto_picture(_points(unet))
    assert "var(" not in picture
    assert "#fbfaf7" in picture
    assert ElementTree.fromstring(picture).tag.endswith("svg")


def test_a_table_of_plans_has_a_row_for_each(unet: nn.Module) -> None:
    rows = list(csv.DictReader(io.StringIO(pareto_csv(_points(unet)).decode())))
    assert [row["weight_bytes"] for row in rows] == ["500", "700", "900", "1000"]
    assert [row["dominated"] for row in rows] == ["0", "1", "0", "0"]
    assert rows[0]["predicted_db"] == "29.500"


def test_every_scheme_has_a_colour_and_every_row_the_reason_of_its_rule(unet: nn.Module) -> None:
    assert len({scheme_colour(name) for name in SCHEMES}) == len({s.colours for s in SCHEMES.values()}) == len(SCHEMES)
    result = made_up_result(unet)
    plan = dataclasses.replace(result.plan, rules=[{"pattern": "*", "scheme": "w8a16", "reason": "most layers"}])
    reasons = [row.reason for row in layer_rows(unet, result.analysis, plan)]
    assert reasons[0] == "even w8a16 alone is <too noisy>"
    assert all(reason.startswith("rule *, most layers; alone ") for reason in reasons[1:])


def test_the_same_measurements_give_the_same_page(page: str, unet: nn.Module, report: Report) -> None:
    assert render(unet, report) == page


def test_a_full_disk_leaves_the_older_page(
    unet: nn.Module, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "report.html").write_text("older")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path / "report.html", unet, report)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.html", "older")]


def test_the_table_of_numbers_holds_what_was_measured(unet: nn.Module) -> None:
    analysis = made_up_analysis(unet)
    assert schemes_of(analysis) == list(TRIED)
    rows = list(csv.DictReader(io.StringIO(to_csv(layer_rows(unet, analysis, None), list(TRIED)).decode())))
    assert [row["layer"] for row in rows] == list(quantizable_layers(unet))
    power = analysis.output[rows[5]["layer"], "w8a8-static"].mean_power
    assert 10 ** (-float(rows[5]["output_sqnr_db w8a8-static"]) / 10) == pytest.approx(power, rel=1e-3)
    assert rows[0]["output_sqnr_db w8a16"] == "200.000"
    assert (rows[4]["search w8a16"], rows[5]["search w8a16"]) == ("alpha 0.5", "plain")
    assert rows[0]["chosen"] == ""
