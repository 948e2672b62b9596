"""Heads: small networks and statistics fitted on the latents of a frozen world model."""

from worldloom.heads.behaviour import (
    BehaviourPrior,
    BehaviourPriorConfig,
    BlockDensity,
    BlockDensityConfig,
    Mixture,
    fit_behaviour_prior,
)
from worldloom.heads.coarse import CoarseConfig, CoarseModel, fit_coarse
from worldloom.heads.distance import DistanceConfig, TemporalDistance, fit_distance, rank_correlation
from worldloom.heads.geometry import (
    LatentGeometry,
    Reversibility,
    measure_geometry,
    predict_arrival,
    still,
)
from worldloom.heads.head import FitConfig, Head
from worldloom.heads.heads import Heads
from worldloom.heads.inverse import InverseModel, InverseModelConfig
from worldloom.heads.latent_episodes import LatentEpisodes, dream, encode_episodes
from worldloom.heads.probe import Probe, ProbeConfig, fit_probe
from worldloom.heads.refinement import RefinementConfig, refine_predictor
from worldloom.heads.support import Support, measure_support, nearest_gap

__all__ = [
    "BehaviourPrior",
    "BehaviourPriorConfig",
    "BlockDensity",
    "BlockDensityConfig",
    "CoarseConfig",
    "CoarseModel",
    "DistanceConfig",
    "FitConfig",
    "Head",
    "Heads",
    "InverseModel",
    "InverseModelConfig",
    "LatentEpisodes",
    "LatentGeometry",
    "Mixture",
    "Probe",
    "ProbeConfig",
    "RefinementConfig",
    "Reversibility",
    "Support",
    "TemporalDistance",
    "dream",
    "encode_episodes",
    "fit_behaviour_prior",
    "fit_coarse",
    "fit_distance",
    "fit_probe",
    "measure_geometry",
    "measure_support",
    "nearest_gap",
    "predict_arrival",
    "rank_correlation",
    "refine_predictor",
    "still",
]
