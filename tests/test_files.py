"""Are files read without copying, and is every way in which they can be broken said in words?"""

import io
import json
import os
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from moddiff.checkpoints import CheckpointError, config_beside, describe, files, read, size_of
from safetensors.torch import save_file

from moddiff.weights import formats

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


@pytest.mark.parametrize("odd", [0, 1])
def test_a_file_larger_than_the_memory_is_mapped_without_reserving_any(tmp_path, monkeypatch, odd):
    state = STATE | {"none": torch.zeros(0, 3), "fp8": torch.ones(5).to(torch.float8_e4m3fn)}
    path = tmp_path / "one.safetensors"
    save_file(state, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + odd).to_bytes(8, "little") + data[8 : 8 + size] + b" " * odd + data[8 + size :])
    opened = formats.safe_open

    def refuses(path, framework, device):
        if framework == "pt":
            raise RuntimeError("unable to mmap 28577106624 bytes: Cannot allocate memory (12)")
        return opened(path, framework=framework, device=device)

    monkeypatch.setattr(formats, "safe_open", refuses)
    before, found = path.read_bytes(), read(path)
    assert set(found) == set(state) and all(x.dtype == state[name].dtype for name, x in found.items())
    for name, x in found.items():
        assert torch.equal(x.float(), state[name].float())
        x.view(torch.uint8).zero_()
    assert path.read_bytes() == before, "what is written into the tensors stays out of the file"


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


# A pickle is mapped only as it was written.


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """A torch.save file whose records were changed: change(name, bytes) -> bytes"""
    written = io.BytesIO()
    torch.save({"w": torch.arange(64.0), "v": torch.ones(64), "none": torch.zeros(0)}, written)
    held = zipfile.ZipFile(written)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in held.namelist():
            archive.writestr(name, change(name, held.read(name)))
    return path


def unchanged(name, data):
    return data


def test_a_pickle_that_was_packed_again_as_it_was_is_read(tmp_path):
    assert torch.equal(read(rewritten(tmp_path / "m.pth", unchanged))["w"], torch.arange(64.0))


def test_a_compressed_pickle_is_never_read_as_if_it_were_not(tmp_path):
    path = rewritten(tmp_path / "m.pth", unchanged, zipfile.ZIP_DEFLATED)
    for look in (read, describe):
        with pytest.raises(CheckpointError, match="m.pth is a compressed archive.*save the state again"):
            look(path)


@pytest.mark.parametrize("record", ["data/0", "data/1"])
@pytest.mark.parametrize("size", [0, 100, 300])
def test_a_record_of_another_size_is_never_filled_from_its_neighbour(tmp_path, record, size):
    path = rewritten(
        tmp_path / "m.pth", lambda name, data: (data * 2)[:size] if name.endswith(record) else data
    )
    with pytest.raises(CheckpointError, match="m.pth is damaged"):
        read(path)


def test_an_archive_of_something_else_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(
        CheckpointError, match="m.pth is a zip archive of notes.txt; expected an archive that torch.save"
    ):
        read(tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", "x")
        archive.writestr("m/constants.pkl", "x")
    with pytest.raises(
        CheckpointError, match="m.pt is a TorchScript program; expected an archive that torch.save"
    ):
        read(tmp_path / "m.pt")


def test_shapes_without_values_are_no_weights(tmp_path):
    torch.save(STATE | {"c": torch.zeros(2, device="meta")}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="m.pth holds shapes without values: c"):
        read(tmp_path / "m.pth")


@pytest.mark.parametrize(
    "odd, words",
    [
        ({5: torch.zeros(1)}, "5 is not a name"),
        ({"s": torch.eye(2).to_sparse()}, "s is a torch.sparse_coo tensor"),
        ({"s": torch.eye(2).to_sparse_csr()}, "s is a torch.sparse_csr tensor"),
        ({"n": torch.nested.nested_tensor([torch.ones(1)])}, "n is a nested tensor"),
    ],
    ids=["number", "sparse", "csr", "nested"],
)
def test_a_state_of_other_than_names_and_plain_tensors_is_refused(tmp_path, odd, words):
    torch.save(STATE | odd, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=f"m.pth is not a flat dictionary of tensors: {words}"):
        read(tmp_path / "m.pth")


@pytest.mark.parametrize("data", [b".", b"\x80\x02", b"a.", b"\x80\x02N.", b"PK\3\4", b"\x80" * 100])
def test_no_damage_to_a_pickle_gives_another_error(tmp_path, data):
    (tmp_path / "m.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="m.pth"):
        read(tmp_path / "m.pth")


# What a file is, whatever it is called.


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "m.bin"])
@pytest.mark.parametrize(
    "data, words",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "Git LFS pointer.*Fetch it again",
        ),
        (b"<!DOCTYPE html><html><title>Sign in</title></html>", "web page.*Fetch it again"),
        (b"GGUF\3\0\0\0" + b"\1" * 64, "GGUF file that is damaged.*fetch it again"),
        (b"", "is empty. Fetch it again"),
        (b"\0" * 600, "begins with zeros.*Fetch it again"),
    ],
    ids=["pointer", "page", "gguf", "empty", "zeros"],
)
def test_what_is_no_weights_file_is_named_under_any_suffix(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    for look in (read, describe):
        with pytest.raises(CheckpointError, match=words) as error:
            look(tmp_path / name)
        assert "run code" not in str(error.value)


def test_the_content_counts_and_not_the_suffix(tmp_path):
    save_file(STATE, tmp_path / "really_safetensors.pth")
    assert same(read(tmp_path / "really_safetensors.pth"))
    torch.save(STATE, tmp_path / "really_pickled.safetensors")
    with pytest.raises(CheckpointError, match="was written by torch.save .*; rename it to .pth"):
        read(tmp_path / "really_pickled.safetensors")


def test_a_file_or_folder_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    save_file(STATE, tmp_path / "m.safetensors")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(CheckpointError, match="cannot be looked into: Permission denied"):
        read(tmp_path)
    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(CheckpointError, match="m.safetensors cannot be read: Permission denied"):
        read(tmp_path / "m.safetensors")


# Shards.


def test_the_shard_that_the_index_names_wins_over_a_stale_one(tmp_path):
    names = sharded(tmp_path)
    stale = {"a.weight": torch.full((3, 4), -1.0)}
    save_file(stale | {"b.weight": STATE["b.weight"]}, tmp_path / names["b.weight"])
    assert same(read(tmp_path))


def test_a_tensor_that_no_index_names_is_not_dropped(tmp_path):
    names = sharded(tmp_path)
    save_file({"b.weight": STATE["b.weight"], "more": torch.ones(1)}, tmp_path / names["b.weight"])
    assert read(tmp_path).keys() == {*STATE, "more"}


@pytest.mark.parametrize(
    "index, shard, save",
    [
        ("model.safetensors.index.json", "model-0000{}-of-00002.safetensors", save_file),
        ("pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin", torch.save),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors", save_file),
        ("model.safetensors.fp16.index.json", "model-0000{}-of-00002.fp16.safetensors", save_file),
    ],
)
def test_every_spelling_of_an_index_is_read(tmp_path, index, shard, save):
    home = {name: shard.format(1 + i % 2) for i, name in enumerate(STATE)}
    for file in set(home.values()):
        save({name: x for name, x in STATE.items() if home[name] == file}, tmp_path / file)
    (tmp_path / index).write_text(json.dumps({"weight_map": home}))
    assert same(read(tmp_path)) and same(read(tmp_path / index)) and len(files(tmp_path)) == 2


def test_shards_without_their_index_are_seen_to_be_shards(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="These look like shards: fetch their index too"):
        read(tmp_path)


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/passwd", "..", "a\\b.safetensors", ""])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, shard):
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    (tmp_path / "in" / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(
        CheckpointError, match="names the shard .*; expected files beside the index, not paths"
    ):
        read(tmp_path / "in")


@pytest.mark.parametrize(
    "text",
    [
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 5}}',
        b"\xff\xfe",
        b"[" * 10**5,
    ],
    ids=range(6),
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="m.safetensors.index.json.*etch it again"):
        read(tmp_path)


def test_thousands_of_absent_shards_do_not_fill_the_screen(tmp_path):
    home = {f"x{i}": f"s{i}.safetensors" for i in range(3000)}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    with pytest.raises(CheckpointError, match="names 3000 shards but .* and 2994 more are not in") as error:
        read(tmp_path)
    assert len(str(error.value)) < 1000


# The head of a safetensors file.


def test_a_file_is_described_without_memory_for_its_values(tmp_path, monkeypatch):
    save_file(STATE, tmp_path / "m.safetensors")

    def refused(*_, **__):
        raise MemoryError("mapping a file for writing counts against memory")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refused)
    found = describe(tmp_path / "m.safetensors")
    assert all(x.is_meta and x.shape == STATE[name].shape for name, x in found.items()) and len(found) == 3


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "head",
    [
        [],
        None,
        {"a": 5},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": ENTRY | {"data_offsets": []}},
        {"a": ENTRY | {"data_offsets": [4, 0]}, "b": ENTRY},
        {"a": ENTRY | {"data_offsets": "ab"}},
        {"a": ENTRY | {"dtype": ["F32"]}},
        {"a": ENTRY | {"dtype": "X" * 10**4}},
        {"a": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}},
        {"a": ENTRY | {"shape": [2**62, 2**62]}},
        {"a": ENTRY | {"shape": [-1]}},
        {"a": ENTRY | {"shape": [True]}},
        {"a": ENTRY | {"shape": [3]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY | {"data_offsets": [4, 8]}},
        {"__metadata__": {"x": 1}, "a": ENTRY},
        b"[" * 10**5,
        b"\xff\xff",
    ],
    ids=range(19),
)
def test_a_damaged_head_is_named(tmp_path, head):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    for look in (read, describe):
        with pytest.raises(CheckpointError, match="m.safetensors") as error:
            look(tmp_path / "m.safetensors")
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text", [b"[]", b"\xff", b'{"a":' * 10**5], ids=range(3))
def test_a_config_that_is_no_table_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="config.json.*etch it again"):
        config_beside(tmp_path)
