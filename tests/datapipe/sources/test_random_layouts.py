"""Tables and folders drawn at random from all that people do at once: labels stay with their
crystals."""

from __future__ import annotations

import csv
import gzip
import io
import random
import shutil
from pathlib import Path

import pytest

from crysforge.datapipe.crystals.crystal import Crystal
from tests.salts import GAPS, TEXTS, N, put, read, salt

NAMES = ["salt{}.cif", "cifs/salt{}.cif", "data/a/salt{}.cif", "salt{}/x/out.cif", "{:04d}.cif"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1"]
MISSING = ["N/A", "None", "-", "nan", "NULL"]


def draw_table(r: random.Random, cells: list[dict[str, str]], names: dict[str, list[str]], seps):
    """A table's bytes and the crystals whose label is left out of it."""
    separator, end = r.choice(seps), r.choice(["\n", "\r\n", "\r"])
    comma = separator != "," and r.random() < 0.5
    missing = {i for i in range(N) if r.random() < 0.2}
    word = r.choice(MISSING)
    rows = []
    for i, cell in enumerate(cells):
        gap = f"{GAPS[i]:.2f}".replace(".", ",") if comma else str(GAPS[i])
        note = {"note": r.choice(["Grün", "a;b", "x,y", "1"])} if separator != " " else {}
        rows.append({**cell, "gap": word if i in missing else gap, **note})
    r.shuffle(rows)
    columns = [c for c in rows[0] if c != "note"]
    headed = r.random() < 0.7
    if headed:
        columns = list(rows[0])
        r.shuffle(columns)
    text = io.StringIO()
    quoting = csv.QUOTE_ALL if end == "\r" or r.random() < 0.5 else csv.QUOTE_MINIMAL
    writer = csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting)
    if r.random() < 0.2 and separator != " ":
        text.write(f"# a remark, with all; kinds\tof | signs{end}")
    if headed:
        writer.writerow([r.choice(names[c]) for c in columns])
    for row in rows:
        writer.writerow([row[c] for c in columns])
        text.write(end if r.random() < 0.1 else "")
    return text.getvalue().encode(r.choice(ENCODINGS)), missing


def check(found, missing):
    assert [f for f in found if not isinstance(f, Crystal)] == []
    known = {tuple(salt(i)): i for i in range(N)}
    labels = {known[tuple(sorted(c.numbers.tolist()))]: c.targets["gap"] for c in found}
    assert len(found) == len(labels) == N
    for i, label in labels.items():
        assert label != label if i in missing else label == pytest.approx(GAPS[i], abs=1e-9), i


LABELS = {"gap": ["gap", "Gap", " gap", "GAP"], "note": ["note", "Bemerkung"]}


@pytest.mark.parametrize("seed", range(40))
def test_files_with_a_table(tmp_path, seed):
    r = random.Random(seed)
    name = r.choice(NAMES)
    folder = put(tmp_path / "set", name)
    place = r.choice(["path", "base", "stem"])

    def called(i: int) -> str:
        path = Path(name.format(i))
        if path.name == "out.cif":
            return str(path) if place == "path" else f"salt{i}"
        return {"path": str(path), "base": path.name, "stem": path.stem}[place]

    names = {"id": ["id", "Sample", "file", "Größe", "probe"], **LABELS}
    cells = [{"id": called(i)} for i in range(N)]
    data, missing = draw_table(r, cells, names, [",", ";", "\t", "|", " "])
    where = r.choice(["inside", "apart", "input"])
    table = tmp_path / "labels.csv" if where == "apart" else folder / r.choice(["t.csv", "d.txt"])
    if where == "inside":
        table = folder / r.choice(["", "tables", "cifs"]) / table.name
    table.parent.mkdir(exist_ok=True)
    table.write_bytes(data)
    source = table if where == "input" else folder
    if where != "input" and r.random() < 0.5:
        kind = r.choice(["zip", "gztar"])
        source = Path(shutil.make_archive(str(tmp_path / "p"), kind, tmp_path, "set"))
    check(read(source, **({"labels": str(table)} if where == "apart" else {})), missing)


@pytest.mark.parametrize("seed", range(30))
def test_tables_of_structures(tmp_path, seed):
    r = random.Random(seed)
    names = {
        "id": ["material_id", "ID", "Sample", "jid"],
        "cif": ["cif", "CIF", " cif ", "structure", "Kristall", '"cif"'],
        **LABELS,
    }
    cells = [{"id": f"salt{i}", "cif": TEXTS[i]} for i in range(N)]
    data, missing = draw_table(r, cells, names, [",", ";", "\t", "|"])
    folder = tmp_path / "set"
    folder.mkdir()
    source = folder / r.choice(["a.csv", "b.tsv", "c.txt", "d.csv.gz"])
    source.write_bytes(gzip.compress(data) if source.suffix == ".gz" else data)
    way = r.choice(["file", "folder", "zip"])
    if way == "zip" and source.suffix == ".csv":
        (folder / "README.md").touch()
        source = Path(shutil.make_archive(str(folder), "zip", tmp_path, "set"))
    check(read(folder if way == "folder" else source), missing)
