"""What is read of a model's folder and of a file of prompts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmq_kernels.cli.models import read_prompts
from python_tests.cli.commands import complaint, run
from python_tests.tiny import SHALLOW, tiny_unet


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfa red circle\r\na blue square\r\n", ["a red circle", "a blue square"]),
        (b"\xef\xbb\xbf\n\xef\xbb\xbfa cat\n", ["a cat"]),
        ("a castle\u2028at night\na ship\u0085at sea\n".encode(), ["a castle at night", "a ship at sea"]),
        (b"one\x0ctwo\x0bthree\x1cfour\n", ["one two three four"]),
        (b"\x0c\n\xe2\x80\xa9\n a cat\n", ["a cat"]),
        (b"a\rb\r\nc\n\n d  e ", ["a", "b", "c", "d  e"]),
    ],
    ids=["mark", "mark in between", "separators", "form feed", "only separators", "ends of lines"],
)
def test_a_line_is_a_prompt_whatever_else_parts_lines(content: bytes, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_prompts(tmp_path / "prompts.txt") == prompts


def _dtypes(folder: Path) -> set[torch.dtype]:
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    return {tensor.dtype for name, tensor in tensors.items() if name.endswith("bias")}


@pytest.mark.parametrize(
    ("stored", "beside", "safe"),
    [
        (torch.float32, torch.float16, True),
        (torch.float16, torch.float32, True),
        (torch.float16, None, False),
        (torch.bfloat16, torch.float32, False),
    ],
    ids=str,
)
def test_what_is_written_has_the_dtype_of_the_file_that_is_loaded(
    stored: torch.dtype, beside: torch.dtype | None, safe: bool, plan_file: Path, tmp_path: Path
) -> None:
    unet = tiny_unet(**SHALLOW)
    unet.to(stored).save_pretrained(tmp_path / "model", safe_serialization=safe)
    if beside is not None:
        unet.to(beside).save_pretrained(tmp_path / "model", variant="another", safe_serialization=True)
    assert run("quantize", tmp_path / "model", "--plan", plan_file, "--out", tmp_path / "out") == 0
    assert _dtypes(tmp_path / "out") == {stored}


def test_a_model_whose_name_is_no_utf_8_is_loaded(model: Path, plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model-\udcff").symlink_to(model)
    assert run("quantize", tmp_path / "model-\udcff", "--plan", plan_file, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_variant_that_is_there_alone_is_loaded(sharded: bool, plan_file: Path, tmp_path: Path) -> None:
    size = "200KB" if sharded else "10GB"
    unet = tiny_unet(**SHALLOW).half()
    unet.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size=size)
    unet.save_pretrained(tmp_path / "plain")
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) is sharded
    for name in ("model", "plain"):
        assert run("quantize", tmp_path / name, "--plan", plan_file, "--out", tmp_path / f"{name} out") == 0
    one, other = (
        load_file(tmp_path / f"{name} out" / "diffusion_pytorch_model.safetensors") for name in ("model", "plain")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert _dtypes(tmp_path / "model out") == {torch.float16}


def test_a_pipeline_of_one_variant_keeps_its_dtypes(model: Path, plan_file: Path, tmp_path: Path) -> None:
    """One part has plain weights beside, of another dtype: the variant is what diffusers loads then."""
    shutil.copytree(model, tmp_path / "model")
    for file in (tmp_path / "model").glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    plain = {name: t.float() for name, t in load_file(next((tmp_path / "model").glob("vae/*.safetensors"))).items()}
    save_file(plain, tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    assert run("quantize", tmp_path / "model", "--plan", plan_file, "--out", tmp_path / "out") == 0
    for part in ("unet", "vae"):
        assert _dtypes(tmp_path / "out" / part) == {torch.float16}


def test_of_several_variants_none_is_guessed(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for variant in ("fp16", "ema"):
        tiny_unet(**SHALLOW).save_pretrained(tmp_path / "model", variant=variant)
    assert run("quantize", tmp_path / "model", "--plan", plan_file, "--out", tmp_path / "out") == 1
    assert "model (ema, fp16): say which variant is meant" in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_the_variant_that_is_named_is_loaded_and_another_is_refused(
    model: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the UNet both are there; the other parts have plain weights alone, as diffusers allows."""
    shutil.copytree(model, tmp_path / "model")
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(weights).items()}, weights.with_suffix(".bf16.safetensors"))
    command = ("quantize", tmp_path / "model", "--plan", plan_file)
    for out, named, dtype in (("plain", (), torch.float16), ("bf16", ("--variant", "bf16"), torch.bfloat16)):
        assert run(*command, *named, "--out", tmp_path / out) == 0
        assert _dtypes(tmp_path / out / "unet") == {dtype}
    for place in (("--dry-run",), ("--out", tmp_path / "none")):
        capsys.readouterr()
        assert run(*command, "--variant", "fp32", *place) == 1
        assert "no weights of the variant 'fp32', it holds" in (error := complaint(capsys))
        assert "unet (bf16, plain); vae (plain): give a variant that is there" in error
    assert not (tmp_path / "none").exists()


def test_a_config_that_is_nonsense_is_named(model: Path, plan_file: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "unet", tmp_path / "unet")
    (tmp_path / "unet" / "config.json").write_text("[" * 100_000)
    assert run("quantize", tmp_path / "unet", "--plan", plan_file, "--out", tmp_path / "out") == 1
