"""Steps on disk: their names, and the renames that make them appear and vanish as a whole.

::

    checkpoints/
      .lock                        held by the run that writes here (`run_lock`)
      step_00001000/               finished
        arrays/                    the state, written by Orbax
        metadata.json              step, data position, seed, recipe, names and shapes of the arrays
        manifest.json              size and SHA-256 of every file above
      .step_00002000.tmp/          being written, or left by a run that was killed
      .step_00000500.trash/        being deleted
      step_00003000.abandoned/     finished, but of a past that this run has left

A step is written under its hidden temporary name. Its manifest is the last file; when that is on the disk the step is *complete*,
and a rename *publishes* it. A run killed between the two leaves a complete step under a temporary name, which `recover` publishes;
any other temporary directory is removed. Deletion goes the other way: first the rename, then the files. So a ``step_*`` directory
never is half of something, unless the disk damaged it.

A run that goes back (its newest steps were damaged, or the user chose an older one) reaches steps whose directories already exist.
To skip such a save, or to let the keep policy compare it with steps of the other past, would lose new work without a word; to
overwrite would lose finished work. So the steps of the other past are set aside by name, and stay until a human deletes them.
"""

import logging
import os
import pathlib
import re
import shutil

from v4train.checkpoint import integrity

_log = logging.getLogger(__name__)

ARRAYS = "arrays"
METADATA = "metadata.json"

_FINISHED = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"\.(step_\d{8,})\.tmp")
_TRASH = re.compile(r"\.step_\d{8,}\.trash")


def path(directory: pathlib.Path, *, step: int) -> pathlib.Path:
    """Where a finished step is."""
    return directory / f"step_{step:08d}"


def temporary_path(directory: pathlib.Path, *, step: int) -> pathlib.Path:
    """Where a step is written."""
    return directory / f".step_{step:08d}.tmp"


def list_steps(directory: pathlib.Path) -> list[int]:
    """The finished steps, oldest first; none if the directory does not exist. Says nothing about damage."""
    if not directory.is_dir():
        return []
    matches = (_FINISHED.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def locate(source: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """The checkpoints, and the step or None, that a path means: a run directory, the checkpoints in it, or one step of them.

    Raises:
        ValueError: it is none of these.
    """
    if (match := _FINISHED.fullmatch(source.absolute().name)) and (source / METADATA).is_file():
        return source.absolute().parent, int(match[1])
    for directory in (source / "checkpoints", source):
        if list_steps(directory):
            return directory.absolute(), None
    what = "holds no finished checkpoint" if source.is_dir() else "does not exist"
    raise ValueError(f"{source} {what}: give a run directory (with checkpoints/step_...), or one step of it")


def publish(directory: pathlib.Path, *, step: int) -> None:
    """Makes a complete step visible, after setting aside the steps that are not in its past."""
    for other in list_steps(directory):
        if other >= step:
            _set_aside(directory, step=other, because=step)
    os.rename(temporary_path(directory, step=step), path(directory, step=step))
    integrity.flush_directory(directory)


def delete(directory: pathlib.Path, *, step: int) -> None:
    """Removes a finished step, all at once for whoever looks."""
    trash = directory / f".step_{step:08d}.trash"
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path(directory, step=step), trash)
    shutil.rmtree(trash)


def recover(directory: pathlib.Path) -> None:
    """Publishes the complete steps and removes the rest that a killed run left under hidden names. Needs the lock."""
    for entry in sorted(directory.iterdir()):
        if _TRASH.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif match := _UNFINISHED.fullmatch(entry.name):
            if integrity.find_damage(entry):
                _log.info("removing %s, which a run that was stopped did not finish", entry)
                shutil.rmtree(entry, ignore_errors=True)
            else:
                publish(directory, step=int(match[1].removeprefix("step_")))


def _set_aside(directory: pathlib.Path, *, step: int, because: int) -> None:
    source = path(directory, step=step)
    target = source.with_name(f"{source.name}.abandoned")
    number = 1
    while target.exists():
        number += 1
        target = source.with_name(f"{source.name}.abandoned-{number}")
    _log.warning("the run went back and saves step %d: its former step %d is now %s (delete it when you are sure)", because, step, target)
    os.rename(source, target)
