"""Parquet: row groups are the tasks, and within them rows come in small batches, so that no row group is ever in memory as a whole."""

import os
import pathlib
from collections.abc import Iterator

from v4train.data.prepare import config as config_lib
from v4train.data.prepare import fields, files, record

_ROWS = 64  # a batch; media rows may be megabytes each


def check_extra() -> None:
    """Imports the library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow, which is not installed: run `pip install 'v4train[prepare]'`") from None


def pieces(source: config_lib.ParquetConfig, *, task_bytes: int) -> Iterator[record.Piece]:
    """Consecutive row groups of about ``task_bytes``; a file whose footer cannot be read is one piece, which reading will report."""
    import pyarrow
    import pyarrow.parquet

    for path in files.find(source.path):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
        except (pyarrow.ArrowException, OSError):
            yield record.Piece((path,), os.path.getsize(path))
            continue
        start = size = 0
        for i, one in enumerate(sizes):
            size += one
            if size >= task_bytes or i == len(sizes) - 1:
                yield record.Piece((path,), size, start, i + 1)
                start, size = i + 1, 0


def read(source: config_lib.ParquetConfig, task: record.Task) -> Iterator[record.Record | record.Bad]:
    """The rows of the task's row groups."""
    import pyarrow
    import pyarrow.parquet

    (path,) = task.files
    name, folder = files.relative(path, source.path), pathlib.Path(path).parent
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            stop = file.metadata.num_row_groups if task.stop < 0 else task.stop
            row = sum(file.metadata.row_group(i).num_rows for i in range(task.start))
            names = file.schema_arrow.names
            missing = [field for field in fields.wanted(source) if field not in names]
            if missing:
                yield record.Bad(path, f"there is no column {', '.join(missing)}; it has {', '.join(names)}")
                return
            for batch in file.iter_batches(
                _ROWS, row_groups=list(range(task.start, stop)), columns=fields.wanted(source), use_threads=False
            ):
                size = batch.nbytes // max(1, batch.num_rows)
                for values in batch.to_pylist():
                    yield _record(values, f"{path} row {row}", size, key=f"{source.name}/{name}#{row}", source=source, folder=folder)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        yield record.Bad(f"{path} row {row}", f"unreadable from here on: {files.reason(error)}")


def _record(
    values: dict, place: str, size: int, *, key: str, source: config_lib.ParquetConfig, folder: pathlib.Path
) -> record.Record | record.Bad:
    try:
        found = fields.parts(values, source=source, folder=folder)
        return record.Record(place, fields.key(values, source=source, default=key), found, size)
    except ValueError as error:
        return record.Bad(place, files.reason(error), size)
