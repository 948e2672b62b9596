"""World models: encoders, predictors, the losses that train them, and their checkpoints."""

from worldloom.models.checkpoint import load_extra, load_model, load_tensors, save_model, save_tensors
from worldloom.models.encoders import ENCODERS, EncoderConfig, default_encoder
from worldloom.models.heads import MLP, LinearProbe, ProbeScore, fit_head
from worldloom.models.jepa import JEPA, JEPAConfig, WindowOutputs, build_jepa
from worldloom.models.losses import LOSSES, Loss, LossConfig, LossInputs
from worldloom.models.predictors import PREDICTORS, Predictor, PredictorConfig
from worldloom.models.target import TargetConfig, TargetEncoder

__all__ = [
    "ENCODERS",
    "JEPA",
    "LOSSES",
    "MLP",
    "PREDICTORS",
    "EncoderConfig",
    "JEPAConfig",
    "LinearProbe",
    "Loss",
    "LossConfig",
    "LossInputs",
    "Predictor",
    "PredictorConfig",
    "ProbeScore",
    "TargetConfig",
    "TargetEncoder",
    "WindowOutputs",
    "build_jepa",
    "default_encoder",
    "fit_head",
    "load_extra",
    "load_model",
    "load_tensors",
    "save_model",
    "save_tensors",
]
