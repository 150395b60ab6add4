"""The run of diffusers' tests: models are quantized when they are made, what does not apply is told with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from ldmq_kernels.conversion import summarize
from python_tests.diffusers_mixins import __main__ as command
from python_tests.diffusers_mixins.applicable import why_not
from python_tests.diffusers_mixins.plugin import in_float, quantize_when_made
from python_tests.tiny import tiny_unet


def test_a_model_is_quantized_when_it_is_made_and_when_it_is_loaded_as_it_was(tmp_path: Path) -> None:
    class Made(UNet2DConditionModel):
        pass

    quantize_when_made(Made)
    quantize_when_made(Made)
    config = {name: value for name, value in tiny_unet().config.items() if not name.startswith("_")}
    assert summarize(Made(**config)).quantized_linears == 50
    with in_float():
        model = Made(**config)
    assert summarize(model).quantized_linears == 0
    model.save_pretrained(tmp_path)
    assert summarize(Made.from_pretrained(tmp_path)).quantized_linears == 0


def test_what_does_not_apply_has_a_reason() -> None:
    assert "weights, which are integers" in str(why_not("test_training_with_ema"))
    assert why_not("test_outputs_equivalence") is None
    assert "convolutions alone" in str(why_not("test_quantized_layers", "TestAutoencoderKLWanLdmq"))
    assert why_not("test_quantized_layers", "TestFluxTransformerLdmq") is None


def test_a_folder_without_the_tests_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixins", str(tmp_path)])
    with pytest.raises(SystemExit):
        command.main()
    assert "give the folder `tests` of a checkout" in capsys.readouterr().err
