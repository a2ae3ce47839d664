"""Evaluation of finished runs: statistics over replicates and crystals, tables, figures, a report."""
