"""Speed of preparing data on one core: crystals per second from CIF text of every dialect and from
JSON.

    python benchmarks/prepare.py data=DIR            a data set made by launch/prepare.py
    … crystals=1000 repeats=5

Crystals of the data set are written as the files they might have come from, CSVs with a `cif`
column and JSON in the JARVIS layout, and prepared again with one process. The dialects of CIF are
pymatgen's without symmetry (as in CDVAE's files), pymatgen's with symmetry (`symprec=0.01`), the
same with the symbol in place of the operations, and ASE's. `parse` is from a record of the file to
a checked crystal, `all` from the file to finished shards: two passes over the records, parsing,
checks, writing. `pymatgen` is `Structure.from_str` on the same CIF text, `gemmi` its SmallStructure
with all atoms of the cell. They run in alternation; times are CPU time of all processes, the best
of the repeats. The last line is the table as JSON.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ase.io
import gemmi
import numpy as np
from ase.data import chemical_symbols
from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter

from benchmarks.tables import show
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.prepare import prepare
from crysforge.datapipe.sources import Options, Reading, read_raw, resolve
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    data: str = ""
    """Data set directory."""
    crystals: int = 500
    """Crystals to write and read, spread evenly over the data set."""
    repeats: int = 3
    """Runs of each measurement; the fastest counts."""


def main() -> None:
    config = parse(BenchmarkConfig, __doc__)
    required(config, "data", "crystals", "repeats")
    warnings.simplefilter("ignore")
    crystals = read(config)
    with tempfile.TemporaryDirectory(prefix="crysforge-") as folder:
        rows = []
        for name, write in DIALECTS.items():
            cifs = [write(crystal) for crystal in crystals]
            path = write_csv(f"{folder}/crystals.csv", crystals, cifs)
            rows.append(measure(f"CIF, {name}", path, cifs, config.repeats))
        path = write_json(f"{folder}/crystals.json", crystals)
        rows.append(measure("JSON", path, [], config.repeats))
    atoms = np.mean([len(c) for c in crystals])
    print(f"{len(crystals)} crystals of {Path(config.data).name}, {atoms:.1f} atoms on average\n")
    show(rows, {"data": config.data, "crystals": len(crystals)})


def read(config: BenchmarkConfig) -> list[Crystal]:
    """Crystals spread evenly over the data set."""
    dataset = Dataset.open(config.data)
    items = np.unique(np.linspace(0, len(dataset) - 1, config.crystals).astype(np.int64))
    return [c for _, c in dataset.read(items) if isinstance(c, Crystal)]


def plain(crystal: Crystal) -> str:
    """CIF text as pymatgen writes it."""
    return str(CifWriter(crystal.to_pymatgen()))


def symmetric(crystal: Crystal) -> str:
    """CIF text as pymatgen writes it when it looks for symmetry."""
    return str(CifWriter(crystal.to_pymatgen(), symprec=0.01))


def by_ase(crystal: Crystal) -> str:
    """CIF text as ASE writes it."""
    text = io.BytesIO()
    ase.io.write(text, crystal.to_ase(), format="cif")
    return text.getvalue().decode()


def by_symbol(crystal: Crystal) -> str:
    """CIF text with the symbol of the space group in place of the operations."""
    lines = symmetric(crystal).split("\n")
    first = next(i for i, line in enumerate(lines) if "_symmetry_equiv_pos_site_id" in line)
    last = next(i for i in range(first + 2, len(lines)) if lines[i].startswith("loop_"))
    return "\n".join([*lines[: first - 1], *lines[last:]])


DIALECTS: dict[str, Callable[[Crystal], str]] = {
    "pymatgen P 1": plain,
    "pymatgen symmetric": symmetric,
    "symbol alone": by_symbol,
    "ASE": by_ase,
}


def with_gemmi(text: str) -> Any:
    """All atoms of the cell as gemmi expands them."""
    block = gemmi.cif.read_string(text).sole_block()
    return gemmi.make_small_structure_from_block(block).get_all_unit_cell_sites()


def write_csv(path: str, crystals: list[Crystal], cifs: list[str]) -> str:
    """A CSV with the columns material_id, y and cif."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["material_id", "y", "cif"])
        table.writerows(zip((c.id for c in crystals), range(len(cifs)), cifs, strict=True))
    return path


def write_json(path: str, crystals: list[Crystal]) -> str:
    """A list of {jid, y, atoms} as JARVIS writes it."""
    records = [
        {
            "jid": c.id,
            "y": number,
            "atoms": {
                "lattice_mat": c.lattice.tolist(),
                "coords": c.frac_coords.tolist(),
                "elements": [chemical_symbols[z] for z in c.numbers],
                "cartesian": False,
            },
        }
        for number, c in enumerate(crystals)
    ]
    Path(path).write_text(json.dumps(records), encoding="utf-8")
    return path


SHORT = 10
"""Times that what takes a moment is measured in each repeat."""


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(name: str, path: str, cifs: list[str], repeats: int) -> dict[str, Any]:
    """A row of the table."""
    raws = list(read_raw(path, resolve(path), Options()))
    gc.freeze()  # as in the processes that parse
    parse_one = Reading(("y",), Filters())

    def whole() -> None:
        with tempfile.TemporaryDirectory(prefix="crysforge-") as folder:
            prepare(
                PrepareConfig(
                    input=path,
                    output=f"{folder}/d",
                    targets=["y"],
                    workers=1,
                    progress=False,
                    cell="as_is",
                )
            )

    works: dict[str, Callable[[], Any]] = {
        "all": whole,
        "parse": lambda: [parse_one(raw) for raw in raws],
    }
    if cifs:
        works["pymatgen"] = lambda: [Structure.from_str(text, fmt="cif") for text in cifs]
        works["gemmi"] = lambda: [with_gemmi(text) for text in cifs]
    best = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for kind, work in works.items():
            for _ in range(SHORT if kind in ("parse", "gemmi") else 1):
                began = cpu_seconds()
                work()
                best[kind] = min(best[kind], cpu_seconds() - began)
    rates = {kind: len(raws) / seconds for kind, seconds in best.items()}
    ratio = rates["parse"] / rates["pymatgen"] if cifs else None
    return {
        "source": name,
        "all, crystals/s": round(rates["all"]),
        "parse, crystals/s": round(rates["parse"]),
        "pymatgen, crystals/s": round(rates["pymatgen"]) if cifs else None,
        "gemmi, crystals/s": round(rates["gemmi"]) if cifs else None,
        "parse : pymatgen": round(ratio, 1) if ratio else None,
    }


if __name__ == "__main__":
    run(main)
