"""From files of crystals to data sets: settings, splits, duplicates, and what is done with sets."""
