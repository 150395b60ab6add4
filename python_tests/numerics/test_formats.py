"""Scheme names."""

import pytest

from ldmq_kernels.numerics.formats import SCHEMES, parse_schemes


def test_w8a8_stands_for_its_static_and_its_dynamic_form():
    assert [str(s) for s in parse_schemes(["w8a8", "fp16"])] == ["w8a8-static", "w8a8-dynamic", "fp16"]


def test_a_name_comes_once():
    assert [str(s) for s in parse_schemes(["w8a8-static", "w8a8"])] == ["w8a8-static", "w8a8-dynamic"]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"int3.*w8a8"):
        parse_schemes(["int3"])


def test_only_static_schemes_need_a_scale():
    assert {name for name, s in SCHEMES.items() if s.is_static} == {"w8a8-static", "w4a8-static"}
