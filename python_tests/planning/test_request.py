"""A request holds everything that a plan is made from, and refuses what no plan can be made from."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from torch import nn

from ldmq_kernels.cli import options
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning import planner
from ldmq_kernels.planning.planner import plan
from ldmq_kernels.planning.request import DEFAULT_FORMATS, SMALLER_FORMATS, PlanRequest, split_calls
from ldmq_kernels.planning.target import Target
from ldmq_kernels.plans.cost import least_bytes
from ldmq_kernels.plans.layers import quantizable_layers


def test_the_last_quarter_of_the_prompts_is_held_out() -> None:
    assert split_calls(list("abcdefgh")) == (list("abcdef"), ["g", "h"])
    assert split_calls(["a"]) == (["a"], ["a"])
    request = PlanRequest([" a ", "b", "", "c", "d"])
    assert (request.calibration_calls, request.held_out_calls) == (["a", "b", "c"], ["d"])


def test_a_text_alone_is_one_prompt() -> None:
    request = PlanRequest("a red cat")
    assert request.calls == ("a red cat",)
    assert request.calibration_calls == request.held_out_calls == ["a red cat"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calls": []}, "there is no prompt"),
        ({"calls": ["", "  "]}, "there is no prompt"),
        ({"calls": " "}, "there is no prompt"),
        ({"signals": "sqnr"}, "signals is the text 'sqnr'"),
        ({"formats": ()}, "there is no format to choose among"),
        ({"formats": ["w3a8"]}, "w3a8"),
        ({"formats": "w8a8"}, "formats is the text 'w8a8'"),
        ({"calibration_mode": "last-step"}, "unknown calibration 'last-step'.*first-step"),
        ({"signals": ["ssim"]}, "give one of sqnr, latent, psnr, or one of them with ssim"),
        ({"signals": ["sqnr", "beauty"]}, "give one of sqnr, latent, psnr, or one of them with ssim"),
        ({"signals": []}, "the signals are none"),
        ({"signals": ["latent", "psnr"]}, "the signals are latent,psnr"),
        ({"signals": ["psnr"], "target": Target(latent_db=30.0)}, "the signal is psnr and the target 30 dB in the lat"),
        ({"hybrid": 1.5}, "hybrid is 1.5"),
        ({"hybrid": float("nan")}, "hybrid is nan"),
    ],
    ids=str,
)
def test_what_no_plan_can_be_made_from_is_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PlanRequest(**({"calls": ["a dog"]} | changes))


def test_a_format_stands_for_all_of_its_schemes() -> None:
    assert PlanRequest(["a"], formats=["w8a8", "fp16"]).schemes == [
        "w8a8-static",
        "w8a8-timestep",
        "w8a8-dynamic",
        "w8a8x2",
        "w8a8-rotated",
        "fp16",
    ]


def test_what_a_plan_keeps_is_where_its_target_is_measured_or_what_the_signals_name() -> None:
    assert (PlanRequest(["a"], Target(bytes=3)).measure, PlanRequest(["a"], Target(bytes=3)).ends) == ("sqnr", ())
    assert PlanRequest(["a"], Target(latent_db=30.0)).ends == ("latent",)
    assert PlanRequest(["a"], Target(psnr_db=30.0, bytes=3)).measure == "psnr"
    assert PlanRequest(["a"], Target(bytes=3), signals=["psnr", "ssim"]).ends == ("picture",)


def test_times_are_needed_by_a_target_in_milliseconds_or_on_demand() -> None:
    assert not PlanRequest(["a"], Target(sqnr_db=30.0)).needs_times
    assert PlanRequest(["a"], Target(milliseconds=3.0)).needs_times
    assert PlanRequest(["a"], time_layers=True).needs_times


def test_the_command_line_has_the_same_default_formats() -> None:
    assert options.names_in(options.DEFAULT_FORMATS) == DEFAULT_FORMATS


def test_few_bytes_allow_4_bit_weights_where_no_formats_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(64, 64))
    in_8_bits = least_bytes(model, parse_schemes(DEFAULT_FORMATS))
    assert in_8_bits == 10 * 64 * 64 + 2 * 64 * 4
    assert least_bytes(model, parse_schemes(SMALLER_FORMATS)) < 0.6 * in_8_bits
    enough, few = Target(bytes=in_8_bits), Target(bytes=in_8_bits - 1)
    assert PlanRequest(["a"], few).with_room(model).formats == (*DEFAULT_FORMATS, *SMALLER_FORMATS)
    for same in (
        PlanRequest(["a"], enough),
        PlanRequest(["a"], few, DEFAULT_FORMATS),
        PlanRequest(["a"], Target(sqnr_db=30.0)),
        PlanRequest(["a"]),
    ):
        assert same.with_room(model) is same


def test_a_session_is_opened_with_room_for_its_bytes(monkeypatch: pytest.MonkeyPatch, shallow_pipe: Any) -> None:
    offered: list[list[str]] = []

    def analyzed(_pipe: Any, request: PlanRequest) -> None:
        offered.append(request.schemes)
        raise InterruptedError

    monkeypatch.setattr(planner, "analyzed", analyzed)
    floats = sum(2 * layer.weight.numel() for layer in quantizable_layers(shallow_pipe.unet).values())
    for share in (0.32, 0.9):
        with pytest.raises(InterruptedError):
            plan(shallow_pipe, ["a dog"], target_bytes=int(share * floats))
    assert {"w4a8-rotated", "w4a16"} < set(offered[0])
    assert offered[1] == PlanRequest(["a"]).schemes


def test_every_keyword_of_plan_reaches_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "target_sqnr_db": 31.0,
        "target_latent_db": None,
        "target_psnr_db": None,
        "target_bytes": 32,
        "target_milliseconds": 33.0,
        "target_layers": 34,
        "formats": ["w8a16"],
        "calibration_mode": "all-steps",
        "signals": ["sqnr", "ssim"],
        "part": "transformer_2",
        "hybrid": 0.35,
        "time_layers": True,
        "times_for": "h200",
        "num_inference_steps": 36,
        "guidance_scale": 37.0,
        "seed": 38,
        "height": 39,
        "width": 40,
        "scheduler": "DDIMScheduler",
        "settings": [{}, {"seed": 41, "scheduler": "PNDMScheduler"}],
        "cut_latents": True,
        "work_dir": "folder",
        "show_progress": False,
    }
    assert set(given) == set(inspect.signature(plan).parameters) - {"pipe", "prompts", "calls", "forward_loop", "out"}
    requests: list[PlanRequest] = []

    def stop(_pipe: object, request: PlanRequest) -> None:
        requests.append(request)
        raise InterruptedError

    monkeypatch.setattr(planner, "make_plan", stop)
    with pytest.raises(InterruptedError):
        plan(None, ["a dog"], **given)  # type: ignore[arg-type]
    (request,) = requests
    assert request.target == Target(31.0, 32, 33.0, 34)
    assert [dataclasses.astuple(one) for one in request.drawn_at] == [
        (36, 37.0, 38, 39, 40, "DDIMScheduler"),
        (36, 37.0, 41, 39, 40, "PNDMScheduler"),
    ]
    assert (list(request.calls), list(request.formats)) == (["a dog"], ["w8a16"])
    for name in ("latent", "psnr"):
        with pytest.raises(InterruptedError):
            plan(None, ["a dog"], **{f"target_{name}_db": 35.0})
        assert requests.pop().target == Target(**{f"{name}_db": 35.0})
    assert (request.calibration_mode, list(request.signals), request.hybrid) == ("all-steps", ["sqnr", "ssim"], 0.35)
    assert (request.time_layers, str(request.work_dir), request.show) == (True, "folder", False)
    assert (request.part, request.times_for) == ("transformer_2", "h200")
