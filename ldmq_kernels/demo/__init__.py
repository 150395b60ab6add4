"""A small trained text-to-image latent diffusion model, which ships with the package.

Pictures of coloured shapes, 64x64 pixels: "a small red circle above a large blue square on a grey
background". Its parts are those of Stable Diffusion; `train.py` made the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ldmq_kernels.demo.evaluator import Evaluator

WEIGHTS = Path(__file__).parent / "weights"


def check_weights(folder: Path) -> None:
    """Raise FileNotFoundError where the demo model is not in a folder."""
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"the demo model's weights are not in {folder}: install the package with its data files, or train them "
            "with `python -m ldmq_kernels.demo.train`"
        )


def load_demo_pipeline(dtype: torch.dtype, folder: Path = WEIGHTS) -> Any:
    """The trained StableDiffusionPipeline, on the CPU; its weights are stored in float16.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    from diffusers import StableDiffusionPipeline

    check_weights(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_evaluator(folder: Path = WEIGHTS) -> Evaluator:
    """The classifier of attributes that scores pictures, in float32 on the CPU.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    from ldmq_kernels.demo.evaluator import Evaluator

    check_weights(folder)
    return Evaluator.from_pretrained(folder / "evaluator")
