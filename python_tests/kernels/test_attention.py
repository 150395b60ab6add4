"""ops.attention is softmax(query key^T / sqrt(head_dim) + mask) value, as near to it as torch's of the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.models import attention
from ldmq_kernels import ops
from ldmq_kernels.kernels.cpu import attention as cpu
from ldmq_kernels.kernels.cpu import compiled
from ldmq_kernels.kernels.reference.attention import attention as reference

LIMITS = {name: getattr(cpu, name) for name in ("FEWEST_QUERIES", "FEWEST_KEYS")}
HEADS = [8, 40, 64, 72, 80, 96, 128, 160, 256]
TOKENS = [1, 7, 16, 33, 64, 77, 300, 1024]
needs_tiles = pytest.mark.skipif(
    not compiled.has_tiles() or not cpu._has_library(), reason="attention.c is for a processor with AMX"
)


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """C is right for the sizes that torch is faster at, too."""
    for name in LIMITS:
        monkeypatch.setattr(cpu, name, 1)


def operands(
    tokens: int, keys: int, channels: int, batch: int = 2, heads: int = 3, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value in bfloat16; with a scale of 3 a few keys have nearly all of the weight."""
    sizes = (tokens, keys, keys)
    query, key, value = (torch.randn(batch, length, heads * channels).unflatten(2, (heads, -1)) for length in sizes)
    return (query * scale).bfloat16(), key.bfloat16(), value.bfloat16()


def by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bthc,bshc->bhts", query.double(), key.double()) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.einsum("bhts,bshc->bthc", scores.softmax(-1).nan_to_num(0), value.double())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
    """Within twice torch's error, on the whole and for the worst element."""
    wanted = exact(query, key, value, mask)
    found, torchs = ops.attention(query, key, value, mask), by_torch(query, key, value, mask)
    assert found.shape == wanted.shape
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    assert error(found, wanted) <= 2 * error(torchs, wanted)
    worst = (torchs.double() - wanted).abs().max() + 2**-9 * wanted.abs().max()
    assert (found.double() - wanted).abs().max() <= 2 * worst


@pytest.mark.parametrize("channels", HEADS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_head_size_is_as_near_as_torchs(channels: int, scale: float) -> None:
    check(*operands(77, 300, channels, scale=scale))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("keys", [1, 16, 33, 77, 256, 257, 1024])
def test_every_count_of_tokens_is_as_near_as_torchs(tokens: int, keys: int) -> None:
    check(*operands(tokens, keys, 40))


@needs_tiles
@pytest.mark.parametrize("channels", HEADS)
def test_the_c_code_serves_the_head_sizes_of_models(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fewest in LIMITS.items():
        monkeypatch.setattr(cpu, name, fewest)
    assert cpu.is_compiled(*operands(1024, 77, channels), None)
    assert cpu.is_compiled(*operands(192, 32, channels), None)
    assert not cpu.is_compiled(*operands(191, 191, channels), None)


MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "of the text": lambda _, keys: (torch.arange(keys) < keys - 20).view(1, 1, 1, keys).expand(2, 3, 1, keys),
    "of each sample": lambda _, keys: torch.rand(2, 1, 1, keys) < 0.5,
    "of each query": lambda tokens, keys: torch.rand(tokens, keys) < 0.5,
    "added": lambda tokens, keys: torch.randn(2, 3, tokens, keys).bfloat16() * 3,
    "added to the text": lambda _, keys: torch.where(torch.rand(2, 1, 1, keys) < 0.5, -10000.0, 0.0).bfloat16(),
    "of the causal kind": lambda tokens, keys: torch.full((tokens, keys), -torch.inf).triu(1).bfloat16(),
    "the first keys are hidden": lambda _, keys: (torch.arange(keys) >= min(270, keys - 1)).view(1, 1, 1, keys),
    "a column": lambda tokens, _: torch.randn(2, 1, tokens, 1).bfloat16(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("tokens", "keys"), [(70, 77), (97, 300)])
def test_masks_are_as_near_as_torchs(mask: str, tokens: int, keys: int) -> None:
    check(*operands(tokens, keys, 40), MASKS[mask](tokens, keys))


@pytest.mark.parametrize("hidden", ["bool", "-inf"])
def test_a_query_that_sees_no_key_gets_zeros(hidden: str) -> None:
    query, key, value = operands(100, 300, 40)
    seen = torch.ones(2, 1, 100, 300, dtype=torch.bool)
    seen[0, 0, 5] = False
    mask = seen if hidden == "bool" else torch.zeros(2, 1, 100, 300).masked_fill(~seen, -torch.inf).bfloat16()
    out = ops.attention(query, key, value, mask)
    assert not out[0, 5].any()
    assert not by_torch(query, key, value, mask)[0, 5].any()
    check(query, key, value, mask)


def test_the_lowest_number_hides_like_torchs() -> None:
    query, key, value = operands(100, 77, 40)
    mask = torch.zeros(2, 1, 1, 77).bfloat16()
    mask[0, ..., 3:] = torch.finfo(torch.bfloat16).min
    mask[1] = torch.finfo(torch.bfloat16).min  # all keys: all are alike
    out = ops.attention(query, key, value, mask)
    assert error(out[:1], exact(query[:1], key[:1, :3], value[:1, :3])) < 0.01
    assert error(out[1:], value[1:].double().mean(1, keepdim=True).expand_as(out[1:])) < 0.01


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_own_outputs_only(name: str, number: float) -> None:
    if name == "key" and number == torch.inf and not cpu.is_compiled(*operands(100, 300, 40), None):
        pytest.skip("torch's flash attention has finite numbers for an infinite key")
    given = dict(zip(("query", "key", "value"), operands(100, 300, 40), strict=True))
    given[name][1, 30, 2, 7] = number
    out, wanted = ops.attention(**given), reference(*given.values(), None)
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert torch.equal(out.isnan(), wanted.isnan())
    assert not out.isfinite().all()


@needs_tiles
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e15])
def test_large_scores_choose_one_key(scale: float) -> None:
    query, key, value = operands(100, 600, 40)
    out = ops.attention(query * scale, key * scale, value)
    chosen = torch.einsum("bthc,bshc->bhts", (query * scale).double(), (key * scale).double()).argmax(-1)
    wanted = torch.stack([torch.stack([value[b, chosen[b, h], h] for h in range(3)], 1) for b in range(2)])
    assert torch.equal(out, wanted)


def test_scores_that_grow_from_key_to_key_are_followed() -> None:
    query, key, value = operands(100, 1500, 40)
    ramp = torch.linspace(-60, 60, 1500).view(1, 1, 1, -1).bfloat16()
    check(query, key, value, ramp)
    check(query, key, value, ramp.flip(-1).contiguous())
    query[..., 0] = 40**0.5
    key[..., 0] = ramp.view(1, -1, 1)
    check(query, key, value)
    check(query, key.flip(1).contiguous(), value)


@needs_tiles
@pytest.mark.parametrize("largest", [2e4, 1e6, 3e8, 1e12, 1e20])
@pytest.mark.parametrize("place", [3, 31, 40, 70, 599])
def test_a_key_of_a_large_score_is_chosen_wherever_it_is(largest: float, place: int) -> None:
    query, key, value = operands(100, 600, 40)
    query[..., 0] = 1
    key[:, place, :, 0] = largest * 40**0.5
    assert torch.equal(ops.attention(query, key, value, None), value[:, place : place + 1].expand(-1, 100, -1, -1))


@needs_tiles
@pytest.mark.parametrize("score", [-1e12, 1e10, 1e14])
def test_large_scores_that_are_alike_weigh_alike(score: float) -> None:
    query, key, value = operands(100, 320, 40)
    query[..., 0] = 1
    key[..., 0] = score
    wanted = value.double().mean(1, keepdim=True).expand_as(query)
    assert error(ops.attention(query, key, value, None), wanted) < 0.01


@pytest.mark.parametrize("keys", [5, 20, 33, 77])
def test_keys_that_are_not_there_are_below_low_scores(keys: int) -> None:
    query, key, value = operands(100, keys, 40)
    query[..., 0] = 1
    key[..., 0] = -300 * 40**0.5
    check(query, key, value)


def test_keys_that_no_cache_holds_are_met_by_several_groups() -> None:
    check(*operands(300, 1600, 256, batch=1, heads=1))
    check(*operands(97, 1601, 256, batch=1, heads=2, scale=3.0))


@needs_tiles
def test_no_output_depends_on_the_batch_or_the_threads() -> None:
    query, key, value = operands(100, 300, 40, batch=3)
    mask = torch.randn(3, 1, 1, 300).bfloat16()
    together = ops.attention(query, key, value, mask)
    for i in range(3):
        own = slice(i, i + 1)
        assert torch.equal(ops.attention(query[own], key[own], value[own], mask[own]), together[own])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.attention(query, key, value, mask), together)
    finally:
        torch.set_num_threads(threads)


@needs_tiles
def test_strides_are_taken_as_they_are() -> None:
    query, key, value = operands(100, 77, 40)
    expected = ops.attention(query, key, value)
    joint = torch.cat([key.flatten(2), value.flatten(2)], dim=2)
    views = [x.unflatten(2, (3, -1)) for x in joint.split(120, dim=2)]
    heads_first = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.attention(heads_first, *views), expected)
    channels_first = query.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(ops.attention(channels_first, *views), expected)


@needs_tiles
def test_what_lies_around_the_operands_is_not_read() -> None:
    """The tail of a head's channels and of the tokens is padded with zeros, not with what comes next in memory."""
    query, key, value = operands(97, 77, 40)
    expected = ops.attention(query, key, value)
    inside = []
    for x in (query, key, value):
        around = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2], 48), torch.nan).bfloat16()
        around[:, 1:-1, :, 4:44] = x
        inside.append(around[:, 1:-1, :, 4:44])
    assert torch.equal(ops.attention(*inside), expected)


@needs_tiles
def test_torchs_products_are_right_after_it() -> None:
    """oneDNN keeps its own configuration of the tiles."""
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    expected = nn.functional.linear(x, weight)
    ops.attention(*operands(97, 77, 40))
    assert torch.equal(nn.functional.linear(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in operands(100, 77, 40))
    assert torch.equal(ops.attention(query, key, value), by_torch(query, key, value))


@pytest.mark.parametrize(("tokens", "keys", "batch"), [(0, 5, 2), (5, 5, 0)])
def test_nothing_gives_nothing(tokens: int, keys: int, batch: int) -> None:
    assert ops.attention(*operands(tokens, keys, 40, batch=batch)).shape == (batch, tokens, 3, 40)


def test_gradients_are_torchs() -> None:
    query, key, value = (x.requires_grad_() for x in operands(97, 77, 40))
    ops.attention(query, key, value).float().square().sum().backward()
    own = [x.grad for x in (query, key, value)]
    for x in (query, key, value):
        x.grad = None
    by_torch(query, key, value).float().square().sum().backward()
    for found, x in zip(own, (query, key, value), strict=True):
        assert found is not None
        torch.testing.assert_close(found, x.grad)


def test_the_definition_is_exact_attention() -> None:
    query, key, value = (x.float() for x in operands(97, 77, 40))
    for mask in (None, torch.rand(2, 1, 97, 77) < 0.5, torch.randn(97, 77)):
        wanted = exact(query, key, value, mask).float()
        torch.testing.assert_close(reference(query, key, value, mask), wanted, rtol=1e-5, atol=2e-6)


def test_the_fake_kernel_promises_what_there_is() -> None:
    given = operands(97, 77, 40)
    out = ops.attention(*given)
    with FakeTensorMode() as mode:
        promised = ops.attention(*(mode.from_tensor(x) for x in given))
    assert (promised.shape, promised.dtype, promised.stride()) == (out.shape, out.dtype, out.stride())


def test_the_benchmark_measures_the_op_beside_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    attention.main(["--shape", "1x64x33x2x40", "--rounds", "1"])
    attention.main(["--shape", "1x7x5x2x40", "--rounds", "1", "--all", "--threads", str(torch.get_num_threads())])
    assert "1x64 to 33, 2 heads of 40" in capsys.readouterr().out
    assert (cpu.FEWEST_QUERIES, cpu.FEWEST_KEYS) == (1, 1), "it leaves the limits as they were"


def test_a_compiled_function_calls_it_as_one_node() -> None:
    query, key, value = operands(97, 77, 40)
    own = torch.compile(lambda q, k, v: ops.attention(q * 2, k, v) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(own(query, key, value), ops.attention(query * 2, key, value) + 1)


@pytest.mark.parametrize("kind", [None, "bool", "float32", "bfloat16"])
def test_without_amx_bfloat16_is_attended_in_float32(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_tiles", lambda: False)
    query, key, value = operands(300, 77, 40)
    mask = None
    if kind is not None:
        mask = torch.rand(2, 1, 300, 77) > 0.3 if kind == "bool" else torch.randn(2, 1, 1, 77).to(getattr(torch, kind))
    check(query, key, value, mask)
    wide = None if mask is None or mask.dtype == torch.bool else mask.float()
    once = by_torch(query.float(), key.float(), value.float(), mask if wide is None else wide).bfloat16()
    assert torch.equal(ops.attention(query, key, value, mask), once)
