"""What all quantized layers share: making them of a float layer, their stored tensors, and loading those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.kernels.rotation import rotated_weight
from ldmq_kernels.nn.input_scale import InputScale
from ldmq_kernels.nn.kinds import CHANNEL_AXES
from ldmq_kernels.nn.packed import PLAIN, PackedWeight, buffer_name
from ldmq_kernels.numerics.formats import Scheme, no_groups, product_of, schemes_of
from ldmq_kernels.numerics.gptq import Hessian
from ldmq_kernels.numerics.hadamard import block_size
from ldmq_kernels.numerics.smoothing import fitted
from ldmq_kernels.numerics.split import LOW_STEPS, quantize_low_part

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FIRST_TOKEN = "first_token_weight"  # the plain weight beside a packed one, for the product with a 16-bit first token


class QuantizedLayer(PackedWeight, InputScale):
    """Mixin over nn.Linear or a convolution of torch; `kind` is one of `kinds.CLASSES`.

    Attributes:
        scheme: what the layer computes in; the float scheme until `from_float` or the loader says more.
        first_token: whether the row of the first token is computed from its 16-bit input.
        adds_bias: whether the float layer had no bias, and a correction gave this one its own.
    """

    kind: str
    channel_axis: int = -1  # of the output
    bias: Any
    first_token: bool = False
    adds_bias: bool = False
    revision: int = 0  # of the buffers: grows whenever they are filled, loaded or moved

    # -- to be given by the layer ------------------------------------------------------------------

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """The float layer's weight with input channels as the last axis, contiguous."""
        raise TypeError("a quantized layer says where its input channels are")

    @classmethod
    def structure_of(cls, module: Any) -> Self:
        """A float layer of this class on the meta device, shaped as `module`."""
        raise TypeError("a quantized layer knows its float layer")

    def compute(self, x: Tensor) -> Tensor:
        """The layer's output by its integers, without gradients."""
        raise TypeError("a quantized layer computes")

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input of `compute`, of this shape, from that of its output.

        Args:
            gradient: of the output's shape, floating.
            weight: as the float layer has it, of the gradient's dtype.
            shape: of the input.
        """
        raise TypeError("a quantized layer has gradients")

    # -- construction ------------------------------------------------------------------------------

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        scheme: Scheme,
        *,
        input_scale: Tensor | None = None,
        smoothing: Tensor | None = None,
        first_token: bool = False,
        bias_correction: Tensor | None = None,
        hessian: Hessian | None = None,
    ) -> Self:
        """Quantize a float layer; the bias is shared with it unless it is corrected, the weight is not.

        Args:
            module: nn.Linear, or nn.Conv1d, nn.Conv2d or nn.Conv3d; its class is of the kind that this one is for.
            scheme: what to compute in, of `numerics.formats.SCHEMES`.
            input_scale: (1,) float32, required by a static scheme; (timestep groups,) by a timestep one.
            smoothing: (C,) float32 inverse of the smoothing vector, of 8-bit activations; the weight takes the vector.
            first_token: compute the row x[:, :1] of an input (B, T, C) from its 16-bit values; linears only.
            bias_correction: (out,) float32, added to the bias.
            hessian: (K, K) of the layer's inputs without smoothing, or of its outputs too: round by GPTQ.

        Raises:
            ValueError: the scheme does not exist for this kind of layer or lacks its input scale, the layer is
                grouped or no linear where that is needed, the weight is not finite, or a scale is not finite and
                positive.
        """
        if not scheme.quantizes:
            layer = cls.empty(module, scheme)
            layer.weight, layer.bias = module.weight, module.bias
            return layer.train(module.training)
        scales = 1 if input_scale is None else input_scale.numel()
        if scheme.is_static and (input_scale is None or (scales != 1 and not scheme.has_timestep_scales)):
            found = "no scale" if input_scale is None else f"{scales} scales"
            raise ValueError(
                f"{scheme} needs a calibrated input scale, this has {found}: calibrate, or choose a dynamic scheme"
            )
        layer = cls.empty(
            module,
            scheme,
            smoothed=smoothing is not None,
            timestep_groups=scales,
            first_token=first_token,
            corrected=bias_correction is not None,
        ).train(module.training)
        float_weight: Any = module.weight
        layer.bias = module.bias
        if bias_correction is not None:
            layer.correct_bias(bias_correction, float_weight)
        original = cls.to_channels_last(float_weight.detach())
        if smoothing is not None and layer._buffers["smoothing"] is not None:
            layer.smoothing = smoothing.detach().to(original.device, torch.float32, copy=True)  # not the plan's own
        by = rotated_weight if scheme.is_rotated else None
        weight, weighted = fitted(original, hessian, layer._buffers["smoothing"], by)
        for name, tensor in scheme.format.weight.quantize(weight, weighted).items():
            layer.fill(name, tensor)
        if scheme.is_static and input_scale is not None:
            layer.input_scale = input_scale.detach().float().reshape(-1).to(original.device)
        for name, dtype in scheme.dtypes.items():
            if dtype == torch.float32:
                scheme.check(name, layer._buffers.get(name))
        layer.finish()
        return layer

    @classmethod
    def empty(
        cls,
        module: nn.Module,
        scheme: Scheme,
        *,
        smoothed: bool = False,
        timestep_groups: int = 1,
        first_token: bool = False,
        corrected: bool = False,
    ) -> Self:
        """The layer with all its buffers on the meta device, for a loader to fill; `corrected` says of the bias."""
        layer = cls.structure_of(module)
        if layer.kind not in scheme.format.layers:
            raise ValueError(f"there is no {scheme} for a {layer.kind}: choose {', '.join(schemes_of(layer.kind))}")
        if layer.folds_time > 1 and layer.weight_channels % scheme.format.weight.channel_groups:
            raise ValueError(no_groups(scheme, layer.weight_channels))
        if not scheme.quantizes:
            return layer
        for op in layer._ops_of(scheme):
            if not hasattr(ops, op):
                raise ValueError(f"{scheme} is computed by the op {op}, which ldmq_kernels.ops does not have")
        smoothed = smoothed and scheme.quantizes_activations
        if smoothed and getattr(layer, "groups", 1) != 1:
            raise ValueError("a grouped convolution cannot be smoothed: its channels are not those of its weight")
        if scheme.is_rotated and getattr(layer, "groups", 1) != 1:
            raise ValueError(f"{scheme} rotates channels, which a grouped convolution does not share")
        if first_token and layer.kind != "linear":
            raise ValueError(f"first_token is for linears, this is a {layer.kind}: leave it out")
        first_token = first_token and scheme.quantizes_activations
        if first_token and scheme.format.first_token_op is None:
            raise ValueError(f"{scheme} has no product for a first token in 16 bit: leave first_token out")
        layer.float_dtype = layer.weight.dtype
        shape = cls.to_channels_last(layer.weight).shape
        del layer.weight
        layer.scheme, layer.first_token = scheme, first_token
        buffers = scheme.buffers(shape, smoothed=smoothed, timestep_groups=timestep_groups)
        for name in (*buffers, *(absent for absent in ("input_scale", "smoothing") if absent not in buffers)):
            buffer = buffers.get(name)
            empty = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
            layer.register_buffer(buffer_name(name), empty)
        layer._non_persistent_buffers_set.add(PLAIN)  # state_dict has it as "weight"
        if corrected and layer.bias is None:
            layer.bias = nn.Parameter(
                torch.empty(shape[0], dtype=layer.float_dtype, device="meta"), requires_grad=False
            )
            layer.adds_bias = True
        layer._derive_for_call()
        return layer

    def _ops_of(self, scheme: Scheme) -> list[str]:
        """The ops that compute this kind of layer in a scheme."""
        products, activations = scheme.format.products, scheme.activations
        quantizers = activations.quantize_static, activations.quantize_per_token, activations.quantize_per_sample
        fused = scheme.format.fused_linear, scheme.format.geglu_linear
        named = products[product_of(self.kind)], *quantizers, scheme.format.first_token_op, *fused
        return [op for op in named if op]

    def with_activations(self, scheme: Scheme, *, input_scale: Tensor | None = None, first_token: bool = False) -> Self:
        """The same layer with its activations scaled in another way; both hold one weight, which is not rounded again.

        Args:
            scheme: of this layer's format; the layer itself is dynamic, with the smoothing that is wanted, or rotated
                as the scheme is.
            input_scale: see `from_float`, as for `first_token`.

        Raises:
            ValueError: this is not dynamic or computes its first token apart, or the scheme is of another format.
        """
        if self.scheme.is_static or not self.scheme.quantizes_activations or self.first_token:
            raise ValueError(f"a plain dynamic layer can be given other activations, this is {self.scheme}")
        if scheme.format is not self.scheme.format or scheme.is_rotated != self.scheme.is_rotated:
            raise ValueError(f"{scheme} has another weight than {self.scheme}: quantize the float layer")
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone._buffers, clone._parameters = dict(self._buffers), dict(self._parameters)
        clone._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        clone.scheme, clone.first_token, clone._view = scheme, first_token, None
        clone._buffers["input_scale"] = None if input_scale is None else input_scale.detach().float().reshape(-1)
        clone._derive_for_call()
        if first_token and clone.packed_weight is not None:
            clone._hold(FIRST_TOKEN, self.plain_weight)
        return clone

    def correct_bias(self, correction: Tensor, like: Tensor | None = None) -> None:
        """Put a bias of the layer's own in place of the one that it shares: (out,) `correction` more.

        Args:
            like: of the new bias's dtype and device; without, as the bias that is there.
        """
        shared = self.bias
        like = shared if like is None else like
        assert like is not None
        added = correction.detach().to(like.device)
        if shared is not None:
            added = shared.detach().float() + added
        self.bias = nn.Parameter(added.to(like.dtype), requires_grad=shared is not None and shared.requires_grad)

    def requantize(self, weight: Tensor, bias: Tensor | None) -> None:
        """Hold another weight, rounded to the nearest integers as the layer is: its scheme, input scales and smoothing.

        Args:
            weight: of the float layer's shape, floating.
            bias: (out,) floating, None where the layer has none.

        Raises:
            ValueError: the weight is not finite; the layer holds what it held.
        """
        module = self.structure_of(self)
        module.weight, module.bias = nn.Parameter(weight, requires_grad=False), self.bias
        made = self.from_float(
            module,
            self.scheme,
            input_scale=self.input_scale,
            smoothing=self.smoothing,
            first_token=self.first_token,
        )
        self.refill(made.stored_tensors(), bias)

    def refill(self, stored: dict[str, Tensor], bias: Tensor | None) -> None:
        """Take the tensors of the layer's checkpoint, see `stored_tensors`, and a bias."""
        self.unpack()
        device = self._buffers[PLAIN].device
        for name, tensor in stored.items():
            self.fill(name, tensor.to(device))
        if bias is not None:
            shared = self.bias
            self.bias = nn.Parameter(bias.to(device, shared.dtype), requires_grad=shared.requires_grad)
        self.finish()

    def finish(self) -> None:
        """Derive what is not stored and pack for the device, once all buffers are filled."""
        self.revision += 1
        if self.bias is not None:
            self.float_dtype = self.bias.dtype
        plain = self._buffers.get(PLAIN)
        if not self.scheme.quantizes or plain is None:
            return
        self._derive_for_call()
        self.pack()
        if self.first_token and self.packed_weight is not None:
            self._hold(FIRST_TOKEN, plain)

    def _derive_for_call(self) -> None:
        self.use_timestep_group(0)
        if self.first_token:
            held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
            growth = block_size(self.weight_channels) if self.scheme.is_rotated else 1
            self._hold("first_token_scale", self.scheme.format.weight.group_scale(held) * growth)
            self._hold(FIRST_TOKEN, None)

    # -- of a call -----------------------------------------------------------------------------------

    def refuse(self, x: Tensor, channels: int) -> None:
        """Say what is wrong with an input that no layer of this kind takes.

        Args:
            x: the input.
            channels: how many a channel axis of it has to have.

        Raises:
            ValueError: always; the text names the layer.
        """
        layer = f"{self.name or 'a layer'} ({self.scheme} {self.kind})"
        if x.dtype not in ACTIVATION_DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in ACTIVATION_DTYPES)
            raise ValueError(f"{layer} is given {x.dtype}, it takes {accepted}: cast the input to the model's dtype")
        raise ValueError(
            f"{layer} is given an input of shape {tuple(x.shape)}, and takes {channels} channels along "
            f"{CHANNEL_AXES[self.kind]}: is it meant for another model?"
        )

    def low_part(self, x: Tensor, x_q: Tensor, axis: int) -> Tensor:
        """The second int8 value of each activation of a split scheme."""
        inv_scale: Any = self.input_inv_scale
        return quantize_low_part(x, x_q, inv_scale, axis)

    def scale_and_bias(self, x_scale: Tensor | None, second: bool) -> tuple[Tensor | None, Tensor | None]:
        """A product's input scale, and its bias, which the product of a pair's second values leaves out."""
        scale: Any = self.call_scale if self.scheme.is_static else x_scale
        return (scale / LOW_STEPS, None) if second else (scale, self.bias)

    @property
    def takes_quantized(self) -> bool:
        """Whether an input that is quantized already is all that the layer needs."""
        return self.scheme.takes_quantized and not self.first_token

    def operands(self) -> list[Tensor]:
        """The stored tensors that the product takes beside the weight, in its order."""
        held: Any = self._buffers  # as attributes they would be looked up in three places
        return [held[name] for name in self.scheme.format.operands]

    # -- moving, loading and copying -----------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.scheme.quantizes:
            return super()._apply(fn, recurse)
        self.unpack()
        kept = {name: self._buffers.get(name) for name in map(buffer_name, self.scheme.dtypes)}
        like = torch.empty(0, dtype=self.float_dtype, device=self._buffers[PLAIN].device)
        self.float_dtype = fn(like).dtype
        scale, inv_scale = self.call_scale, self.input_inv_scale
        super()._apply(fn, recurse)
        for name, original in kept.items():
            moved = self._buffers.get(name)
            if original is not None and moved is not None and moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        self.finish()
        if self.scheme.has_timestep_scales:
            self._keep_call_scale(scale, inv_scale)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if self.scheme.quantizes and isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
            raise ValueError(
                f"{prefix}weight is {weight.dtype}, {self.scheme.dtypes['weight']} is needed: the layer is quantized "
                f"({self.scheme}), load this into the float model and quantize that with ldmq.quantize"
            )
        for name in self.scheme.dtypes:
            try:
                self.scheme.check(name, state_dict.get(prefix + name))
            except ValueError as error:
                raise ValueError(f"{prefix}{error}") from None
        self.unpack()
        if not self.scheme.quantizes:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        with self._as_stored():
            super()._load_from_state_dict(state_dict, prefix, *rest)
        self.finish()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_buffers"].pop(FIRST_TOKEN, None)  # `finish` makes it again
        state["_non_persistent_buffers_set"].discard(FIRST_TOKEN)
        state["_view"] = state["_call_scale"] = state["_call_inv_scale"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.finish()

    # -- for people ----------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """The float layer's description, the scheme, the input scale and the backend's packing."""
        words = [super().extra_repr(), str(self.scheme)]
        if self.scheme.quantizes:
            if self.input_scale is not None and not self.input_scale.is_meta:
                words.append("input_scale=" + "/".join(f"{scale:.4g}" for scale in self.input_scale.tolist()))
            if self.smoothing is not None:
                words.append("smoothed")
            if self.first_token:
                words.append("first token in 16 bit")
            if self.packer is not None:
                words.append(f"packed for {self.packer.layout}")
        return ", ".join(words)


def name_layers(model: nn.Module) -> None:
    """Tell each quantized layer of a model what it is called there, adapters of PEFT upon it aside."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            layer.name = name.removesuffix(".base_layer")
