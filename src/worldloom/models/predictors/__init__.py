"""Predictors from latents and actions to future latents. To add one, add a file here with a registered config."""

from worldloom.models.predictors.mlp import MLPPredictor
from worldloom.models.predictors.predictor import PREDICTORS, Predictor, PredictorConfig, PredictorField
from worldloom.models.predictors.transformer import TransformerPredictor

__all__ = [
    "PREDICTORS",
    "MLPPredictor",
    "Predictor",
    "PredictorConfig",
    "PredictorField",
    "TransformerPredictor",
]
