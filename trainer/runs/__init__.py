"""Runs on disk, and what is known of them."""
