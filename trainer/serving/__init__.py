"""Trained models at work: structures in, predictions out."""
