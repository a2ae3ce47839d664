"""CIF files: symmetry, elements and values as crystallographers write them."""

from crysforge.datapipe.cif.checks import CHECKS
from crysforge.datapipe.cif.read import read_cif, read_cifs, structure_names

__all__ = ["CHECKS", "read_cif", "read_cifs", "structure_names"]
