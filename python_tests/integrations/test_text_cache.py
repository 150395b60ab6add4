"""Keys and values of the text, once for each prompt: the same bits, and nothing stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers.fused.merged import MergedLinears
from ldmq_kernels.integrations.diffusers.fused.transformer_block import projects_text_alone
from ldmq_kernels.integrations.diffusers.text_cache import KEPT, TextCache
from ldmq_kernels.nn import QuantLinear
from python_tests.breadth import parts
from python_tests.integrations.cached_unets import made
from python_tests.tiny import PROMPTS, TEXT_WIDTH, TOKENS, draw, tiny_pipeline, tiny_unet, unet_inputs


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return made("mixed")


@pytest.fixture
def unet(quantized: nn.Module) -> Any:
    """A copy with the cache."""
    unet = copy.deepcopy(quantized)
    assert 0 < ldmq.cache_text(unet) < 4  # of four blocks; the others follow the timestep
    return unet


def attention(unet: Any) -> Any:
    """The attention to the text of the first block that is cached."""
    return next(block for block in cache_of(unet).blocks if projects_text_alone(block)).attn2


def texts(count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator) for _ in range(count)]


def run(unet: nn.Module, text: Tensor, **changes: Any) -> Tensor:
    dtype = text.dtype
    inputs = {**unet_inputs(dtype), "encoder_hidden_states": text} | changes
    with torch.no_grad():
        return unet(**inputs, return_dict=False)[0]


def cache_of(unet: nn.Module) -> TextCache:
    return next(h.__self__ for h in unet._forward_pre_hooks.values() if isinstance(h.__self__, TextCache))


def projections(unet: Any, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many times keys of the text are computed while `call` runs."""
    names = {id(m): n for n, m in unet.named_modules() if n.endswith("attn2.to_k")}
    calls: list[str] = []
    with monkeypatch.context() as patch:
        alone = ((nn.Linear, "forward"), (QuantLinear, "forward"), (QuantLinear, "linear"))
        for kind, name in (*alone, (MergedLinears, "products")):
            real: Any = getattr(kind, name)

            def counted(self: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
                layers = self.layers if isinstance(self, MergedLinears) else [self]
                calls.extend(names[id(layer)] for layer in layers if id(layer) in names)
                return real(self, *args, **kwargs)

            patch.setattr(kind, name, counted)
        call()
    return len(calls)


def same_as_without(unet: Any, text: Tensor) -> bool:
    """Whether a call with the cache has the bits of one without."""
    without = copy.deepcopy(unet)
    ldmq.uncache_text(without)
    return torch.equal(run(unet, text), run(without, text))


def test_pictures_are_the_same_and_the_text_is_projected_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(tmp_path)
    ldmq.quantize(pipe, scheme="w8a8-dynamic")
    expected = draw(pipe, 3)
    once = projections(pipe.unet, lambda: draw(pipe, 1), monkeypatch)
    assert ldmq.cache_text(pipe.unet) == once == 4
    pictures: list[Tensor] = []
    assert projections(pipe.unet, lambda: pictures.append(draw(pipe, 3)), monkeypatch) == once
    assert torch.equal(pictures[0], expected)


def test_sdxl_draws_the_same_alone_and_in_a_batch() -> None:
    pipe = StableDiffusionXLPipeline(**parts.stable_diffusion_xl())
    pipe.set_progress_bar_config(disable=True)
    ldmq.quantize(pipe, scheme="w8a8-dynamic")

    def drawn(prompts: list[str]) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        return pipe(prompts, num_inference_steps=2, generator=generators, output_type="pt", height=16, width=16).images

    embedded: list[int] = []
    pipe.unet.add_embedding.linear_2.register_forward_hook(lambda *_: embedded.append(1))
    expected = drawn(PROMPTS)
    pipe.unet.add_embedding.linear_2._forward_hooks.clear()
    assert len(embedded) == 2
    with ldmq.batch_invariant(pipe, 2):
        apart = drawn(PROMPTS)
    assert ldmq.cache_text(pipe.unet) > 0
    assert torch.equal(drawn(PROMPTS), expected)
    assert len(cache_of(pipe.unet).pooled.entries) == 1
    with ldmq.batch_invariant(pipe, 2):
        assert torch.equal(drawn(PROMPTS), apart)
    ldmq.uncache_text(pipe.unet)
    assert type(pipe.unet.add_embedding).__name__ == "TimestepEmbedding"
    assert torch.equal(drawn(PROMPTS), expected)


@pytest.mark.parametrize("change", ["sizes", "pooled in place", "layer", "hook", "nothing"])
def test_the_pooled_embedding_of_sdxl_is_never_stale(change: str) -> None:
    unet: Any = parts.stable_diffusion_xl()["unet"]
    ldmq.quantize(unet, scheme="w8a8-dynamic")
    assert ldmq.cache_text(unet) > 0
    text = torch.randn(2, TOKENS, unet.config.cross_attention_dim)
    pooled, sizes = torch.randn(2, TEXT_WIDTH), torch.full((2, 6), 16.0)
    first = run(unet, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})
    layer = unet.add_embedding.linear_1
    if change == "sizes":
        sizes = torch.full((2, 6), 8.0)
    elif change == "pooled in place":
        pooled *= 2
    elif change == "layer":
        unet.add_embedding.linear_1 = nn.Linear(layer.in_features, layer.out_features)
    elif change == "hook":
        layer.register_forward_hook(lambda *a: a[-1] * 2)
    out = run(unet, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})
    assert torch.equal(out, first) == (change == "nothing")
    ldmq.uncache_text(unet)
    assert torch.equal(run(unet, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}), out)


def test_an_embedding_as_wide_as_its_input_is_computed_in_each_call() -> None:
    unet: Any = parts.xl_unet(addition_time_embed_dim=16, projection_class_embeddings_input_dim=6 * 16 + TEXT_WIDTH)
    assert unet.add_embedding.linear_1.in_features == unet.add_embedding.linear_2.out_features
    ldmq.quantize(unet, scheme="w8a8-dynamic")
    text = torch.randn(2, TOKENS, unet.config.cross_attention_dim)
    pooled, sizes = torch.randn(2, TEXT_WIDTH), torch.full((2, 6), 16.0)
    expected = run(unet, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})
    assert ldmq.cache_text(unet) > 0
    assert torch.equal(run(unet, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}), expected)
    assert not cache_of(unet).pooled.entries


def test_a_known_text_costs_nothing_and_few_are_kept(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = texts()[0]
    known = projections(unet, lambda: (run(unet, first), run(unet, first)), monkeypatch)
    cache = cache_of(unet)

    def run_others() -> None:
        for text in texts(KEPT + 2):
            run(unet, text)
        assert len(cache.texts.entries) == KEPT

    assert known < projections(unet, run_others, monkeypatch)
    run(unet, first)
    assert len(cache.texts.entries) == 1
    ldmq.uncache_text(unet)
    assert not cache.texts.entries
    assert cache.before not in unet._forward_pre_hooks.values()


def _write(unet: Any, _text: Tensor) -> None:
    layer = attention(unet).to_v
    layer.bias = nn.Parameter(torch.full((layer.out_features,), 0.5), requires_grad=False)


def _load(unet: Any, _text: Tensor) -> None:
    other = copy.deepcopy(unet)
    ldmq.uncache_text(other)
    for name, tensor in (state := other.state_dict()).items():
        if name.endswith("attn2.to_k.weight_scale"):
            state[name] = tensor * 1.5
    unet.load_state_dict(state)


def _replace(unet: Any, _text: Tensor) -> None:
    torch.manual_seed(5)
    old = attention(unet).to_k
    attention(unet).to_k = nn.Linear(old.in_features, old.out_features, bias=False)


def _hook(unet: Any, _text: Tensor) -> None:
    attention(unet).to_k.register_forward_hook(lambda *a: a[-1] * 2)


def _change_text(_unet: Any, text: Tensor) -> None:
    text[0, 3] += 1.0


def _move(unet: Any, _text: Tensor) -> None:
    unet.to(torch.bfloat16).to(torch.float32)


def _adapt(unet: Any, _text: Tensor) -> None:
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))


@pytest.mark.parametrize("change", [_write, _load, _replace, _hook, _change_text, _move, _adapt])
def test_nothing_is_stale(unet: Any, change: Callable[[Any, Tensor], None]) -> None:
    (text,) = texts()
    before = run(unet, text)
    change(unet, text)
    assert same_as_without(unet, text)
    if change is not _move:  # in float32 the bias alone may lose bits
        assert not torch.equal(run(unet, text), before)


def test_another_dtype_is_another_text(unet: Any) -> None:
    (text,) = texts()
    run(unet, text)
    unet.to(torch.bfloat16)
    assert same_as_without(unet, text.bfloat16())


def test_other_ways_to_call_are_computed_as_before(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = texts()
    expected = run(unet, text)
    arguments = unet_inputs()
    with torch.no_grad():
        by_place = unet(arguments["sample"], arguments["timestep"], text, return_dict=False)[0]
    assert torch.equal(by_place, expected)
    entries = cache_of(unet).texts.entries
    gradient = unet(**{**arguments, "encoder_hidden_states": text}, return_dict=False)[0]
    with torch.inference_mode():
        inferred = unet(**{**arguments, "encoder_hidden_states": text.clone()}, return_dict=False)[0]
    masked = run(unet, text, cross_attention_kwargs={"scale": 1.0})
    assert cache_of(unet).texts.entries == entries
    for other in (gradient, inferred, masked):
        torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3)


def test_a_copy_has_a_cache_of_its_own(unet: Any) -> None:
    (text,) = texts()
    expected = run(unet, text)
    other = copy.deepcopy(unet)
    assert cache_of(other) is not cache_of(unet)
    assert cache_of(other).blocks[0] in list(other.modules())
    _write(other, text)
    assert not torch.equal(run(other, text), expected)
    assert torch.equal(run(unet, text), expected)


def test_what_cannot_be_cached_says_why(caplog: pytest.LogCaptureFixture) -> None:
    assert ldmq.cache_text(tiny_unet()) == 0
    assert "not fused: quantize the UNet" in caplog.text
    assert ldmq.cache_text(nn.Linear(2, 2)) == 0
    assert "only a UNet2DConditionModel" in caplog.text
