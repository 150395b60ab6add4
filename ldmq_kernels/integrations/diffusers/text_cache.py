"""What a UNet computes from the text alone, once for each prompt: keys and values, and SDXL's pooled embedding.

`cache_text` has the UNet look, before each call, whether the text's tensor is one that it has seen, and passes on
[text | keys of the first block | its values | keys of the second | ...] in place of the text; each fused block takes
its columns. The whole is one tensor that belongs to the call, as a row of the table of `step_cache` is: it works with
threads and CUDA graphs, which copy it to their own buffer. It is exact: the same layers compute it, on the same input.
SDXL's `add_embedding` of the pooled text and the sizes comes in place of the sizes, in float64, which they never are.

A text is known by its memory, its place and form there, and how often it was written to; so a new prompt, a tensor that
was changed in place, another dtype or batch is computed anew, as it is when a layer was loaded, moved, replaced or
written to. A block whose own layers are hooked, wrapped by LoRA, or follow the timestep projects the text, which the
whole has too. A call is computed as before with gradients or autocast, under torch.compile, in inference mode and
inside `batch_invariant`, and where a block or the way to it is hooked or no longer fused. Writes through `.data` are
not counted by torch, and are not noticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
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
from ldmq_kernels.integrations.diffusers.step_cache import BLOCKS, has_bare_linears, is_autocast
from ldmq_kernels.nn import QuantLinear
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
    """Tensors that were seen, and what became of them."""

    storages: list[StorageWeakRef]
    forms: tuple[Any, ...]
    state: _State
    made: Tensor


class _Seen:
    """What was made of the tensors that were seen last."""

    def __init__(self) -> None:
        self.entries: tuple[_Entry, ...] = ()

    def get(self, tensors: Sequence[Tensor], state: _State, make: Callable[[], Tensor]) -> Tensor:
        """What was made of these tensors, or is made now; other threads may ask at the same time."""
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        forms = tuple(map(_form, tensors))
        kept = [entry for entry in self.entries if entry.state.is_same(state) and not _is_gone(entry)]
        addresses = [storage.cdata for storage in storages]
        for entry in kept:
            if entry.forms == forms and [storage.cdata for storage in entry.storages] == addresses:
                kept.remove(entry)
                break
        else:
            entry = _Entry(storages, forms, state, make())
        self.entries = (*kept[1 - KEPT :], entry)
        return entry.made

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": ()}  # a copy computes its own


def _form(tensor: Tensor) -> tuple[Any, ...]:
    stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version, stream


def _is_gone(entry: _Entry) -> bool:
    return any(storage.expired() for storage in entry.storages)


class PooledTimesteps(Timesteps):
    """Timesteps of SDXL's sizes that passes on an embedding that comes in their place."""

    embedding_width: int

    def forward(self, timesteps: Tensor) -> Tensor:
        """Sizes (n,) -> (n, num_channels); float64 (samples * embedding_width,) as it is."""
        is_embedded = timesteps.dtype == torch.float64 and timesteps.numel() % self.embedding_width == 0
        return timesteps if is_embedded else super().forward(timesteps)


class PooledEmbedding(TimestepEmbedding):
    """SDXL's embedding of the pooled text and the sizes, which passes on what is embedded already."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """(N, in) -> (N, out); (N, out) as it is."""
        return sample if sample.shape[-1] == self.linear_2.out_features else super().forward(sample, condition)


class TextCache:
    """Gives a UNet its text together with the keys and values of all blocks."""

    def __init__(self, unet: Any, blocks: list[Any]) -> None:
        self.blocks = blocks
        self.frames = [module for module in unet.modules() if isinstance(module, FusedTransformer2DModel)]
        self.width = unet.config.cross_attention_dim
        self.texts, self.pooled = _Seen(), _Seen()
        self.handle: Any = None

    def before(
        self, unet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with the whole in place of the text; None leaves them as they are."""
        text = args[PLACE] if len(args) > PLACE else kwargs.get(NAME)
        if not isinstance(text, Tensor) or not self._serves(unet, text):
            return None
        layers = [layer for block in self.blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
        state = _state(layers, [block._shared for block in self.blocks])  # made anew whenever a block is moved
        if state is None:
            return None
        whole = self.texts.get([text], state, lambda: self._projected(text))
        changed = self._with_pooled(unet, args[0] if args else kwargs.get("sample"), dict(kwargs))
        if len(args) > PLACE:
            return (*args[:PLACE], whole, *args[PLACE + 1 :]), changed
        return args, {**changed, NAME: whole}

    def _with_pooled(self, unet: Any, sample: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with SDXL's embedding in place of its pooled text and sizes, where it has one."""
        given = kwargs.get("added_cond_kwargs") or {}
        pooled, sizes = given.get("text_embeds"), given.get("time_ids")
        if not (isinstance(pooled, Tensor) and isinstance(sizes, Tensor) and isinstance(sample, Tensor)):
            return kwargs
        embedding: Any = getattr(unet, "add_embedding", None)
        serves = (
            is_unwrapped(embedding, PooledEmbedding)
            and has_bare_linears(embedding)
            and is_unwrapped(unet.add_time_proj, PooledTimesteps)
            and not (pooled.is_inference() or sizes.is_inference())
        )
        state = _state([embedding.linear_1, embedding.linear_2], [sample.dtype]) if serves else None
        if state is None or any(map(_follows_timestep, (embedding.linear_1, embedding.linear_2))):
            return kwargs

        def embed() -> Tensor:
            steps = unet.add_time_proj(sizes.flatten()).reshape(pooled.shape[0], -1)
            return embedding(torch.concat([pooled, steps], dim=-1).to(sample.dtype))

        embedded = self.pooled.get([pooled, sizes], state, embed)
        replaced = {"text_embeds": embedded[:, :0], "time_ids": embedded.double()}
        return {**kwargs, "added_cond_kwargs": {**given, **replaced}}

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

    def _projected(self, text: Tensor) -> Tensor:
        parts: list[Tensor] = [text]
        for block in self.blocks:
            if projects_text_alone(block):
                parts += block.project_text(text)
            else:  # the block does so itself, and nothing reads these columns
                parts += [text.new_zeros((*text.shape[:2], width)) for width in block.text_widths]
        return torch.cat(parts, dim=-1)


def _state(layers: Sequence[Any], others: Sequence[Any]) -> _State | None:
    """What is made depends on these layers and objects beside its tensors; None where torch counts no writes."""
    objects = list(others)
    counts: list[int] = []
    for layer in layers:
        held = [t for tensors in (layer._parameters, layer._buffers) for t in tensors.values() if t is not None]
        if any(tensor.is_inference() for tensor in held):
            return None
        objects += [layer, *held]
        counts.append(getattr(layer, "revision", 0))
        counts += [number for tensor in held for number in (tensor._version, tensor.data_ptr())]
    return _State(objects, counts)


def _follows_timestep(layer: Any) -> bool:
    return isinstance(layer, QuantLinear) and layer.scheme.has_timestep_scales


def _is_watched() -> bool:
    """Whether somebody follows torch's functions, and may have them add in another order."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def cache_text(unet: nn.Module) -> int:
    """Compute the keys and values of the text, and SDXL's pooled embedding, once for each prompt; exact, and in place.

        ldmq.cache_text(pipe.unet)

    Nothing has to be done when the prompt changes. Up to four texts are kept at a time, each with two times the width
    of every cross-attention in the dtype of the text: 52 MB for SDXL in 16 bit with guidance, 8 MB for
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
    embedding: Any = getattr(unet, "add_embedding", None)
    steps: Any = getattr(unet, "add_time_proj", None)
    is_pooled = is_unwrapped(embedding, TimestepEmbedding) and is_unwrapped(steps, Timesteps)
    # by its width it is known whether an input is embedded already
    if is_pooled and embedding.linear_1.in_features != embedding.linear_2.out_features:
        steps.embedding_width = embedding.linear_2.out_features
        steps.__class__, embedding.__class__ = PooledTimesteps, PooledEmbedding
    cache.handle = unet.register_forward_pre_hook(cache.before, with_kwargs=True)
    return sum(map(projects_text_alone, blocks))


def uncache_text(unet: nn.Module) -> None:
    """Undo `cache_text`, and free what it kept; a model without it is left as it is."""
    for module in unet.modules():
        module.__dict__.pop("text_columns", None)
        if isinstance(module, PooledEmbedding | PooledTimesteps):
            module.__dict__.pop("embedding_width", None)
            module.__class__ = TimestepEmbedding if isinstance(module, PooledEmbedding) else Timesteps
    for hook in list(unet._forward_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, TextCache):
            owner.handle.remove()
            owner.texts, owner.pooled = _Seen(), _Seen()


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
