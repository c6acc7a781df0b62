"""The checkpoint's files are read right, and whatever is wrong with them is named before work starts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from llmshrink.checkpoint import index as index_module
from llmshrink.checkpoint.index import CheckpointIndex, check_finite
from llmshrink.checkpoint.names import map_names
from llmshrink.errors import CheckpointError, SourceError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(5, 3) * 4).to(dtype) for dtype in DTYPES}
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7), "cube": torch.randn(2, 3, 5)}


def write_sharded(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if weight_map is None:
        weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(folder: Path, header: object, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(start + text + data)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and bytes_of(left) == bytes_of(right)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_every_dtype_and_shape_is_read_as_the_safetensors_library_wrote_it(tmp_path: Path, sharded: bool) -> None:
    tensors = some_tensors()
    if sharded:
        keys = list(tensors)
        write_sharded(
            tmp_path,
            {"a.safetensors": {k: tensors[k] for k in keys[::2]}, "b.safetensors": {k: tensors[k] for k in keys[1::2]}},
        )
    else:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with CheckpointIndex.open(tmp_path) as index:
        assert set(index.keys()) == tensors.keys() and len(index) == len(tensors)
        assert index.nbytes() == sum(t.numel() * t.dtype.itemsize for t in tensors.values())
        for key, tensor in tensors.items():
            assert same_bytes(index.read(key), tensor), key
            assert b"".join(bytes(piece) for piece in index.read_bytes(key)) == bytes_of(tensor), key
            assert index.reads[key] == 2
            assert "nothing" not in index
        assert len(index.files()) == 1 + sharded
    assert (index.metadata == {"format": "pt"}) is not sharded


def test_tensors_longer_than_a_chunk_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK", 1024)
    tensor = torch.randn(1000, 3)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    assert torch.equal(index.read("w"), tensor)
    pieces = [bytes(piece) for piece in index.read_bytes("w")]
    assert b"".join(pieces) == bytes_of(tensor) and max(map(len, pieces)) == 1024


def test_what_is_read_is_the_callers_own(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    index.read("w").zero_()
    assert index.read("w").sum() == 4


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        CheckpointIndex.open(tmp_path).read("nothing")


def test_the_fingerprint_follows_the_content_and_not_the_shards(tmp_path: Path) -> None:
    def fingerprint(name: str, write: Callable[[Path], None]) -> str:
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        return CheckpointIndex.open(tmp_path / name).fingerprint()

    a, b = torch.arange(5000.0), torch.ones(3)
    single = fingerprint("single", lambda f: save_file({"a": a, "b": b}, f / "model.safetensors"))
    assert single == fingerprint(
        "two", lambda f: write_sharded(f, {"1.safetensors": {"b": b}, "2.safetensors": {"a": a}})
    )
    assert single != fingerprint(
        "last", lambda f: save_file({"a": torch.cat([a[:-1], b[:1]]), "b": b}, f / "model.safetensors")
    )
    assert single != fingerprint(
        "shape", lambda f: save_file({"a": a.reshape(2, 2500), "b": b}, f / "model.safetensors")
    )


# A header that lies.


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{", b"", "isn't JSON"),
        (b'{"\xff', b"", "the header isn't UTF-8"),
        (b"[" * 100_000, b"", "nested more than 100 deep"),
        ({"w": F32 | {"shape": [2]}, "n": int("9" * 4000)}, b"x" * 8, "n: not described"),
        (b'{"w": ' + b"9" * 5000 + b"}", b"", r"isn't JSON \(Exceeds the limit \(4300 digits"),
        ({"w": F32 | {"shape": [1] * 300}}, b"x" * 8, "a shape of 300 dimensions, and a tensor has 64 at most"),
        ({"w": F32 | {"shape": [2**62] * 100_000}}, b"x" * 8, "a shape of 100,000 dimensions"),
        ({"w": F32 | {"shape": [2**62] * 60}}, b"x" * 8, "takes a number of 3,72"),
        ({"w": F32 | {"dtype": "F" * 10_000}}, b"x" * 8, "unknown dtype 'FFF"),
        ([], b"", "isn't a JSON object"),
        (b'{"w": {}, "w": {}}', b"", "names 'w' twice"),
        ({"w": 3}, b"", "w: not described"),
        ({"w": F32 | {"dtype": "F33"}}, b"x" * 8, "w: unknown dtype 'F33'"),
        ({"w": F32 | {"shape": [-2]}}, b"x" * 8, "shape"),
        ({"w": F32 | {"shape": [True, 2]}}, b"x" * 8, "shape"),
        ({"w": F32 | {"shape": "2"}}, b"x" * 8, "shape"),
        ({"w": F32 | {"data_offsets": [8, 0]}}, b"x" * 8, "data_offsets"),
        ({"w": F32 | {"data_offsets": [0]}}, b"x" * 8, "data_offsets"),
        ({"w": F32 | {"data_offsets": [0, 2**63]}}, b"x" * 8, "data_offsets"),
        ({"w": F32 | {"shape": [3]}}, b"x" * 8, "takes 12 bytes, not the 8"),
        ({"w": F32 | {"shape": [2**40, 2**40]}}, b"x" * 8, "takes"),
        ({"w": F32, "v": F32}, b"x" * 8, "overlaps"),
        ({"w": F32, "v": F32 | {"data_offsets": [4, 12]}}, b"x" * 12, "overlaps"),
        ({"w": F32, "v": F32 | {"data_offsets": [12, 20]}}, b"x" * 20, "belong to no tensor"),
        ({"w": F32}, b"x" * 9, "1 bytes after the last"),
        ({"w": F32}, b"x" * 7, "truncated"),
        ({"w": F32}, b"", "truncated"),
    ],
)
def test_a_broken_header_is_refused_at_open(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    write_raw(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=says) as caught:
        CheckpointIndex.open(tmp_path)
    assert "model.safetensors" in str(caught.value) and "again" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [10**18, 2**64 - 1, 200])
def test_a_header_longer_than_its_file_is_refused_without_being_read(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path, {"w": F32}, b"x" * 8, length=length)
    with pytest.raises(CheckpointError, match="the header claims"):
        CheckpointIndex.open(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="the file has 0"):
        CheckpointIndex.open(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_shard_raises_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    save_file({"w": torch.ones(4), "v": torch.ones(2, 2, dtype=torch.bfloat16)}, folder / "model.safetensors")
    content = bytearray((folder / "model.safetensors").read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointError), CheckpointIndex.open(folder) as index:
        for key in index:
            index.read(key)


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(400)}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(300)
    with pytest.raises(CheckpointError, match="became shorter while w"):
        index.read("w")


# An index that lies.


def test_a_missing_shard_is_missed_by_a_model_that_needs_it_alone(tmp_path: Path) -> None:
    write_sharded(
        tmp_path, {"a.safetensors": {"a": torch.ones(2)}}, {"a": "a.safetensors", "w.weight_packed": "b.safetensors"}
    )
    with CheckpointIndex.open(tmp_path) as index:
        assert map_names(["a"], index.keys(), base_prefix="model", tied={}, why_not=index.why_not) == {"a": "a"}
        with pytest.raises(
            CheckpointError, match=r"no tensor for w\.weight: its index says b\.safetensors, .* missing"
        ):
            map_names(["a", "w.weight"], index.keys(), base_prefix="model", tied={}, why_not=index.why_not)
        with pytest.raises(
            CheckpointError, match=r"no tensor w\.weight_packed: its index says b\.safetensors, .*again"
        ):
            index.read("w.weight_packed")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: missing, though model\.safetensors\.index\.json names"):
        CheckpointIndex.open(tmp_path)


def test_the_index_says_which_tensors_are_the_model_s(tmp_path: Path) -> None:
    shards = {
        "a.safetensors": {"a": torch.full((2,), 1.0), "b": torch.full((2,), 2.0), "extra": torch.ones(3)},
        "b.safetensors": {"a": torch.full((2,), 3.0), "c": torch.full((2,), 4.0), "extra": torch.ones(3)},
    }
    named = {"a": "a.safetensors", "c": "a.safetensors", "gone": "b.safetensors"}
    write_sharded(tmp_path, shards, {**named, "x": "b.safetensors"})
    with CheckpointIndex.open(tmp_path) as index:
        assert {key: index.read(key)[0].item() for key in index} == {"a": 1.0, "c": 4.0}
        assert index.left_out == {
            "a in b.safetensors": "also in another file, which model.safetensors.index.json names",
            "b": "unknown to model.safetensors.index.json",
            "extra in a.safetensors": "unknown to model.safetensors.index.json",
            "extra in b.safetensors": "unknown to model.safetensors.index.json",
        }
        assert index.absent == {"gone": "b.safetensors", "x": "b.safetensors"}
        assert index.notes() == [
            "3 tensors left out, unknown to model.safetensors.index.json: b, extra in a.safetensors, ...",
            "1 tensor left out, also in another file, which model.safetensors.index.json names: a in b.safetensors",
            "2 tensors left out, named by model.safetensors.index.json and in no file: gone, x",
        ]
        with pytest.raises(CheckpointError, match="has no tensor b"):
            index.read("b")
        assert index.fingerprint() == _fingerprint(tmp_path / "other", {"a": 1.0, "c": 4.0})


def _fingerprint(folder: Path, tensors: dict[str, float]) -> str:
    folder.mkdir()
    save_file({key: torch.full((2,), value) for key, value in tensors.items()}, folder / "model.safetensors")
    with CheckpointIndex.open(folder) as index:
        return index.fingerprint()


def test_a_tensor_that_the_model_needs_is_required(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}}, {"a": "a.safetensors"})
    with (
        CheckpointIndex.open(tmp_path) as index,
        pytest.raises(CheckpointError, match=r"b: a file holds it, but .*name"),
    ):
        map_names(["a", "b"], index.keys(), base_prefix="model", tied={}, why_not=index.why_not)
    write_sharded(tmp_path, {}, {"a": "a.safetensors", "c": "a.safetensors"})
    with (
        CheckpointIndex.open(tmp_path) as index,
        pytest.raises(CheckpointError, match=r"c: its index says a\.safet.*hold"),
    ):
        map_names(["a", "c"], index.keys(), base_prefix="model", tied={}, why_not=index.why_not)


def test_a_pointer_in_the_place_of_a_shard_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/passwd",
        "x/../../a.safetensors",
        "..\\a.safetensors",
        "C:\\a.safetensors",
        "",
        "a\0b",
        "\\a",
    ],
)
def test_an_index_that_names_a_path_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    write_sharded(tmp_path / "model", {}, {"a": name})
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        CheckpointIndex.open(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="broken index"):
        CheckpointIndex.open(tmp_path)


# Folders without safetensors.


def test_a_folder_of_pickles_says_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(SourceError, match=r"only pickle weights.*save_pretrained"):
        CheckpointIndex.open(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(SourceError, match=r"no model\.safetensors.*found consolidated\.safetensors"):
        CheckpointIndex.open(tmp_path)


# The Hub's cache.


def hub_snapshot(root: Path) -> tuple[Path, Path]:
    """A snapshot as huggingface_hub lays it out: links to blobs named by their sha256; returns it and the blob."""
    blobs, snapshot = root / "blobs", root / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(8)}, root / "made")
    name = hashlib.sha256((root / "made").read_bytes()).hexdigest()
    blob = (root / "made").rename(blobs / name)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / name)
    return snapshot, blob


def test_a_snapshot_of_links_to_blobs_is_read_and_verified(tmp_path: Path) -> None:
    snapshot, _ = hub_snapshot(tmp_path)
    with CheckpointIndex.open(snapshot) as index:
        assert index.read("w").sum() == 8
        assert index.verify_blobs() == 1


def test_a_blob_that_does_not_match_its_sha256_is_named(tmp_path: Path) -> None:
    snapshot, blob = hub_snapshot(tmp_path)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its content has sha256 .* delete .*blobs"):
        CheckpointIndex.open(snapshot).verify_blobs()


def test_a_plain_folder_has_no_blobs_to_verify(tmp_path: Path) -> None:
    save_file({"w": torch.ones(8)}, tmp_path / "model.safetensors")
    assert CheckpointIndex.open(tmp_path).verify_blobs() == 0


def test_a_link_to_a_blob_that_is_gone_is_named(tmp_path: Path) -> None:
    snapshot, blob = hub_snapshot(tmp_path)
    blob.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: can't be read"):
        CheckpointIndex.open(snapshot)


# Values no method can work with.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_with_its_place(dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(7, 5)
    tensor[3, 2] = value
    with pytest.raises(CheckpointError, match=r"model\.w: -?(nan|inf) at \[3, 2\]"):
        check_finite("model.w", tensor.to(dtype))


def test_a_value_that_is_not_finite_is_found_in_a_later_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK", 16)
    tensor = torch.ones(9, 5)
    tensor[8, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"at \[8, 4\]"):
        check_finite("w", tensor)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_finite_values_of_every_dtype_pass(dtype: torch.dtype) -> None:
    check_finite("w", torch.tensor([[1.0, 0.0], [-1.0, 3.0]]).to(dtype))
    check_finite("w", torch.empty(0, 3, dtype=dtype))


def test_the_largest_values_of_float64_are_finite() -> None:
    check_finite("w", torch.tensor([1e308, -1e308], dtype=torch.float64))
