"""From files of crystals, in whatever layout, to raw records and crystals."""

from __future__ import annotations

import importlib
import pkgutil

from crysforge.datapipe.sources.base import SOURCES, Options, Raw
from crysforge.datapipe.sources.catalog import ORIGIN, UNITS
from crysforge.datapipe.sources.read import (
    Failure,
    Reading,
    guess,
    read_crystals,
    read_raw,
    resolve,
)

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):  # each registers its readers
    importlib.import_module(_module.name)

__all__ = [
    "ORIGIN",
    "SOURCES",
    "UNITS",
    "Failure",
    "Options",
    "Raw",
    "Reading",
    "guess",
    "read_crystals",
    "read_raw",
    "resolve",
]
