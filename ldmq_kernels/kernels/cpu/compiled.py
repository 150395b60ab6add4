"""The C files of this folder, compiled once on a machine that has a C compiler; without one, torch does the same.

`rows.c` is elementwise work in one pass, called from here, `rotate.c` from `rotated`; norms and activation functions
are called from `compiled_producers`; `products.c` multiplies where there is AMX, or no VNNI, and is called from
`products`; `attention.c` is for AMX, too, and called from `attention`. The library lies beside this user's
measurements, under a name that changes with its source, the compiler and the vectors of the processor. Its calls take
torch's threads, from the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from ldmq_kernels.files import shortened
from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.gpu import cache_folder
from ldmq_kernels.kernels.reference.quantize_static import nan_error

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# no contraction: a product is rounded before the sum, as torch has it
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
VECTORS = {  # by torch's name of what it uses itself
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}
TILES = ("-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
OPENMP = "GOMP_parallel"
OPERANDS = {  # of calls, in the order of their structs in C: eight bytes each, integers and addresses but for epsilons
    "ldmq_quantize_measured": Struct("9q"),
    "ldmq_quantize_calibrated": Struct("7q"),
    "ldmq_rotate": Struct("7q"),
    "ldmq_activate_quantize": Struct("9q"),
    "ldmq_layer_norm_quantize": Struct("7qd8q"),
    "ldmq_group_norm_quantize": Struct("9qd6q"),
    "ldmq_finish": Struct("16q"),
    "ldmq_multiply": Struct("34q"),
    "ldmq_split": Struct("5q"),
}
HAS_NAN, NO_MEMORY = 1, 2  # as producers.h has them, which tells of both at once by their sum
SECONDS = 60
GRAIN = 32768  # elements of a call for one thread, as torch has it
DTYPES = (torch.float32, torch.bfloat16)
ONE = torch.ones(1, dtype=torch.float32, device="cpu")  # of float32 whatever a process has as its default: C reads it


class NoLibraryError(Exception):
    """The library cannot be had on this machine; the text says why."""


def compiler() -> list[str]:
    """The C compiler of this machine: $CC, or cc, gcc or clang.

    Raises:
        NoLibraryError: there is none.
    """
    asked = shlex.split(os.environ.get("CC", ""))
    for names in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(names[0]):
            return names
    raise NoLibraryError(f"there is no C compiler ({os.environ.get('CC') or 'cc, gcc or clang'})")


@functools.cache
def has_tiles() -> bool:
    """Whether this process may use AMX: the processor has it, the system allows it, and torch uses AVX-512."""
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return is_wide and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def processors() -> list[tuple[str, ...]]:
    """The compiler's flags for what this processor has, the best first: a compiler may be too old for these."""
    plain = VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    return [(*plain, *TILES), plain] if has_tiles() else [plain]


def compile_library(folder: Path) -> Path:
    """Compile the C files into a folder, whole or not at all, unless they were compiled there before.

    Raises:
        NoLibraryError: there is no compiler, it fails, or the folder cannot be written.
    """
    command = [*compiler(), *FLAGS]
    *better, plain = processors()
    for flags in better:
        try:
            return _compiled_by([*command, *flags], folder)
        except NoLibraryError:
            continue
    return _compiled_by([*command, *plain], folder)


def _compiled_by(command: list[str], folder: Path) -> Path:
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, timeout=SECONDS).stdout
        read = [path.read_bytes() for path in (*SOURCES, *HEADERS)]
        known = hashlib.sha256(b"\0".join([*read, version, *map(str.encode, command)])).hexdigest()[:16]
        library = folder / f"cpu-{known}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="cpu-") as scratch:
                made = Path(scratch) / library.name
                whole = [*command, *map(str, SOURCES), "-o", str(made), "-lm"]
                done = subprocess.run(whole, capture_output=True, text=True, timeout=SECONDS)
                if done.returncode:
                    raise NoLibraryError(f"{shlex.join(command)} fails: {shortened(done.stderr.strip())}")
                made.replace(library)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoLibraryError(shortened(str(error))) from None
    return library


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why this machine has none; asked once in a process."""
    try:
        library = ctypes.CDLL(str(compile_library(cache_folder())))
    except (NoLibraryError, OSError) as error:
        return None, str(error)
    process = ctypes.CDLL(None)
    if hasattr(process, OPENMP):
        library.ldmq_use_openmp(ctypes.cast(getattr(process, OPENMP), ctypes.c_void_p))
    pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    for name in OPERANDS:
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_char_p, size], ctypes.c_int
    if hasattr(library, "ldmq_attention"):  # compiled where there is AMX
        library.ldmq_attention_room.argtypes, library.ldmq_attention_room.restype = [size] * 4, size
        strided, sizes = (pointer, size, size, size), (size,) * 5
        library.ldmq_attention.argtypes = [*strided * 3, *sizes, *strided, real, pointer, pointer, size]
        library.ldmq_attention.restype = None
    return library, ""


def call(name: str, threads: int, *operands: float) -> int:
    """Call a function of the library; safe in any thread.

    Args:
        name: one of `OPERANDS`.
        threads: how many share the call.
        operands: what it takes, in the order of its struct in C: numbers, flags and addresses of tensors that live
            longer than the call, 0 where there is no operand.

    Returns:
        A status of producers.h.
    """
    library, _ = load()
    return getattr(library, name)(OPERANDS[name].pack(*operands), threads)


def takes(*values: Tensor | None) -> bool:
    """Whether the library is there and knows the dtypes of all floating operands, of which there may be none."""
    for value in values:
        if value is not None and value.dtype not in DTYPES:
            return False
    return load()[0] is not None


def threads(values: Tensor) -> int:
    """How many threads share a call on these values."""
    return max(1, min(torch.get_num_threads(), values.numel() // GRAIN))


def address(values: Tensor | None) -> int:
    """Where an operand lies, for C, 0 where there is none; the tensor has to live until the call is over."""
    return 0 if values is None else values.data_ptr()


def in_float32(values: Tensor) -> Tensor:
    """An operand as float32, contiguous."""
    if values.dtype == torch.float32 and values.is_contiguous():
        return values
    return values.float().contiguous()


def quantize_measured(x: Tensor, channels: int, inv_smooth: Tensor | None, q: Tensor, scale: Tensor) -> None:
    """Write scale = max(absmax(y), 1e-12) / 127 of y = x * inv_smooth for each group of rows, and y in int8 by it.

    Args:
        x: float32 or bfloat16, in memory (groups, rows, channels).
        channels: of a row.
        inv_smooth: (channels,) or (1,) floating, or None.
        q: int8, in memory as x: is written.
        scale: float32, contiguous, one for each group: is written.
    """
    parts, groups = threads(x), scale.numel()
    largest = x.new_empty(groups * parts, dtype=torch.int32) if groups < parts else None
    factors = None if inv_smooth is None else in_float32(inv_smooth.expand(channels))
    call(
        "ldmq_quantize_measured",
        parts,
        *(x.data_ptr(), x.dtype == torch.bfloat16, groups, x.numel() // (groups * channels), channels),
        *(address(factors), q.data_ptr(), scale.data_ptr(), address(largest)),
    )


def quantize_calibrated(x: Tensor, channels: int, factors: Tensor, q: Tensor) -> None:
    """Write q = clamp(rint(x * factors), -127, 127).

    Args:
        x: float32 or bfloat16, in memory (rows, channels).
        channels: of a row.
        factors: (1,) or (channels,) floating.
        q: int8, in memory as x: is written.

    Raises:
        ValueError: there is NaN, which int8 lacks.
    """
    factors = in_float32(factors)
    if call(
        "ldmq_quantize_calibrated",
        threads(x),
        *(x.data_ptr(), x.dtype == torch.bfloat16, x.numel() // channels, channels),
        *(factors.data_ptr(), factors.numel(), q.data_ptr()),
    ):
        raise nan_error()


class Epilogue(NamedTuple):
    """out = (sum * scale * column_scale + bias + sample_bias) * gate + residual, in this order, rounded once.

    What has G rows has one for each of G equal runs of the output's (M, N). M and G may be several axes.

    Attributes:
        scale: (G,) float32.
        column_scale: (N,) float32.
        bias: (N,) floating.
        sample_bias: (G, N) floating.
        residual: floating, in memory (M, N): a picture's channels are last there.
        gate: (G, N) floating.
    """

    scale: Tensor
    column_scale: Tensor | None = None
    bias: Tensor | None = None
    sample_bias: Tensor | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None

    def fitted(self, rows: int, columns: int) -> Epilogue:
        """The same with small operands in float32, the bias maybe in bfloat16, row after row, that fit (rows, columns).

        C reads them unseen, and torch would broadcast some.

        Raises:
            Unsupported: one does not fit.
        """
        scale, column_scale, bias, sample_bias, residual, gate = self
        if column_scale is not None:
            column_scale = _of_columns("column_scale", column_scale, 1, columns)
        if bias is not None:
            bias = bias if _is_taken(bias, columns) else _of_columns("bias", bias, 1, columns)
        if sample_bias is not None:
            sample_bias = _of_columns("sample_bias", sample_bias, rows, columns)
        if gate is not None:
            gate = _of_columns("gate", gate, rows, columns)
        if residual is not None and residual.numel() != rows * columns:
            raise Unsupported(f"residual has {residual.numel()} elements, the output {rows * columns}")
        scale = _of_runs("scale", scale, scale.numel(), rows)
        return Epilogue(scale, column_scale, bias, sample_bias, residual, gate)

    def as_rows(self, rows: int, columns: int) -> Epilogue:
        """The same as torch takes them: scales (G, 1), and each other operand of runs or rows with two axes."""
        scale, column_scale, bias, sample_bias, residual, gate = self
        return Epilogue(
            scale.reshape(-1, 1),
            column_scale,
            bias,
            None if sample_bias is None else sample_bias.reshape(-1, columns),
            None if residual is None else residual.as_strided((rows, columns), (columns, 1)),
            None if gate is None else gate.reshape(-1, columns),
        )

    def operands(self, out: Tensor, columns: int) -> tuple[int, ...]:
        """What C takes, addresses among it: of an epilogue that is `fitted`, and lives longer than the call."""
        scale, column_scale, bias, sample_bias, residual, gate = self
        return (
            scale.data_ptr(),
            scale.numel(),
            0 if column_scale is None else column_scale.data_ptr(),
            *((0, 0) if bias is None else (bias.data_ptr(), bias.dtype == torch.bfloat16)),
            *((0, 0) if sample_bias is None else (sample_bias.data_ptr(), sample_bias.numel() // columns)),
            *((0, 0) if gate is None else (gate.data_ptr(), gate.numel() // columns)),
            *((0, 0) if residual is None else (residual.data_ptr(), residual.dtype == torch.bfloat16)),
            out.data_ptr(),
            out.dtype == torch.bfloat16,
        )


def _of_columns(name: str, operand: Tensor, rows: int, columns: int) -> Tensor:
    if operand.shape[-1] != columns:
        raise Unsupported(f"{name} has {operand.shape[-1]} columns, the output {columns}")
    return _of_runs(name, operand, operand.numel() // columns, rows)


def _is_taken(bias: Tensor, columns: int) -> bool:
    return bias.dtype in DTYPES and bias.shape == (columns,) and bias.is_contiguous()


def _of_runs(name: str, operand: Tensor, runs: int, rows: int) -> Tensor:
    if not runs or rows % runs:
        raise Unsupported(f"{name} has {runs} rows, which do not divide the {rows} of the output")
    return in_float32(operand)


def finish(accumulator: Tensor, epilogue: Epilogue, out: Tensor) -> None:
    """Write a `fitted` epilogue of (M, N) float32, contiguous, into (M, N) float32 or bfloat16, contiguous."""
    rows, columns = accumulator.shape
    operands = epilogue.operands(out, columns)
    call("ldmq_finish", threads(accumulator), accumulator.data_ptr(), rows, columns, *operands)
