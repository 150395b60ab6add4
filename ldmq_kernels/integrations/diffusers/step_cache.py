"""What a UNet computes from the timestep alone, tabulated: its time embedding and each block's projection of it.

In Stable Diffusion 1 and 2 the residual blocks' `time_emb_proj(silu(emb))` depends on the timestep and on nothing
else. `cache_time_embeddings` computes it once for each timestep, and a call of the UNet gathers a row on the
device: [emb | projection of the first block | of the second | ...]. `time_proj` gives the row in place of the
sinusoids, `time_embedding` passes it on, and each block takes its columns. Nothing is kept between calls, so the
table works with threads, torch.compile and CUDA graphs. In SDXL `emb` also holds the pooled text: nothing is cached.

A call computes everything as before where gradients or autocast are on, or where something hooks `time_proj`,
`time_embedding` or a residual block. A block whose own projection is hooked, wrapped by LoRA, replaced or loaded
projects `emb`, which the row has too. The table is dropped when the model's dtype changes, in training mode, and
not used once parts of `time_embedding` are replaced or loaded. Weights that are written in place by other means,
and blocks that are exchanged between UNets, are not noticed: call `cache_time_embeddings` again. A row is computed with
the input scales of its own timestep, where a call without the table takes those of its first sample's.

It is asked for, and no part of `ldmq.quantize`: which timesteps there will be is the scheduler's to say, the
device and dtype in which the model will run are not known at conversion, and a table of all 1000 steps takes
43 MB in 16 bit where one of 30 steps takes 1.3 MB. On a GPU a timestep that is not in the table cannot be
noticed without waiting for it, and nobody who did not ask for a table should meet it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets import unet_2d_blocks
from torch import Tensor, nn

from ldmq_kernels.integrations.diffusers.fused.eligibility import is_unhooked, is_unwrapped, is_unwrapped_linear
from ldmq_kernels.integrations.diffusers.fused.resnet import FusedResnetBlock2D, TimeColumns
from ldmq_kernels.nn import QuantLinear
from ldmq_kernels.nn.timestep_groups import attached
from ldmq_kernels.tracing import is_exported

logger = logging.getLogger(__name__)

TRAIN_STEPS = 1000  # of Stable Diffusion's schedulers
GUIDED_BATCH = 2  # a row is computed as in a call of so many samples: a product's last bits depend on it
CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim")
BLOCKS = (
    unet_2d_blocks.CrossAttnDownBlock2D,
    unet_2d_blocks.DownBlock2D,
    unet_2d_blocks.UNetMidBlock2DCrossAttn,
    unet_2d_blocks.CrossAttnUpBlock2D,
    unet_2d_blocks.UpBlock2D,
)


class TabulatedTimestepEmbedding(TimestepEmbedding):
    """TimestepEmbedding that passes on the rows of a table, and embeds other input."""

    row_width: int

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embed as TimestepEmbedding does; rows of a step table (N, row_width) are returned as they are."""
        return sample if sample.shape[-1] == self.row_width else super().forward(sample, condition)

    def leave_table(self) -> None:
        """Be diffusers' own again."""
        self.__dict__.pop("row_width", None)
        self.__class__ = TimestepEmbedding

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.leave_table()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.leave_table()


class TabulatedTimesteps(Timesteps):
    """Timesteps that gives a row of a table for each timestep.

    Attributes:
        steps: (n + 1,) float32, ascending; the last is NaN, which no timestep equals.
        table: (n + 1, row_width) in the model's dtype; the last row is NaN, for timesteps that are not there.
    """

    steps: Tensor
    table: Tensor
    readers: tuple[Any, list[Any]]  # the time embedding and the residual blocks, which are no parts of this module

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (N,) -> (N, row_width), or (N, num_channels) where the table does not serve the call."""
        if not self._serves(timesteps):
            return super().forward(timesteps)
        wanted = timesteps.float().contiguous()
        missing = len(self.steps) - 1
        position = torch.searchsorted(self.steps[:missing], wanted)
        is_there = self.steps[position] == wanted
        is_traced = torch.compiler.is_dynamo_compiling() or is_exported()
        if wanted.device.type == "cpu" and not is_traced and not bool(is_there.all()):
            return super().forward(timesteps)
        return self.table.index_select(0, torch.where(is_there, position, missing))

    def _serves(self, timesteps: Tensor) -> bool:
        embedding, resnets = self.readers
        return (
            not (torch.is_grad_enabled() or is_autocast(timesteps.device.type))
            and timesteps.device == self.table.device
            and is_unhooked(self)
            and is_unwrapped(embedding, TabulatedTimestepEmbedding)
            and has_bare_linears(embedding)
            and all(is_unwrapped(resnet, FusedResnetBlock2D) for resnet in resnets)
        )

    def leave_table(self) -> None:
        """Be diffusers' own again."""
        for name in ("steps", "table"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self.__dict__.pop("readers", None)
        self.__class__ = Timesteps

    def train(self, mode: bool = True) -> Any:
        """Set the mode as nn.Module does; training drops the table."""
        super().train(mode)
        if mode:
            self._drop("the model is being trained")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        steps, dtype = self.steps, self.table.dtype
        super()._apply(fn, recurse)
        if self.table.dtype != dtype:
            self._drop(f"the model was {dtype} and is {self.table.dtype} now")
        else:
            self.steps = steps.to(self.table.device)
        return self

    def _drop(self, why: str) -> None:
        logger.warning("the table of time embeddings is dropped, %s: call cache_time_embeddings again", why)
        self.leave_table()


def cache_time_embeddings(unet: nn.Module, timesteps: Tensor | Sequence[float] | None = None) -> int:
    """Tabulate the residual blocks' time embeddings, in place; call it last, where and as the UNet will run.

        pipe.scheduler.set_timesteps(30)
        cache_time_embeddings(pipe.unet, pipe.scheduler.timesteps)

    A row is what a call with a batch of two computes, bit for bit, on the device and in the dtype the UNet has now.
    A timestep of a call is found by its exact float32 value. One that is not in the table is computed on a CPU;
    on a GPU, and in compiled code, it makes the UNet's output NaN, since no call waits for the device to look.

    Args:
        unet: a UNet2DConditionModel with fused blocks, as quantized UNets have, in eval mode.
        timesteps: all that the UNet will be called with, whole or fractional, such as a scheduler's; by default
            0 to 999, which takes 10 to 30 s on a CPU core and 43 MB in 16 bit for Stable Diffusion 1.

    Returns:
        How many blocks' projections are cached; 0 where none can be, and the log says why.

    Raises:
        ValueError: a timestep is not finite, or there are none.
    """
    steps = _ascending(range(TRAIN_STEPS) if timesteps is None else timesteps)
    uncache_time_embeddings(unet)
    obstacle = _obstacle(unet)
    if obstacle is not None:
        logger.warning("no time embeddings of this %s are cached: %s", type(unet).__name__, obstacle)
        return 0
    resnets = [module for module in unet.modules() if isinstance(module, FusedResnetBlock2D)]
    cached = [resnet for resnet in resnets if _is_cacheable(resnet)]
    model: Any = unet
    # tensors made in inference mode have no version, which compilers and autograd look at outside of it
    with torch.inference_mode(False), torch.no_grad():
        steps = steps.to(model.device)
        rows = [_row(model, cached, step) for step in steps.split(1)]
        table = torch.cat([*rows, torch.full_like(rows[0], torch.nan)])
        steps = torch.cat([steps, steps.new_full((1,), torch.nan)])
    width = table.shape[1]
    stop = embedding_width = width - sum(resnet.time_emb_proj.out_features for resnet in cached)
    for resnet in resnets:
        start, stop = stop, stop + (resnet.time_emb_proj.out_features if resnet in cached else 0)
        resnet.time_columns = TimeColumns(width, embedding_width, start, stop)
    model.time_embedding.__class__ = TabulatedTimestepEmbedding
    model.time_embedding.row_width = width
    time_proj = model.time_proj
    time_proj.__class__ = TabulatedTimesteps
    time_proj.register_buffer("steps", steps, persistent=False)
    time_proj.register_buffer("table", table, persistent=False)
    time_proj.readers = (model.time_embedding, resnets)
    return len(cached)


def uncache_time_embeddings(unet: nn.Module) -> None:
    """Undo `cache_time_embeddings`; a model without a table is left as it is."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.__dict__.pop("time_columns", None)
        elif isinstance(module, TabulatedTimesteps | TabulatedTimestepEmbedding):
            module.leave_table()


def _ascending(timesteps: Tensor | Sequence[float]) -> Tensor:
    """Each timestep once, (n,) float32."""
    given = torch.as_tensor(timesteps if isinstance(timesteps, Tensor) else list(timesteps))
    steps = given.detach().float().flatten().unique()
    if not len(steps) or not bool(torch.isfinite(steps).all()):
        found = "none" if not len(steps) else f"{float(steps[~torch.isfinite(steps)][0])}"
        raise ValueError(f"timesteps: found {found}, finite numbers are needed: pass the scheduler's `timesteps`")
    return steps


def _row(unet: Any, resnets: list[FusedResnetBlock2D], step: Tensor) -> Tensor:
    """A row of the table, (1, row_width), for a timestep (1,), computed as a call with GUIDED_BATCH samples would."""
    timestep_groups = attached(unet)
    if timestep_groups is not None:
        timestep_groups.before(unet, (), {"timestep": step})
    embedding = unet.time_embedding(unet.time_proj(step.expand(GUIDED_BATCH)).to(unet.dtype))
    return torch.cat([embedding, *(resnet.project_time(embedding) for resnet in resnets)], dim=1)[:1]


def is_autocast(device_type: str) -> bool:
    """Whether operations on such a device are computed in another dtype than their inputs'."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _is_cacheable(resnet: Any) -> bool:
    return resnet.can_add_vector() and is_unwrapped_linear(resnet.time_emb_proj)


def has_bare_linears(embedding: Any) -> bool:
    """Whether a time embedding is what its class computes: nothing is on top of its parts."""
    activations = (embedding.act, embedding.post_act)
    return (
        is_unwrapped_linear(embedding.linear_1)
        and is_unwrapped_linear(embedding.linear_2)
        and all(activation is None or is_unhooked(activation) for activation in activations)
    )


def _obstacle(unet: Any) -> str | None:
    """Why nothing can be cached, or None."""
    if type(unet) is not UNet2DConditionModel:
        return "only a UNet2DConditionModel's flow of time embeddings is known"
    if unet.training:
        return "it is in training mode, call .eval() first"
    if any(tensor.is_meta for tensor in itertools.chain(unet.parameters(), unet.buffers())):
        return "its weights are not in memory (meta device), load them first"
    for name in CONDITIONS:
        if unet.config.get(name) is not None:
            return f"with {name}={unet.config[name]!r} its time embedding holds more than the timestep"
    if unet.time_embed_act is not None:
        return f"time_embedding_act_fn={unet.config.time_embedding_act_fn!r} is applied to the whole embedding"
    if not is_unwrapped(unet.time_proj, Timesteps):
        return f"time_proj is a {type(unet.time_proj).__name__} or hooked, a plain Timesteps is needed"
    if not (is_unwrapped(unet.time_embedding, TimestepEmbedding) and has_bare_linears(unet.time_embedding)):
        return "time_embedding is hooked or has an adapter on it"
    return _obstacle_in_blocks(unet)


def _obstacle_in_blocks(unet: Any) -> str | None:
    blocks = [block for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if block is not None]
    for block in blocks:
        if type(block) not in BLOCKS:
            accepted = ", ".join(kind.__name__ for kind in BLOCKS)
            return f"a {type(block).__name__} may read the time embedding elsewhere, known are {accepted}"
    resnets = [resnet for block in blocks for resnet in block.resnets]
    if not all(is_unwrapped(resnet, FusedResnetBlock2D) for resnet in resnets):
        return "a residual block is hooked or not fused: quantize the UNet, or call fuse(unet), first"
    if not any(_is_cacheable(resnet) for resnet in resnets):
        return "every time_emb_proj is hooked, has an adapter on it, or gives a scale and a shift"
    layers = [unet.time_embedding.linear_1, unet.time_embedding.linear_2, *(r.time_emb_proj for r in resnets)]
    follows = attached(unet) is not None
    if not follows and any(isinstance(m, QuantLinear) and m.scheme.has_timestep_scales for m in layers):
        return "its timestep layers do not follow its timestep: call timestep_groups.attach(unet, boundaries) first"
    return None
