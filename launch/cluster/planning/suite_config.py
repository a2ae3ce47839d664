"""Settings of a suite."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class DataSource:
    """A prepared data set that a suite needs."""

    path: str = ""
    """Directory or URL; default its name in `data_dir`."""
    source: str = ""
    """Where the crystals come from and the command that prepares them."""


@dataclass(kw_only=True)
class StartRun:
    """A run that runs, or other runs, start from."""

    job: str = "pretrain"
    """`pretrain` or `finetune`."""
    data: str = ""
    """Name of a data set."""
    config: list[str] = field(default_factory=list)
    """Config files."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings on top of them."""
    per: list[str] = field(default_factory=list)
    """Factors for each of whose values the run is made anew."""


@dataclass(kw_only=True)
class SuiteConfig:
    """Settings of a suite."""

    title: str = ""
    """What is compared."""
    include: list[str] = field(default_factory=list)
    """Suite files to start from, relative to the one that includes them."""
    output: str = ""
    """Directory of all runs."""
    baseline: str = ""
    """`FACTOR=VALUE` that others are compared with."""
    replicate: Any = None
    """Factors whose values are repetitions of the same: one, or a list."""
    paper: str = ""
    """Name of the published table to show beside (launch/evaluate.py)."""
    data_dir: str = "data"
    """Where the data sets lie, each in a directory of its name."""
    data: dict[str, Any] = field(default_factory=dict)
    """Data sets by name: `path` and `source`."""
    runs: dict[str, Any] = field(default_factory=dict)
    """Runs to start from, by name: `job`, `data`, `config`, `settings`, `per`."""
    config: list[str] = field(default_factory=list)
    """Config files of every finetuning."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of every finetuning, on top of them."""
    factors: dict[str, Any] = field(default_factory=dict)
    """Factor → its values: a list of values of the setting of that name, or names with the settings
    of each. The last varies fastest."""
    only: dict[str, list[Any]] = field(default_factory=dict)
    """Factor → those of its values that are runs; default all (`only.model=[PDDFormer]`)."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Combinations, or parts of some, that are no runs."""
    hardware: str = ""
    """Preset of configs/hardware that every run takes, by name: `h200`."""
    rates: dict[str, float] = field(default_factory=dict)
    """Crystals/s of one device by stage (`rates.vae=…`), for the costs that are shown; default what
    was measured on the preset."""
    skip_missing: bool = False
    """Leave out the runs whose data set is not there, instead of stopping."""
