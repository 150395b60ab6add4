"""Blocks stay fused whatever computes their attention, and a processor that cannot says so."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused import attention, unfuse
from ldmq_kernels.integrations.diffusers.fused.attended import attended, dispatched
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.integrations.cached_unets import made
from python_tests.tiny import run_unet


class Counted(AttnProcessor):
    """Another class than diffusers', which counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().__call__(*args, **kwargs)


class Remembers(AttnProcessor):
    """Uses the hidden states for more than a projection."""

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return super().__call__(attn, hidden_states, **kwargs) + 0.0 * hidden_states


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return made("w8a8-dynamic")


@pytest.fixture
def unet(quantized: nn.Module) -> Any:
    return copy.deepcopy(quantized)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[type]]:
    """The processors that blocks are fused with, put back afterwards."""
    monkeypatch.setattr(attention, "PROCESSORS", set(attention.PROCESSORS))
    return attention.PROCESSORS


@pytest.fixture
def fused_norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An element for each LayerNorm that quantizes in its op: three in a block that is fused."""
    calls: list[int] = []
    real = ops.layer_norm_quantize

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "layer_norm_quantize", counted)
    return calls


@pytest.mark.parametrize("processor", [AttnProcessor, lambda: SlicedAttnProcessor(2)], ids=["plain", "sliced"])
@pytest.mark.usefixtures("as_unfused")
def test_processors_of_diffusers_run_in_fused_blocks(unet: Any, processor: Any, fused_norms: list[int]) -> None:
    expected = run_unet(unet)
    usual = len(fused_norms)
    unet.set_attn_processor(processor())
    out = run_unet(unet)
    assert len(fused_norms) == 2 * usual > 0
    assert float(sqnr_db(expected, out)) > 60
    assert float(sqnr_db(run_unet(unfuse(unet)), out)) > 40


def test_xformers_runs_in_fused_blocks(unet: Any, monkeypatch: pytest.MonkeyPatch, fused_norms: list[int]) -> None:
    """With a function that has xformers' arguments: (B * heads, T, C)."""

    class Ops:
        calls = 0

        @staticmethod
        def memory_efficient_attention(
            q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, op: Any, scale: float
        ) -> Tensor:
            Ops.calls += 1
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)

    monkeypatch.setattr(attention_processor, "xformers", type("xformers", (), {"ops": Ops}), raising=False)
    expected = run_unet(unet)
    usual = len(fused_norms)
    unet.set_attn_processor(attention_processor.XFormersAttnProcessor())
    assert float(sqnr_db(expected, run_unet(unet))) > 60
    assert Ops.calls == 8
    assert len(fused_norms) == 2 * usual


def test_a_function_in_place_of_torchs_is_called_in_fused_blocks(
    unet: Any, monkeypatch: pytest.MonkeyPatch, fused_norms: list[int]
) -> None:
    """The way that SageAttention is put in."""
    real, calls = nn.functional.scaled_dot_product_attention, []

    def sage(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None) -> Tensor:
        calls.append(query.shape)
        return real(query, key, value, attn_mask=attn_mask)

    expected = run_unet(unet)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", sage)
    assert torch.equal(run_unet(unet), expected)
    assert len(calls) == 8
    assert len(fused_norms) > 0


def counted_op(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of the query of each call of the package's attention."""
    calls: list[torch.Size] = []
    real = ops.attention

    def counted(query: Tensor, *others: Any) -> Tensor:
        calls.append(query.shape)
        return real(query, *others)

    monkeypatch.setattr(ops, "attention", counted)
    return calls


def test_on_a_cpu_bfloat16_attends_by_the_packages_op(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet.bfloat16()
    unfused = run_unet(unfuse(copy.deepcopy(unet)), dtype=torch.bfloat16)
    calls = counted_op(monkeypatch)
    out = run_unet(unet, dtype=torch.bfloat16)
    assert len(calls) == 8
    assert float(sqnr_db(unfused, out)) > 25
    real = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *a, **b: real(*a, **b))
    run_unet(unet, dtype=torch.bfloat16)
    assert len(calls) == 8


def test_float32_and_calls_with_gradients_attend_by_torchs(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_op(monkeypatch)
    run_unet(unet)
    query = torch.randn(2, 3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    attended(query, query, query).float().sum().backward()
    assert query.grad is not None
    assert not calls


@pytest.mark.parametrize("how", ["processor", "all"])
def test_a_backend_that_is_set_in_diffusers_attends(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    calls = counted_op(monkeypatch)
    query, key, value = (torch.randn(2, 20, 3, 8, dtype=torch.bfloat16) for _ in range(3))
    native = dispatched(query, key, value, None, None)
    assert len(calls) == 1
    if how == "processor":
        out = dispatched(query, key, value, "_native_math", None)
    else:
        with attention_backend("_native_math"):
            out = dispatched(query, key, value, None, None)
    assert len(calls) == 1
    torch.testing.assert_close(out, native, rtol=2e-2, atol=1e-2)


def test_a_processor_of_the_users_is_fused_once_it_is_declared(
    unet: Any, known: set[type], fused_norms: list[int]
) -> None:
    unet.set_attn_processor(Counted())
    unfused = run_unet(unet)
    assert not fused_norms
    assert ldmq.fuse_with_processor(Counted) is Counted
    out = run_unet(unet)
    assert len(fused_norms) > 0
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor.calls == 16
    assert float(sqnr_db(unfused, out)) > 40
    with pytest.raises(TypeError, match="found a function"):
        ldmq.fuse_with_processor(lambda: None)  # type: ignore[type-var]


def test_a_processor_that_computes_from_its_inputs_is_no_silent_mistake(unet: Any, known: set[type]) -> None:
    unet.set_attn_processor(Remembers())
    run_unet(unet)
    ldmq.fuse_with_processor(Remembers)
    with pytest.raises(RuntimeError, match=r"Remembers cannot run in a fused block.*do not give this class"):
        run_unet(unet)


def test_the_default_processor_gives_the_same_with_the_stand_in(unet: Any, known: set[type]) -> None:
    """The stand-in's residual, text and mask are the block's: the same class by another name computes the same."""

    class Same(AttnProcessor2_0):
        pass

    expected = run_unet(unet)
    ldmq.fuse_with_processor(Same)
    unet.set_attn_processor(Same())
    assert torch.equal(run_unet(unet), expected)
