"""Prepares a data set: files of crystals to shards, in parallel.

    python launch/prepare.py input=mp20.csv output=data/mp20 targets=[formation_energy_per_atom]
    python launch/prepare.py input=cifs/ output=data/mine targets=[band_gap]    CIFs and a table
    python launch/prepare.py input=cifs/ labels=gaps.csv output=data/mine targets=[band_gap]
    python launch/prepare.py train=train.csv val=val.csv test=test.csv output=data/perov5 \\
        targets=[heat_ref]
    python launch/prepare.py input=prototypes size=2000 output=data/demo targets=[ewald_energy]
    python launch/prepare.py input=dft_3d.json output=data/jarvis targets=[mbj_bandgap] \\
        split=published-123
    python launch/prepare.py input=cifs/ output=data/mine targets=[band_gap] split_by=formula
    python launch/prepare.py input=cifs/ output=data/mine targets=[band_gap] folds=5
    python launch/prepare.py input=gnome/ output=data/gnome dedup=[data/mp20,data/jarvis] \\
        duplicates.splits=[val,test] duplicates.within=true

Reads tables with structures or names of files, folders and archives of CIF or POSCAR files (with
a table of labels or without), JARVIS, MEGNet, Matbench, pymatgen and OQMD JSON, extxyz, ASE
databases, GNoME, SuperCon3D, and data sets prepared before. Bad crystals are listed in dropped.csv.

Cells are reduced to primitive ones, so that a material is the same whatever cell it came in;
cell=as_is leaves them alone. Labels of the cell (a total energy) are named in extensive=[…].

What can be done with data sets; each action has settings of its own (add --help):

    python launch/prepare.py verify=DIR                    names every problem; exit code 1 if any
    python launch/prepare.py inspect=DIR                   statistics, and histograms.png beside
    python launch/prepare.py merge=[DIR,DIR] output=DIR
    python launch/prepare.py subset=DIR output=DIR filters.atoms=[2,40] count=1000
    python launch/prepare.py reshard=DIR output=DIR shard_size=5000
    python launch/prepare.py bake=DIR output=DIR encoders=[pddformer]      graphs in the shards
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose(1)  # the work is shared out to processes

from crysforge.datapipe.common.escape import one_line
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.edit_configs import (
    BakeConfig,
    InspectConfig,
    MergeConfig,
    ReshardConfig,
    SubsetConfig,
    VerifyConfig,
)
from crysforge.datapipe.storage.manifest import Manifest
from crysforge.datapipe.storage.remote import join_path, local_path
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import CONTINUES, STARTS_ANEW, run


def make() -> None:
    config = parse(PrepareConfig, __doc__)
    from crysforge.datapipe.preparing.prepare import prepare
    from crysforge.datapipe.preparing.write import plan, summary

    if config.dry_run:
        print(plan(config))
    else:
        announce(config)
        print(summary(prepare(config), config.output))


def announce(config) -> None:
    """Says beside the progress bars how the work is shared out."""
    if config.progress:
        workers = config.workers or threads.share_of(os.environ).cpus
        print(f"workers: {workers}; {threads.describe()}", file=sys.stderr, flush=True)


def check() -> None:
    config = parse(VerifyConfig, __doc__)
    required(config, "verify")
    from crysforge.datapipe.preparing.verify import verify

    Manifest.load(config.verify)  # an error stands alone
    announce(config)
    count = 0
    for problem in verify(config):
        print(one_line(problem))
        count += 1
    print(f"{config.verify}: {count or 'no'} problem{'' if count == 1 else 's'}")
    if count:
        raise SystemExit(1)


def look() -> None:
    config = parse(InspectConfig, __doc__)
    required(config, "inspect")
    local = local_path(config.inspect)
    if local is None:
        required(config, "output")
    from crysforge.datapipe.preparing.inspect import columns, describe, statistics
    from crysforge.trainer.figures.data_figures import histograms

    Manifest.load(config.inspect)  # an error stands alone
    announce(config)
    found = statistics(config)
    print(describe(found))
    path = config.output or join_path(local or "", "histograms.png")
    histograms(found.atoms, found.elements, *columns(found), path)
    print(f"histograms: {path}")


@dataclass(kw_only=True)
class BakeEncodersConfig(BakeConfig):
    """Settings of `bake` with encoders."""

    encoders: list[str] = field(default_factory=list)
    """Whose graphs to store: encoders by name, or config files (.yaml) with an `encoder` section,
    that of a run too."""


def bake_graphs() -> None:
    config = parse(BakeEncodersConfig, __doc__)
    required(config, "bake", "encoders", "output")
    from crysforge.datapipe.preparing.bake import bake
    from crysforge.datapipe.preparing.write import summary
    from crysforge.trainer.jobs.starting import graph_of

    announce(config)
    manifest = Manifest.load(config.bake)
    specs = (graph_of(encoder, manifest) for encoder in config.encoders)
    print(summary(bake(config, specs), config.output))


EDITS: dict[str, type] = {"merge": MergeConfig, "subset": SubsetConfig, "reshard": ReshardConfig}


def edit(name: str) -> None:
    config: Any = parse(EDITS[name], __doc__)
    required(config, "output")
    from crysforge.datapipe.preparing.edit import merge, reshard, subset
    from crysforge.datapipe.preparing.write import summary

    actions: dict[str, Any] = {"merge": merge, "subset": subset, "reshard": reshard}
    print(summary(actions[name](config), config.output))


ACTIONS: dict[str, Callable[[], None]] = {
    "verify": check,
    "inspect": look,
    "bake": bake_graphs,
    **{name: partial(edit, name) for name in EDITS},
}


def again() -> str:
    """What the same command does after an interrupt: it goes on where a search for duplicates or
    groups has kept what it found."""
    output = next((a.partition("=")[2] for a in sys.argv if a.startswith("output=")), "")
    root = Path(output).resolve()
    kept = (root.parent / f".{root.name}.{purpose}" for purpose in ("dedup", "groups"))
    return CONTINUES if output and any(path.is_dir() for path in kept) else STARTS_ANEW


def main() -> None:
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    action = next((act for name, act in ACTIONS.items() if name in given), make)
    action()


if __name__ == "__main__":
    run(main, again=again)
