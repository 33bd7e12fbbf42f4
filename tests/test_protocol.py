"""DataProto, registry, files and seeds."""

from __future__ import annotations

import pickle

import pytest
import torch

from verl.protocol import DataProto, check_columns
from verl.registry import Registry
from verl.utils.files import atomic_path
from verl.utils.rng import derive_seed


def proto(rows: int = 6) -> DataProto:
    shared = [{"x": torch.ones(2)} for _ in range(rows // 2)]
    return DataProto.from_dict(
        {"a": torch.arange(rows), "b": torch.arange(rows * 2).view(rows, 2)},
        {"uid": [f"u{i}" for i in range(rows)], "mm_inputs": [shared[i // 2] for i in range(rows)]},
    )


def test_indexing_splitting_and_joining_keep_rows_together():
    batch = proto()
    assert batch.rows(torch.tensor([4, 1]))["uid"].tolist() == ["u4", "u1"]
    assert [len(p) for p in batch.split([4, 2])] == [4, 2] and [len(p) for p in batch.chunk(3)] == [2, 2, 2]
    joined = DataProto.concat(batch.split([4, 2]))
    assert torch.equal(joined["b"], batch["b"]) and joined["uid"].tolist() == batch["uid"].tolist()
    assert batch.rows(torch.tensor([True, False] * 3))["a"].tolist() == [0, 2, 4]
    assert batch.repeat_interleave(2)["a"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_shared_objects_stay_shared_through_pickle():
    again = pickle.loads(pickle.dumps(proto().repeat_interleave(3)))
    assert again["mm_inputs"][0] is again["mm_inputs"][5] and again["mm_inputs"][0] is not again["mm_inputs"][6]


def test_lists_of_equal_length_stay_objects():
    batch = DataProto.from_dict({"a": torch.zeros(2)}, {"images": [[1, 2], [3, 4]]})
    assert batch["images"].shape == (2,) and batch["images"][1] == [3, 4]


def test_misuse_is_named():
    batch = proto()
    with pytest.raises(ValueError, match="6 rows cannot be cut into 4 equal parts"):
        batch.chunk(4)
    with pytest.raises(KeyError, match="no columns .'nope'."):
        batch.select(["a", "nope"])
    with pytest.raises(KeyError, match="no column 'nope'; there are"):
        batch["nope"]
    with pytest.raises(ValueError, match="disagree in their number of rows"):
        DataProto.from_dict({"a": torch.zeros(2)}, {"uid": ["x"]})
    with pytest.raises(ValueError, match="different columns"):
        DataProto.concat([batch, batch.select(["a"])])
    with pytest.raises(ValueError, match="column 'responses' is torch.float32 .* should be torch.int64 .B R."):
        check_columns(DataProto.from_dict({"responses": torch.zeros(2, 3)}))


def test_registry_refuses_a_taken_name_and_names_what_it_has():
    registry: Registry[object] = Registry("engine")
    registry.register("a")(int)
    with pytest.raises(ValueError, match="engine 'a' is registered already"):
        registry.register("a")(str)
    with pytest.raises(ValueError, match="unknown engine 'b'; known: a"):
        registry["b"]


def test_atomic_path_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(str(path)) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_path_replaces_a_folder_as_a_whole(tmp_path):
    for content in ("a", "b"):
        with atomic_path(str(tmp_path / "model")) as temporary:
            import os

            os.makedirs(temporary)
            with open(os.path.join(temporary, content), "w"):
                pass
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert derive_seed(1, "uid", 0) == derive_seed(1, "uid", 0) == 1001667657152493901
    assert len({derive_seed(*p) for p in ((1, "a"), (1, "b"), (2, "a"), ("1a",), (1, "a", 0))}) == 5
