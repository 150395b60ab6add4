"""A small autoencoder as LiteVAE's: fixed wavelets, and modulated convolutions that are baked before quantization."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import ConversionError, summarize


class ModulatedConv2d(nn.Conv2d):
    """Each input channel has a learned scale, and each output channel's weight the norm 1 after that."""

    def __init__(self, *arguments: int, **options: int) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.modulation = nn.Parameter(torch.rand(self.in_channels) + 0.5)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def modulated_weight(self) -> Tensor:
        scaled = self.weight * self.modulation[:, None, None]
        return self.gain * scaled / (scaled.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.modulated_weight(), self.bias)


class Haar(nn.Module):
    """One level of the Haar wavelet transform, or its inverse: a fixed kernel in a buffer, and no layer."""

    def __init__(self, inverse: bool = False) -> None:
        super().__init__()
        signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
        self.register_buffer("kernel", signs.view(4, 1, 2, 2))
        self.inverse = inverse

    def forward(self, x: Tensor) -> Tensor:
        kernel: Tensor = self.kernel
        channels = x.shape[1] // (4 if self.inverse else 1)
        repeated = kernel.to(x.dtype).repeat(channels, 1, 1, 1)
        function = nn.functional.conv_transpose2d if self.inverse else nn.functional.conv2d
        return function(x, repeated, stride=2, groups=channels)


class LiteAutoencoder(nn.Module):
    """Wavelets of a picture, features of them by modulated convolutions, and the way back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            Haar(), ModulatedConv2d(12, 16, 3, padding=1), nn.SiLU(), ModulatedConv2d(16, 8, 3, padding=1)
        )
        self.decoder = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 16, 3, padding=1)),
            nn.SiLU(),
            ModulatedConv2d(16, 12, 1),
            Haar(inverse=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(self.encoder(x))
        return decoded


def picture() -> Tensor:
    return torch.rand(2, 3, 18, 14, generator=torch.Generator().manual_seed(1))


WEIGHTS = {ModulatedConv2d: ModulatedConv2d.modulated_weight}


@torch.no_grad()
def test_a_baked_autoencoder_is_quantized_with_its_wavelets_as_they_were() -> None:
    model = LiteAutoencoder().eval()
    exact = model(picture())
    left = ldmq.quantize(copy.deepcopy(model), scheme="w8a8-dynamic")
    assert summarize(left).quantized_convolutions == 0
    assert torch.equal(left(picture()), exact)
    baked = ldmq.bake(model, WEIGHTS)
    torch.testing.assert_close(baked(picture()), exact)
    ldmq.quantize(baked, scheme="w8a8-dynamic")
    assert summarize(baked).quantized_convolutions == 4
    assert summarize(baked).in_float == ()
    assert 30 < ldmq.sqnr_db(exact, baked(picture())) < 60
    again = ldmq.quantize(ldmq.bake(LiteAutoencoder().eval(), WEIGHTS), scheme="w8a8-dynamic")
    again.load_state_dict(baked.state_dict())
    assert torch.equal(again(picture()), baked(picture()))
    assert baked.half()(picture().half()).dtype == torch.float16
    assert baked.encoder[0].kernel.dtype == torch.float16


def test_what_depends_on_the_input_is_refused_and_nothing_is_changed() -> None:
    class Gated(ModulatedConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.mean()

    model = nn.Sequential(ModulatedConv2d(4, 4, 3), Gated(4, 4, 3))
    with pytest.raises(ConversionError, match=r"1: a .*Gated computes something else than the product"):
        ldmq.bake(model, WEIGHTS)
    assert type(model[0]) is ModulatedConv2d
    with pytest.raises(ConversionError, match=r"0: the weight of this ModulatedConv2d has shape \(4, 3, 3\)"):
        ldmq.bake(model, {ModulatedConv2d: lambda layer: layer.weight[0]})
    with pytest.raises(ConversionError, match="0: a ModulatedConv2d computes something else"):
        ldmq.bake(model, {ModulatedConv2d: lambda layer: layer.weight * torch.nan})
    with pytest.raises(ConversionError, match="Haar is neither a linear nor a convolution"):
        ldmq.bake(model, {Haar: lambda layer: layer.kernel})


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_another_tensor_than_a_weight_keeps_its_norm() -> None:
    recurrent = nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    model = ldmq.bake(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), recurrent))
    assert {*model[0]._parameters} == {"weight", "bias"}
    assert hasattr(recurrent, "weight_hh_l0_g")
