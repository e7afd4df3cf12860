"""What stays of a directory of tensors after success, failure, a kill and a full disk; and the memory that writing and reading take."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from v4train.interop import tensor_files

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def program(text, *arguments, prefix=()):
    """Starts Python on a text. The package is imported as it is here."""
    command = [*prefix, sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


def everything_in(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def fill(directory, *, count=4, size=1000):
    writer = tensor_files.TensorFilesWriter(directory, tensors={f"t{i}": (np.int8, (size,)) for i in range(count)}, shard_bytes=size)
    for name in writer.table:
        writer.write(name, np.ones(size, np.int8))
    writer.finish()


def test_a_directory_appears_as_a_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with tensor_files.complete_directory(out) as temporary:
        assert temporary.parent == out.parent
        assert temporary.name.startswith(".")
        fill(temporary)
        (temporary / "folder").mkdir()
        (temporary / "folder" / "config.json").write_text("{}")
        assert not out.exists()
    assert everything_in(tmp_path / "deep")[:2] == ["out", "out/checksums.json"]
    assert not temporary.exists()
    assert tensor_files.TensorFiles.open(out).verify() == 5


@pytest.mark.parametrize("failure", [ValueError("bad"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "No such file", "source")])
def test_after_a_failure_nothing_stays(failure, tmp_path):
    def attempt():
        with tensor_files.complete_directory(tmp_path / "out") as temporary:
            fill(temporary)
            raise failure

    with pytest.raises(type(failure)) as error:
        attempt()
    assert error.value is failure
    assert everything_in(tmp_path) == []


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(ValueError, match=f"{name} exists already; remove it"), tensor_files.complete_directory(tmp_path / name):
            pytest.fail("the body ran")
    (tmp_path / "empty").mkdir()
    with tensor_files.complete_directory(tmp_path / "empty") as temporary:
        (temporary / "x").touch()
    assert everything_in(tmp_path) == ["empty", "empty/x", "file", "folder", "folder/x", "link"]


WRITE_AND_WAIT = """
    import sys, time
    import numpy as np
    from v4train.interop import tensor_files
    with tensor_files.complete_directory(sys.argv[1]) as temporary:
        writer = tensor_files.TensorFilesWriter(temporary, tensors={"a": (np.int8, (9,)), "b": (np.int8, (9,))})
        writer.write("a", np.ones(9, np.int8))
        print("half", flush=True)
        time.sleep(100)
"""


def test_a_running_writer_is_left_alone_and_a_killed_one_is_cleared_away(tmp_path):
    process = program(WRITE_AND_WAIT, tmp_path / "out")
    assert process.stdout.readline() == "half\n"
    with pytest.raises(ValueError, match="being written by another process"), tensor_files.complete_directory(tmp_path / "out"):
        pytest.fail("the body ran")
    assert everything_in(tmp_path) == [".out.incomplete", ".out.incomplete/model.safetensors"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert everything_in(tmp_path) == [".out.incomplete", ".out.incomplete/model.safetensors"]
    with tensor_files.complete_directory(tmp_path / "out") as temporary:
        assert everything_in(temporary) == []
        fill(temporary)
    assert tensor_files.TensorFiles.open(tmp_path / "out").verify() == 5
    assert not temporary.exists()


def test_too_little_space_is_known_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4200))
    expected = pytest.raises(ValueError, match=r"no space left to write .*: 4,\d\d\d bytes are needed and 4,200 are free")
    with expected, tensor_files.complete_directory(tmp_path / "out") as temporary:
        fill(temporary)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_space_that_ends_meanwhile_is_one_message_and_nothing_half_written(code, tmp_path, monkeypatch):
    pwrite, calls = os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data[:600], offset)  # the system may also write less than it is asked for

    monkeypatch.setattr(os, "pwrite", full)
    expected = pytest.raises(ValueError, match=rf"no space left to write .* \({os.strerror(code)}\)")
    with expected, tensor_files.complete_directory(tmp_path / "out") as temporary:
        fill(temporary)
    assert len(calls) == 3
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("what", ["tensors", "text"])
def test_a_disk_that_is_really_full(what, tmp_path):
    """On a file system of one megabyte of its own, where the check beforehand is told that there is more."""
    act = {
        "tensors": "fill(temporary)",
        "text": "(temporary / 'tokenizer.json').write_text('x' * 2 ** 21)",
    }
    text = """
        import pathlib, shutil, subprocess, sys
        import numpy as np
        from v4train.interop import tensor_files
        out = pathlib.Path(sys.argv[1])
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", out], capture_output=True)
        if made.returncode:
            sys.exit(print("no mount"))
        def fill(temporary):
            shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2 ** 40, 0, 2 ** 40)
            writer = tensor_files.TensorFilesWriter(temporary, tensors={name: (np.int8, (400_000,)) for name in "abcd"})
            for name in "abcd":
                writer.write(name, np.ones(400_000, np.int8))
        try:
            with tensor_files.complete_directory(out / "export") as temporary:
                ACT
        except ValueError as error:
            print(str(error).startswith(f"no space left to write {out}"), "No space left on device" in str(error), list(out.iterdir()))
    """.replace("ACT", act[what])
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs privileges that this machine does not give")
    said = finished(program(text, tmp_path, prefix=("unshare", "-m")))
    if said == "no mount\n":
        pytest.skip("mounting needs privileges that this machine does not give")
    assert said == "True True []\n"


def test_a_limit_on_the_size_of_files_is_no_space_either(tmp_path):
    said = finished(
        program(
            """
            import resource, sys
            import numpy as np
            from v4train.interop import tensor_files
            resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))
            try:
                with tensor_files.complete_directory(sys.argv[1]) as temporary:
                    tensor_files.TensorFilesWriter(temporary, tensors={"a": (np.int8, (2 * 10 ** 6,))})
            except ValueError as error:
                print(error)
            """,
            tmp_path / "out",
        )
    )
    assert "no space left to write" in said
    assert "File too large" in said
    assert everything_in(tmp_path) == []


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for place, name in (("file/out", "file/out"), ("n" * 300, "nnn")):
        with pytest.raises(ValueError, match=f"{name} cannot be written: .*"), tensor_files.complete_directory(tmp_path / place):
            pytest.fail("the body ran")


def test_writing_reading_and_verifying_take_the_memory_of_a_few_tensors(tmp_path):
    """400 MB in tensors of 8 MB: the peak of resident memory, which the kernel counts, against what the process had before."""
    said = finished(
        program(
            """
            import pathlib, sys
            import numpy as np
            from v4train.interop import tensor_files
            def peak():
                status = pathlib.Path("/proc/self/status").read_text()
                return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
            def measure(act):
                pathlib.Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
                before = peak()
                act()
                print(peak() - before)
            shapes = {f"layers.{i}.weight": (np.dtype(np.float32), (1000, 2000)) for i in range(50)}
            def write():
                with tensor_files.complete_directory(sys.argv[1]) as temporary:
                    writer = tensor_files.TensorFilesWriter(temporary, tensors=shapes, shard_bytes=150_000_000)
                    for number, name in enumerate(writer.table):
                        writer.write(name, np.full((1000, 2000), number, np.float32))
                    writer.finish()
            def read():
                files = tensor_files.TensorFiles.open(sys.argv[1])
                for number, name in enumerate(shapes):
                    array = files.read(name)
                    assert array[0, 0] == array[-1, -1] == number
            measure(write)
            measure(read)
            measure(lambda: tensor_files.TensorFiles.open(sys.argv[1]).verify())
            """,
            tmp_path / "out",
        )
    )
    written, read, verified = map(float, said.split())
    assert sum(path.stat().st_size for path in pathlib.Path(tmp_path / "out").iterdir()) > 4e8
    assert max(written, read) < 32, (written, read)
    assert verified < 8
    print(f"MiB over the baseline: writing {written:.1f}, reading {read:.1f}, verifying {verified:.1f}")
    shutil.rmtree(tmp_path / "out")
