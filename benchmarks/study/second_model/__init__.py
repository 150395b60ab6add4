"""A second model for the study, of another kind than the demo's: a diffusion transformer trained by flow matching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WEIGHTS = Path(__file__).parent / "weights"
STEPS, GUIDANCE = 20, 3.0
ENLARGED = 2  # pixels a side for one of the demo's


def load_pipeline(dtype: torch.dtype, folder: Path = WEIGHTS) -> Any:
    """The trained pipeline, on the CPU; its weights are stored in float16.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    from diffusers import SD3Transformer2DModel

    from benchmarks.study.second_model.models import build_pipeline

    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"the second model's weights are not in {folder}: take them from the repository, or train them with "
            "`python -m benchmarks.study.second_model.train --work build/second_model`"
        )
    transformer = SD3Transformer2DModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return build_pipeline(transformer)
