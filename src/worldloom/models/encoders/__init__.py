"""Encoders from observations to latents. To add one, add a file here with a registered `EncoderConfig`."""

from worldloom.models.encoders.encoder import ENCODERS, EncoderConfig, EncoderField
from worldloom.models.encoders.fusion import Fusion, default_encoder
from worldloom.models.encoders.keypoints import Keypoints
from worldloom.models.encoders.patch_conv import PatchConv, StemmedPatchConv
from worldloom.models.encoders.vector import VectorMLP
from worldloom.models.encoders.vit import ViT

__all__ = [
    "ENCODERS",
    "EncoderConfig",
    "EncoderField",
    "Fusion",
    "Keypoints",
    "PatchConv",
    "StemmedPatchConv",
    "VectorMLP",
    "ViT",
    "default_encoder",
]
