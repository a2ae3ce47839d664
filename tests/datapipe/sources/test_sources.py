"""Readers: every layout gives the crystals that were written, and says what is wrong with which."""

import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp import Poscar

from crysforge.datapipe.common.workers import Workers
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.sources import (
    SOURCES,
    Failure,
    Options,
    guess,
    read_crystals,
    read_raw,
)
from crysforge.datapipe.sources.json_stream import JsonText
from tests.layouts import (
    LAYOUTS,
    N,
    archive_tar,
    archive_zip,
    assert_same,
    cif,
    csv_cdvae,
    extxyz,
    files,
    ids,
    jarvis_atoms,
    json_megnet,
    labels,
    make_structure,
    write_table,
    write_text,
)


@pytest.fixture(scope="module")
def structures() -> list[Structure]:
    rng = np.random.default_rng(0)
    return [make_structure(rng) for _ in range(N)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layout_gives_the_crystals_that_were_written(layout, tmp_path, structures):
    path, format, labelled = layout(tmp_path, structures)
    assert guess(path) == format
    targets = ["e_form"] if labelled else []
    found = list(read_crystals(str(path), targets=targets, workers=1))
    assert not [str(f) for f in found if isinstance(f, Failure)]
    by_id = {c.id: c for c in found}
    assert set(by_id) == set(ids())
    # POSCAR and CIF text carry 8 digits or more, ASE's extxyz too
    for i, structure in enumerate(structures):
        assert_same(by_id[f"c{i}"], structure, 2e-5)
        if labelled:
            assert by_id[f"c{i}"].targets == labels(i)


def test_single_structure_file(tmp_path, structures):
    (tmp_path / "one.cif").write_text(cif(structures[0]))
    (crystal,) = read_crystals(str(tmp_path / "one.cif"))
    assert crystal.id == "one"


def test_single_pymatgen_json(tmp_path, structures):
    write_text(tmp_path / "one.json", structures[0].to_json())
    (crystal,) = read_crystals(str(tmp_path / "one.json"))
    assert_same(crystal, structures[0])


def test_prototypes_are_the_same_in_any_process():
    options = Options(size=200, seed=3)
    names = ["ewald_energy", "density"]
    found = []
    for workers in (1, 2):
        stream = read_crystals("prototypes", targets=names, options=options, workers=workers)
        found.append([(c.id, c.targets) for c in itertools.islice(stream, 40)])
    assert found[0] == found[1]
    assert all(set(targets) == set(names) for _, targets in found[0])


def test_missing_labels_are_nan_and_garbage_is_a_failure(tmp_path, structures):
    values = ["", "na", "1.5", "abc", "inf", "nan", "NA"]
    rows = [[f"c{i}", cif(structures[0]), v] for i, v in enumerate(values)]
    path = write_table(tmp_path / "x.csv", ["id", "cif", "gap"], rows)
    found = list(read_crystals(str(path), targets=["gap"]))
    kinds = ["bad" if isinstance(f, Failure) else f.targets["gap"] for f in found]
    np.testing.assert_equal(kinds, [np.nan, np.nan, 1.5, "bad", "bad", np.nan, np.nan])
    assert "x.csv row 4 (id 'c3'): label 'gap' is 'abc'" in str(found[3])
    assert {f.reason for f in found if isinstance(f, Failure)} == {"bad label"}


def test_json_null_na_and_nan_are_missing_but_infinity_is_not(tmp_path, structures):
    atoms = jarvis_atoms(structures[0], False)
    text = json.dumps(
        [
            {"jid": f"c{i}", "atoms": atoms, "gap": v}
            for i, v in enumerate([None, "na", float("nan"), 2, float("inf")])
        ]
    )
    write_text(tmp_path / "x.json", text)
    found = list(read_crystals(str(tmp_path / "x.json"), targets=["gap"]))
    kinds = ["bad" if isinstance(f, Failure) else f.targets["gap"] for f in found]
    np.testing.assert_equal(kinds, [np.nan, np.nan, np.nan, 2.0, "bad"])


# What cannot be used


def one_row(tmp_path: Path, text: str) -> Failure:
    path = write_table(tmp_path / "bad.csv", ["material_id", "cif"], [["mp-17", text]])
    (failure,) = read_crystals(str(path))
    assert isinstance(failure, Failure)
    assert failure.id == "mp-17" and failure.where == "bad.csv row 1"
    return failure


GOOD = cif(Structure(Lattice.cubic(5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
SMALL = cif(Structure(Lattice.cubic(0.3), ["Na"], [[0, 0, 0]]))


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        ("what is this", "unreadable", "neither a CIF nor a POSCAR"),
        ("", "unreadable", "neither"),
        (GOOD[: GOOD.index("_atom_site_fract_z")], "unreadable", ""),
        (GOOD.replace("  1\n", "  0.5\n"), "partial occupancy", "partial occupancy at site 0"),
        (GOOD.replace("  Na  Na0", "  Zz  Zz0"), "unknown element", "'Zz'"),
        (GOOD.replace("  Na  Na0", "  Bx  Bx0"), "unknown element", "'Bx'"),
        (GOOD.replace("0.50000000", "0.05000000"), "atoms too close", "0 (Na) and 1 (Cl) are 0.43"),
        (GOOD.replace("5.00000000", "0.30000000"), "contradiction", "_cell_volume is"),
        (SMALL, "atoms too close", "Å apart"),
        (GOOD.replace("90.00000000", "0.00000000"), "unusable structure", "cell"),
        (GOOD + GOOD.replace("data_NaCl", "data_again"), "unusable structure", "2 structures"),
    ],
    ids=["text", "empty", "cut", "occupancy", "element", "near-element", "close", "volume", "image",
         "flat", "two"],
)  # fmt: skip
def test_bad_structures_say_why(tmp_path, text, reason, words):
    failure = one_row(tmp_path, text)
    assert failure.reason == reason
    assert words in failure.message
    assert "\n" not in str(failure)


def test_vasp4_poscar_is_not_read_as_hydrogen(tmp_path):
    lines = str(Poscar(Structure(Lattice.cubic(4), ["Cu"], [[0, 0, 0]]))).splitlines()
    text = "\n".join(["no names", *lines[1:5], *lines[6:8], "0 0 0"])
    assert "does not name its 1 elements" in one_row(tmp_path, text).message


def test_partial_occupancy_and_unknown_element_in_json(tmp_path):
    structure = Structure(Lattice.cubic(4), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    dummy = jarvis_atoms(Structure(Lattice.cubic(4), ["Cu"], [[0, 0, 0]]), False)
    records = [{"id": "alloy", "structure": structure.as_dict()},
               {"id": "odd", "atoms": dummy | {"elements": ["Qq"]}},
               {"id": "bare", "atoms": {"elements": ["Cu"]}},
               {"id": "nothing", "formula": "Cu"}, 17]  # fmt: skip
    write_text(tmp_path / "x.json", json.dumps(records))
    found = list(read_crystals(str(tmp_path / "x.json")))
    assert [f.reason for f in found] == [
        "partial occupancy", "unknown element", "unreadable", "unreadable", "unreadable"
    ]  # fmt: skip
    assert "Cu:0.5, Au:0.5" in found[0].message or "Au:0.5, Cu:0.5" in found[0].message
    assert "'Qq'" in found[1].message and "'coords'" in found[2].message


def test_duplicate_ids_are_failures(tmp_path):
    path = write_table(tmp_path / "x.csv", ["id", "cif"], [["a", GOOD], ["b", GOOD], ["a", GOOD]])
    found = list(read_crystals(str(path)))
    assert [getattr(f, "reason", "ok") for f in found] == ["ok", "ok", "duplicate id"]


def test_listed_file_that_is_missing_and_file_that_is_not_listed(tmp_path, structures):
    folder = files(tmp_path / "cifs", structures, table=False)
    (folder / "id_prop.csv").write_text("c1,0.5\nghost,1\n")
    found = {r.id: r for r in read_crystals(str(folder))}
    assert isinstance(found["c1"], Crystal)
    assert found["ghost"].reason == "missing file" and found["ghost"].bad
    assert found["c2"].reason == "not listed" and not found["c2"].bad


@pytest.mark.parametrize("pack", ["zip", "gztar"])
def test_file_that_is_listed_twice_keeps_its_first_label(tmp_path, structures, pack):
    folder = files(tmp_path / "cifs", structures[:2], table=False)
    (folder / "id_prop.csv").write_text("c0,1\nc1,2\nc0,3\n")
    path = shutil.make_archive(str(tmp_path / "packed"), pack, folder)
    found = sorted(read_crystals(path, targets=["gap"]), key=lambda c: isinstance(c, Failure))
    assert {c.id: c.targets["gap"] for c in found[:2]} == {"c0": 1, "c1": 2}
    assert [(f.id, f.reason) for f in found[2:]] == [("c0", "duplicate id")]


@pytest.mark.parametrize("layout", [csv_cdvae, json_megnet, extxyz, archive_tar, archive_zip])
def test_cut_file_is_one_clear_error(layout, tmp_path, structures):
    path, _, _ = layout(tmp_path, structures)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=path.name):
        list(read_crystals(str(path), format=guess_by_name(path)))


def guess_by_name(path: Path) -> str:
    return (
        next(
            f for s, f in {"csv": "csv", "json": "json", "xyz": "extxyz"}.items() if s in path.name
        )
        if "cifs" not in path.name
        else "folder"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "id,structure_text\n1,2\n", "no column 'cif'.*one of id, structure_text"),
        ("x.csv", "", "x.csv is empty"),
        ("x.csv", "id,cif\n", "x.csv holds no crystals"),
        ("x.json", "[]", "x.json holds no crystals"),
        ("x.json", '[{"id": 1}, {"id"', "x.json.*not complete JSON"),
        ("x.json", "hello", "x.json.*neither a list nor an object"),
        ("x.extxyz", "two\n", "frame 1 should start with a number of atoms, found 'two'"),
        ("x.extxyz", "2\nLattice\nH 0 0 0\n", "frame 1 ends before its 2 atoms"),
        ("x.db", "not sqlite" * 100, "x.db: not an ASE database"),
        ("x.dat", "?", "cannot tell what .*x.dat is.*give format=…, one of ase-db, cif, csv"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        list(read_crystals(str(tmp_path / name)))


def test_empty_folder_and_missing_input(tmp_path):
    with pytest.raises(ValueError, match="is empty: give a folder"):
        list(read_crystals(str(tmp_path)))
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        list(read_crystals(str(tmp_path / "nowhere")))
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(ValueError, match="holds no structure files"):
        list(read_crystals(str(tmp_path)))


def test_data_sets_of_the_papers_say_where_they_come_from():
    with pytest.raises(ValueError, match=r"'MP_20' is not on this machine\. Get it from .*cdvae"):
        list(read_crystals("MP_20"))


def test_name_of_a_data_set_is_a_format(tmp_path, structures):
    path, _, _ = csv_cdvae(tmp_path, structures)
    assert len(list(read_crystals(str(path), format="mp-20"))) == N
    with pytest.raises(ValueError, match=r"unknown format 'cvs': did you mean 'csv'\?"):
        list(read_crystals(str(path), format="cvs"))


def test_chosen_columns(tmp_path, structures):
    rows = [["u", "v", cif(structures[0])]]
    path = write_table(tmp_path / "x.csv", ["material_id", "name", "text"], rows)
    options = Options(id_column="name", structure_column="text")
    (crystal,) = read_crystals(str(path), options=options)
    assert crystal.id == "v"
    with pytest.raises(ValueError, match=r"no id column 'nam': did you mean 'name'"):
        list(read_raw(str(path), options=Options(id_column="nam", structure_column="text")))
    with pytest.raises(ValueError, match=r"no structure column 'txt': did you mean 'text'"):
        list(read_raw(str(path), options=Options(structure_column="txt")))


def test_ragged_row_and_empty_id(tmp_path):
    rows = [["a", GOOD, "1"], ["b", GOOD], ["", GOOD, "1"]]
    path = write_table(tmp_path / "x.csv", ["id", "cif", "gap"], rows)
    found = list(read_crystals(str(path), targets=["gap"]))
    assert [getattr(f, "reason", "ok") for f in found] == ["ok", "unreadable", "no id"]
    assert "2 fields, the header has 3" in found[1].message


def test_columns_of_id_prop_need_as_many_targets(tmp_path, structures):
    folder = files(tmp_path / "cifs", structures[:2], table=False)
    (folder / "id_prop.csv").write_text("c0,1,2\nc1,3,4\n")
    found = list(read_crystals(str(folder), targets=["a", "b"]))
    assert [c.targets for c in found] == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    with pytest.raises(ValueError, match=r"id_prop.csv has 2 label column\(s\).*targets names 1"):
        list(read_crystals(str(folder), targets=["a"]))
    (folder / "id_prop.csv").write_text("c0,1,2\nc1,3\n")
    with pytest.raises(ValueError, match=r"id_prop.csv line 2 has 2 fields, line 1 has 3"):
        list(read_crystals(str(folder)))


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_json_is_streamed_in_pieces_of_any_size(chunk):
    values = [12, -3.5e-7, 'a"b,]', None, True, [], {}, [1, [2, {"x": [3]}]], 123456789]
    text = JsonText(io.StringIO(json.dumps(values, indent=2)), chunk)
    assert list(text.items()) == values
    assert text.peek() == ""
    mapping = {"a": 1, "b": [2, 3], "c": {"d": "e"}}
    text = JsonText(io.StringIO(json.dumps(mapping)), chunk)
    assert {key: text.value() for key in text.keys()} == mapping  # noqa: SIM118
    for broken in ("[1, 2", "[1 2]", '{"a" 1}', '["a'):
        with pytest.raises(ValueError, match="JSON"):
            text = JsonText(io.StringIO(broken), chunk)
            list(text.items() if broken[0] == "[" else text.keys())


def test_every_source_documents_itself():
    for name in SOURCES:
        assert SOURCES[name].read.__doc__, name


# Processes


def double(x: int) -> int:
    if x == 999:
        raise KeyError("boom")
    return 2 * x


@pytest.mark.parametrize("count", [1, 2, 3])
def test_workers_keep_the_order(count):
    with Workers(double, count) as workers:
        assert list(workers.map(iter(range(500)))) == [2 * x for x in range(500)]
        assert list(workers.map([])) == []


def test_failure_in_a_worker_ends_the_run():
    with Workers(double, 2) as workers, pytest.raises(RuntimeError, match="boom"):
        list(workers.map(range(2000)))


def test_killed_worker_ends_the_run():
    with Workers(double, 2) as workers:
        results = workers.map(range(10_000))
        next(results)
        workers._processes[1].kill()
        workers._processes[1].join()
        with pytest.raises(ChildProcessError, match="was killed"):
            list(results)


def test_workers_take_large_items():
    with Workers(len, 2) as workers:
        assert list(workers.map(["x" * 200_000] * 200)) == [200_000] * 200
