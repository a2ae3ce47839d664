"""What a model takes: any form of a structure, in any cell, and what it says of those it does not
know."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifWriter

from crysforge import load
from crysforge.datapipe.common.files import write_json
from crysforge.datapipe.crystals.cells import Cells
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.models.encoders import build_encoder
from crysforge.trainer.base.tensors import copied_state
from crysforge.trainer.jobs.schemas import FinetuneJob
from crysforge.trainer.jobs.starting import starting_encoder
from crysforge.trainer.runs.model_directory import Scaler, export_stage, open_model, take_encoder
from crysforge.trainer.runs.trained_on import TrainedOn
from crysforge.trainer.stages.finetune import FinetuneConfig, FinetuneStage
from tests.cell_changes import MATERIALS, cells_of

PRIMITIVE = {"cell": Cells().describe()}
SEEN = {"elements": [11, 17, 8, 12], "atoms": [1, 8], "volume_per_atom": [8.0, 30.0]}
ROCKSALT = MATERIALS["rocksalt"]()


def export(path: Path, data: dict, encoder: str = "pddformer", targets=("gap",)) -> Path:
    """A model that learned nothing."""
    torch.manual_seed(0)
    count = len(targets)
    scaler = Scaler(list(targets), ["eV"] * count, [1.5] * count, [0.7] * count)
    built = build_encoder({"name": encoder, "tiny": True})
    stage = FinetuneStage(FinetuneConfig(), built, list(targets), scaler.mean, scaler.std)
    for layer in stage.readout.modules():
        if isinstance(layer, torch.nn.Linear):  # so that structures differ by more than rounding
            layer.weight.data *= 20
    export_stage(path, stage, copied_state(stage), data, scaler)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(export(tmp_path_factory.mktemp("model") / "m", PRIMITIVE))


@pytest.mark.parametrize("encoder", ["pddformer", "matformer", "icomformer", "potnet"])
def test_ten_cells_of_a_material_get_one_number(tmp_path, encoder):
    model = load(export(tmp_path / "m", PRIMITIVE, encoder))
    numbers = np.array([model.predict(list(cells_of(m).values())) for m in MATERIALS])
    spread = numbers[:, 0].std()  # over materials; without any, cells would be equal for nothing
    assert spread > 0.01
    assert np.ptp(numbers, axis=1).max() < 1e-4 * max(spread, 1)
    as_given = model.predict(list(cells_of("bcc iron").values()), cell="as_is")
    assert np.ptp(as_given) > 0.01 * spread


def test_what_goes_with_the_cell_comes_back_for_the_cell_that_is_given(tmp_path):
    data = PRIMITIVE | {"extensive": ["total_energy"]}
    model = load(export(tmp_path / "m", data, targets=("gap", "total_energy")))
    primitive = ROCKSALT.get_primitive_structure()
    rows = model.predict([primitive, ROCKSALT, ROCKSALT.make_supercell((1, 2, 1), in_place=False)])
    np.testing.assert_allclose(rows[:, 0], rows[0, 0], atol=1e-5)
    np.testing.assert_allclose(rows[:, 1], rows[0, 1] * np.array([1, 4, 8]), rtol=1e-5)


def jarvis(s: Structure, cartesian: bool) -> dict:
    coords = s.cart_coords if cartesian else s.frac_coords
    return {
        "lattice_mat": s.lattice.matrix.tolist(),
        "coords": coords.tolist(),
        "elements": [str(x) for x in s.species],
        "cartesian": cartesian,
    }


class JarvisAtoms:
    """The part of `jarvis.core.atoms.Atoms` that is looked at."""

    def __init__(self, s: Structure) -> None:
        self.lattice_mat, self._dict = s.lattice.matrix, jarvis(s, False)
        self.lattice = self.frac_coords = None

    def to_dict(self) -> dict:
        return self._dict


def test_structures_come_in_any_form(model, tmp_path):
    s = ROCKSALT
    atoms = AseAtomsAdaptor.get_atoms(s)
    CifWriter(s).write_file(tmp_path / "one.cif")
    forms = [
        s, atoms, Crystal.from_pymatgen(s), s.as_dict(), atoms.todict(), jarvis(s, True),
        jarvis(s, False), JarvisAtoms(s), {"jid": "J-1", "atoms": jarvis(s, True)},
        {"structure": s.as_dict()}, str(CifWriter(s)), tmp_path / "one.cif",
        str(tmp_path / "one.cif"),
    ]  # fmt: skip
    expected = model.predict(s)
    for form in forms:
        assert model.predict(form).shape == ()
        assert model.predict(form) == pytest.approx(expected, abs=1e-5)
    array = np.empty(len(forms), dtype=object)
    array[:] = forms
    for many in (forms, tuple(forms), array, pd.Series(forms, index=range(5, 18)), iter(forms)):
        np.testing.assert_allclose(model.predict(many), expected, atol=1e-5)
    zero = np.empty((), dtype=object)
    zero[()] = s
    assert model.predict(zero) == pytest.approx(expected, abs=1e-5)
    assert model.embed(s.as_dict()).shape == (model.encoder.dim,)


def test_a_path_may_be_whatever_prepare_reads(model, tmp_path):
    others = [MATERIALS[name]() for name in ("rocksalt", "wurtzite", "pyrite")]
    expected = model.predict(others)
    (tmp_path / "cifs").mkdir()
    for i, s in enumerate(others):
        CifWriter(s).write_file(tmp_path / "cifs" / f"{i}.cif")
    records = [{"name": i, "text": str(CifWriter(s))} for i, s in enumerate(others)]
    with open(tmp_path / "all.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "text"])
        writer.writeheader()
        writer.writerows(records)
    (tmp_path / "all.json").write_text(json.dumps([s.as_dict() for s in others]))
    np.testing.assert_allclose(model.predict(tmp_path / "cifs"), expected, atol=1e-4)
    np.testing.assert_allclose(model.predict(str(tmp_path / "all.json")), expected, atol=1e-4)
    found = model.predict(tmp_path / "all.csv", structure_column="text", id_column="name")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(ValueError, match="unknown"):
        model.predict(tmp_path / "all.csv", structure_colum="text")
    with pytest.raises(
        BadCrystal, match=r"structure 1: .*all\.json holds 3 crystals: give its path"
    ):
        model.predict([ROCKSALT, tmp_path / "all.json"])


def test_what_is_no_structure_is_named(model):
    close = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.02, 0, 0]])
    bad = {
        "atoms 0 .* and 1 .* 0.08 Å apart": close,
        "a dict with a, b is no structure": {"a": 1, "b": 2},
        "no 'elements'": {"lattice_mat": np.eye(3).tolist(), "coords": []},
        "is not periodic": AseAtomsAdaptor.get_atoms(ROCKSALT).todict() | {"pbc": [0] * 3},
        "NoneType is no structure": None,
    }
    for message, item in bad.items():
        with pytest.raises(BadCrystal, match=f"structure 1: .*{message}"):
            model.predict([ROCKSALT, item])
    with pytest.raises(BadCrystal, match="a DataFrame is no list of structures"):
        model.predict(pd.DataFrame({"structure": [ROCKSALT]}))
    with pytest.raises(BadCrystal, match="int is no structure"):
        model.predict(5)


def test_models_from_before_cells_were_recorded_take_them_as_they_are(tmp_path):
    model = load(export(tmp_path / "m", {}))
    double = ROCKSALT.make_supercell((2, 1, 1), in_place=False)
    with pytest.warns(UserWarning, match=r"trained on cells that are as_is.* another number"):
        found = model.embed([ROCKSALT, double])
    assert np.abs(found[0] - found[1]).max() > 1e-3
    with pytest.warns(UserWarning, match=r"cells are primitive .*was trained on as_is"):
        found = model.predict([ROCKSALT, double], cell="primitive")
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_crystals_unlike_the_training_are_told_of_once(tmp_path):
    model = load(export(tmp_path / "m", PRIMITIVE | {"seen": SEEN}))
    large = MATERIALS["orthorhombic, face-centred"]()
    wide = ROCKSALT.copy()
    wide.scale_lattice(8 * 60.0)
    strange = [ROCKSALT, MATERIALS["wurtzite"](), wide, large, ROCKSALT]
    with pytest.warns(UserWarning) as told:
        values = model.predict(strange)
    (one,) = told
    assert len(values) == 5
    text = str(one.message)
    assert text.startswith("3 crystals are unlike all that the model learned from: 1 (element Zn")
    assert "2 (60 Å³ per atom (8 to 30))" in text and "3 (element S" in text
    with pytest.raises(BadCrystal, match="3 crystals are unlike"):
        model.predict(strange, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict([ROCKSALT], strict=True)
        model.embed(ROCKSALT, strict=True)
    many = [MATERIALS["bcc iron"]()] * 9
    with pytest.warns(UserWarning, match=r"9 crystals .*4 \(element Fe.*, …$"):
        model.predict(many)


def test_damaged_records_of_the_training_are_named(tmp_path):
    for data in (
        {"cell": 5}, {"cell": {"rule": "any"}}, {"cell": {"rule": "primitive", "tolerance": "x"}},
        {"extensive": "gap"}, {"seen": [1]}, {"seen": {"atoms": [1]}}, {"seen": {"atoms": "12"}},
        {"seen": {"elements": ["H"]}}, {"elements": 7},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^there is damaged: section data"):
            TrainedOn.of(data, "there")


def test_runs_record_cells_and_ranges_and_predict_keeps_to_them(runs, data, call, tmp_path):
    model = load(runs / "fine")
    assert model.trained_on.cells == Cells(rule="as_is")
    assert model.trained_on.elements and model.trained_on.atoms and model.trained_on.volume
    inside = ROCKSALT.copy()
    odd = Structure(Lattice.cubic(3), ["Og"], [[0, 0, 0]])
    (tmp_path / "in").mkdir()
    for name, s in (("inside", inside), ("odd", odd)):
        CifWriter(s).write_file(tmp_path / "in" / f"{name}.cif")
    given = [f"checkpoint={runs / 'fine'}", f"input={tmp_path / 'in'}", "workers=1"]
    code, out, _ = call("predict", *given, f"output={tmp_path / 'a.csv'}")
    assert code == 0 and "trained on cells that are as_is" in out
    assert "note: 1 crystal is unlike all that the model learned from: odd (element Og" in out
    code, out, _ = call("predict", *given, f"output={tmp_path / 'b.csv'}", "strict=true")
    assert code == 0 and "1 predictions" in out and "1 crystals could not be used" in out
    assert "outside the training data" in (tmp_path / "b.dropped.csv").read_text()
    code, out, _ = call("predict", *given, f"output={tmp_path / 'c.csv'}", "cell=primitive")
    assert code == 0 and "was trained on as_is" in out
    code, _, err = call("predict", *given, f"output={tmp_path / 'd.csv'}", "cell=primitve")
    assert code == 2 and "did you mean 'primitive'" in err
    (tmp_path / "in" / "bad.cif").write_text("data_x\n")
    code, _, err = call("predict", *given, f"output={tmp_path / 'e.csv'}", "on_bad=error")
    assert code == 2 and "bad.cif" in err and not (tmp_path / "e.csv").exists()


def test_members_of_an_ensemble_see_one_cell(tmp_path):
    for number, data in enumerate((PRIMITIVE, {})):
        export(tmp_path / str(number), data)
    write_json(tmp_path / "ensemble.json", {"schema": 1, "members": 2, "scale": [1.0]})
    with pytest.raises(ValueError, match=r"one kind of cell, and here are as_is and primitive"):
        load(tmp_path)
    (tmp_path / "same").mkdir()
    for number in range(2):
        export(tmp_path / "same" / str(number), PRIMITIVE | {"seen": SEEN})
    write_json(tmp_path / "same" / "ensemble.json", {"schema": 1, "members": 2, "scale": [1.0]})
    ensemble = load(tmp_path / "same")
    with pytest.warns(UserWarning, match="element Zn") as told:
        mean, sigma = ensemble.predict_with_uncertainty(list(cells_of("wurtzite").values()))
    assert sum("unlike" in str(one.message) for one in told) == 1
    assert np.ptp(mean) < 1e-4 and np.ptp(sigma) < 1e-4
    assert ensemble.predict(ROCKSALT).shape == ()


@pytest.mark.parametrize("rule", ["primitive", "niggli", "as_is", None])
def test_a_fresh_encoder_suits_the_cells_of_its_data(tmp_path, rule, random_crystal):
    with DatasetWriter(tmp_path / "set", []) as writer:
        writer.add("train", random_crystal(np.random.default_rng(0), 4))
        writer.finish({"cell": Cells(rule=rule).describe()} if rule else {})
    dataset = Dataset.open(tmp_path / "set")

    def start(**section):
        job = FinetuneJob(encoder={"name": "pddformer", "tiny": True} | section)
        return starting_encoder(job, dataset)

    once = rule == "primitive"
    assert start().graph.own_images_once is once
    assert ("own_images_once" in start().section) is once  # as earlier versions wrote it
    assert start(own_images_once=True).graph.own_images_once
    assert not start(own_images_once=False).graph.own_images_once
    assert start(name="schnet").graph.radius


def test_an_encoder_is_taken_on_whatever_it_says_of_own_images(tmp_path):
    section = {"name": "pddformer", "tiny": True}
    encoder = build_encoder(section | {"own_images_once": True})
    stage = FinetuneStage(FinetuneConfig(), encoder, ["gap"], [0.0], [1.0])
    scaler = Scaler(["gap"], ["eV"], [0.0], [1.0])
    export_stage(tmp_path / "m", stage, copied_state(stage), {}, scaler)
    assert take_encoder(open_model(tmp_path / "m"), section).graph.own_images_once
    assert not take_encoder(open_model(tmp_path / "m"), section).graph.cut_ties
    cut = take_encoder(open_model(tmp_path / "m"), section | {"cut_ties": True})
    assert cut.graph.cut_ties and cut.graph.own_images_once
    for name, value in copied_state(stage.encoder).items():
        assert torch.equal(cut.state_dict()[name], value)
    with pytest.raises(ValueError, match="own_images_once=True, but the config asks for"):
        take_encoder(open_model(tmp_path / "m"), section | {"own_images_once": False})
