"""Training losses, one module each. To add one, add a file here with a registered `LossConfig`."""

from worldloom.models.losses.covariance import Covariance
from worldloom.models.losses.inverse_dynamics import InverseDynamics
from worldloom.models.losses.loss import LOSSES, Formula, Loss, LossConfig, LossField, LossInputs, Samples, draw_samples
from worldloom.models.losses.prediction import Prediction
from worldloom.models.losses.sigreg import SIGReg
from worldloom.models.losses.straightening import Straightening
from worldloom.models.losses.temporal_similarity import TemporalSimilarity
from worldloom.models.losses.variance import Variance

__all__ = [
    "LOSSES",
    "Covariance",
    "Formula",
    "InverseDynamics",
    "Loss",
    "LossConfig",
    "LossField",
    "LossInputs",
    "Prediction",
    "SIGReg",
    "Samples",
    "Straightening",
    "TemporalSimilarity",
    "Variance",
    "draw_samples",
]
