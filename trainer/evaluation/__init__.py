"""Evaluation of finished runs: statistics, tables, figures, a report."""
