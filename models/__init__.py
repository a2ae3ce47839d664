"""Encoders and objectives: plain torch on packed batches."""
