"""The loader, for ComfyUI's menu."""

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .loading import load


class LdmqLoader(io.ComfyNode):
    """Load a file that `ldmq export --comfyui --own-layers` wrote."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """A choice among the files in models/diffusion_models, and a model."""
        return io.Schema(
            node_id="LdmqDiffusionModelLoader",
            display_name="Load LDMQ Diffusion Model",
            category="advanced/loaders",
            inputs=[io.Combo.Input("unet_name", options=folder_paths.get_filename_list("diffusion_models"))],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        """Load the file of that name."""
        return io.NodeOutput(load(folder_paths.get_full_path_or_raise("diffusion_models", unet_name)))


class LdmqExtension(ComfyExtension):
    """All nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The loader alone."""
        return [LdmqLoader]
