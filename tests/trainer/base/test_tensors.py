"""Files of tensors are told from pickles by their first bytes, whatever length they state."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from crysforge.trainer.base.safe_read import check_tensor_file


def test_no_length_of_the_header_is_taken_for_a_pickle(tmp_path):
    path, starts = tmp_path / "model.safetensors", set()
    for length in range(256):
        save_file({"x": torch.zeros(2)}, path, {"note": "." * length})
        starts.add(path.read_bytes()[0])
        check_tensor_file(path)
    assert 0x80 in starts


@pytest.mark.parametrize("archive", [True, False])
def test_pickles_are_named(tmp_path, archive):
    path = tmp_path / "model.safetensors"
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match="but a pickle"):
        check_tensor_file(path)
