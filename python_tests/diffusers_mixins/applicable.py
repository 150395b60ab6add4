"""Which of diffusers' tests say nothing of a quantized model, and why."""

from __future__ import annotations

from fnmatch import fnmatchcase

NOT_APPLICABLE = {
    "test_from_save_pretrained_dtype*": "loads without low_cpu_mem_usage, which diffusers refuses of quantized models",
    "test_keep_in_fp32_modules*": "looks for parameters, where scales are float32 in every dtype",
    "test_to_keep_in_fp32_modules_warns": "looks for parameters, where scales are float32 in every dtype",
    "test_training*": "trains the weights, which are integers; LoRA trains, see test_quantization_training",
    "test_mixed_precision_training": "trains the weights, which are integers",
    "test_gradient_checkpointing_equivalence": "compares the gradients of weights, which are integers",
    "test_layerwise_casting*": "layerwise casting is refused: it would cost noise for next to no bytes",
    "test_lora_layerwise_casting*": "layerwise casting is refused: it would cost noise for next to no bytes",
    "test_group_offloading_with_layerwise_casting*": "layerwise casting is refused: it would cost noise for no bytes",
    "test_fuse_unfuse_qkv_projections": "wants the same bits; fused projections are float ones of the same weights",
    "test_custom_diffusion*": "makes float layers of the tensors of state_dict, which is refused: they are integers",
    "test_from_unet2d": "gives float weights to quantized layers, which is refused: load before quantizing",
    "test_loading_motion_adapter": "gives float weights to quantized layers, which is refused: load before quantizing",
    "test_saving_motion_modules": "takes float layers out of a model, whose tensors are integers",
    "test_effective_gradient_checkpointing": "compares the gradients of weights, which are integers",
    "test_single_file*": "takes models from the hub",
    "*_from_hub*": "takes models from the hub",
    "test_from_pretrained_hub": "takes models from the hub",
    "test_output_pretrained": "takes models from the hub",
    "test_model_parallelism*": "needs several devices",
    "TestAutoencoderKLWanLdmq::test_quantized_layers": "counts linears, and this model has convolutions alone",
    "TestUNetSpatioTemporalConditionModelLdmq::test_quantization_training": "wants gradients where attention has one "
    "token, which are zero in float too",
    "TestWanAnimate2*Ldmq::test_quantization_inference": "takes a tensor, where this model gives a list of them",
    "TestWanAnimate2*Ldmq::test_quantization_lora_inference": "takes a tensor, where this model gives a list of them",
    "TestWanAnimate2*Ldmq::test_quantization_serialization": "takes a tensor, where this model gives a list of them",
    "TestWanAnimate2*Ldmq::test_quantization_dequantize": "takes a tensor, where this model gives a list of them",
    "TestWanAnimate2*Ldmq::test_quantization_training": "takes a tensor, where this model gives a list of them",
}
OTHERS = (  # tests of other quantizers, or that need an accelerator or several processes
    "BitsAndBytes",
    "Quant",
    "TorchAo",
    "GGUF",
    "ModelOpt",
    "SDNQ",
    "AutoRound",
    "Nunchaku",
    "Parallel",
    "SingleFile",
    "HotSwap",
    "Compile",
    "AttentionBackend",
)


def why_not(test: str, of: str = "") -> str | None:
    """Why a test of this name, of a class, does not apply; None where it does."""
    names = test, f"{of}::{test}"
    return next((why for pattern, why in NOT_APPLICABLE.items() if any(fnmatchcase(n, pattern) for n in names)), None)
