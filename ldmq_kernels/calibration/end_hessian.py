"""What errors of a layer's weight count at the end of the trajectory, as GPTQ rounding takes it: two Hessians a layer.

An error E of a weight moves a random probe at the end by sum_i <g_i, E x_i> = <E, G>, where the sum is over all
positions and steps of a picture, x_i are the layer's inputs and g_i the adjoints of its outputs. G is the gradient of
the probe by the weight. So what is alike from step to step has added up before it is squared. The sums of G^T G and of
G G^T over pictures and probes are the two factors of a `KroneckerHessian`.

Few pictures and probes leave directions out that other prompts have. So the plain second moments of the inputs, which
are of far more rows, count as much as the first factor, and the second one has a share of the unit matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.adjoint import (
    LARGE_CALLS,
    LATENT,
    PICTURE,
    EndTrajectory,
    is_whole,
    pictures_that_count,
    sampler_adjoint,
)
from ldmq_kernels.calibration.denoisers import denoiser, whole_pipeline
from ldmq_kernels.calibration.drawings import Call
from ldmq_kernels.calibration.hessian import hessian_bytes, rows_of
from ldmq_kernels.calibration.probes import EndRecord, end_records
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.nn.kinds import FloatLayer, axes_of
from ldmq_kernels.numerics.kronecker import KroneckerHessian
from ldmq_kernels.plans.layers import quantizable_layers

PROBES = 4  # in each picture
OWN_SHARE = 0.1  # of an output's weight that is its own, so that few probes do not tie outputs to each other


def ends_to_round_by(
    pipe: Any,
    trajectory: Trajectory,
    calls: Sequence[Call],
    settings: Sequence[SamplingSettings],
    *,
    show: bool = False,
) -> EndTrajectory:
    """The adjoint of a recorded trajectory: of all its pictures, or of a large model the first final latents.

    Raises:
        NoAdjoint: gradients do not run through the pipeline.
    """
    model = denoiser(pipe)
    whole = is_whole(model)
    decodes = getattr(whole_pipeline(pipe), "vae", None) is not None and all(o.dim() == 4 for o in trajectory.outputs)
    found = sampler_adjoint(
        pipe,
        trajectory,
        calls,
        settings,
        pictures_that_count(model, len(calls), len(settings)),
        ends=(PICTURE if whole and decodes else LATENT,),  # through a large VAE, gradients take gigabytes
        probes=PROBES,
        show=show,
    )
    return found if whole else found.thinned(LARGE_CALLS)


def end_hessian_bytes(layer: FloatLayer, ends: EndTrajectory) -> int:
    """Bytes that a layer's sums take in `end_hessians`, with the plain Hessian beside them."""
    pictures = max(len(of_call.call.prompts) for of_call in ends.calls)
    gradients = 4 * pictures * ends.probes * layer.weight.numel()
    return gradients + 2 * hessian_bytes(layer) + 4 * layer.weight.shape[0] ** 2


def end_hessians(model: nn.Module, ends: EndTrajectory, hessians: Mapping[str, Tensor]) -> dict[str, KroneckerHessian]:
    """What errors of the weights of some layers count at the end.

    Args:
        model: the full-precision model that the trajectory was recorded of.
        hessians: layer -> (K, K), the second moments of its inputs, see `input_hessians`.

    Returns:
        layer -> its Hessians, of mean diagonal 2 (inputs) and 1 + OWN_SHARE (outputs); those of a layer whose output
        does not reach the end weigh inputs as the plain ones do, and all outputs alike.
    """
    known = quantizable_layers(model)
    sums = {name: _Sums(known[name]) for name in hessians}
    for run in _runs(ends):
        for name, record in end_records(model, run, list(hessians)):
            sums[name].add(record)
        for of_layer in sums.values():
            of_layer.end_run()
    return {name: sums[name].mixed(hessian) for name, hessian in hessians.items()}


def _runs(ends: EndTrajectory) -> list[EndTrajectory]:
    """Each run of the pipeline alone: its pictures end together."""
    calls: dict[tuple[int, ...], list[Any]] = {}
    for of_call in ends.calls:
        calls.setdefault(of_call.call.prompts, []).append(of_call)
    return [replace(ends, calls=of_run) for of_run in calls.values()]


class _Sums:
    """The gradients by one layer's weight of the run that is recorded, and the two factors of those before."""

    def __init__(self, layer: FloatLayer) -> None:
        self._layer = layer
        width, outputs, device = layer.weight[0].numel(), layer.weight.shape[0], layer.weight.device
        self._inputs = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._outputs = torch.zeros(outputs, outputs, dtype=torch.float32, device=device)
        self._gradients: dict[tuple[int, int], Tensor] = {}  # picture, probe -> (out, K)

    def add(self, record: EndRecord) -> None:
        """Add what one call of the layer weighs in its pictures; rows that are no picture's count as one."""
        prompts = record.prompts or (0,) * record.x.shape[0]
        if record.gradients is None:
            return
        for picture in set(prompts):
            rows = [row for row, prompt in enumerate(prompts) if prompt == picture]
            place = torch.tensor(rows, device=record.x.device)
            x = rows_of(self._layer, record.x[place], record.gradients[0].shape)
            for probe, gradient in enumerate(record.gradients):
                g = _as_rows(self._layer, gradient[place]).t() * float(record.weights.amplitude[probe])
                before = self._gradients.get((picture, probe))
                self._gradients[picture, probe] = g @ x if before is None else before.addmm_(g, x)

    def end_run(self) -> None:
        """Take the squares of the run's gradients."""
        for gradient in self._gradients.values():
            self._inputs.addmm_(gradient.t(), gradient)
            self._outputs.addmm_(gradient, gradient.t())
        self._gradients = {}

    def mixed(self, hessian: Tensor) -> KroneckerHessian:
        """Both factors, with the plain second moments of the inputs (K, K)."""
        inputs, outputs = _of_mean_one(self._inputs).add_(_of_mean_one(hessian)), _of_mean_one(self._outputs)
        outputs.diagonal().add_(OWN_SHARE)
        return KroneckerHessian(inputs, outputs)


def _of_mean_one(hessian: Tensor) -> Tensor:
    mean = hessian.diagonal().mean()
    return hessian / mean if bool(mean > 0) else torch.zeros_like(hessian)


def _as_rows(layer: FloatLayer, gradient: Tensor) -> Tensor:
    """(positions, out) of the gradient of an output."""
    return (gradient.movedim(1, -1) if axes_of(layer) else gradient).flatten(0, -2)
