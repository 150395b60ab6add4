"""From a file to a model patcher, by ComfyUI's own `load_diffusion_model_state_dict` with operations of this pack."""

from typing import Any

import comfy.sd
import comfy.utils
import torch

from ldmq_kernels.integrations.comfyui.reading import settings_of, shapes_of

from .layers import LdmqOps, adopt, follow_timesteps


def load(path: str) -> Any:
    """A model patcher.

    Raises:
        ValueError: the file is not one of `ldmq export --comfyui --own-layers`, or ComfyUI does not know its model.
    """
    tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    settings = settings_of(metadata, path)
    dtype = next(t.dtype for name, t in tensors.items() if name.endswith("out.0.weight"))
    # ComfyUI finds out what model this is by the shapes of weights
    tensors |= {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes_of(tensors).items()}
    options = {"custom_operations": LdmqOps, "dtype": dtype}
    patcher = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options)
    if patcher is None:
        raise ValueError(f"{path} holds a model that ComfyUI does not know")
    adopt(patcher.model.diffusion_model)
    follow_timesteps(patcher.model.diffusion_model, settings["timestep_groups"])
    return patcher
