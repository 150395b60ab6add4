"""The names of formats and schemes, and what they say of activations."""

import copy
import pickle
from typing import get_args

import pytest

from ldmq_kernels.cli.options import Formats
from ldmq_kernels.numerics.formats import FORMATS, SCHEMES, parse_schemes, scheme_of

W8A8 = ["w8a8-static", "w8a8-timestep", "w8a8-dynamic", "w8a8x2", "w8a8-rotated"]


def test_w8a8_stands_for_all_its_ways_of_scaling():
    assert [str(s) for s in parse_schemes(["w8a8", "fp16"])] == [*W8A8, "fp16"]


def test_a_name_comes_once():
    assert [str(s) for s in parse_schemes(["w8a8-static", "w8a8"])] == W8A8


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"int3.*w8a8"):
        parse_schemes(["int3"])


def test_all_but_dynamic_schemes_of_8_bit_activations_need_scales():
    assert {name for name, s in SCHEMES.items() if s.has_timestep_scales} == {"w8a8-timestep", "w4a8-timestep"}
    assert {name for name, s in SCHEMES.items() if s.is_split} == {"w8a8x2", "w4a8x2"}
    static = {f + ending for f in ("w8a8", "w4a8") for ending in ("-static", "-timestep", "x2")}
    assert {name for name, s in SCHEMES.items() if s.is_static} == {*static, "fp8-static"}


def test_the_command_lines_help_names_every_format_and_way_of_scaling():
    told = get_args(Formats)[1].help
    assert all(name in told for name in FORMATS)
    assert all(scheme.activations.name in told for scheme in SCHEMES.values() if scheme.quantizes_activations)


def test_copies_of_a_scheme_are_the_scheme_itself():
    for scheme in SCHEMES.values():
        assert copy.deepcopy(scheme) is pickle.loads(pickle.dumps(scheme)) is scheme
    assert scheme_of("w8a8-stepped") is SCHEMES["w8a8-timestep"]
    with pytest.raises(ValueError, match=r"unknown scheme 'w3a3'.*w8a8-static"):
        scheme_of("w3a3")
