"""Stages that learn to make crystals."""
