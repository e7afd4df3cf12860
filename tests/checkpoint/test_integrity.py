"""Every way to damage a step is found, and names the file."""

import hashlib
import json

import pytest

from v4train.checkpoint import integrity


@pytest.fixture
def step(tmp_path):
    directory = tmp_path / "step_00000001"
    (directory / "arrays").mkdir(parents=True)
    (directory / "arrays" / "data").write_bytes(bytes(range(256)) * 8192)
    (directory / "metadata.json").write_text('{"a": 1}')
    integrity.write_manifest(directory, files=integrity.digest_files(directory))
    return directory


def damage(directory, **options):
    return [str(finding) for finding in integrity.find_damage(directory, **options)]


def test_the_manifest_lists_sizes_and_digests_of_all_files(step):
    files = json.loads((step / "manifest.json").read_text())["files"]
    assert files == {
        name: {"bytes": (step / name).stat().st_size, "sha256": hashlib.sha256((step / name).read_bytes()).hexdigest()}
        for name in ("arrays/data", "metadata.json")
    }
    assert damage(step) == []


def test_a_flipped_bit_is_found(step):
    content = bytearray((step / "arrays/data").read_bytes())
    content[100_000] ^= 1
    (step / "arrays/data").write_bytes(content)
    assert damage(step) == ["arrays/data does not have the digest it was saved with: its content has changed"]
    assert damage(step, digests=False) == [], "a large file is not read without digests"


def test_small_files_are_always_digested(step):
    (step / "metadata.json").write_text('{"a": 2}')
    assert [line.split()[0] for line in damage(step, digests=False)] == ["metadata.json"]


@pytest.mark.parametrize("digests", [True, False])
def test_truncated_and_deleted_files_are_found(step, digests):
    with open(step / "arrays/data", "r+b") as file:
        file.truncate(1000)
    (step / "metadata.json").unlink()
    assert damage(step, digests=digests) == [
        "arrays/data has 1000 bytes, not 2097152: it was truncated or overwritten",
        "metadata.json is missing",
    ]


def test_a_damaged_manifest_is_found(step):
    manifest = step / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace("2097152", "2097153"))
    assert damage(step) == ["manifest.json does not match its own digest: its content has changed"]
    manifest.write_text(text[: len(text) // 2])
    assert damage(step) == ["manifest.json is not a manifest: its content has changed"]
    manifest.write_text("[]")
    assert damage(step) == ["manifest.json is not a manifest: its content has changed"]
    manifest.unlink()
    assert damage(step) == ["manifest.json is missing: the step was never finished, or not copied completely"]


def test_hosts_share_the_files(step):
    (step / "arrays/data").unlink()
    (step / "metadata.json").unlink()
    halves = [damage(step, share=(host, 2)) for host in range(2)]
    assert [len(half) for half in halves] == [1, 1]
    assert sorted(halves[0] + halves[1]) == damage(step)


def test_shares_are_merged_and_a_missing_one_names_its_host(step):
    integrity.write_share(step, host=1, files={"a": {"bytes": 1, "sha256": "x"}})
    integrity.write_share(step, host=2, files={"b": {"bytes": 2, "sha256": "y"}})
    assert sorted(integrity.merge_shares(step, hosts=[1, 2])) == ["a", "b"]
    with pytest.raises(OSError, match="host 1 could not write its part"):
        integrity.merge_shares(step, hosts=[1])
