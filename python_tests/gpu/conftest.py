"""What is here needs a CUDA device that the Triton backend serves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ldmq_kernels.kernels.triton import backend as triton_backend


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """The current GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if not triton_backend.serves(device):
        pytest.skip(f"the Triton backend does not serve {torch.cuda.get_device_name(device)}")
    return device


@pytest.fixture
def without_cudnn() -> Iterator[None]:
    """Float convolutions as plain matrix products: cuDNN may choose TF32 or a transform."""
    with torch.backends.cudnn.flags(enabled=False):
        yield
