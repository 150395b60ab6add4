"""The examples of docs/using run as they stand, on a pipeline in miniature."""

from __future__ import annotations

import functools
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs" / "using").glob("*.md"))
CODE = re.compile(r"^ *```python\n(.*?)```", re.DOTALL | re.MULTILINE)
WITH_CODE = [page for page in PAGES if CODE.search(page.read_text())]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the LoRA that the pages speak of."""
    from peft import LoraConfig, get_peft_model_state_dict

    from python_tests.tiny import SHALLOW, tiny_pipeline

    folder = tmp_path_factory.mktemp("pages")
    pipe = tiny_pipeline(folder / "tokenizer", **SHALLOW)
    pipe.save_pretrained(folder / "path/to/a/model")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False), "style")
    layers = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    pipe.save_lora_weights(folder / "path/to/a/lora", unet_lora_layers=layers)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page: Path, models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "path").symlink_to(models / "path")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    names: dict[str, Any] = {"__name__": page.stem}
    for code in CODE.findall(page.read_text()):
        exec(compile(textwrap.dedent(code), str(page), "exec"), names)
    check = {"lora": _lora, "compile": _compile, "files": _files, "parts": _parts}.get(page.stem)
    if check is not None:
        check(names)


def _lora(names: dict[str, Any]) -> None:
    assert len(names["trained"]) > 8


@torch.no_grad()
def _compile(names: dict[str, Any]) -> None:
    inputs = names["inputs"]
    other = inputs | {"sample": torch.randn(3, 4, 12, 10), "encoder_hidden_states": torch.randn(3, 40, 32)}
    for given in (inputs, other):
        wanted = names["pipe"].unet(**given).sample
        torch.testing.assert_close(names["unet"](**given).sample, wanted)
        torch.testing.assert_close(names["compiled"](**given).sample, wanted)


def _files(names: dict[str, Any]) -> None:
    from ldmq_kernels.conversion import summarize

    assert [summarize(part).quantized_linears > 0 for part in (names["pipe"].unet, names["pipe"].vae)] == [True, True]
    assert summarize(names["unet"]).quantized_convolutions == summarize(names["unet"]).convolutions - 1


def _parts(names: dict[str, Any]) -> None:
    from ldmq_kernels.conversion import summarize

    assert summarize(names["vae"]).quantized_linears == 0


def test_every_page_is_reached_from_the_page_of_models() -> None:
    linked = (PAGES[0].parents[1] / "models.md").read_text()
    assert all(f"using/{page.name}" in linked for page in PAGES)


def test_the_page_of_diffusers_tests_says_which_do_not_apply() -> None:
    from python_tests.diffusers_mixins.applicable import NOT_APPLICABLE

    said = (PAGES[0].parent / "diffusers-tests.md").read_text()
    assert re.findall(r"^\| `(.+)` \| (.+) \|$", said, re.MULTILINE) == list(NOT_APPLICABLE.items())
