"""What a killed run leaves is finished or removed; finished steps of another past are set aside, not overwritten."""

import pathlib

import pytest

from v4train.checkpoint import integrity, step_directory


def write(directory: pathlib.Path, content: str) -> None:
    directory.mkdir()
    (directory / "content").write_text(content)
    integrity.write_manifest(directory, files=integrity.digest_files(directory))


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


@pytest.fixture
def directory(tmp_path):
    for step in (10, 20, 30):
        write(step_directory.path(tmp_path, step=step), f"old {step}")
    return tmp_path


def test_only_finished_steps_are_listed(directory):
    for name in (".step_00000040.tmp", ".step_00000005.trash", "step_00000050.abandoned", "step_7", "notes"):
        (directory / name).mkdir()
    (directory / "step_00000060").write_text("a file")
    write(step_directory.path(directory, step=10**9), "")
    assert step_directory.list_steps(directory) == [10, 20, 30, 10**9]
    assert step_directory.list_steps(directory / "absent") == []


def test_an_incomplete_step_and_trash_are_removed(directory):
    (directory / ".step_00000040.tmp").mkdir()
    (directory / ".step_00000040.tmp" / "content").write_text("half")
    (directory / ".step_00000005.trash").mkdir()
    (directory / ".other.tmp").mkdir()
    step_directory.recover(directory)
    assert names(directory) == [".other.tmp", "step_00000010", "step_00000020", "step_00000030"]


def test_a_complete_step_is_published_on_recovery(directory):
    write(step_directory.temporary_path(directory, step=40), "new")
    step_directory.recover(directory)
    assert (step_directory.path(directory, step=40) / "content").read_text() == "new"


def test_the_steps_of_another_past_are_set_aside(directory):
    for attempt in range(2):
        write(step_directory.temporary_path(directory, step=20), f"new {attempt}")
        step_directory.publish(directory, step=20)
    assert step_directory.list_steps(directory) == [10, 20]
    assert names(directory)[1:] == ["step_00000020", "step_00000020.abandoned", "step_00000020.abandoned-2", "step_00000030.abandoned"]
    assert (directory / "step_00000020" / "content").read_text() == "new 1"
    assert (directory / "step_00000020.abandoned" / "content").read_text() == "old 20"
    assert (directory / "step_00000030.abandoned" / "content").read_text() == "old 30"


def test_deletion_removes_the_name_first(directory, monkeypatch):
    def die(path, **options):
        if path.exists():
            raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(step_directory.shutil, "rmtree", die)
        with pytest.raises(OSError, match="killed"):
            step_directory.delete(directory, step=10)
    assert step_directory.list_steps(directory) == [20, 30]
    step_directory.recover(directory)
    assert names(directory) == ["step_00000020", "step_00000030"]
