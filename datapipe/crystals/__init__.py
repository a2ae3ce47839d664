"""One crystal: its record, cell, symmetry, elements, and the filters it passes."""
