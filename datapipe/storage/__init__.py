"""Data sets on disk and elsewhere: manifest, records, shards, cache."""
