"""Prepares a data set: files of crystals to shards, in parallel.

    python launch/prepare.py input=mp20.csv output=data/mp20 targets=[formation_energy_per_atom]
    python launch/prepare.py input=cifs/ output=data/mine targets=[band_gap]    CIFs, id_prop.csv
    python launch/prepare.py train=train.csv val=val.csv test=test.csv output=data/perov5 \\
        targets=[heat_ref]
    python launch/prepare.py input=prototypes size=2000 output=data/demo targets=[ewald_energy]
    python launch/prepare.py input=dft_3d.json output=data/jarvis targets=[mbj_bandgap] \\
        split=published-123

Reads CSV with a `cif` column, folders and archives of CIF or POSCAR files (with id_prop.csv or
without), JARVIS, MEGNet, Matbench, pymatgen and OQMD JSON, extxyz, ASE databases, GNoME,
SuperCon3D, and data sets prepared before. Bad crystals are listed in dropped.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datapipe.prepare import PrepareConfig, plan, prepare, summary
from trainer.config import parse, run


def main() -> None:
    config = parse(PrepareConfig, __doc__)
    if config.dry_run:
        print(plan(config))
    else:
        print(summary(prepare(config), config.output))


if __name__ == "__main__":
    run(main)
