"""Encoders and objectives: plain torch on packed batches."""

__version__ = "0.1.0"
