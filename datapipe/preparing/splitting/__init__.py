"""Which crystals go to train, val and test, or to which fold."""
