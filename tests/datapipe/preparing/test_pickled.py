"""Published lists of ids that are pickles: read without running anything in them."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest

from crysforge.datapipe.preparing.splitting.pickled import pickled_ids
from crysforge.datapipe.preparing.splitting.splits import by_ids, read_ids
from tests.exploits import Exploit

ENTRIES = [
    {
        "id": f"mp-{i}",
        "atoms": {"lattice_mat": [[1.0, 0, 0]], "coords": np.eye(3), "elements": ["Na"]},
        "bulk modulus": np.float64(1.5 + i),
        "n": np.int64(i),
        "known": np.bool_(True),
    }
    for i in range(5)
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_ids_of_entries_as_the_published_files_have_them(tmp_path, protocol):
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps(ENTRIES, protocol))
    assert pickled_ids(path) == [f"mp-{i}" for i in range(5)]
    path.write_bytes(pickle.dumps(["a", "b", 3, np.int32(7)], protocol))
    assert pickled_ids(path) == ["a", "b", "3", "7"]


def test_a_folder_of_pickles_is_a_split(tmp_path):
    for split, ids in {"train": ["a", "b"], "val": ["c"], "test": ["d"]}.items():
        (tmp_path / f"bulk_megnet_{split}.pkl").write_bytes(pickle.dumps([{"jid": i} for i in ids]))
    assert by_ids(["d", "x", "b", "c", "a"], read_ids(str(tmp_path))).tolist() == [2, -1, 0, 1, 0]
    (tmp_path / "shear_megnet_val.pkl").write_bytes(pickle.dumps(["c"]))
    with pytest.raises(ValueError, match=r"bulk_megnet_val\.pkl and shear_megnet_val.pkl"):
        read_ids(str(tmp_path))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_else_is_looked_up(tmp_path, protocol):
    exploit = Exploit(tmp_path / "hacked")
    pickle.loads(pickle.dumps(exploit, protocol))  # it does what it should
    exploit.path.rmdir()
    path = tmp_path / "train.pkl"
    for value in (exploit, [exploit], [{"id": "a", "x": exploit}], [{"id": exploit}]):
        path.write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(ValueError, match="only lists, dicts, strings and numbers"):
            pickled_ids(path)
        assert not exploit.path.exists(), "code of the file was run"
    for value in (OrderedDict(a=1), {1, 2}.__class__, [np.random.default_rng(0)]):
        path.write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(ValueError, match="it asks for"):
            pickled_ids(path)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "only lists"),
        (b"not a pickle", "only lists"),
        (pickle.dumps(ENTRIES)[:-40], "only lists"),
        (pickle.dumps({"train": []}), "holds no list"),
        (pickle.dumps([{"name": 1}]), "entry 1 has no id"),
        (pickle.dumps(["a", 2.5]), "entry 2 has no id"),
        (b"cnumpy\ndtype\n(S'O'\ntR.", "holds no list"),
        (b"\x80\x04cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'x'\ntR.", "only"),
        (b"(cbuiltins\neval\nS'1'\ntR.", "asks for builtins.eval|only lists"),
    ],
)
def test_what_is_no_list_of_ids_is_named(tmp_path, data, word):
    path = tmp_path / "train.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=word):
        pickled_ids(path)
