"""World models: encoders, predictors, training losses and checkpoints."""

from worldloom.models.attention import Block
from worldloom.models.checkpoint import (
    build_from,
    delete_tensors,
    load_model,
    load_tensors,
    save_model,
    save_tensors,
    stored_digest,
    stored_extra,
)
from worldloom.models.distributed import alone, lay_like, whole
from worldloom.models.jepa import JEPA, JEPAConfig, WindowOutputs, build_jepa
from worldloom.models.normalisation import LatentNorm, PixelNormalisation, Standardise
from worldloom.models.perceptron import MLP, Activation, Norm, hidden_layer
from worldloom.models.target import TargetConfig, TargetEncoder

__all__ = [
    "JEPA",
    "MLP",
    "Activation",
    "Block",
    "JEPAConfig",
    "LatentNorm",
    "Norm",
    "PixelNormalisation",
    "Standardise",
    "TargetConfig",
    "TargetEncoder",
    "WindowOutputs",
    "alone",
    "build_from",
    "build_jepa",
    "delete_tensors",
    "hidden_layer",
    "lay_like",
    "load_model",
    "load_tensors",
    "save_model",
    "save_tensors",
    "stored_digest",
    "stored_extra",
    "whole",
]
