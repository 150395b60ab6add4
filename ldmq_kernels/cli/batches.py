"""Whether a picture is the same alone and in a batch on this machine, with the backends that serve it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

SCHEMES = ("w8a8-dynamic", "w8a16")
STEPS, GUIDANCE, BATCH = 1, 4.0, 3


def check_batches(device: torch.device) -> tuple[bool, str]:
    """Draw with the demo model alone and in a batch of three.

    Returns:
        Whether the pictures are equal to the bit, and a line that says so; true with a reason where it is not checked.
    """
    if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("transformers") is None:
        return True, "batches are not checked: pip install 'ldmq_kernels[diffusers]'"
    from ldmq_kernels.conversion import quantize
    from ldmq_kernels.demo import load_demo_pipeline
    from ldmq_kernels.integrations.diffusers.batch_invariance import batch_invariant, find_variance

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    for scheme in SCHEMES:
        pipe = quantize(load_demo_pipeline(dtype), scheme=scheme).to(device)

        def draw(seeds: Sequence[int], pipe: object = pipe) -> torch.Tensor:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            prompts = ["a small red circle"] * len(seeds)
            settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
            with batch_invariant(pipe, len(seeds)):
                return pipe(prompts, generator=generators, **settings).images  # type: ignore[operator]

        found = find_variance(draw, (BATCH,))
        if found is not None:
            line = f"a picture in {scheme} differs in a batch of {found.pictures} on {device} by {found.largest:g}"
            return False, f"{line}: serve with --max-batch 1"
    return True, f"alone and in a batch of {BATCH}: pictures are equal to the bit"
