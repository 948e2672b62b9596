"""Predictors: latents and actions to future latents. A new one is one file here and a registered config."""

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
