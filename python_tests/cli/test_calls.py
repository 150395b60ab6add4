"""A file of calls holds the arguments of the pipeline's own call, and every mistake in it is named by its line."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionInpaintPipeline, StableVideoDiffusionPipeline
from PIL import Image

from ldmq_kernels.cli.calls import _takes_pictures, read_calls
from ldmq_kernels.plans.plan import Plan
from python_tests.cli.commands import complaint, run


def _written(folder: Path, *lines: str) -> Path:
    Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / "red.png")
    Image.new("L", (16, 16), 7).save(folder / "mask.png")
    (folder / "calls.jsonl").write_text("\n".join(lines))
    return folder / "calls.jsonl"


def test_pictures_are_opened_and_all_else_is_as_written(tmp_path: Path) -> None:
    path = _written(
        tmp_path,
        '{"prompt": "red.png", "image": "red.png", "mask_image": ["mask.png"], "strength": 0.5}',
        "",
        '{"prompt": ["a", "b"], "image": "red.png", "num_images_per_prompt": 2}',
    )
    first, second = read_calls(path, StableDiffusionInpaintPipeline)
    assert (first["prompt"], first["strength"]) == ("red.png", 0.5)
    assert (first["image"].size, first["image"].mode) == ((16, 16), "RGB")
    assert (first["mask_image"][0].mode, first["mask_image"][0].getpixel((0, 0))) == ("L", 7)
    assert (second["prompt"], second["num_images_per_prompt"]) == (["a", "b"], 2)


@pytest.mark.parametrize("pipeline", [StableDiffusionControlNetPipeline, StableVideoDiffusionPipeline])
def test_only_pictures_are_taken_for_pictures(pipeline: type) -> None:
    parameters = inspect.signature(pipeline.__call__).parameters
    assert {name for name in parameters if _takes_pictures(name, parameters)} <= {"image", "ip_adapter_image"}
    assert _takes_pictures("image", parameters)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "line 2 is not a JSON object that this package takes: Expecting"),
        ('["a"]', "line 2 is not a JSON object of arguments"),
        ('{"prompt": "a", "prompt": "b"}', "line 2 is not a JSON object .*the name 'prompt' twice"),
        (
            '{"prompt": "a", "promt": 1}',
            r"line 2: .* takes no 'promt' \(did you mean prompt\?\); it takes prompt, image",
        ),
        ('{"image": "blue.png"}', r"line 2, image: there is no picture .*blue\.png"),
        ('{"image": ["red.png", "calls.jsonl"]}', r"line 2, image\[1\]: .*calls\.jsonl cannot be read as a picture"),
    ],
    ids=["json", "object", "twice", "unknown", "missing", "no-picture"],
)
def test_a_mistake_is_named_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    path = _written(tmp_path, '{"prompt": "fine"}', line)
    with pytest.raises(ValueError, match=words):
        read_calls(path, StableDiffusionInpaintPipeline)


def test_an_empty_file_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no call"):
        read_calls(_written(tmp_path, "", " "), StableDiffusionInpaintPipeline)
    with pytest.raises(ValueError, match="there is no file of calls"):
        read_calls(tmp_path / "none.jsonl", StableDiffusionInpaintPipeline)


def test_a_plan_is_made_from_calls(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(
        tmp_path,
        '{"prompt": "a red cat", "num_inference_steps": 1, "height": 16, "width": 16}',
        '{"prompt": "a blue dog", "guidance_scale": 1, "height": 16, "width": 16}',
    )
    common = ("plan", model, "--target-sqnr", 20, "--formats", "w8a16", "--out", tmp_path / "made.json")
    assert run(*common, "--calls", path) == 0
    made = Plan.load(tmp_path / "made.json")
    assert (made.calibration["calls"], made.measured["verified_on"]) == (1, "held-out calls")
    capsys.readouterr()
    assert run(*common) == 2
    assert run(*common, "--calls", path, "--prompts", path) == 2
    capsys.readouterr()
    path.write_text('{"prompt": "a", "image": "red.png"}')
    assert run(*common, "--calls", path) == 1
    assert "line 1: StableDiffusionPipeline takes no 'image'" in complaint(capsys)
