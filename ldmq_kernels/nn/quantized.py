"""What QuantLinear and QuantConv2d share: quantized buffers, and their packed form on a CPU.

A checkpoint holds plain tensors. Where the CPU backend serves the layer, the weight is held in that backend's packed
form alone; anything that reads the layer (state_dict, deepcopy, pickle, `.weight`, a move) gets the plain one, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldmq_kernels.kernels import cpu
from ldmq_kernels.nn.input_scale import InputScale
from ldmq_kernels.nn.stored import BUFFERS, FLOAT32_BUFFERS, check_stored
from ldmq_kernels.numerics import affine
from ldmq_kernels.numerics.formats import FLOAT, Scheme, schemes_of
from ldmq_kernels.numerics.packing import pack_int4, unpack_int4
from ldmq_kernels.numerics.smoothing import smoothed_hessian
from ldmq_kernels.numerics.split import FINER, quantize_low_part


class QuantizedLayer(InputScale):
    """Mixin over nn.Linear or nn.Conv2d; `kind` is "linear" or "conv2d".

    Attributes:
        scheme: what the layer computes in; the float scheme until `from_float` or the loader says more.
        weight: int8 (N, K) or (K, R, S, C), or uint8 with two int4 to a byte of the last axis.
        weight_scale: (out,) float32; with w4a8 beside `multiplier` (uint8).
        group_scale: (out, groups) float32, w4a16 only.
        first_token: whether the row of the first token is computed from its 16-bit input.
        adds_bias: whether the float layer had no bias, and a correction gave this one its own.
    """

    kind: str
    bias: Any
    scheme: Scheme = FLOAT
    first_token: bool = False
    adds_bias: bool = False
    packed_weight: Tensor | None = None
    revision: int = 0  # of the buffers: grows whenever they are filled, loaded or moved

    # -- to be given by the layer ------------------------------------------------------------------

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """The float layer's weight with input channels as the last axis, contiguous."""
        raise TypeError("a quantized layer says where its input channels are")

    def _pack(self, weight: Tensor) -> Tensor:
        raise TypeError("a quantized layer knows its packed form")

    def _unpack(self, packed: Tensor) -> Tensor:
        raise TypeError("a quantized layer knows its packed form")

    @property
    def weight_channels(self) -> int:
        """Input channels of one output's weight."""
        raise TypeError("a quantized layer knows its channels")

    @classmethod
    def structure_of(cls, module: Any) -> Self:
        """A float layer of this class on the meta device, shaped as `module`."""
        raise TypeError("a quantized layer knows its float layer")

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
        hessian: Tensor | None = None,
    ) -> Self:
        """Quantize a float layer; the bias is shared with it unless it is corrected, the weight is not.

        Args:
            module: nn.Linear or nn.Conv2d.
            scheme: what to compute in, of `numerics.formats.SCHEMES`.
            input_scale: (1,) float32, required by a static scheme; (timestep groups,) by a timestep one.
            smoothing: (C,) float32 reciprocal of the smoothing vector; the weight takes the vector itself. Of
                8-bit activations only.
            first_token: compute the row x[:, :1] of an input (B, T, C) from its 16-bit values; linears only.
            bias_correction: (out,) float32, added to the bias.
            hessian: (K, K) float32, the sum of x x^T over the layer's inputs without smoothing: round by GPTQ.

        Raises:
            ValueError: the scheme does not exist for this kind of layer or lacks its input scale, the layer is
                grouped or no linear where that is needed, the weight is not finite, or a scale is not finite and
                positive.
        """
        if not scheme.quantizes:
            layer = cls.empty(module, scheme)
            layer.weight, layer.bias = module.weight, module.bias  # type: ignore[assignment]
            return layer.train(module.training)
        scales = 1 if input_scale is None else input_scale.numel()
        if scheme.is_static and (input_scale is None or (scales != 1 and not scheme.has_timestep_scales)):
            found = "no scale" if input_scale is None else f"{scales} scales"
            raise ValueError(
                f"{scheme} needs a calibrated input scale, this has {found}: calibrate first, or choose a dynamic "
                "scheme"
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
        device, weight, weighted = original.device, original, hessian
        if layer._buffers["smoothing"] is not None:
            assert smoothing is not None
            layer.smoothing = smoothing.detach().float().to(device)
            weight = original.float() / layer.smoothing
            weighted = None if hessian is None else smoothed_hessian(hessian, layer.smoothing)
        layer._fill(weight, weighted)
        if scheme.is_static and input_scale is not None:
            layer.input_scale = input_scale.detach().float().reshape(-1).to(device)
        for name in FLOAT32_BUFFERS:
            check_stored(scheme, name, getattr(layer, name))
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
        if not scheme.quantizes:
            return layer
        eight_bit_input = scheme.format.activation_bits == 8
        smoothed = smoothed and eight_bit_input
        if smoothed and getattr(layer, "groups", 1) != 1:
            raise ValueError("a grouped convolution cannot be smoothed: its channels are not those of its weight")
        if first_token and layer.kind != "linear":
            raise ValueError(f"first_token is for linears, this is a {layer.kind}: leave it out")
        layer.scheme, layer.first_token = scheme, first_token and eight_bit_input
        float_dtype = layer.weight.dtype
        shape = cls.to_channels_last(layer.weight).shape
        out_channels, channels = shape[0], shape[-1]
        groups = (*shape[:-1], affine.group_count(channels))
        four_bit = scheme.format.weight_bits == 4
        two_level = four_bit and scheme.format.activation_bits == 8
        del layer.weight
        meta = torch.device("meta")

        def buffer(name: str, size: tuple[int, ...], dtype: torch.dtype, exists: bool = True) -> None:
            layer.register_buffer(name, torch.empty(size, dtype=dtype, device=meta) if exists else None)

        stored = (*shape[:-1], -(-channels // 2)) if four_bit else tuple(shape)
        buffer("weight", stored, torch.uint8 if four_bit else torch.int8)
        buffer("multiplier", groups, torch.uint8, two_level)
        buffer("weight_scale", (out_channels,), torch.float32, not four_bit or two_level)
        buffer("group_scale", groups, torch.float32, four_bit and not two_level)
        buffer("input_scale", (timestep_groups if scheme.has_timestep_scales else 1,), torch.float32, scheme.is_static)
        buffer("smoothing", (channels,), torch.float32, smoothed)
        if corrected and layer.bias is None:
            layer.bias = nn.Parameter(torch.empty(out_channels, dtype=float_dtype, device=meta), requires_grad=False)
            layer.adds_bias = True
        layer._derive_for_call()
        return layer

    def _fill(self, weight: Tensor, hessian: Tensor | None) -> None:
        if self.scheme.format.weight_bits == 8:
            self.weight, self.weight_scale = affine.quantize_weight_int8(weight, hessian)
        elif self.scheme.format.activation_bits == 8:
            grouped = affine.quantize_weight_w4a8(weight, hessian)
            self.weight, self.multiplier = pack_int4(grouped.integers), grouped.multiplier
            self.weight_scale = grouped.scale
        else:
            integers, self.group_scale = affine.quantize_weight_w4a16(weight, hessian)
            self.weight = pack_int4(integers)

    def with_activations(self, scheme: Scheme, *, input_scale: Tensor | None = None, first_token: bool = False) -> Self:
        """The same layer with its activations scaled in another way; both hold one weight, which is not rounded again.

        Args:
            scheme: of this layer's format; the layer itself is dynamic, with the smoothing that is wanted.
            input_scale: see `from_float`, as for `first_token`.

        Raises:
            ValueError: this is not dynamic or computes its first token apart, or the scheme is of another format.
        """
        if self.scheme.activations != "dynamic" or self.first_token:
            raise ValueError(f"a plain dynamic layer can be given other activations, this is {self.scheme}")
        if scheme.format != self.scheme.format:
            raise ValueError(f"{scheme} has another weight than {self.scheme}: quantize the float layer")
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._buffers, twin._parameters = dict(self._buffers), dict(self._parameters)
        twin._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        twin.scheme, twin.first_token = scheme, first_token
        twin._buffers["input_scale"] = None if input_scale is None else input_scale.detach().float().reshape(-1)
        twin._derive_for_call()
        if first_token and twin.packed_weight is not None:
            twin.first_token_weight = self.weight
        return twin

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

    def real_weight(self) -> Tensor:
        """(out, ..., C) float32: what the stored integers and scales stand for, for an input without smoothing."""
        weight = self.weight
        if self.scheme.format.weight_bits == 4:
            weight = unpack_int4(weight, self.weight_channels)
        if self.scheme.format.weight_bits == 4 and self.scheme.format.activation_bits == 16:
            real = weight * affine.expand_groups(self.group_scale, self.weight_channels)
        else:
            if self.multiplier is not None:
                weight = affine.fold_multiplier(weight, self.multiplier)
            real = weight * self.weight_scale.view(-1, *[1] * (weight.dim() - 1))
        return real if self.smoothing is None else real * self.smoothing

    def finish(self) -> None:
        """Derive what is not stored and pack for the device, once all buffers are filled."""
        self.revision += 1
        if not self.scheme.quantizes or self._buffers["weight"] is None:
            return
        self._derive_for_call()
        if self.scheme.format.activation_bits == 8 and cpu.serves(self.weight.device):
            packed = self._pack(self.weight)
            if self.first_token:
                self.first_token_weight = self._buffers["weight"]
            self.packed_weight = packed
            self._buffers["weight"] = None

    def _derive_for_call(self) -> None:
        self.use_timestep_group(0)
        if self.first_token:
            scale = self.weight_scale[:, None] * self.multiplier if self.multiplier is not None else None
            self.register_buffer("first_token_scale", scale, persistent=False)
            self.register_buffer("first_token_weight", None, persistent=False)

    # -- of a call -----------------------------------------------------------------------------------

    def low_part(self, x: Tensor, x_q: Tensor, axis: int) -> Tensor:
        """Of a split scheme: the second int8 value of each activation."""
        inv_scale: Any = self.input_inv_scale
        return quantize_low_part(x, x_q, inv_scale, axis)

    def scale_and_bias(self, x_scale: Tensor | None, second: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of a product: the input's scale, and the bias, which the product of a pair's second values leaves out."""
        scale: Any = self.call_scale if self.scheme.is_static else x_scale
        return (scale / FINER, None) if second else (scale, self.bias)

    @property
    def takes_int8(self) -> bool:
        """Whether an input that is quantized already is all that the layer needs."""
        return self.scheme.format.activation_bits == 8 and not (self.first_token or self.scheme.is_split)

    # -- the packed weight stays out of sight --------------------------------------------------------

    def unpack(self) -> None:
        """Hold the plain weight again."""
        if self.packed_weight is not None:
            self._buffers["weight"] = self._unpack(self.packed_weight)
            self.packed_weight = None

    @property
    def kernel_weight(self) -> Tensor:
        """The weight as the ops take it: packed, or plain."""
        packed = self.packed_weight
        return self.weight if packed is None else packed

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("packed_weight") is not None:
            return self._unpack(self.__dict__["packed_weight"])
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.scheme.quantizes:
            return super()._apply(fn, recurse)
        self.unpack()
        kept = {name: self._buffers[name] for name in FLOAT32_BUFFERS}
        scale, inv_scale = self._call_scale, self._call_inv_scale
        super()._apply(fn, recurse)
        for name, original in kept.items():
            moved = self._buffers[name]
            if original is not None and moved is not None and moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        self.finish()
        if self.scheme.has_timestep_scales:
            self._keep_call_scale(scale, inv_scale)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed_weight is not None:
            destination[prefix + "weight"] = self._unpack(self.packed_weight)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        if self.scheme.quantizes:
            for name in BUFFERS:
                try:
                    check_stored(self.scheme, name, state_dict.get(prefix + name))
                except ValueError as error:
                    raise ValueError(f"{prefix}{error}") from None
        self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.finish()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.packed_weight is not None:
            state["_buffers"] = {
                **self._buffers,
                "weight": self._unpack(self.packed_weight),
                "first_token_weight": None,
            }
            state["packed_weight"] = None
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
            if self.packed_weight is not None:
                words.append("packed for oneDNN")
        return ", ".join(words)
