"""`rows.c` gives the bits of the torch code that serves where there is no C compiler."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import backend, blocks, compiled
from ldmq_kernels.kernels.cpu.quantize_per_sample import quantize_per_sample
from ldmq_kernels.kernels.cpu.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.cpu.quantize_static import quantize_static

DTYPES = [torch.float32, torch.bfloat16]
GRAIN = 64  # elements of a thread, so that small operands are shared between threads

pytestmark = pytest.mark.skipif(compiled.load()[0] is None, reason=f"no library: {compiled.load()[1]}")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(compiled, "GRAIN", GRAIN)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def by_torch(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "load", lambda: (None, "switched off"))
        return work()


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
    flat = x.view(-1)
    flat[:4] = torch.tensor([0.0, -0.0, 1e-40, 3e38])  # a denormal, and what a product takes to infinity
    return x.to(dtype)


def assert_same(ours: object, expected: object) -> None:
    for got, wanted in zip(ours, expected, strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 51), (29, 51)], ids=str)
def test_tokens(
    dtype: torch.dtype, smoothed: bool, shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = values(*shape[:1], max(4, shape[1]), dtype=dtype)
    x[-1] = 0
    smooth = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5 if smoothed else None
    assert_same(quantize_per_token(x, smooth), by_torch(monkeypatch, lambda: quantize_per_token(x, smooth)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 3, 3), (2, 51, 5, 7), (5, 51, 5, 7)], ids=str)
def test_samples_of_which_there_are_fewer_than_threads_or_more(
    dtype: torch.dtype, smoothed: bool, shape: tuple[int, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = values(*shape, dtype=dtype)
    smooth = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) + 0.5 if smoothed else None
    assert_same(quantize_per_sample(x, smooth), by_torch(monkeypatch, lambda: quantize_per_sample(x, smooth)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(2, 4), (29, 51), (2, 51, 5, 7)], ids=str)
def test_calibrated_scales(
    dtype: torch.dtype, per_channel: bool, shape: tuple[int, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = 1 if len(shape) == 4 else -1
    x = values(*shape, dtype=dtype)
    factors = torch.rand(shape[channel] if per_channel else 1, generator=torch.Generator().manual_seed(2)) * 20
    ours = quantize_static(x, factors, channel)
    assert (ours.min(), ours.max()) == (-127, 127)
    assert_same([ours], [by_torch(monkeypatch, lambda: quantize_static(x, factors, channel))])


@pytest.mark.parametrize("at", [(0, 0), (-1, -1)])
def test_a_calibrated_scale_refuses_nan_wherever_it_is(at: tuple[int, int], threads: int) -> None:
    x = values(29, 51)
    x[at] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        quantize_static(x, torch.ones(1), -1)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_measured_scale_shows_nan_and_infinity(wrong: float, threads: int) -> None:
    x = values(1, 51, 5, 7)
    x[0, 7, 3, 3] = wrong
    assert not quantize_per_sample(x, None)[1].isfinite().any()
    tokens = x.permute(0, 2, 3, 1).reshape(-1, 51)
    assert quantize_per_token(tokens, None)[1].isfinite().sum() == len(tokens) - 1


EVERY = {"column_scale", "bias", "sample_bias", "gate", "residual"}


@pytest.mark.parametrize("out_dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("given", [set(), {"bias"}, {"sample_bias", "residual"}, EVERY], ids=len)
@pytest.mark.parametrize("runs", [1, 3, 6 * 13])
def test_the_epilogue(
    out_dtype: torch.dtype, given: set[str], runs: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, (rows, columns) = torch.Generator().manual_seed(3), (6 * 13, 51)
    accumulator = torch.randn(rows, columns, generator=random) * 1000
    operands = {
        "scale": torch.rand(runs, generator=random),
        "column_scale": torch.rand(columns, generator=random),
        "bias": torch.randn(columns, generator=random).bfloat16(),
        "sample_bias": torch.randn(3, columns, generator=random).bfloat16(),
        "gate": torch.randn(2, columns, generator=random),
        "residual": torch.randn(rows, columns, generator=random).to(out_dtype),
    }
    operands = {name: operand if name in given | {"scale"} else None for name, operand in operands.items()}

    def finished() -> Tensor:
        copy = accumulator.clone()
        out = copy if out_dtype == torch.float32 else torch.full_like(copy, torch.nan, dtype=out_dtype)
        blocks.finish_rows(copy, compiled.Epilogue(**operands), out)  # type: ignore[arg-type]
        return out

    assert_same([finished()], [by_torch(monkeypatch, finished)])


def test_the_epilogue_of_wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(4)
    accumulator, residual = (torch.randn(3, 2500, generator=random) for _ in range(2))
    columns = [torch.rand(2500, generator=random) for _ in range(2)]
    per_sample = torch.rand(3, 2500, generator=random)

    def finished() -> Tensor:
        out = torch.full_like(accumulator, torch.nan, dtype=torch.bfloat16)
        scale = torch.tensor([0.1, 0.2, 0.3])
        epilogue = compiled.Epilogue(scale, *columns, per_sample, residual, per_sample + 1)
        blocks.finish_rows(accumulator.clone(), epilogue, out)
        return out

    assert_same([finished()], [by_torch(monkeypatch, finished)])


@pytest.mark.parametrize("by", ["C", "torch"])
def test_runs_that_do_not_divide_the_rows_are_refused(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "torch":
        monkeypatch.setattr(compiled, "load", lambda: (None, "switched off"))
    accumulator = torch.zeros(6, 5)
    with pytest.raises(Unsupported, match="gate has 4 rows, which do not divide the 6 of the output"):
        blocks.finish_rows(accumulator, compiled.Epilogue(torch.ones(1), gate=torch.ones(4, 5)), accumulator)


def test_one_smoothing_factor_is_that_of_all_channels() -> None:
    x = values(3, 8)
    assert_same(quantize_per_token(x, torch.tensor([0.5])), quantize_per_token(x, torch.full((8,), 0.5)))


def test_factors_of_another_dtype_are_converted() -> None:
    x, smooth, scale = values(3, 8), torch.full((8,), 0.5), torch.full((8,), 4.0)
    assert_same(quantize_per_token(x, smooth.bfloat16()), quantize_per_token(x, smooth))
    assert_same([quantize_static(x, scale.bfloat16(), -1)], [quantize_static(x, scale, -1)])
    outs = [torch.empty(3, 8) for _ in range(2)]
    for out, row_scale in zip(outs, (torch.tensor([0.5]), torch.tensor([0.5]).bfloat16()), strict=True):
        blocks.finish_rows(x.clone(), compiled.Epilogue(row_scale), out)
    assert_same(outs[:1], outs[1:])


def test_what_was_compiled_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled.compile_library(tmp_path)
    written = first.stat().st_mtime_ns
    assert compiled.compile_library(tmp_path) == first
    assert first.stat().st_mtime_ns == written
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DOTHER"))
    assert compiled.compile_library(tmp_path) != first
    assert {path.suffix for path in tmp_path.iterdir()} == {".so"}, "nothing else is left there"


@pytest.mark.parametrize(
    ("compiler", "told"), [("no-such-cc", "no C compiler (no-such-cc)"), ("false --option", "false --option -O3")]
)
def test_without_a_library_torch_serves_and_doctor_says_why(
    compiler: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("CC", compiler)
        patch.setenv("LDMQ_CACHE", str(tmp_path))
        compiled.load.cache_clear()
        try:
            assert told in compiled.load()[1]
            assert told in backend.remark(torch.device("cpu"))
            q, _ = quantize_per_token(torch.tensor([[1.0, -2.0]]), None)
            assert q.tolist() == [[64, -127]]
            assert not list(tmp_path.iterdir())
        finally:
            compiled.load.cache_clear()
    assert "C compiler" not in backend.remark(torch.device("cpu"))


@pytest.mark.skipif(not compiled.has_tiles(), reason="this processor has no AMX")
def test_a_compiler_that_does_not_know_amx_compiles_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old-cc"
    old.write_text('#!/bin/sh\ncase "$*" in *-mamx*) echo "unknown option" >&2; exit 1;; esac\nexec cc "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CC", str(old))
    assert compiled.compile_library(tmp_path / "kept").exists()
