"""A plan and a checkpoint that version 0.1.0 wrote, with its words, still load and give the same integers.

`python_tests/data/version_2` was written by 0.1.0: `mixed_plan` of a small UNet, in every scheme, and the UNet that it
quantized. The digest is of 0.1.0's own state dict.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

import ldmq_kernels as ldmq
from ldmq_kernels.plans.plan import Plan
from python_tests.tiny import run_unet, tiny_unet

FILES = Path(__file__).parents[1] / "data/version_2"
TENSORS = "292935407b20e99ac59c41bc0b1716e4375afc47b9ea70506bf3858eb9764eb0"


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def digest_of_all(tensors: dict[str, Tensor]) -> str:
    entries = sorted((name, (str(tensor.dtype), digest(tensor))) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """The checkpoint of 0.1.0, loaded."""
    return UNet2DConditionModel.from_pretrained(FILES / "unet").eval()


def test_the_files_have_every_scheme_in_former_words() -> None:
    text = (FILES / "plan_version_2.json").read_text()
    assert '"ldmq_plan": 2' in text
    assert all(f'"{word}"' in text for word in ("w8a8-stepped", "w8a8-paired", "w4a8-paired", "step_groups"))
    plan = Plan.load(FILES / "plan_version_2.json")
    schemes = {str(layer.scheme) for layer in plan.layers(small_unet()).values()}
    assert schemes >= {f + ending for f in ("w8a8", "w4a8") for ending in ("-static", "-timestep", "-dynamic", "x2")}
    assert schemes >= {"w8a16", "w4a16", "fp16"}


def test_a_former_checkpoint_loads_bit_for_bit(unet: UNet2DConditionModel) -> None:
    assert digest_of_all(unet.state_dict()) == TENSORS


def test_a_former_checkpoint_computes_what_it_did(unet: UNet2DConditionModel) -> None:
    before = load_file(FILES / "output.safetensors")["sample"]  # of `run_unet` by 0.1.0's reference
    with ldmq.use_backend("reference"):
        assert ldmq.sqnr_db(before, run_unet(unet)) > 100  # float layers may be summed in another order


def test_a_former_plan_makes_the_same_integers(unet: UNet2DConditionModel) -> None:
    quantized = ldmq.quantize(small_unet(), FILES / "plan_version_2.json")
    assert digest_of_all(quantized.state_dict()) == TENSORS


def small_unet() -> UNet2DConditionModel:
    return tiny_unet(block_out_channels=(16, 32), norm_num_groups=4)
