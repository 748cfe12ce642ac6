"""Measuring trained models: features of images, metrics of them, and a model's results."""

from genfast.training.evaluation.measuring import Evaluation, evaluate
from genfast.training.evaluation.metrics import METRICS

__all__ = ["METRICS", "Evaluation", "evaluate"]
