"""Milliseconds of a model's call on a GPU that is not there, from data sheets and the cost model of tiles.

`record` notes what a call computes, with a model on the meta device too; `predict` says what each of these operations
takes at least and is expected to take. Nothing here was measured: whatever shows such a figure says "predicted".
"""

from ldmq_kernels.prediction.predict import BACKENDS, Predicted, Prediction, predict
from ldmq_kernels.prediction.recorded import Operation, record

__all__ = ["BACKENDS", "Operation", "Predicted", "Prediction", "predict", "record"]
