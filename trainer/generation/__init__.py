"""Crystals that a generative stage makes: what is asked for, made, ranked, shown and judged."""
