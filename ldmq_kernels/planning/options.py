"""The options of the knapsack: every candidate of every layer, and the float layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ldmq_kernels.calibration.adjoint import LATENT, PICTURE, End
from ldmq_kernels.nn import quantized_class
from ldmq_kernels.nn.cuts import depends_on_cuts
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES
from ldmq_kernels.planning.assignment import SQNR, step_weights
from ldmq_kernels.planning.knapsack import Option
from ldmq_kernels.planning.target import Measure
from ldmq_kernels.planning.times import LayerTimes
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.cost import layer_bytes, operation_cost, weight_bytes
from ldmq_kernels.plans.layers import layer_shape, quantizable_layers
from ldmq_kernels.plans.plan import PlanError
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.candidates import LayerCandidate

ENDS: dict[Measure, End] = {"latent": LATENT, "psnr": PICTURE}


@dataclass(frozen=True)
class NoiseColumns:
    """The noise of each candidate, in a column for each analysed step at the UNet's output, or for each picture.

    Attributes:
        weights: of the columns in the mean of dB; they add up to 1.
        pictures: the sample of each column; None at the UNet's output.
    """

    of: Callable[[str, LayerCandidate], tuple[float, ...]]
    weights: tuple[float, ...]
    pictures: tuple[int, ...] | None = None


def noise_columns(analysis: Analysis, measure: Measure) -> NoiseColumns:
    """The noise that a measure adds up; at the UNet's output where the analysis knows none of the end."""
    candidates = [candidate for of_layer in analysis.candidates.values() for candidate in of_layer]
    end = ENDS.get(measure)
    if end is not None and all(c.end is not None and end in c.end.by_picture for c in candidates):
        pictures = sorted({picture for c in candidates if c.end is not None for picture in c.end.by_picture[end]})

        def by_picture(_layer: str, candidate: LayerCandidate) -> tuple[float, ...]:
            assert candidate.end is not None
            return tuple(candidate.end.by_picture[end][picture] for picture in pictures)

        return NoiseColumns(by_picture, (1 / len(pictures),) * len(pictures), tuple(pictures))

    def by_step(layer: str, candidate: LayerCandidate) -> tuple[float, ...]:
        noise = analysis.output[layer, str(candidate.scheme)].by_step
        return tuple(noise[step] for step in analysis.steps)

    return NoiseColumns(by_step, step_weights(analysis.steps, analysis.calibration.trajectory.steps))


def make_options(
    model: nn.Module,
    analysis: Analysis,
    formats: Sequence[str],
    signals: Sequence[str] = (SQNR,),
    times: LayerTimes | None = None,
    columns: NoiseColumns | None = None,
) -> list[Option]:
    """Every option of every layer: noise, bytes, operations and time.

    A layer stays in 16 bit where the pipeline never runs it, and where no candidate fits it. With times, a
    candidate that is slower than the float layer is left out, if "fp16" is among the formats.

    Args:
        columns: the noise; at the UNet's output if None.

    Raises:
        PlanError: a signal that the analysis does not have.
    """
    for name in signals:
        if name != SQNR and name not in analysis.signals:
            raise PlanError(f"the analysis has no signal {name!r}: analyse with it, or plan by {SQNR} alone")
    names = [name for name in signals if name != SQNR]
    columns = columns or noise_columns(analysis, SQNR)
    silent = (0.0,) * len(columns.weights)
    options = []
    for layer, module in quantizable_layers(model).items():
        size = weight_bytes(module, FLOAT)
        if layer not in analysis.candidates:
            options.append(Option(layer, str(FLOAT), silent, size, 0.0))
            continue
        operations = analysis.calibration.operations[layer]
        of_layer = []
        for candidate in analysis.candidates[layer]:
            key = (layer, str(candidate.scheme))
            of_layer.append(
                Option(
                    layer,
                    key[1],
                    columns.of(layer, candidate),
                    layer_bytes(module, candidate.layer_plan),
                    operation_cost(operations, candidate.scheme),
                    signals=tuple((name, max(0.0, analysis.signals[name].get(key, 0.0))) for name in names),
                )
            )
        unchanged = Option(layer, str(FLOAT), silent, size, operation_cost(operations, FLOAT), is_float=True)
        if times is not None:
            unchanged, *of_layer = times.of([unchanged, *of_layer])
        if str(FLOAT) in formats:
            no_slower = [option for option in of_layer if option.milliseconds <= unchanged.milliseconds]
            options += [*no_slower, unchanged]
        else:
            options += of_layer or [unchanged]
    return options


def independent_of_cuts(
    model: nn.Module, candidates: Mapping[str, Sequence[LayerCandidate]]
) -> dict[str, list[LayerCandidate]]:
    """The candidates whose scales do not depend on how a latent is cut."""
    layers = quantizable_layers(model)
    return {
        name: [c for c in of_layer if not depends_on_cuts(quantized_class(layers[name]).empty(layers[name], c.scheme))]
        for name, of_layer in candidates.items()
    }


# -- the paper's global step -------------------------------------------------------------------------------


def sensitive_blocks(model: nn.Module, analysis: Analysis, share: float) -> list[str]:
    """The blocks that make most noise for what they hold, up to a share of all blocks' noise.

    Each block is judged by its noise at the output in the scheme that makes most, over the geometric mean of its
    parameters and of its multiply-accumulates. The blocks of the highest value are taken until they make `share` of
    all blocks' noise.

    Args:
        share: above 0 and up to 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of noise for sensitive blocks is {share}: choose above 0 and up to 1")
    noise: dict[str, float] = {}
    for (block, _), block_noise in analysis.blocks.items():
        noise[block] = max(noise.get(block, 0.0), block_noise.mean_power)
    parameters: dict[str, float] = dict.fromkeys(noise, 0.0)
    operations: dict[str, float] = dict.fromkeys(noise, 0.0)
    for layer, module in quantizable_layers(model).items():
        block = block_of(model, layer)
        if layer in analysis.candidates and block in noise:
            size = 1
            for extent in layer_shape(module):
                size *= extent
            parameters[block] += size
            operations[block] += analysis.calibration.operations[layer]
    density = {b: power / max(1.0, (parameters[b] * operations[b]) ** 0.5) for b, power in noise.items()}
    taken: list[str] = []
    total, sum_taken = sum(noise.values()), 0.0
    for block in sorted(density, key=lambda b: -density[b]):
        if sum_taken >= share * total:
            break
        taken.append(block)
        sum_taken += noise[block]
    return taken


def restricted(model: nn.Module, options: Sequence[Option], blocks: Collection[str]) -> list[Option]:
    """The options without the less precise ones in these blocks; a layer without precise ones keeps its least noisy."""
    kept: list[Option] = []
    layers: dict[str, list[Option]] = {}
    for option in options:
        layers.setdefault(option.layer, []).append(option)
    for layer, of_layer in layers.items():
        if block_of(model, layer) not in blocks:
            kept += of_layer
            continue
        precise = [option for option in of_layer if SCHEMES[option.scheme].is_precise]
        kept += precise or [min(of_layer, key=lambda option: sum(option.noise))]
    return kept
