"""Fused blocks on Triton, in its interpreter where there is no GPU: every op is served, and as by the reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ldmq_kernels.conversion import convert
from ldmq_kernels.integrations.diffusers.fused import PLAIN, fuse
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.triton import backend as triton_backend
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, model_record

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEAR = 45.0  # dB: float sums in another order turn over ties, each worth a step of an int8 activation
PRODUCT = {"w8a8": "linear_w8a8", "w4a8": "linear_w4a8"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers whose weights the CPU backend does not pack."""
    if not triton_backend.serves(DEVICE):
        pytest.skip(f"the Triton backend does not serve {DEVICE}")
    monkeypatch.setattr("ldmq_kernels.kernels.cpu.backend.serves", lambda _: False)
    torch.manual_seed(0)
    yield
    dispatch.reset_dispatch_report()


def converted(block: nn.Module, scheme: str) -> nn.Module:
    """The block in a model of its own, quantized and fused; its norms' parameters are not ones and zeros."""
    for module in block.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    model = nn.ModuleDict({"block": block}).eval()
    plan = Plan(model_record(model), [{"pattern": "*", "scheme": scheme}])
    if scheme.endswith("static"):
        plan.input_scales.update(dict.fromkeys(quantizable_layers(model), 0.03))
    convert(model, plan)
    fused = fuse(model)["block"]
    assert type(fused) in PLAIN
    return fused.to(DEVICE)


def served_by(backend: str, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, int]]:
    """What `run` gives with every op served by one backend, and how often each op was called."""
    dispatch.reset_dispatch_report()
    with dispatch.use_backend(backend), torch.no_grad():
        out = run()
    lines = [line.split() for line in dispatch.dispatch_report().splitlines()]
    assert {line[1] for line in lines} == {backend}
    assert all(line[-1] == "calls" for line in lines)
    return out, {line[0]: int(line[-2]) for line in lines}


def check(run: Callable[[], Tensor], **expected: int) -> None:
    """Triton serves these ops, so often, and comes near to the reference."""
    wanted, in_reference = served_by("reference", run)
    out, counts = served_by("triton", run)
    assert counts == in_reference == expected
    assert out.shape == wanted.shape
    assert float(sqnr_db(wanted, out)) > NEAR


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic", "w4a8-dynamic"])
def test_a_residual_block(scheme: str) -> None:
    """64 channels to 96, so that its shortcut is a product; TMA tiles and a time embedding."""
    block = ResnetBlock2D(in_channels=64, out_channels=96, temb_channels=48, groups=8, eps=1e-5)
    fused, product = converted(block, scheme), PRODUCT[scheme[:4]]
    x, embedding = random(2, 64, 6, 5), random(2, 48)
    check(
        lambda: fused(x, embedding),
        group_norm_silu_quantize=2,
        silu_quantize=1,
        **{
            product.replace("linear", "conv2d"): 2,
            "quantize_static" if scheme == "w8a8-static" else "quantize_per_token": 1,
            product: 2,
        },
    )


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic", "w4a8-dynamic"])
def test_a_transformer_block_with_q_k_and_v_as_one_product(scheme: str) -> None:
    block = BasicTransformerBlock(64, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=48)
    fused, product = converted(block, scheme), PRODUCT[scheme[:4]]
    q, k, v = (getattr(fused.attn1, name).plain_weight for name in ("to_q", "to_k", "to_v"))
    assert len({weight.untyped_storage().data_ptr() for weight in (q, k, v)}) == 1
    x, context = random(2, 17, 64), random(2, 7, 48)
    is_static = scheme == "w8a8-static"
    # qkv, q of the text's attention, its k and v as one, GEGLU's two; and the two attentions' outputs
    products = {product: 5, "linear_static_w8a8": 2} if is_static else {product: 7}
    check(
        lambda: fused(x, encoder_hidden_states=context),
        layer_norm_quantize=3,
        geglu_quantize=1,
        **({"quantize_static": 1} if is_static else {"quantize_per_token": 3}),
        **products,
    )


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic", "fp8-static"])
def test_geglu_in_the_epilogue_of_its_projection(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a calibrated scale the product after it gets its 8-bit input from there, else from one quantization more."""
    fused, x = converted(FeedForward(32, activation_fn="geglu"), scheme), random(2, 5, 32)
    in_two_ops = served_by("reference", lambda: fused(x))[0]
    monkeypatch.setattr(dispatch, "is_served", lambda *_: True)
    fused._apply(lambda tensor: tensor)  # the layers ask again
    products = {"fp8-static": {"quantize_static": 1, "linear_geglu_fp8": 1, "linear_fp8": 1}}
    products["w8a8-static"] = {"quantize_static": 1, "linear_geglu_w8a8": 1, "linear_w8a8": 1}
    products["w8a8-dynamic"] = {"quantize_per_token": 2, "linear_geglu_w8a8": 1, "linear_w8a8": 1}
    check(lambda: fused(x), **products[scheme])
    assert float(sqnr_db(in_two_ops, served_by("reference", lambda: fused(x))[0])) > NEAR


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic", "w4a8-dynamic"])
@pytest.mark.parametrize("channels", [64, 20])
def test_an_upsampling_block(channels: int, scheme: str) -> None:
    fused, x = converted(Upsample2D(channels, use_conv=True), scheme), random(2, channels, 3, 5)
    quantize = "quantize_static" if scheme.endswith("static") else "quantize_per_sample"
    check(lambda: fused(x), **{quantize: 1, PRODUCT[scheme[:4]].replace("linear", "conv2d"): 1})


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_a_downsampling_block(size: tuple[int, int], padding: int) -> None:
    """Padded at the far sides by the convolution where `padding` is 0; odd sizes are read by pointers."""
    fused = converted(Downsample2D(64, use_conv=True, padding=padding), "w8a8-dynamic")
    x = random(2, 64, *size)
    check(lambda: fused(x), quantize_per_sample=1, conv2d_w8a8=1)


@pytest.mark.parametrize("linear_projection", [False, True])
def test_a_transformer_model(linear_projection: bool) -> None:
    """Its projections are products over pixels in both forms, and take their input from the norm."""
    model = Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=64,
        norm_num_groups=8,
        cross_attention_dim=48,
        use_linear_projection=linear_projection,
    )
    fused = converted(model, "w8a8-dynamic")
    x, context = random(2, 64, 4, 3), random(2, 7, 48)
    check(
        lambda: fused(x, encoder_hidden_states=context, return_dict=False)[0],
        group_norm_silu_quantize=1,
        layer_norm_quantize=3,
        geglu_quantize=1,
        quantize_per_token=4,
        linear_w8a8=9,
    )
