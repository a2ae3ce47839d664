"""Encoders by name: those of this package, and those that other packages register."""

from models.encoders import cgcnn, icomformer, matformer, pddformer, schnet  # noqa: F401
from models.encoders.base import ENCODERS, Encoder, build_encoder

__all__ = ["ENCODERS", "Encoder", "build_encoder"]
