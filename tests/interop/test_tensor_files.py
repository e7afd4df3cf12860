"""Directories of safetensors files, against the `safetensors` package in both directions, and damaged in every way."""

import hashlib
import json
import os
import re
import struct
import threading

import numpy as np
import pytest
import safetensors.numpy

from v4train.interop import safetensors_file, tensor_files

NUMPY_READS = set(safetensors_file.DTYPES) - {"BF16", "F8_E8M0", "F8_E4M3", "F8_E5M2"}


def tensors(*, seed=0, count=1):
    """Every dtype and some awkward shapes, with random bytes."""
    rng = np.random.default_rng(seed)
    made = {}
    for number in range(count):
        for dtype in safetensors_file.DTYPES.values():
            for shape in ((3, 5), (7,), (), (0, 4), (2, 1, 3)):
                size = int(np.prod(shape)) * dtype.itemsize
                raw = rng.integers(0, 2 if dtype == np.bool_ else 256, size, dtype=np.uint8)
                made[f"layers.{number}.{dtype}.{'x'.join(map(str, shape)) or 'scalar'}"] = raw.view(dtype).reshape(shape)
    return made


def announce(arrays):
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def write(directory, arrays, **kwargs):
    directory.mkdir(exist_ok=True)
    writer = tensor_files.TensorFilesWriter(directory, tensors=announce(arrays), **kwargs)
    for name, array in arrays.items():
        writer.write(name, array)
    writer.finish()
    return writer


def assert_equal(array, expected):
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(array.reshape(-1).view(np.uint8), expected.reshape(-1).view(np.uint8))


def problems(error):
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def file_of(header, data=b"", *, length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_is_byte_for_byte_that_of_the_safetensors_package(tmp_path):
    arrays = tensors(count=2) | {"größe.weight": np.arange(3, dtype=np.int8)}
    write(tmp_path, arrays)
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checksums.json", "model.safetensors"]


def test_shards_are_read_by_the_safetensors_package(tmp_path):
    arrays = tensors(count=3)
    write(tmp_path, arrays, shard_bytes=400)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert index["weight_map"].keys() == arrays.keys()
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safetensors.safe_open(tmp_path / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in set(opened.keys()):
                assert index["weight_map"][name] == file
                if safetensors_file.NAMES[arrays[name].dtype] in NUMPY_READS:
                    assert_equal(opened.get_tensor(name), arrays[name])
        sizes = [array.nbytes for name, array in arrays.items() if index["weight_map"][name] == file]
        assert sum(sizes) <= 400
    assert_equal_directory(tmp_path, arrays)


def assert_equal_directory(directory, arrays):
    files = tensor_files.TensorFiles.open(directory)
    assert list(files.table) == sorted(arrays)
    for name, array in arrays.items():
        assert_equal(files.read(name), array)
    assert files.verify() == len(files.files)


def test_a_tensor_above_the_limit_has_a_file_of_its_own(tmp_path):
    arrays = {name: np.zeros(size, np.int8) for name, size in (("a", 10), ("b", 1000), ("c", 10), ("d", 10))}
    writer = write(tmp_path, arrays, shard_bytes=100)
    assert [int(writer.table[name].file.split("-")[1]) for name in "abcd"] == [1, 2, 3, 3]


def test_files_of_the_safetensors_package_are_read(tmp_path):
    arrays = tensors()
    (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(arrays))
    files = tensor_files.TensorFiles.open(tmp_path)
    for name, array in arrays.items():
        assert_equal(files.read(name), array)
        assert (files.table[name].file, files.table[name].nbytes) == ("model.safetensors", array.nbytes)
    assert files.verify() == 0


def test_rows_are_read_alone(tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
    write(tmp_path, {"x": array})
    files = tensor_files.TensorFiles.open(tmp_path)
    for rows in (slice(1, 3), slice(0, 5), slice(4, None), slice(3, 3), slice(-2, None), slice(2, 99)):
        assert_equal(files.read("x", rows=rows), array[rows])
    assert files.read("x").flags.owndata


def test_tensors_come_in_any_order_of_any_strides_from_several_threads(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {f"t{number}": rng.normal(size=(40, 30)).astype(np.float32).T for number in range(40)}
    writer = tensor_files.TensorFilesWriter(tmp_path, tensors=announce(arrays), shard_bytes=20_000)
    names = list(rng.permutation(list(arrays)))
    threads = [threading.Thread(target=lambda part=part: [writer.write(n, arrays[n]) for n in part]) for part in (names[:20], names[20:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.finish()
    assert_equal_directory(tmp_path, arrays)


def test_the_system_may_move_fewer_bytes_than_asked(tmp_path, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:600], offset))
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: preadv(descriptor, [buffers[0][:70]], offset))
    arrays = {"x": np.arange(1000), "y": np.arange(77, dtype=np.int8)}
    write(tmp_path, arrays)
    assert_equal_directory(tmp_path, arrays)


def test_two_sets_of_files_share_a_directory_and_its_digests(tmp_path):
    first, second = tensors(seed=1), {"v4train.stem": np.ones(3, np.float32)}
    write(tmp_path, first, shard_bytes=500)
    write(tmp_path, second, stem="multimodal")
    assert tensor_files.TensorFiles.open(tmp_path).verify() > 3
    files = tensor_files.TensorFiles.open(tmp_path, stem="multimodal")
    assert_equal(files.read("v4train.stem"), second["v4train.stem"])
    assert files.verify() == 1
    listed = json.loads((tmp_path / "checksums.json").read_bytes())["files"]
    for name, what in listed.items():
        content = (tmp_path / name).read_bytes()
        assert what == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_writer_holds_its_user_to_the_announcement(tmp_path):
    with pytest.raises(ValueError, match=r"knows only U64.*; a has the dtype <U3; c has the dtype complex128"):
        tensor_files.TensorFilesWriter(tmp_path, tensors={"a": (np.dtype("U3"), (1,)), "c": (np.dtype(complex), (1,))})
    writer = tensor_files.TensorFilesWriter(tmp_path, tensors={"a": (np.int8, (2,)), "b": (np.int8, (3,)), "c": (np.int8, ())})
    for name, array, message in (
        ("x", np.zeros(2, np.int8), "x was not announced"),
        ("a", np.zeros(2, np.uint8), r"a is uint8 \[2\], but was announced as int8 \[2\]"),
        ("a", np.zeros((2, 1), np.int8), r"a is int8 \[2, 1\], but was announced as int8 \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(name, array)
    writer.write("a", np.zeros(2, np.int8))
    with pytest.raises(ValueError, match="a was written before"):
        writer.write("a", np.zeros(2, np.int8))
    with pytest.raises(ValueError, match=r"2 tensors of .* were never written: b, c"):
        writer.finish()


HEADERS = {
    "empty file": (b"", "was truncated: it has 0 bytes"),
    "half a length": (b"\x10\0\0", "was truncated: it has 3 bytes"),
    "header longer than the file": (file_of({}, length=99), "of a header of 99 bytes, 2 are there"),
    "absurd header": (file_of({}, length=2**63), "is no safetensors file or was truncated"),
    "PyTorch file": (b"PK\x03\x04" + bytes(200), "is no safetensors file or was truncated"),
    "not JSON": (file_of(b"{oops}"), "its header is not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "its header is not JSON"),
    "deeply nested": (file_of(b"[" * 100_000), "its header is not JSON"),
    "a list": (file_of(b"[]"), "its header is a list"),
    "a name twice": (file_of(b'{"a": 1, "a": 2}'), "twice: a"),
    "an entry that is none": (file_of({"a": 3}), "a is not described by dtype, shape and data_offsets but by 3"),
    "unknown dtype": (file_of({"a": entry("F4", [2], 0, 1)}, b"1"), "a has the unknown dtype 'F4'; known are U64"),
    "negative size": (file_of({"a": entry("I8", [-2], 0, 2)}, b"12"), r"a has the shape \[-2\]"),
    "size that is no number": (file_of({"a": entry("I8", ["2"], 0, 2)}, b"12"), r"a has the shape \['2'\]"),
    "offsets turned round": (file_of({"a": entry("I8", [2], 2, 0)}, b"12"), r"a has the offsets \[2, 0\]"),
    "three offsets": (file_of({"a": {**entry("I8", [2], 0, 2), "data_offsets": [0, 1, 2]}}, b"12"), r"a has the offsets \[0, 1, 2\]"),
    "too few bytes": (file_of({"a": entry("F32", [2], 0, 4)}, b"1234"), r"a has 4 bytes, but F32 \[2\] has 8"),
    "overflowing product": (file_of({"a": entry("F32", [2**62, 4], 0, 0)}), r"a has 0 bytes, but F32 .* has 73786976294838206464"),
    "overlap": (file_of({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 2, 6)}, b"123456"), "b overlaps a"),
    "the same bytes twice": (file_of({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 0, 4)}, b"1234"), "b overlaps a"),
    "a gap": (file_of({"a": entry("I8", [1], 0, 1), "b": entry("I8", [1], 3, 4)}, b"1234"), "2 bytes before b belong to no tensor"),
    "truncated": (file_of({"a": entry("I8", [4], 0, 4)}, b"123"), r"was truncated: its header describes \d+ bytes, and it has \d+"),
    "bytes at the end": (file_of({"a": entry("I8", [2], 0, 2)}, b"123"), "1 bytes at its end belong to no tensor"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_file_is_refused_as_the_safetensors_package_refuses_it(case, tmp_path):
    content, message = HEADERS[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        tensor_files.TensorFiles.open(tmp_path)
    assert str(error.value).startswith(f"{tmp_path} cannot be used:\n  - model.safetensors")
    if case not in ("unknown dtype", "a name twice"):  # known to the package, though not as an array; and it takes the last of two
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load(content)


def test_every_truncation_and_every_flipped_bit_is_noticed(tmp_path):
    """Lost bytes by the header alone; a header that still makes sense, and other values, by the digest."""
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.ones(3, np.float32)}
    write(tmp_path, arrays)
    path, whole = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            tensor_files.TensorFiles.open(tmp_path)
    for position in range(len(whole)):
        for flip in (1, 4, 32, 128):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"model\.safetensors"):
                tensor_files.TensorFiles.open(tmp_path).verify()


def sharded(directory, *, count=2):
    arrays = tensors(count=count)
    write(directory, arrays, shard_bytes=500)
    return arrays, sorted(path.name for path in directory.glob("*.safetensors"))


def test_everything_that_is_wrong_with_a_directory_is_said_at_once(tmp_path):
    arrays, files = sharded(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    of = {file: sorted(name for name, where in index["weight_map"].items() if where == file) for file in files}
    (tmp_path / files[0]).unlink()
    with open(tmp_path / files[1], "r+b") as stream:
        stream.truncate(os.fstat(stream.fileno()).st_size - 1)
    (tmp_path / files[2]).write_bytes(b"<html>404 not found</html>")
    forgotten = of[files[3]][0]
    del index["weight_map"][forgotten]
    index["weight_map"]["ghost"] = files[3]
    index["weight_map"]["outside"] = "../model.safetensors"
    index["weight_map"]["nowhere"] = None
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    again = of[files[5]][0]
    (tmp_path / files[4]).write_bytes(safetensors.numpy.save({name: arrays[name] for name in [*of[files[4]], again]}))
    with pytest.raises(ValueError) as error:
        tensor_files.TensorFiles.open(tmp_path)
    expected = [
        r"model.safetensors.index.json says that outside is in '../model.safetensors', which is no file of this directory",
        r"model.safetensors.index.json says that nowhere is in None, which is no file of this directory",
        rf"{files[0]} is missing",
        rf"{files[1]} was truncated: its header describes \d+ bytes, and it has \d+",
        rf"{files[2]} is no safetensors file or was truncated: .*",
        rf"{files[3]} lacks tensors that the index says are in it: ghost",
        rf"{files[3]} has tensors that the index does not list for it: {re.escape(forgotten)}",
        rf"{files[4]} has tensors that the index does not list for it: {re.escape(again)}",
        rf"{re.escape(again)} is in {files[4]} and again in {files[5]}",
    ]
    assert len(problems(error)) == len(expected), str(error.value)
    for line, pattern in zip(problems(error), expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors.index.json", b"{", "is no index or was damaged"),
        ("model.safetensors.index.json", b"[]", "is no index or was damaged"),
        ("model.safetensors.index.json", b'{"metadata": {}}', r"is no index or was damaged \(KeyError: 'weight_map'\)"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "its weight_map lists nothing"),
        ("model.safetensors.index.json", b'{"weight_map": []}', "its weight_map lists nothing"),
        ("model.safetensors", b"", "there is model.safetensors, and model.safetensors.index.json that does not mention it"),
        ("checksums.json", b"{}", "is no list of digests"),
        ("checksums.json", b'{"files": {"a": 3}}', "is no list of digests"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(name, content, message, tmp_path):
    sharded(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tensor_files.TensorFiles.open(tmp_path).verify()


def test_a_directory_without_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        tensor_files.TensorFiles.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"there is neither model\.safetensors nor model\.safetensors\.index\.json$"):
        tensor_files.TensorFiles.open(tmp_path)
    _, files = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"there is neither .*, only {files[0]}"):
        tensor_files.TensorFiles.open(tmp_path)


def test_a_wrong_total_of_the_index_is_logged_only(tmp_path, caplog):
    """DeepSeek-V3's own index counts two bytes for each FP8 parameter."""
    arrays, _ = sharded(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    tensor_files.TensorFiles.open(tmp_path)
    assert not caplog.records
    for total in (7, "many"):
        index["metadata"]["total_size"] = total
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert tensor_files.TensorFiles.open(tmp_path).table.keys() == arrays.keys()
        assert f"states a size of {total} bytes" in caplog.records.pop().message
    for metadata in ({}, None):
        index["metadata"] = metadata
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        tensor_files.TensorFiles.open(tmp_path)
    assert not caplog.records


def test_digests_are_compared_and_progress_is_told(tmp_path):
    _, files = sharded(tmp_path)
    opened = tensor_files.TensorFiles.open(tmp_path)
    told = []
    assert opened.verify(progress=lambda done, total: told.append((done, total))) == len(files) + 1
    sizes = [(tmp_path / file).stat().st_size for file in opened.files]
    assert [done for done, _ in told] == list(np.cumsum(sizes))
    assert {total for _, total in told} == {sum(sizes)}
    with open(tmp_path / files[1], "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    listed = json.loads((tmp_path / "checksums.json").read_bytes())
    listed["files"].pop(files[2])
    listed["files"][files[0]]["bytes"] += 1
    (tmp_path / "checksums.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError) as error:
        opened.verify()
    size = listed["files"][files[0]]["bytes"]
    assert problems(error) == [
        f"{files[0]} has {size - 1} bytes, not the {size} of checksums.json",
        f"{files[1]} does not have the digest of checksums.json: its content has changed",
        f"{files[2]} is not in checksums.json",
    ]


def test_a_file_that_changes_under_the_reader_is_noticed(tmp_path):
    write(tmp_path, {"x": np.arange(1000)})
    files = tensor_files.TensorFiles.open(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as stream:
        stream.truncate(500)
    with pytest.raises(ValueError, match=r"model\.safetensors became shorter while it was read: x"):
        files.read("x")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: No such file"):
        files.read("x")
    with pytest.raises(ValueError, match="has no tensor y"):
        files.read("y")
