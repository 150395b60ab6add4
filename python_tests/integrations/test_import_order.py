"""The quantizer is known to diffusers whichever of the two is imported first."""

from __future__ import annotations

import pytest

from python_tests.processes import run_each_anew

CHECK = "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'ldmq' in known"
ORDERS = (
    "import ldmq_kernels, diffusers",
    "import diffusers, ldmq_kernels",
    "import diffusers.quantizers.auto, ldmq_kernels",
    "import ldmq_kernels.integrations.diffusers",
    "from ldmq_kernels.integrations.diffusers.fused import fuse",
    "import diffusers, ldmq_kernels.integrations.diffusers",
)


@pytest.mark.slow
def test_registered_in_every_order_of_imports() -> None:
    run_each_anew([f"{order}; {CHECK}" for order in ORDERS])
