"""A picture is the same alone and in a batch, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.batch_invariance import find_variance
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.cpu import attention as cpu_attention
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from python_tests.breadth import parts
from python_tests.tiny import mixed_plan

WORDS = "abcdefgh"


def drawing(pipe: Any, *, guarded: bool = True, **settings: Any) -> Callable[[Sequence[int]], Tensor]:
    """Seeds -> pictures of prompts of their own, drawn in one batch."""

    def draw(seeds: Sequence[int]) -> Tensor:
        with ldmq.batch_invariant(pipe, len(seeds)) if guarded else nullcontext():
            prompts = [f"a red circle {WORDS[seed]}" for seed in seeds]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            settings_of_all = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"} | settings
            return pipe(prompts, generator=generators, **settings_of_all).images

    return draw


def quantized(pipe: Any, how: str) -> Any:
    if how == "every scheme":
        return ldmq.quantize(pipe, mixed_plan(pipe.unet))
    return pipe if how == "float" else ldmq.quantize(pipe, scheme=how)


@pytest.mark.parametrize(
    ("how", "guidance"),
    [("every scheme", 4.0), ("every scheme", 1.0), ("w8a16", 1.0), ("w8a8-dynamic", 4.0), ("float", 4.0)],
)
def test_a_picture_is_the_same_in_every_place_of_a_batch(pipe: Any, how: str, guidance: float) -> None:
    draw = drawing(quantized(pipe, how), guidance_scale=guidance)
    assert find_variance(draw, (2, 5) if how == "every scheme" and guidance > 1 else (3,)) is None


def test_without_it_a_picture_depends_on_its_batch(shared_pipe: Any) -> None:
    found = find_variance(drawing(shared_pipe, guarded=False, guidance_scale=4.0), (2, 3, 4, 8))
    assert found is not None
    assert found.largest > 0


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sdxl_and_its_text_are_the_same_in_a_batch(guidance: float) -> None:
    pipe = StableDiffusionXLPipeline(**parts.stable_diffusion_xl())
    pipe.set_progress_bar_config(disable=True)
    draw = drawing(quantized(pipe, "every scheme"), guidance_scale=guidance)
    assert find_variance(draw, (3,)) is None


def test_what_it_changed_is_put_back(shared_pipe: Any) -> None:
    with ldmq.batch_invariant(shared_pipe, 3):
        assert shared_pipe.vae.use_slicing
    assert not shared_pipe.vae.use_slicing
    assert not shared_pipe.unet._forward_hooks
    assert not shared_pipe.unet._forward_pre_hooks


def test_fp8_products_add_in_floating_point_and_run_once_for_each_picture(shared_pipe: Any) -> None:
    linear = QuantLinear.from_float(nn.Linear(64, 32), SCHEMES["fp8-dynamic"])
    conv = QuantConv2d.from_float(nn.Conv2d(8, 16, 3, padding=1), SCHEMES["fp8-dynamic"])
    x, residual, gate = torch.randn(3, 5, 64), torch.randn(3, 5, 32), torch.randn(3, 1, 32)
    picture, vector, added = torch.randn(3, 8, 4, 4), torch.randn(3, 16), torch.randn(3, 16, 4, 4)

    def compute(of: slice) -> list[Tensor]:
        x_q, scale = conv.quantize(picture[of])
        out = conv.convolve(x_q, scale, torch.float32, vector[of], added[of])
        return [linear.project(x[of], residual[of], gate[of]), out]

    with torch.no_grad():
        alone = [torch.cat(parts) for parts in zip(*(compute(slice(i, i + 1)) for i in range(3)), strict=True)]
        dispatch.reset_dispatch_report()
        with ldmq.batch_invariant(shared_pipe, 3):
            together = compute(slice(None))
    calls = dispatch.calls_by_backend()
    assert [sum(n for (op, _), n in calls.items() if op == name) for name in ("linear_fp8", "conv2d_fp8")] == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_a_picture_of_a_transformer_is_modulated_by_its_own_terms(shared_pipe: Any) -> None:
    x, scale, shift = torch.randn(4, 5, 16), torch.randn(4, 1, 16), torch.randn(4, 1, 16)

    def compute(of: slice) -> list[Tensor]:
        x_q, x_scale = ops.layer_norm_quantize(x[of], None, None, 1e-5, None, None, scale[of], shift[of])
        hidden_q, hidden_scale = ops.gelu_quantize(x[of], True, None, None)
        return [x_q, x_scale, hidden_q, hidden_scale]

    alone = [torch.cat(parts) for parts in zip(compute(slice(0, 2)), compute(slice(2, 4)), strict=True)]
    dispatch.reset_dispatch_report()
    with ldmq.batch_invariant(shared_pipe, 2):
        together = compute(slice(None))
    calls = dispatch.calls_by_backend()
    names = ("layer_norm_quantize", "gelu_quantize")
    assert [sum(n for (op, _), n in calls.items() if op == name) for name in names] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_attention_of_a_picture_is_its_own(shared_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(3, length, 2, 8).bfloat16() for length in (70, 40, 40))
    mask = torch.randn(3, 1, 1, 40).bfloat16()

    def attend(of: slice) -> Tensor:
        return ops.attention(query[of], key[of], value[of], mask[of])

    alone = torch.cat([attend(slice(i, i + 1)) for i in range(3)])
    samples: list[int] = []
    real = cpu_attention.is_compiled
    monkeypatch.setattr(cpu_attention, "is_compiled", lambda q, *others: samples.append(len(q)) or real(q, *others))
    with ldmq.batch_invariant(shared_pipe, 3):
        assert torch.equal(attend(slice(None)), alone)
    assert samples == [1, 1, 1]
