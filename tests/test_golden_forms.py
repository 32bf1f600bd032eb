"""Other golden files have the form of those in tests/golden, and neither their sizes nor numbers.

The test files of the mechanisms compare both by the same functions, so that none of them can know
by heart what it should read from the file.
"""

from __future__ import annotations

import golden_forms
import pytest
import torch
from golden_files import GOLDEN, load, read, write


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def test_another_file_of_the_same_form(name):
    tensors, metadata = golden_forms.make(name)
    theirs, words = read(name)
    assert metadata.keys() == words.keys()
    assert metadata["config"].keys() == words["config"].keys()
    assert metadata["config"] != words["config"]
    assert {key.split(".")[0] for key in tensors} == {key.split(".")[0] for key in theirs}
    shared = tensors.keys() & theirs.keys()  # cases may have other names
    for key in shared:
        assert tensors[key].dtype == theirs[key].dtype, key
        assert bool(tensors[key].isfinite().all()), key
    resized = [key for key in shared if tensors[key].shape != theirs[key].shape]
    assert len(resized) > len(shared) / 4, "the same sizes nearly everywhere"


def test_what_is_written_is_read_back(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor([1], dtype=torch.int64)}
    metadata = {"note": "plain words", "config": {"sizes": [1, 2], "causal": True, "name": None}}
    write(tmp_path / "x.safetensors", tensors, metadata)
    found, words = load(tmp_path / "x.safetensors")
    assert words == metadata
    assert all(torch.equal(found[key], x) for key, x in tensors.items())
    assert found.keys() == tensors.keys()
