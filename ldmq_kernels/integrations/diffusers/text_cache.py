"""What a UNet computes from the text alone, once for each prompt: the keys and values of its cross-attentions.

`cache_text` has the UNet look, before each call, whether the text's tensor is one that it has seen, and passes on
[text | keys of the first block | its values | keys of the second | ...] in place of the text; each fused block takes
its columns. The whole is one tensor that belongs to the call, as a row of the table of `step_cache` is: it works with
threads and CUDA graphs, which copy it to their own buffer. It is exact: the same layers compute it, on the same input.

A text is known by its memory, its place and form there, and how often it was written to; so a new prompt, a tensor that
was changed in place, another dtype or batch is computed anew, as it is when a layer was loaded, moved, replaced or
written to. A block whose own layers are hooked, wrapped by LoRA, or follow the timestep projects the text, which the
whole has too. A call is computed as before with gradients or autocast, under torch.compile, in inference mode and
inside `batch_invariant`, and where a block or the way to it is hooked or no longer fused. Writes through `.data` are
not counted by torch, and are not noticed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import DeviceContext

from ldmq_kernels.integrations.diffusers.fused.eligibility import is_unwrapped
from ldmq_kernels.integrations.diffusers.fused.transformer_2d import FusedTransformer2DModel
from ldmq_kernels.integrations.diffusers.fused.transformer_block import (
    FusedBasicTransformerBlock,
    TextColumns,
    projects_text_alone,
)
from ldmq_kernels.integrations.diffusers.step_cache import BLOCKS, is_autocast
from ldmq_kernels.tracing import is_exported

logger = logging.getLogger(__name__)

KEPT = 4  # texts whose keys and values are kept, those used last: the halves of guidance may come one by one
NAME, PLACE = "encoder_hidden_states", 2  # of the text among the arguments of a UNet


class _State(NamedTuple):
    """Which layers project the text, and how often they were filled, moved or written to; `is_same` compares."""

    objects: list[Any]
    counts: list[int]

    def is_same(self, other: _State) -> bool:
        """Whether nothing has changed since."""
        is_alike = self.counts == other.counts and len(self.objects) == len(other.objects)
        return is_alike and all(a is b for a, b in zip(self.objects, other.objects, strict=True))


class _Entry(NamedTuple):
    """A text that was seen, and what became of it."""

    storage: StorageWeakRef
    form: tuple[Any, ...]
    state: _State
    whole: Tensor


class TextCache:
    """Gives a UNet its text together with the keys and values of all blocks."""

    def __init__(self, unet: Any, blocks: list[Any]) -> None:
        self.blocks = blocks
        self.frames = [module for module in unet.modules() if isinstance(module, FusedTransformer2DModel)]
        self.width = unet.config.cross_attention_dim
        self.entries: tuple[_Entry, ...] = ()
        self.handle: Any = None

    def before(
        self, unet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with the whole in place of the text; None leaves them as they are."""
        text = args[PLACE] if len(args) > PLACE else kwargs.get(NAME)
        if not isinstance(text, Tensor) or not self._serves(unet, text):
            return None
        state = self._state()
        if state is None:
            return None
        whole = self._whole(text, state)
        if len(args) > PLACE:
            return (*args[:PLACE], whole, *args[PLACE + 1 :]), dict(kwargs)
        return args, {**kwargs, NAME: whole}

    def _serves(self, unet: Any, text: Tensor) -> bool:
        is_traced = torch.compiler.is_dynamo_compiling() or is_exported()
        return (
            not (is_traced or torch.is_grad_enabled() or text.is_inference() or is_autocast(text.device.type))
            and not _is_watched()
            and text.dim() == 3
            and text.shape[-1] == self.width
            and unet.encoder_hid_proj is None
            and all(is_unwrapped(frame, FusedTransformer2DModel) for frame in self.frames)
            and all(is_unwrapped(block, FusedBasicTransformerBlock) for block in self.blocks)
        )

    def _whole(self, text: Tensor, state: _State) -> Tensor:
        storage = StorageWeakRef(text.untyped_storage())
        stream = torch.cuda.current_stream(text.device) if text.is_cuda else None
        form = (text.storage_offset(), text.shape, text.stride(), text.dtype, text._version, stream)
        kept = [entry for entry in self.entries if entry.state.is_same(state) and not entry.storage.expired()]
        found = next((entry for entry in kept if entry.storage.cdata == storage.cdata and entry.form == form), None)
        if found is None:
            found = _Entry(storage, form, state, self._projected(text))
        else:
            kept.remove(found)
        self.entries = (*kept[1 - KEPT :], found)
        return found.whole

    def _projected(self, text: Tensor) -> Tensor:
        parts: list[Tensor] = [text]
        for block in self.blocks:
            if projects_text_alone(block):
                parts += block.project_text(text)
            else:  # the block does so itself, and nothing reads these columns
                parts += [text.new_zeros((*text.shape[:2], width)) for width in block.text_widths]
        return torch.cat(parts, dim=-1)

    def _state(self) -> _State | None:
        """What the keys and values depend on beside the text; None where torch does not count writes to it."""
        objects, counts = [], []
        for block in self.blocks:
            objects.append(block._shared)  # made anew whenever the block is moved
            for layer in (block.attn2.to_k, block.attn2.to_v):
                held = [t for tensors in (layer._parameters, layer._buffers) for t in tensors.values() if t is not None]
                if any(tensor.is_inference() for tensor in held):
                    return None
                objects += [layer, *held]
                counts.append(getattr(layer, "revision", 0))
                counts += [number for tensor in held for number in (tensor._version, tensor.data_ptr())]
        return _State(objects, counts)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "entries": ()}  # a copy computes its own


def _is_watched() -> bool:
    """Whether somebody follows torch's functions, and may have them add in another order."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def cache_text(unet: nn.Module) -> int:
    """Compute the keys and values of the text once for each prompt, exactly; in place, once the UNet is fused.

        ldmq.cache_text(pipe.unet)

    Nothing has to be done when the prompt changes. Up to four texts are kept at a time, each with two times the width
    of every cross-attention in the dtype of the text: 52 MB for SDXL in 16 bit with guidance, 10 MB for
    Stable Diffusion 1. What is kept of a text that is gone is freed in the next call, or by `uncache_text`.

    Args:
        unet: a UNet2DConditionModel with fused blocks, as quantized UNets have.

    Returns:
        How many blocks' keys and values are cached; 0 where none can be, and the log says why.
    """
    uncache_text(unet)
    blocks = [module for module in unet.modules() if isinstance(module, FusedBasicTransformerBlock)]
    obstacle = _obstacle(unet, blocks)
    if obstacle is not None:
        logger.warning("no keys and values of this %s are cached: %s", type(unet).__name__, obstacle)
        return 0
    cache = TextCache(unet, blocks)
    start = cache.width
    row = start + sum(sum(block.text_widths) for block in blocks)
    for block in blocks:
        keys, values = block.text_widths
        block.text_columns = TextColumns(row, cache.width, start, start + keys, start + keys + values)
        start += keys + values
    cache.handle = unet.register_forward_pre_hook(cache.before, with_kwargs=True)
    return sum(map(projects_text_alone, blocks))


def uncache_text(unet: nn.Module) -> None:
    """Undo `cache_text`, and free what it kept; a model without it is left as it is."""
    for module in unet.modules():
        vars(module).pop("text_columns", None)
    for hook in list(unet._forward_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, TextCache):
            owner.handle.remove()
            owner.entries = ()


def _obstacle(unet: Any, blocks: list[Any]) -> str | None:
    """Why nothing can be cached, or None."""
    if type(unet) is not UNet2DConditionModel:
        return "only a UNet2DConditionModel's flow of the text is known"
    if unet.encoder_hid_proj is not None:
        return "it projects its text or image embeddings first, as with an IP-Adapter"
    if unet.config.get("addition_embed_type") not in (None, "text_time"):
        return f"with addition_embed_type={unet.config.addition_embed_type!r} it reads the text elsewhere"
    if not isinstance(unet.config.cross_attention_dim, int):
        return "its blocks take texts of several widths"
    for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if part is not None and type(part) not in BLOCKS:
            return f"a {type(part).__name__} may read the text elsewhere"
    frames = [frame for part in unet.modules() for frame in [part] if type(part).__name__ == "Transformer2DModel"]
    if not frames or not all(isinstance(frame, FusedTransformer2DModel) for frame in frames):
        return "its transformers are not fused: quantize the UNet, or call fuse(unet), first"
    if any(type(child) is not FusedBasicTransformerBlock for frame in frames for child in frame.transformer_blocks):
        return "a block of its transformers is not fused"
    if any(getattr(frame, "caption_projection", None) is not None for frame in frames):
        return "its transformers project the text first"
    if any(block.attn2 is None or block.attn2.to_k is None for block in blocks):
        return "a block has no attention to the text"
    if not any(map(projects_text_alone, blocks)):
        return "every to_k or to_v has something on it, or follows the timestep"
    return None
