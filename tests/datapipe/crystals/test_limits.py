"""A crystal that would cost too much costs itself: it is refused before memory is taken, with the
limit named, and the searches that replace the unbounded ones find the same."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.db import connect
from hypothesis import given, settings
from hypothesis import strategies as st

from crysforge.datapipe.common.workers import Guard, Workers
from crysforge.datapipe.crystals import filters
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.filters import closest_pair, is_charge_neutral
from crysforge.datapipe.crystals.lattice import reduction
from crysforge.datapipe.crystals.limits import Limits, check_atoms, check_images
from crysforge.datapipe.crystals.pair_bound import PairBound
from crysforge.datapipe.graphs.lattice_sums import lattice_sums
from crysforge.datapipe.graphs.neighbours import lattice_triple, neighbours
from crysforge.datapipe.graphs.stored import StoredGraphs
from crysforge.datapipe.preparing.duplicates.matcher import Reduced
from crysforge.datapipe.preparing.duplicates.records import Duplicates
from crysforge.datapipe.schema import GraphSpec
from crysforge.datapipe.sources import Failure, Options, Reading, read_crystals
from crysforge.datapipe.storage.plain_tar import MAX_ENTRY, PlainEntries
from tests.conftest import make_crystal

CIF = """data_x
_cell_length_a 6
_cell_length_b 6
_cell_length_c 6
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F m -3 m'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na Na 0 0 0
Cl Cl 0.5 0.5 0.5
"""
KNN = GraphSpec(neighbors=8, pdd=8)


def cluster(n: int, box: float, seed: int = 0) -> Crystal:
    """Atoms about 2.5 Å apart in a corner of a cubic cell."""
    side = int(np.ceil(n ** (1 / 3)))
    grid = np.array(list(itertools.product(range(side), repeat=3)))[:n] * 2.5
    moved = grid + np.random.default_rng(seed).uniform(-0.3, 0.3, grid.shape)
    return Crystal.create("cluster", np.full(n, 6), moved / box + 0.1, np.eye(3) * box)


def skewed(rng: np.random.Generator, most: int) -> np.ndarray:
    """[3, 3] integers of determinant one."""
    out = np.eye(3, dtype=int)
    for i, j in ((1, 0), (2, 1), (0, 2)):
        out[i] += int(rng.integers(-most, most + 1)) * out[j]
    return out


def edges(crystal: Crystal, spec: GraphSpec, **limits) -> tuple[list, np.ndarray]:
    """Target and source of every edge, and its length in Å, in an order of their own."""
    graph = neighbours(crystal, spec, **limits)
    target, source, shell, _ = np.repeat(graph.edges, graph.edges[3], axis=1).astype(int)
    order = np.lexsort((graph.distances[shell], source, target))
    return np.stack([target, source])[:, order].tolist(), graph.distances[shell][order]


def same(one: tuple[list, np.ndarray], other: tuple[list, np.ndarray]) -> bool:
    return one[0] == other[0] and np.allclose(one[1], other[1], rtol=0, atol=3e-4)


# -- Geometry: the bounded searches find what the others find --------------------------------------


@given(seed=st.integers(0, 10_000), most=st.sampled_from([0, 1, 5, 1000]))
def test_a_reduced_basis_has_the_shortest_vectors_of_the_lattice(seed, most):
    rng = np.random.default_rng(seed)
    lattice = rng.uniform(-1, 1, (3, 3)) * rng.uniform(1, 9)
    if abs(np.linalg.det(lattice)) < 0.1:
        return
    change = reduction(skewed(rng, most) @ lattice) @ skewed(rng, 0)
    basis = reduction(lattice) @ lattice
    assert abs(round(np.linalg.det(change))) == 1
    steps = np.array([s for s in itertools.product(range(-3, 4), repeat=3) if any(s)])
    for k in range(3):  # Minkowski's conditions
        some = steps[np.gcd.reduce(steps[:, k:], axis=1) == 1]
        lengths = np.linalg.norm(some @ basis, axis=1)
        assert lengths.min() >= np.linalg.norm(basis[k]) * (1 - 1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), limit=st.integers(1_000, 30_000))
def test_a_graph_does_not_depend_on_the_limit(seed, n, limit):
    crystal = make_crystal(np.random.default_rng(seed), n)
    for spec in (KNN, GraphSpec(radius=4.0), GraphSpec(neighbors=6, lattice_edges="comformer")):
        try:
            found = edges(crystal, spec, max_pairs=limit)
        except BadCrystal as error:
            assert error.reason == "too many pairs" and f"max_pairs={limit}" in str(error)
        else:
            assert same(found, edges(crystal, spec))


def test_a_cluster_in_an_empty_cell_has_the_graph_of_the_cluster():
    there = edges(cluster(300, 60.0), KNN)
    assert same(edges(cluster(300, 3000.0), KNN), there)
    assert same(edges(cluster(300, 3000.0), KNN, max_pairs=400_000), there)
    radius = GraphSpec(radius=5.0)  # whose bins would fill the cell
    assert same(edges(cluster(60, 3000.0), radius), edges(cluster(60, 60.0), radius))


@pytest.mark.parametrize("most", [3, 30])
def test_a_skewed_cell_has_the_graph_of_the_crystal(most):
    rng = np.random.default_rng(1)
    crystal = make_crystal(rng, 6)
    change = skewed(rng, most)
    place = crystal.frac_coords @ np.linalg.inv(change)
    other = Crystal.create("skewed", crystal.numbers, place, change @ crystal.lattice)
    assert other.volume == pytest.approx(crystal.volume, rel=1e-6)
    assert same(edges(other, KNN), edges(crystal, KNN))
    vectors = GraphSpec(neighbors=8, vectors=True)
    graph = neighbours(other, vectors)
    lengths = np.linalg.norm(graph.vectors, axis=1)
    np.testing.assert_allclose(lengths, graph.distances[graph.edges[2]], atol=2e-3)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), radius=st.floats(0.5, 7))
def test_no_search_looks_at_more_than_was_counted(seed, n, radius):
    rng = np.random.default_rng(seed)
    crystal = make_crystal(rng, n)
    points = crystal.frac_coords @ crystal.lattice
    bound = PairBound(points, crystal.lattice, most=0)  # 0: every way of counting is tried
    steps = np.array(list(itertools.product(range(-5, 6), repeat=3))) @ crystal.lattice
    away = points[:, None, None] - points[None, :, None] + steps
    pairs = int((np.linalg.norm(away, axis=-1) < radius).sum())
    assert bound.work(radius) >= pairs
    assert bound._pairs_in_bins(radius) >= pairs


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), skew=st.sampled_from([0, 2, 9]))
def test_a_close_pair_is_found_among_many(seed, n, skew):
    rng = np.random.default_rng(seed)
    lattice = skewed(rng, skew) @ (np.eye(3) * rng.uniform(2, 9) + rng.uniform(-0.5, 0.5, (3, 3)))
    crystal = Crystal.create("x", np.full(n, 6), rng.random((n, 3)), lattice)
    cutoff = float(rng.uniform(0.1, 2))
    pair = filters._close_pair_of_many(crystal, cutoff)
    if skew < 9:
        few = closest_pair(crystal, cutoff)
        assert (pair is None) == (few is None)
    if pair is not None:
        i, j, distance = pair
        basis = reduction(crystal.lattice) @ crystal.lattice
        step = (crystal.frac_coords[i] - crystal.frac_coords[j]) @ crystal.lattice
        place = step @ np.linalg.inv(basis)
        images = np.array(list(itertools.product(range(-3, 4), repeat=3)))
        lengths = np.linalg.norm((place - np.rint(place) + images) @ basis, axis=1)
        assert distance < cutoff and np.abs(lengths - distance).min() < 1e-6


def test_lattice_sums_do_not_depend_on_how_many_atoms_are_looked_at_together(monkeypatch):
    crystal = make_crystal(np.random.default_rng(0), 17)
    points = crystal.frac_coords @ crystal.lattice
    whole = lattice_sums(points, crystal.lattice, 1.0)
    monkeypatch.setattr("crysforge.datapipe.graphs.lattice_sums._AT_ONCE", 800)
    np.testing.assert_allclose(lattice_sums(points, crystal.lattice, 1.0), whole, rtol=1e-12)


# -- Bombs: what would take gigabytes or hours is refused at once ----------------------------------

BOMBS = {
    "a far atom": lambda: neighbours(
        Crystal.create(
            "x",
            np.full(5001, 6),
            [[0.5, 0.5, 0.5], *cluster(5000, 3000.0).frac_coords],
            np.eye(3) * 3000,
        ),
        KNN,
    ),
    "a radius": lambda: neighbours(cluster(5000, 60.0), GraphSpec(radius=60.0)),
    "all in one place": lambda: neighbours(
        Crystal.create("x", np.full(9000, 6), np.zeros((9000, 3)), np.eye(3) * 50), KNN
    ),
    "all pairs": lambda: neighbours(cluster(5000, 60.0), GraphSpec(radius=3.0, pair_sums="scaled")),
}
NO_BOMBS = {
    "a cluster": lambda: neighbours(cluster(6000, 3000.0), KNN),
    "a needle": lambda: neighbours(
        Crystal.create("x", [6], [[0, 0, 0]], np.diag([1e-3, 1e3, 1e3])), KNN
    ),
    "a long cell": lambda: lattice_triple(np.diag([3.0, 3.0, 30_000.0])),
    "close pairs of a line": lambda: closest_pair(
        Crystal.create("x", [6], [[0, 0, 0]], np.diag([1e-5, 1e-5, 1e8])), 0.5
    ),
    "close pairs of many": lambda: closest_pair(cluster(20_000, 3000.0), 0.5),
    "close pairs in one place": lambda: closest_pair(
        Crystal.create("x", np.full(20_000, 6), np.zeros((20_000, 3)), np.eye(3) * 0.6), 0.5
    ),
    "charges": lambda: is_charge_neutral(
        Crystal.create("x", [3] * 19_997 + [8] * 3, np.zeros((20_000, 3)), np.eye(3) * 90)
    ),
}


@pytest.mark.parametrize("name", [*BOMBS, *NO_BOMBS])
def test_a_bomb_takes_neither_memory_nor_time(name):
    """In a process that has 1.5 GB and ten seconds of processor time for it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            Guard(print, 10.0, 3 << 29).limit_memory()
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, 10.0)
            (BOMBS | NO_BOMBS)[name]()
            status = 0 if name in NO_BOMBS else 2
        except BadCrystal as error:
            status = 0 if name in BOMBS and "max_pairs=10000000" in str(error) else 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_charges_balance_as_pymatgen_says():
    from pymatgen.core import Composition

    for formula in ("NaCl", "Fe2O3", "Fe3O4", "NaCl2", "TiO2", "CuO", "LiFePO4", "Na3P", "KrF"):
        composition = Composition(formula)
        numbers = [e.Z for e, n in composition.items() for _ in range(int(n))]
        crystal = Crystal.create("x", numbers, np.zeros((len(numbers), 3)), np.eye(3))
        assert is_charge_neutral(crystal) == bool(composition.oxi_state_guesses()), formula


def test_what_is_not_compared_is_told(monkeypatch):
    with pytest.raises(ValueError, match=r"has 9 atoms, more than duplicates\.max_atoms=8"):
        Reduced(cluster(9, 10.0), 0, 8)
    with pytest.raises(ValueError, match=r"5e\+03 times as long as wide"):
        Reduced(Crystal.create("x", [6], [[0, 0, 0]], np.diag([2.0, 2.0, 1e4])), 0)
    with pytest.raises(ValueError, match=r"duplicates\.max_atoms must be at least 1"):
        Duplicates(max_atoms=0)


def test_a_stored_graph_has_no_more_edges_than_a_graph_may(random_crystal):
    stored = StoredGraphs(KNN, max_pairs=10_000)
    tensors = stored.tensors(neighbours(random_crystal(np.random.default_rng(0), 4), KNN))
    assert stored.find(tensors, 4) is not None
    name = f"{stored.key}.edges"
    tensors[name] = tensors[name].astype(np.uint32)
    tensors[name][3, 0] = 2**32 - 1  # as many edges of a plain graph
    with pytest.raises(BadCrystal, match=r"has 4\d{9} edges, more than max_pairs=10000"):
        stored.find(tensors, 4)


def test_an_entry_that_claims_gigabytes_is_none():
    import io
    import tarfile

    info = tarfile.TarInfo("000000000.safetensors")
    info.size = MAX_ENTRY + 1
    assert PlainEntries(io.BytesIO(info.tobuf())).read(1 << 10) == b""
    info.size = 100
    assert len(PlainEntries(io.BytesIO(info.tobuf() + bytes(512))).read(1 << 10)) == 1024


# -- Workers: an item that kills its process costs itself ------------------------------------------


def costly(item: str) -> str:
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "crashed":
        os.kill(os.getpid(), signal.SIGTRAP)
    if item == "exits":
        os._exit(3)
    if item == "slow":
        while True:
            pass
    if item == "large":
        try:
            np.ones(1 << 31)
        except MemoryError:
            return "no memory"
    return item.upper()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("ordered", [True, False])
def test_an_item_that_kills_its_process_costs_itself(count, ordered):
    guard = Guard(lambda item, reason: f"{item} {reason}", 0.2, 1 << 28)
    items = [f"item {i}" for i in range(100)]
    costs = {
        "killed": "killed killed its process, probably for want of memory",
        "crashed": "crashed ended its process (SIGTRAP)",
        "exits": "exits ended its process (status 3)",
        "slow": "slow took more than 0.2 s of processor time",
        "large": "no memory",
    }
    for place, item in zip((3, 4, 50, 70, 99), costs, strict=True):
        items[place] = item
    with Workers(costly, count, guard) as workers:
        found = list(workers.map(iter(items), chunk=8, ordered=ordered))
        again = list(workers.map(["a", "b"]))
    expected = [costs.get(item, item.upper()) for item in items]
    assert found == expected if ordered else sorted(found) == sorted(expected)
    assert again == ["A", "B"]


def test_a_process_that_is_killed_from_outside_costs_nothing():
    guard = Guard(lambda item, reason: f"lost: {item}", 60.0, 1 << 28)
    with Workers(costly, 2, guard) as workers:
        results = workers.map(str(i) for i in range(2000))
        found = [next(results)]
        workers._processes[1].kill()
        found += results
    assert found == [str(i) for i in range(2000)]


# -- Sources ---------------------------------------------------------------------------------------


def test_atoms_and_images_are_checked_where_they_are_known(tmp_path):
    assert check_atoms(20_000) is None and check_images(192, 5000) is None
    with Limits(atoms=10, images=100).applied():
        with pytest.raises(BadCrystal, match=r"11 atoms, more than limits\.atoms=10"):
            check_atoms(11)
        with pytest.raises(BadCrystal, match=r"192 .* 2 sites are 384 .* limits\.images=100"):
            check_images(192, 2)
    (tmp_path / "x.cif").write_text(CIF)
    small, sites = (
        next(read_crystals(str(tmp_path), reading=Reading(limits=limits)))
        for limits in (Limits(atoms=7), Limits(images=300))
    )
    assert isinstance(small, Failure) and "limits.atoms=7" in small.message
    assert isinstance(sites, Failure) and "limits.images=300" in sites.message
    assert len(next(read_crystals(str(tmp_path)))) == 8
    for bad in ({"atoms": 0}, {"images": 0}, {"seconds": 0}, {"memory_gb": float("nan")}):
        with pytest.raises(ValueError, match=rf"limits\.{next(iter(bad))} must be"):
            Limits(**bad)


def test_a_crystal_that_takes_too_long_is_named_and_costs_itself(call, tmp_path):
    """`python launch/prepare.py` on 60 files of which one would take minutes."""
    sites = "\n".join(f"C{i} C 0.{i:04d} 0.{7 * i:05d} 0.{3 * i:05d}" for i in range(1, 5_200))
    for i in range(60):
        (tmp_path / "in").mkdir(exist_ok=True)
        text = CIF.replace("'F m -3 m'", "P1") if i != 30 else CIF.replace("6\n", "600\n") + sites
        (tmp_path / "in" / f"{i:02d}.cif").write_text(text)
    args = (
        f"input={tmp_path / 'in'}",
        f"output={tmp_path / 'out'}",
        "limits.seconds=0.1",
        "limits.atoms=2000000",
    )
    code, out, err = call("prepare", *args, "workers=2", "progress=false")
    assert code == 0, err
    assert "59 crystals" in out and "dropped 1" in out
    dropped = (tmp_path / "out" / "dropped.csv").read_text().splitlines()[1]
    assert dropped.startswith("30,in/30.cif,too costly,it took more than 0.1 s of processor time")
    assert "limits.seconds" in dropped


def frames(*counts: str) -> str:
    frame = 'Lattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\n'
    return "".join(
        f"{n}\n{frame}" + "".join(f"C {i} 0 0\n" for i in range(max(0, int(n)))) for n in counts
    )


@pytest.mark.parametrize("count", ["-1", "1_0", "+1", "1e3", "٣", "99999999999999"])
def test_a_frame_starts_with_a_number_of_atoms(tmp_path, count):
    (tmp_path / "x.xyz").write_text(frames("1") + f"{count}\nx\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.xyz frame 2 should start with a number of atoms"):
        list(read_crystals(str(tmp_path / "x.xyz")))


def test_frames_that_are_too_large_are_passed_over(tmp_path):
    path = tmp_path / "x.xyz"
    path.write_text(frames("1", "9", "0", "1"))
    one, nine, none, last = read_crystals(str(path), reading=Reading(limits=Limits(atoms=4)))
    assert len(one) == len(last) == 1 and "no atoms" in none.message
    assert "x.xyz frame 2" in str(nine) and "9 atoms, more than limits.atoms=4" in str(nine)
    path.write_text(frames("1") + "5000000\nx\n")
    with pytest.raises(ValueError, match="frame 2 ends before its 5000000 atoms"):
        list(read_crystals(str(path), reading=Reading(limits=Limits(atoms=4))))
    path.write_text(frames("1") + "x" * (1 << 23))
    with pytest.raises(ValueError, match=r"line 4 has more than \d+ characters"):
        list(read_crystals(str(path)))


def test_a_database_that_is_computed_is_refused_and_none_is_written_to(tmp_path):
    good = tmp_path / "good.db"
    with connect(good) as database:
        for i in range(3):
            database.write(bulk("NaCl", "rocksalt", 5.6), gap=float(i), name="x", flag=True)
    crystals = list(read_crystals(str(good), targets=["gap"]))
    assert [c.targets["gap"] for c in crystals] == [0, 1, 2] and len(crystals[0]) == 2
    columns = [row[1] for row in sqlite3.connect(good).execute("PRAGMA table_info(systems)")]
    shown = ", ".join("n.i AS id" if c == "id" else c for c in columns)
    endless = (
        "CREATE VIEW systems AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        f"SELECT {shown} FROM s2, n"
    )
    computed = ", ".join(f"{c} AS (zeroblob(9e8))" if c == "positions" else c for c in columns)
    for name, script in {
        "view": f"ALTER TABLE systems RENAME TO s2; {endless}",
        "virtual": "DROP TABLE systems; CREATE VIRTUAL TABLE systems USING fts5(id, numbers)",
        "computed": f"DROP TABLE systems; CREATE TABLE systems ({computed})",
        "none": "DROP TABLE systems",
    }.items():
        path = tmp_path / f"{name}.db"
        path.write_bytes(good.read_bytes())
        with sqlite3.connect(path) as database:
            database.executescript(script)
        database.close()
        before = path.read_bytes()
        with pytest.raises(ValueError, match=rf"{name}\.db: not an ASE database: .*'systems'"):
            list(read_crystals(str(path)))
        assert path.read_bytes() == before and len(list(tmp_path.glob(f"{name}.db*"))) == 1


def test_a_damaged_or_large_row_of_a_database_costs_itself(tmp_path):
    with connect(tmp_path / "x.db") as database:
        for size in (1, 2, 1):
            database.write(bulk("NaCl", "rocksalt", 5.6) * (size, 1, 1))
    with sqlite3.connect(tmp_path / "x.db") as database:
        database.execute("UPDATE systems SET positions = x'00' WHERE id = 3")
    database.close()
    one, large, damaged = read_crystals(
        str(tmp_path / "x.db"), options=Options(), reading=Reading(limits=Limits(atoms=2))
    )
    assert len(one) == 2
    assert "row 2" in str(large) and "4 atoms, more than limits.atoms=2" in str(large)
    assert "row 3" in str(damaged) and "its arrays are damaged" in str(damaged)


def test_memory_of_a_reader_is_bounded(tmp_path):
    """A POSCAR of 3,000,000 atoms."""
    head = "C\n1.0\n900 0 0\n0 900 0\n0 0 900\nC\n{}\nDirect\n"
    (tmp_path / "a.vasp").write_text(head.format(1) + "0 0 0\n")
    (tmp_path / "b.vasp").write_text(head.format(3_000_000) + "0 0 0\n" * 3_000_000)
    began = time.process_time()
    good, bad = read_crystals(
        str(tmp_path), reading=Reading(limits=Limits(atoms=10**9, memory_gb=0.02))
    )
    assert len(good) == 1 and bad.reason == "too costly", str(bad)
    assert time.process_time() - began < 5  # of this process, which only waits


def test_a_set_of_one_bomb_is_one_line_that_names_it(call, tmp_path):
    (tmp_path / "bomb.cif").write_text(CIF)
    args = (f"input={tmp_path}/bomb.cif", f"output={tmp_path}/out", "limits.atoms=7")
    code, _, err = call("prepare", *args, "progress=false")
    assert code == 2 and err.count("\n") == 1
    assert "bomb" in err and "limits.atoms=7" in err
    assert not Path(tmp_path / "out").exists()
