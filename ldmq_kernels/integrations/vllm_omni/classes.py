"""Which pipelines of diffusers this package serves in vLLM-Omni, by its own classes."""

CLASSES = {"StableDiffusionPipeline": "LdmqPipeline", "StableDiffusionXLPipeline": "LdmqXLPipeline"}
