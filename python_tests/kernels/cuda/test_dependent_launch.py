"""A kernel that is launched before the one in front of it has ended touches no memory until that has ended.

In the emulator the memory of a call holds rubbish until the kernel waits, and what is written there before is lost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.cuda import extension, tiles
from ldmq_kernels.kernels.dependent_launch import dependent_launches
from ldmq_kernels.kernels.reference import backend as reference
from python_tests.kernels.cuda.emulation import emulate
from python_tests.kernels.cuda.test_random_order import PRODUCTS
from python_tests.kernels.operands import exact_conv2d, random_int8

DEPENDENCY_WAIT = 64  # of emulator::Fault
Outputs = tuple[Tensor, ...]


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The emulated backend with early launches, where all memory that a kernel is given is the kernel before's."""
    binding = emulate(monkeypatch)
    address_of = Tensor.data_ptr

    def watched(tensor: Tensor) -> int:
        address = address_of(tensor)
        if size := tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size():
            binding.watch(ctypes.c_void_p(address), ctypes.c_uint64(size))
        return address

    monkeypatch.setattr(Tensor, "data_ptr", watched)
    binding.set_eager(1)
    with dependent_launches(True):
        yield binding
    binding.set_eager(0)
    binding.set_fault(0)
    binding.forget_watched()


def counted(binding: ModuleType, call: Callable[[], Outputs]) -> tuple[Outputs, int, int]:
    """What a call gives, how many of its kernels were launched early, and how many let the next one begin."""
    early, triggered = binding.early_launches(), binding.triggered()
    binding.forget_watched()
    found = call()
    binding.forget_watched()
    return found, binding.early_launches() - early, binding.triggered() - triggered


def outputs(found: Tensor | Outputs) -> Outputs:
    """What an op gives, without the scale where that is calibrated."""
    return tuple(out for out in (found if isinstance(found, tuple) else (found,)) if out.numel())


def producer(op: str, *arguments: object) -> tuple[Callable[[], Outputs], Outputs]:
    """A call of an op, and what its definition gives."""
    return lambda: outputs(getattr(cuda, op)(*arguments)), outputs(getattr(reference, op)(*arguments))


def product(kind: str) -> tuple[Callable[[], Outputs], Outputs]:
    call, exact = PRODUCTS[kind]()
    return lambda: (call().nan_to_num(nan=0.5).double(),), (exact.double(),)


def split() -> tuple[Callable[[], Outputs], Outputs]:
    """A convolution whose partial sums a second kernel adds."""
    (tile, *_) = [t for t in tiles.candidates("conv2d_w8a8", 64, 64, 64, torch.device("cpu")) if t.family == 80]
    x, weight = random_int8(1, 32, 4, 4).contiguous(memory_format=torch.channels_last), random_int8(24, 3, 3, 32)
    geometry = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)

    def call() -> Outputs:
        with tiles.forced(tile._replace(split_k=3)):
            out = cuda.conv2d_w8a8(x, torch.ones(1), weight, torch.ones(24), None, None, None, *geometry, torch.float32)
        return (out.nan_to_num(nan=0.5).double(),)

    return call, (exact_conv2d(x, weight, geometry).double(),)


X = torch.randn(5, 64)
PIXELS = torch.randn(2, 32, 3, 3).contiguous(memory_format=torch.channels_last)
# how a call is made, and how many of its kernels are launched early and let the next one begin
CALLS: dict[str, tuple[Callable[[], tuple[Callable[[], Outputs], Outputs]], int, int]] = {
    "quantize_static": (lambda: producer("quantize_static", X, torch.rand(64) + 9, 1), 1, 1),
    "quantize_per_token": (lambda: producer("quantize_per_token", X, torch.rand(64)), 1, 1),
    "quantize_per_sample, after a memset": (lambda: producer("quantize_per_sample", PIXELS, torch.rand(32)), 1, 2),
    "geglu_quantize, static": (lambda: producer("geglu_quantize", X, torch.rand(32) + 9, None), 1, 1),
    "gelu_quantize, by token": (lambda: producer("gelu_quantize", X, True, None, torch.rand(64)), 1, 1),
    "wgmma": (lambda: product("in turns"), 1, 1),
    "wgmma, cluster": (lambda: product("cooperative, cluster"), 1, 1),
    "wgmma, int4": (lambda: product("int4"), 1, 1),
    "im2col": (lambda: product("im2col"), 1, 1),
    "mma.sync": (lambda: product("mma.sync"), 1, 1),
    "mma.sync, int4": (lambda: product("int4, mma.sync"), 1, 1),
    "split-K": (split, 2, 2),
}


def are_close(found: Outputs, wanted: Outputs) -> bool:
    """To the last rounding: of GELU, one step of int8."""
    pairs = zip(found, wanted, strict=True)
    return all((one.double() - w.double()).abs().max() <= (1 if w.dtype == torch.int8 else 1e-5) for one, w in pairs)


@pytest.mark.parametrize("name", CALLS)
def test_no_memory_is_touched_before_the_kernel_in_front_has_ended(name: str, watching: ModuleType) -> None:
    """Without the wait, inputs are read and outputs are lost."""
    make, early, triggered = CALLS[name]
    call, wanted = make()
    found, *counts = counted(watching, call)
    assert are_close(found, wanted)
    assert counts == [early, triggered]
    watching.set_fault(DEPENDENCY_WAIT)
    try:
        found, *_ = counted(watching, call)
        assert not are_close(found, wanted)
    except RuntimeError:
        pass  # a product of rubbish that does not end


def test_a_cooperative_norm_is_never_launched_early(watching: ModuleType) -> None:
    arguments = (PIXELS, torch.randn(32), torch.randn(32), 4, 1e-5, True, None, torch.rand(32) + 0.5, False)
    found, early, _ = counted(watching, lambda: cuda.group_norm_silu_quantize(*arguments))
    assert early == 0
    assert are_close(found, reference.group_norm_silu_quantize(*arguments))


@pytest.mark.parametrize("why", ["it is off", "its code was made of PTX of sm_80"])
def test_nothing_is_launched_early_where(why: str, watching: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call, wanted = producer("quantize_per_token", X, torch.rand(64))
    if why.startswith("its code"):
        monkeypatch.setattr(extension, "target", lambda _: {"device": 0, "stream": 0})
    with dependent_launches(why != "it is off"):
        found, early, _ = counted(watching, call)
    assert early == 0
    assert are_close(found, wanted)
