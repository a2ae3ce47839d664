"""When crystals are the same, and which of a data set are."""
