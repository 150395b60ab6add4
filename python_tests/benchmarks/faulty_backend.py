"""A backend whose kernels hang, end their process, are wrong or missing, written into a copy of the package."""

from __future__ import annotations

from pathlib import Path

BACKEND = """
from ldmq_kernels.kernels.backend import Backend, register


class _Faulty(Backend):
    name = "faulty"

    def serves(self, device):
        return True


backend = register(_Faulty())
"""
REFERENCE = "from ldmq_kernels.kernels.reference.{op} import {op} as right\n"
OPS = {  # op: what its module does, and how its cases end
    "linear_w8a8": ("import time\ndef linear_w8a8(*_):\n    time.sleep(600)\n", "hung"),
    "conv2d_w8a8": ("import os\ndef conv2d_w8a8(*_):\n    os.kill(os.getpid(), 11)\n", "failed"),
    "geglu_quantize": ("def geglu_quantize(*_):\n    raise RuntimeError('CUDA error: illegal access')\n", "failed"),
    "quantize_static": (REFERENCE + "def quantize_static(*given):\n    return -right(*given)\n", "wrong"),
    "gelu_quantize": ("import a_library_that_is_not_there\n", "missing"),
    "silu_quantize": (
        "from ldmq_kernels.kernels.backend import Unsupported\n"
        "def silu_quantize(*_):\n    raise Unsupported('no such size')\n",
        "refused",
    ),
    "quantize_per_token": (REFERENCE + "quantize_per_token = right\n", "ok"),
}


def put_into(package: Path) -> None:
    """Write the backend into a copy of the package's folder."""
    folder = package / "kernels" / "faulty"
    folder.mkdir()
    (folder / "__init__.py").write_text(BACKEND)
    for op, (source, _) in OPS.items():
        (folder / f"{op}.py").write_text(source.format(op=op))
