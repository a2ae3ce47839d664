"""Command-line entry points: each reads top to bottom like a recipe."""
