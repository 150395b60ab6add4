"""Plans of 4 and 8 bits: what each case offers, and which shares of the operations are told."""

from __future__ import annotations

import pytest

from benchmarks.study import mixed
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.request import DEFAULT_FORMATS, SMALLER_FORMATS


def test_cases_offer_more_and_more_and_split_activations_where_they_say_so() -> None:
    schemes = parse_schemes(mixed.FORMATS)
    offered = [{str(s) for s in schemes if takes(s)} for takes in mixed.CASES.values()]
    int8, split, floating, everything = offered
    assert everything == {str(s) for s in parse_schemes((*DEFAULT_FORMATS, *SMALLER_FORMATS))}
    assert int8 < split < everything == {str(s) for s in schemes}
    assert split - int8 == {"w8a8x2", "w4a8x2"}
    assert floating - int8 == {"w8a16", "w4a16"}
    for words, names in zip(mixed.CASES, offered, strict=True):
        assert ("without split" in words) == ("w8a8x2" not in names)


def test_operations_are_shared_out_by_what_they_take() -> None:
    choices = {"a": "w8a8x2", "b": "w4a16", "c": "w4a8-rotated", "never run": "fp16"}
    found = mixed._shares(choices, {"a": 10, "b": 20, "c": 70})
    assert found == pytest.approx({"no_int8": 0.2, "split": 0.1, "int4_weights": 0.9})


def test_the_table_has_a_line_for_each_plan() -> None:
    spread = {"mean": 57.3, "median": 57.0, "worst_tenth": 52.0}
    row = {"model": "demo", "captions": 3, "share_of_fp16": 0.32}
    row |= {"drawn": {"psnr": spread, "latent": spread | {"mean": 40.0}}}
    row |= {"operations": {"no_int8": 0.25, "split": 0.5, "int4_weights": 0.75}}
    rows = [row | {"formats": mixed.WITH_SPLIT, "drawn": row["drawn"] | {"psnr": spread | {"mean": 58.0}}}]
    rows.append(row | {"formats": mixed.WITH_16_BIT})
    page = mixed.table({"rows": rows, "device": "a device", "torch": "2", "commit": "c" * 40})
    assert page.splitlines()[-1] == f"| demo | {mixed.WITH_16_BIT} | 0.320x | 57.30 | 52.00 | 40.00 | 25% | 50% | 75% |"
    assert "in place of split ones: -0.7 dB of PSNR (demo)." in page
    assert "3 held-out captions" in page
    assert mixed.readme_lines({"rows": rows}) == []
    rows.append(row | {"formats": mixed.DEFAULT})
    (line,) = mixed.readme_lines({"rows": rows})
    assert line[1:] == ["0.320x of fp16", "57.30 dB in the mean of 3, 52.00 dB for the worst tenth"]
