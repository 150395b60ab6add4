"""One small call of every op on every backend of this GPU, for a tool that watches the kernels; the names it ran.

With --tiles, the CUDA backend's tiles alone: a tool slows down what Triton compiles by more than there is time for.
"""

from __future__ import annotations

import sys

import torch

from ldmq_kernels import ops
from ldmq_kernels.cli.checks import SHAPES
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.cuda import extension, tiles
from ldmq_kernels.ops.operands import example


def main() -> None:
    """Run the calls, those of products on every tile of the CUDA backend."""
    device = torch.device("cuda", torch.cuda.current_device())
    for backend in () if "--tiles" in sys.argv else ("triton", "cuda"):
        for op in ops.specs():
            for shape in SHAPES:
                try:
                    with dispatch.use_backend(backend):
                        getattr(ops, op)(*example(op, shape, device, torch.float16))
                except RuntimeError as refusal:
                    if "no backend takes this call" not in str(refusal):
                        raise
                    continue
                print(op, backend)
    if extension.load() is not None:
        run_tiles(device)
    torch.cuda.synchronize()


def run_tiles(device: torch.device) -> None:
    """A product of more than one tile on every tile that this GPU runs, convolutions also with their K in two parts."""
    rows, columns, depth = 300, 328, 160
    x = torch.randint(-127, 128, (rows, depth), dtype=torch.int8, device=device)
    weight = torch.randint(-127, 128, (columns, depth), dtype=torch.int8, device=device)
    packed = torch.randint(0, 256, (columns, depth // 2), dtype=torch.uint8, device=device)
    multiplier = torch.ones(columns, 3, dtype=torch.uint8, device=device)
    picture = x[:256].view(1, 16, 16, depth).permute(0, 3, 1, 2)
    one, scale = torch.ones(1, device=device), torch.ones(columns, device=device)
    square = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1, torch.float16)
    x_fp8, weight_fp8 = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    picture_fp8 = picture.to(torch.float8_e4m3fn)
    calls = {
        "linear_w8a8": (x, one, weight, scale, None, None, torch.float16),
        "linear_w4a8": (x, one, packed, multiplier, scale, None, None, torch.float16),
        "linear_geglu_w8a8": (x, one, weight[:304], scale[:304], None, one, torch.int8),
        "linear_geglu_fp8": (x_fp8, one, weight_fp8[:304], scale[:304], None, None, torch.float16),
        "conv2d_w8a8": (picture, one, weight.view(columns, 1, 1, depth), scale, None, None, None, *square),
        "linear_fp8": (x_fp8, one, weight_fp8, scale, None, None, torch.float16),
        "conv2d_fp8": (picture_fp8, one, weight_fp8.view(columns, 1, 1, depth), scale, None, None, None, *square),
    }
    with dispatch.use_backend("cuda"):
        for op, arguments in calls.items():
            splits = (1, 2) if op.startswith("conv2d") else (1,)
            for tile in tiles.candidates(op, rows, columns, depth, device):
                for split_k in splits:
                    with tiles.forced(split := tile._replace(split_k=split_k)):
                        getattr(ops, op)(*arguments)
                    print(op, split.name)


if __name__ == "__main__":
    main()
