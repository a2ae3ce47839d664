"""Training objectives by name: `STAGES` in base.py."""
