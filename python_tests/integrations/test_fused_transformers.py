"""Blocks of diffusion transformers in fused form: the same numbers from fewer ops, and diffusers' own where needed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ldmq_kernels.conversion import convert
from ldmq_kernels.integrations.diffusers.fused import PLAIN, fuse, unfuse
from ldmq_kernels.integrations.diffusers.fused.projections import SharesProjections
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, model_record, uniform_plan
from python_tests.integrations.test_fused import served
from python_tests.integrations.transformers import OF_OWN_FUSED_BLOCKS, TRANSFORMERS, run, wan
from python_tests.tiny import mixed_plan

NEAR = 90.0  # dB in float32 on the reference: the formulas are the same, but for the order of a product and a sum
QUANTIZERS = ("quantize_static", "quantize_per_token")


@pytest.fixture(autouse=True)
def on_the_reference() -> Any:
    """The definition, so that fused and unfused round alike."""
    with dispatch.use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmq_kernels.kernels.cpu.backend.serves", lambda _: False)
        yield


def quantized(name: str, scheme: str) -> tuple[nn.Module, dict[str, Any]]:
    model, call = TRANSFORMERS[name]()
    if scheme == "mixed":
        plan = mixed_plan(model)
    elif scheme.endswith("static"):
        plan = Plan(model_record(model), [{"pattern": "*", "scheme": scheme}])
        plan.input_scales.update(dict.fromkeys(quantizable_layers(model), 0.03))
    else:
        plan = uniform_plan(model, scheme)
    convert(model, plan)
    return model, call


def unfused(model: nn.Module) -> nn.Module:
    plain = unfuse(copy.deepcopy(model))
    assert not any(type(module) in PLAIN for module in plain.modules())
    return plain


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static", "mixed", "w8a16"])
@pytest.mark.parametrize("name", OF_OWN_FUSED_BLOCKS)
def test_a_fused_transformer_computes_what_the_unfused_one_does(name: str, scheme: str) -> None:
    model, call = quantized(name, scheme)
    assert any(isinstance(module, SharesProjections) for module in model.modules())
    assert float(sqnr_db(run(unfused(model), call), run(model, call))) > NEAR


@pytest.mark.parametrize("name", sorted(set(TRANSFORMERS) - set(OF_OWN_FUSED_BLOCKS) - {"sana"}))
def test_a_feed_forward_of_any_transformer_has_gelu_and_quantization_in_one_op(name: str) -> None:
    model, call = quantized(name, "w8a8-dynamic")
    assert float(sqnr_db(run(unfused(model), call), run(model, call))) > NEAR
    feed_forwards = sum(isinstance(module, FeedForward) for module in model.modules())
    assert served(lambda: run(model, call))["gelu_quantize"] == feed_forwards > 0


COUNTS = {  # norms, GELUs, SiLUs of the time embedding; and what is left to quantize by itself
    "flux": {"layer_norm_quantize": 5, "gelu_quantize": 2, "silu_quantize": 3, "quantize_per_token": 11},
    "pixart": {"layer_norm_quantize": 2, "gelu_quantize": 1, "silu_quantize": 0, "quantize_per_token": 10},
    "sd3": {"layer_norm_quantize": 8, "gelu_quantize": 3, "silu_quantize": 4, "quantize_per_token": 11},
    "wan": {"layer_norm_quantize": 3, "gelu_quantize": 1, "silu_quantize": 0, "quantize_per_token": 9},
}


@pytest.mark.parametrize("name", OF_OWN_FUSED_BLOCKS)
def test_the_fused_ops_serve_norms_activations_and_gates(name: str) -> None:
    model, call = quantized(name, "w8a8-dynamic")
    counts = served(lambda: run(model, call))
    assert {op: counts[op] for op in COUNTS[name]} == COUNTS[name]
    assert served(lambda: run(unfused(model), call))["layer_norm_quantize"] == 0
    products = sum(count for op, count in counts.items() if op.startswith("linear"))
    assert products < len(quantizable_layers(model))  # q, k and v are one


HOOKED = {
    "flux": ("transformer_blocks.0.norm1", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.ff.net.0.proj",
             "single_transformer_blocks.0.act_mlp", "single_transformer_blocks.0.attn.to_k"),
    "pixart": ("transformer_blocks.0.norm1", "transformer_blocks.0.norm2", "transformer_blocks.0.attn1.to_out.0",
               "transformer_blocks.0.attn2.to_k", "transformer_blocks.0.ff.net.0"),
    "sd3": ("transformer_blocks.0.norm1.norm", "transformer_blocks.0.attn2.to_k",
            "transformer_blocks.0.attn.to_add_out", "transformer_blocks.1.norm1_context",
            "transformer_blocks.1.ff.net.2"),
    "wan": ("blocks.0.norm1", "blocks.0.norm2", "blocks.0.attn1.to_q", "blocks.0.ffn", "blocks.0.ffn.net.2"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in HOOKED.items() for place in places])
def test_a_hook_inside_a_block_is_called(name: str, place: str) -> None:
    model, call = quantized(name, "w8a8-dynamic")
    wanted, seen = run(model, call), []
    model.get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
    assert float(sqnr_db(wanted, run(model, call))) > NEAR
    assert seen


@pytest.mark.parametrize("name", OF_OWN_FUSED_BLOCKS)
def test_another_attention_processor_is_used(name: str) -> None:
    model, call = quantized(name, "w8a8-dynamic")
    wanted, calls = run(model, call), []
    attention = next(m for m in model.modules() if hasattr(m, "processor"))
    kind = type(attention.processor)

    class Own(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    attention.set_processor(Own())
    assert float(sqnr_db(wanted, run(model, call))) > NEAR
    assert calls


@pytest.mark.parametrize("name", OF_OWN_FUSED_BLOCKS)
def test_a_float_layer_in_a_block_stays_float(name: str) -> None:
    model, call = TRANSFORMERS[name]()
    plan = uniform_plan(model, "w8a8-dynamic")
    for place in HOOKED[name]:
        if isinstance(model.get_submodule(place), nn.Linear):
            plan.exceptions[place] = {"scheme": "fp16", "reason": "stays"}
    assert len(plan.exceptions) > 1
    convert(model, plan)
    assert float(sqnr_db(run(unfused(model), call), run(model, call))) > NEAR


@pytest.mark.parametrize("name", OF_OWN_FUSED_BLOCKS)
def test_half_precision_and_copies_are_as_near_as_their_rounding(name: str) -> None:
    model, call = quantized(name, "w8a8-dynamic")
    wanted = run(model, call)
    assert torch.equal(run(copy.deepcopy(model), call), wanted)
    halves = {k: v.bfloat16() if isinstance(v, Tensor) and v.dtype == torch.float32 else v for k, v in call.items()}
    halves |= {k: call[k] for k in ("timestep", "img_ids", "txt_ids") if k in call}
    out = run(model.to(torch.bfloat16), halves)
    assert out.dtype == torch.bfloat16
    assert float(sqnr_db(wanted, out.float())) > 25


def test_a_wan_block_takes_a_time_for_each_token() -> None:
    model, call = wan()
    convert(model, uniform_plan(model, "w8a8-dynamic"))
    call["timestep"] = torch.tensor([[700.0] * 12, [300.0] * 6 + [0.0] * 6])
    assert float(sqnr_db(run(unfused(model), call), run(model, call))) > NEAR
    assert served(lambda: run(model, call))["layer_norm_quantize"] == 3


def test_a_wan_block_takes_one_time_for_each_token_of_all_samples() -> None:
    model, _ = quantized("wan", "w8a8-dynamic")
    block: Any = model.blocks[0]
    width = block.scale_shift_table.shape[-1]
    torch.manual_seed(0)
    x, text, temb = torch.randn(2, 12, width), torch.randn(2, 5, width), torch.randn(1, 12, 6, width)
    rotary = [torch.ones(1, 12, 1, width // block.attn1.heads) for _ in range(2)]
    out = run_block(unfused(block), x, text, temb, rotary)
    assert float(sqnr_db(out, run_block(block, x, text, temb, rotary))) > NEAR


@torch.no_grad()
def run_block(block: nn.Module, *arguments: Any) -> Tensor:
    out: Tensor = block(*arguments)
    return out


def test_an_empty_batch_gives_an_empty_output() -> None:
    model, call = quantized("sd3", "w8a8-dynamic")  # diffusers' own code refuses one of the others
    samples = call["hidden_states"].shape[0]
    shape = run(model, call).shape
    empty = {
        key: value[:0] if isinstance(value, Tensor) and len(value) == samples and "ids" not in key else value
        for key, value in call.items()
    }
    assert run(model, empty).shape == (0, *shape[1:])


@pytest.mark.parametrize("name", OF_OWN_FUSED_BLOCKS)
def test_gradients_pass_through_a_block_layer_by_layer(name: str) -> None:
    model, call = quantized(name, "w8a8-dynamic")
    call["hidden_states"].requires_grad_()
    out = model(**call, return_dict=False)[0]
    assert float(sqnr_db(run(model, call), out.detach())) > NEAR
    out.square().sum().backward()
    assert call["hidden_states"].grad.abs().sum() > 0


def test_docs_models_says_which_blocks_are_fused_and_which_are_not() -> None:
    said = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text().split("<!-- fused -->")[1]
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in said.splitlines()]
    for make in TRANSFORMERS.values():
        model, _ = make()
        fuse(model)
        fused = {PLAIN[type(m)].__name__ for m in model.modules() if type(m) in PLAIN}
        plain = {
            type(m).__name__ for m in model.modules() if type(m) not in PLAIN and type(m).__name__.endswith("Block")
        }
        assert [listed({type(model).__name__}), listed(fused), listed(plain)] in rows


def listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "-"
