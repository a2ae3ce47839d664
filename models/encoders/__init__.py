"""Encoders by name: those of this package, and those that other packages register."""

from crysforge.models.encoders.base import ENCODERS, Encoder, build_encoder

__all__ = ["ENCODERS", "Encoder", "build_encoder"]
