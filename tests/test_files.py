"""Are files read without copying, and is every way in which they can be broken said in words?"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from moddiff.checkpoints import CheckpointError, config_beside, describe, files, read, size_of
from safetensors.torch import save_file

STATE = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "a.bias": torch.zeros(3),
    "b.weight": torch.ones(2, 2, dtype=torch.bfloat16),
}


def same(found):
    return found.keys() == STATE.keys() and all(
        torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in STATE.items()
    )


def sharded(folder, parts=3):
    """STATE, one tensor a shard, with an index."""
    names = {name: f"model-0000{i}-of-0000{parts}.safetensors" for i, name in enumerate(STATE, 1)}
    for name, shard in names.items():
        save_file({name: STATE[name]}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return names


class Runs:
    """A pickle of this would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_one_file_in_either_format_gives_back_what_was_saved(tmp_path):
    save_file(STATE, tmp_path / "one.safetensors")
    torch.save(STATE, tmp_path / "one.pth")
    torch.save({"state_dict": STATE}, tmp_path / "wrapped.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("one.safetensors", "one.pth", "wrapped.pth", "old.pth"):
        assert same(read(tmp_path / name)), name


def test_shards_are_found_through_their_index(tmp_path):
    sharded(tmp_path)
    assert same(read(tmp_path)) and same(read(tmp_path / "model.safetensors.index.json"))
    assert len(files(tmp_path)) == 3


def test_describing_gives_names_shapes_and_types_and_no_values(tmp_path):
    sharded(tmp_path)
    torch.save(STATE, tmp_path / "one.pth")
    for where in (tmp_path, tmp_path / "one.pth"):
        found = describe(where)
        assert all(x.is_meta for x in found.values())
        assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
            name: (x.shape, x.dtype) for name, x in STATE.items()
        }
        assert size_of(found) == 12 * 4 + 3 * 4 + 4 * 2


def resident():
    """Bytes of this process that lie in memory and belong to it alone, not to a mapped file."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc"
)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_reading_maps_the_file_and_takes_no_memory_of_its_own(tmp_path, kind):
    big = {"w": torch.ones(16 * 2**20)}  # 64 MB
    path = tmp_path / f"big.{kind}"
    save_file(big, path) if kind == "safetensors" else torch.save(big, path)
    del big
    before = resident()
    w = read(path)["w"]
    assert float(w.sum()) == 16 * 2**20
    assert resident() - before < 16e6


def test_a_variant_is_taken_only_where_the_plain_file_is_not(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    save_file(STATE, tmp_path / "model.fp16.safetensors")
    assert files(tmp_path)[0].name == "model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    assert files(tmp_path)[0].name == "model.fp16.safetensors"


@pytest.mark.parametrize("part", [0.05, 0.5, 0.99])
def test_a_truncated_safetensors_file_is_said_to_be_cut_off(tmp_path, part):
    path = tmp_path / "one.safetensors"
    save_file(STATE, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    for look in (read, describe):
        with pytest.raises(CheckpointError, match="(cut off|not a whole).*fetch it again"):
            look(path)


def test_a_pointer_file_is_not_weights(tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read(path)


@pytest.mark.parametrize("part", [0.3, 0.95])
def test_a_truncated_pickle_is_said_to_be_damaged(tmp_path, part):
    path = tmp_path / "one.pth"
    torch.save({"w": torch.randn(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError, match="one.pth is damaged or cut off.*Fetch it again"):
        read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path, zipped):
    torch.save(
        STATE | {"evil": Runs(tmp_path / "was_run")},
        tmp_path / "one.pth",
        _use_new_zipfile_serialization=zipped,
    )
    for look in (read, describe):
        with pytest.raises(CheckpointError, match="holds more than tensors.*can run code.*safetensors"):
            look(tmp_path / "one.pth")
    assert not (tmp_path / "was_run").exists()


def test_an_absent_shard_is_named(tmp_path):
    names = sharded(tmp_path)
    (tmp_path / names["a.bias"]).unlink()
    with pytest.raises(
        CheckpointError,
        match="names 3 shards but model-00002-of-00003.safetensors is not in .*download it into that folder",
    ):
        read(tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path):
    names = sharded(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / names["a.bias"])
    with pytest.raises(CheckpointError, match=r"promises a.bias \(in model-00002-of-00003.safetensors\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not readable JSON"),
        ("{}", "is not an index of shards"),
        ("[]", "holds a list; expected an object"),
    ],
)
def test_an_unreadable_index_is_named(tmp_path, text, words):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        files(tmp_path)


def test_absent_and_ambiguous_files_are_said(tmp_path):
    with pytest.raises(CheckpointError, match="there is no weights file at .*nowhere.pth; check the path"):
        read(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="holds no weights; expected one"):
        read(tmp_path)
    save_file(STATE, tmp_path / "x.safetensors")
    save_file(STATE, tmp_path / "y.safetensors")
    with pytest.raises(
        CheckpointError, match="holds x.safetensors, y.safetensors; expected one .*Name the file you mean"
    ):
        read(tmp_path)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, 3.0])
def test_a_pickle_of_something_else_is_not_a_state(tmp_path, value):
    torch.save(value, tmp_path / "one.pth")
    with pytest.raises(CheckpointError, match="is not a flat dictionary of tensors"):
        read(tmp_path / "one.pth")


def test_a_config_that_is_absent_or_torn_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no config.json in"):
        config_beside(tmp_path / "one.pth")
    (tmp_path / "config.json").write_text("{'a': 1")
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        config_beside(tmp_path)
