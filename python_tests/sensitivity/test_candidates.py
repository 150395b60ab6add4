"""The search of one layer finds what was hidden in it, and its words are what it does."""

import dataclasses

import pytest
import torch
from torch import nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.probes import LayerRecord
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.numerics.sqnr import relative_noise_power
from ldmq_kernels.sensitivity import trials
from ldmq_kernels.sensitivity.candidates import PLAIN, LayerSearch, Method

STEPS = 4


def calibration_of(inputs: list[torch.Tensor], axis: int, *, text=(), parts=None, mode="all-steps") -> Calibration:
    calls = [UNetCall(i, (x, 900 - 200 * i), {}, x) for i, x in enumerate(inputs)]
    absmax = torch.stack([x.abs().movedim(axis, -1).flatten(0, -2).amax(0) for x in inputs])
    return Calibration(
        mode,
        (SamplingSettings(STEPS, 1.0, 0),),
        ("a",),
        Trajectory(calls, torch.empty(0), STEPS),
        {"layer": absmax},
        {"layer": 1},
        {name: torch.zeros(2, *absmax.shape) for name in text},
        parts or {},
        (800.0, 600.0, 400.0),
    )


def search(layer, inputs, schemes, *, axis=-1, method=None, **known):
    calibration = calibration_of(inputs, axis, **known)
    seen = [LayerRecord(step, x, 1.0) for step, x in enumerate(inputs)]
    with torch.no_grad():
        found = LayerSearch("layer", layer, seen, calibration, method or Method()).candidates(parse_schemes(schemes))
    return {str(c.scheme): c for c in found}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(64, 48).requires_grad_(False)


def test_noise_without_a_bias_is_that_of_the_layer_on_all_inputs(linear):
    inputs = [random(4, 9, 64, seed=s) for s in range(STEPS)]
    found = search(linear, inputs, ["w8a16"], method=PLAIN)["w8a16"]
    from ldmq_kernels.nn import QuantLinear

    quantized = QuantLinear.from_float(linear, found.scheme)
    expected = relative_noise_power(torch.cat([linear(x) for x in inputs]), torch.cat([quantized(x) for x in inputs]))
    assert found.label == "plain"
    assert found.noise == pytest.approx(expected, rel=1e-3)


def test_a_channel_of_outliers_is_smoothed(linear):
    inputs = [random(4, 9, 64, seed=s) for s in range(STEPS)]
    for x in inputs:
        x[..., 7] *= 100
    linear.weight[:, 7] /= 100
    found = search(linear, inputs, ["w8a8-static"])["w8a8-static"]
    plain = search(linear, inputs, ["w8a8-static"], method=PLAIN)["w8a8-static"]
    assert found.label.startswith("alpha")
    assert found.noise < plain.noise / 100


def test_two_parts_of_different_range_get_a_factor_each():
    torch.manual_seed(0)
    layer = nn.Conv2d(48, 16, 3, padding=1).requires_grad_(False)
    inputs = [random(2, 48, 6, 6, seed=s) for s in range(STEPS)]
    for x in inputs:
        x[:, 32:] *= 30
    layer.weight[:, 32:] /= 30
    found = search(layer, inputs, ["w8a8-dynamic"], axis=1, parts={"layer": 32})["w8a8-dynamic"]
    assert found.layer_plan.smoothing is not None
    assert found.noise < search(layer, inputs, ["w8a8-dynamic"], axis=1, method=PLAIN)["w8a8-dynamic"].noise / 20
    alone = search(layer, inputs, ["w8a8-dynamic"], axis=1)["w8a8-dynamic"]
    assert found.noise <= alone.noise


def test_a_rare_outlier_is_clipped(linear):
    inputs = [random(8, 200, 64, seed=s) for s in range(STEPS)]
    inputs[0][0, 0] *= 3
    found = search(linear, inputs, ["w8a8-static"], method=Method(smoothing=False))["w8a8-static"]
    assert "range 0." in found.label
    full = max(float(x.abs().max()) for x in inputs) / 127
    assert found.layer_plan.input_scale < 0.9 * full


def test_a_first_step_that_saw_too_little_is_widened(linear):
    inputs = [random(4, 50, 64, seed=s) * (1 + 0.4 * s) for s in range(STEPS)]
    found = search(linear, inputs, ["w8a8-static", "w8a8-timestep"], mode="first-step", method=Method(smoothing=False))
    assert float(found["w8a8-static"].label.removeprefix("range ").split(",")[0]) > 1.5
    assert found["w8a8-timestep"].noise < found["w8a8-static"].noise
    scales = found["w8a8-timestep"].layer_plan.input_scale
    assert len(scales) == 4
    assert list(scales) == sorted(scales)


def test_a_mean_error_is_taken_away_and_only_where_other_samples_have_it_too(linear):
    inputs = [random(6, 40, 64, seed=s).abs() for s in range(STEPS)]  # all positive: rounding of weights adds up
    found = search(linear, inputs, ["w8a16"])["w8a16"]
    plain = search(linear, inputs, ["w8a16"], method=PLAIN)["w8a16"]
    assert found.label == "bias"
    assert found.noise < plain.noise / 2
    assert found.layer_plan.bias_correction.shape == (48,)
    single = search(linear, [x[:1] for x in inputs], ["w8a16"])["w8a16"]
    assert single.layer_plan.bias_correction is None


def test_gptq_beats_nearest_and_is_kept_as_a_copy(linear):
    mix = random(64, 64, seed=9)
    inputs = [random(4, 60, 64, seed=s) @ mix for s in range(STEPS)]
    found = search(linear, inputs, ["w4a8-dynamic", "w4a16"], method=Method(bias_correction=False))
    nearest = search(linear, inputs, ["w4a8-dynamic", "w4a16"], method=PLAIN)
    for scheme, candidate in found.items():
        assert candidate.layer_plan.rounding == "gptq"
        assert candidate.quantized_layer is not None
        assert candidate.noise < nearest[scheme].noise / 1.5


def test_the_first_token_is_kept_out_where_the_layer_reads_the_text(linear):
    inputs = [random(4, 9, 64, seed=s) for s in range(STEPS)]
    for x in inputs:
        x[:, 0] *= 200
    known = calibration_of([x[:, 1:] for x in inputs], -1, text=("layer",))
    first = torch.stack([x[:, 0].abs().amax(0) for x in inputs])
    known = dataclasses.replace(known, first_tokens={"layer": first.expand(2, -1, -1)})
    seen = [LayerRecord(step, x, 1.0) for step, x in enumerate(inputs)]
    with torch.no_grad():
        found = LayerSearch("layer", linear, seen, known, Method()).candidates(parse_schemes(["w8a8-static"]))[0]
    assert found.layer_plan.first_token
    assert found.layer_plan.input_scale < 0.1
    assert found.noise < 1e-3


def test_a_first_token_like_the_others_is_not_kept_out(linear):
    inputs = [random(4, 9, 64, seed=s) for s in range(STEPS)]
    known = calibration_of([x[:, 1:] for x in inputs], -1, text=("layer",))
    first = torch.stack([x[:, 0].abs().amax(0) for x in inputs])
    known = dataclasses.replace(known, first_tokens={"layer": first.expand(2, -1, -1)})
    seen = [LayerRecord(step, x, 1.0) for step, x in enumerate(inputs)]
    with torch.no_grad():
        schemes = parse_schemes(["w8a8-static", "w8a8-dynamic", "w8a8x2"])
        found = LayerSearch("layer", linear, seen, known, Method()).candidates(schemes)
    assert not any(candidate.layer_plan.first_token for candidate in found)


def test_a_pair_is_as_good_as_16_bit_activations(linear):
    inputs = [random(4, 50, 64, seed=s) for s in range(STEPS)]
    found = search(linear, inputs, ["w8a8x2", "w8a16"], method=PLAIN)
    assert found["w8a8x2"].noise == pytest.approx(found["w8a16"].noise, rel=0.02)


def test_an_input_of_zeros_has_no_static_candidate(linear):
    inputs = [torch.zeros(2, 3, 64)] * STEPS
    found = search(linear, inputs, ["w8a8-static", "w8a8-dynamic", "w8a16"])
    assert "w8a8-static" not in found
    assert set(found) == {"w8a8-dynamic", "w8a16"}


def in_folds(linear, widths, schemes=("w8a8-static",), method=PLAIN):
    """Candidates where prompt 0, fold 0, is as wide as the first of `widths`, and prompt 1 as the second."""
    inputs = [
        torch.cat([random(1, 50, 64, seed=s) * widths[0], random(1, 50, 64, seed=9 + s) * widths[1]])
        for s in range(STEPS)
    ]
    known = calibration_of(inputs, -1)
    by_fold = torch.stack([torch.stack([x[f].abs().amax(0) for x in inputs]) for f in (0, 1)])
    known = dataclasses.replace(known, absmax_by_fold={"layer": by_fold})
    seen = [LayerRecord(step, x, 1.0, rows=(0, 1)) for step, x in enumerate(inputs)]
    with torch.no_grad():
        found = LayerSearch("layer", linear, seen, known, method).candidates(parse_schemes(list(schemes)))
    return by_fold, {str(c.scheme): c for c in found}


def test_each_fold_is_judged_by_what_the_other_one_makes(linear):
    by_fold, found = in_folds(linear, (1.0, 4.0), ["w8a8-static", "w8a16"])
    static = found["w8a8-static"]
    assert static.layer_plan.input_scale == pytest.approx(float(by_fold.amax()) / 127)
    for fold in (0, 1):
        assert static.judged_on(fold).input_scale == pytest.approx(float(by_fold[1 - fold].amax()) / 127)
    assert found["w8a16"].judged == ()
    assert found["w8a16"].judged_on(1) is found["w8a16"].layer_plan


def test_a_range_that_one_fold_cannot_know_is_seen_in_the_noise(linear):
    _, alike = in_folds(linear, (1.0, 1.0))
    _, apart = in_folds(linear, (1.0, 4.0))
    assert alike["w8a8-static"].noise < 1e-3
    assert apart["w8a8-static"].noise > 0.1  # the wide fold is clipped by the narrow one's range


def test_smoothing_that_serves_its_own_fold_alone_is_not_taken(linear):
    inputs = [random(2, 50, 64, seed=s) for s in range(STEPS)]
    for x in inputs:
        x[0, :, 3] *= 40  # another channel of outliers in each fold: a vector of one is wrong for the other
        x[1, :, 8] *= 40
    by_fold = torch.stack([torch.stack([x[f].abs().amax(0) for x in inputs]) for f in (0, 1)])
    known = dataclasses.replace(calibration_of(inputs, -1), absmax_by_fold={"layer": by_fold})
    seen = [LayerRecord(step, x, 1.0, rows=(0, 1)) for step, x in enumerate(inputs)]
    schemes = parse_schemes(["w8a8-static"])
    with torch.no_grad():
        apart = LayerSearch("layer", linear, seen, known, Method()).candidates(schemes)[0]
        known = dataclasses.replace(known, absmax_by_fold={})
        together = LayerSearch("layer", linear, seen, known, Method()).candidates(schemes)[0]
    assert together.label.startswith("alpha")
    assert not apart.label.startswith("alpha")


def test_a_bias_is_judged_by_the_other_folds_mean(linear):
    inputs = [random(6, 40, 64, seed=s).abs() for s in range(STEPS)]
    found = search(linear, inputs, ["w8a16"])["w8a16"]
    first, second = (found.judged_on(fold).bias_correction for fold in (0, 1))
    assert not torch.equal(first, second)
    assert torch.allclose((first + second) / 2, found.layer_plan.bias_correction, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_estimate_by_kept_errors_is_that_of_the_candidate_run_again(kind, linear, monkeypatch):
    layer = linear if kind == "linear" else nn.Conv2d(8, 12, 3, padding=1).requires_grad_(False)
    shape = (6, 40, 64) if kind == "linear" else (6, 8, 7, 5)
    axis = -1 if kind == "linear" else 1
    inputs = [random(*shape, seed=s).abs() for s in range(STEPS)]
    known = calibration_of(inputs, axis)
    estimates = {}
    for kept in (trials.KEPT, 0):
        monkeypatch.setattr(trials, "KEPT", kept)
        seen = [
            LayerRecord(step, x, 1.0, [random(*layer(x).shape, seed=20 + step)] * 2, rows=(0, 1) * 3)
            for step, x in enumerate(inputs)
        ]
        with torch.no_grad():
            schemes = parse_schemes(["w8a8", "w8a16"])
            found = LayerSearch("layer", layer, seen, known, Method()).candidates(schemes)
        assert any("bias" in candidate.label for candidate in found)
        estimates[kept] = {str(c.scheme): c.estimate.by_step for c in found}
    for scheme, by_step in estimates[0].items():
        assert by_step == pytest.approx(estimates[max(estimates)][scheme], rel=1e-3), scheme


def test_records_that_are_multiplied_together_are_judged_each_by_itself(linear, monkeypatch):
    inputs = [random(4, 9, 64, seed=s) * (1 + s) for s in range(STEPS)]
    schemes = ["w8a8-static", "w8a8-timestep", "w8a8-dynamic", "w8a16"]
    together = search(linear, inputs, schemes)
    monkeypatch.setattr(trials, "AT_ONCE", 1)
    alone = search(linear, inputs, schemes)
    for scheme, candidate in alone.items():
        assert together[scheme].label == candidate.label
        assert together[scheme].noise == pytest.approx(candidate.noise, rel=1e-5)


def test_inputs_without_a_batch_are_judged_call_by_call():
    conv = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    inputs = [random(4, 7, 5, seed=s) for s in range(STEPS)]
    known = calibration_of([x[None] for x in inputs], 1)
    seen = [LayerRecord(step, x, 1.0, rows=(step % 2,) * 4) for step, x in enumerate(inputs)]
    with torch.no_grad():
        found = LayerSearch("layer", conv, seen, known, PLAIN).candidates(parse_schemes(["w8a16"]))[0]
    from ldmq_kernels.nn import QuantConv2d

    quantized = QuantConv2d.from_float(conv, found.scheme)
    expected = relative_noise_power(torch.stack([conv(x) for x in inputs]), torch.stack([quantized(x) for x in inputs]))
    assert found.noise == pytest.approx(expected, rel=1e-3)
