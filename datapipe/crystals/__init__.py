"""Crystals, and what is done to one at a time."""
