"""Crystals from files to packed batches."""
