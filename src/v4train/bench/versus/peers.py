"""Other readers doing the pipeline's work. A program, not a module: it runs in the peers' own environment and imports nothing of ours.

    python peers.py write --reader NAME --documents FILE --directory DIR
    python peers.py read  --reader NAME --directory DIR --length S --batch-rows B --workers N --seconds T --repeats R

The work: documents in random order, packed into rows of S tokens with segment ids and positions, B rows a batch, as numpy arrays.
``FILE`` is an ``.npz`` of ``ids u32`` and ``lengths i64``. Each library gets the settings that its documentation or our own trials found
fastest for this: grain without reader threads on a local disk, StreamingDataset without shuffle blocks that would re-read, WebDataset
with uncompressed tar files. What a library lacks (StreamingDataset and WebDataset do not pack) is done by `pack`, which is as fast
as numpy allows. Writes JSON to standard output.
"""

import argparse
import io
import itertools
import json
import pathlib
import sys
import tarfile
import time

import numpy as np

SHARD_DOCUMENTS = 8192


def documents_of(path):
    """The arrays of the documents' ids."""
    content = np.load(path)
    return np.split(content["ids"], np.cumsum(content["lengths"])[:-1])


def pack(documents, length, rows):
    """Concatenates and cuts; every array of a batch is allocated once and written once."""
    batch, row, used, segment = None, 0, 0, 0
    for ids in documents:
        start = 0
        while start < len(ids):
            if batch is None:
                batch, row, used, segment = {k: np.empty((rows, length), np.int32) for k in ("tokens", "segments", "positions")}, 0, 0, 0
            n = min(len(ids) - start, length - used)
            segment += 1
            batch["tokens"][row, used : used + n] = ids[start : start + n]
            batch["segments"][row, used : used + n] = segment
            batch["positions"][row, used : used + n] = np.arange(start, start + n, dtype=np.int32)
            used, start = used + n, start + n
            if used == length:
                row, used, segment = row + 1, 0, 0
                if row == rows:
                    yield batch
                    batch = None


def forever(make):
    """Epoch after epoch."""
    return itertools.chain.from_iterable(make() for _ in itertools.count())


class Grain:
    """ArrayRecord and `ConcatThenSplitIterDataset`."""

    threads, ahead = 0, 0

    def write(self, documents, directory):
        from array_record.python import array_record_module

        writer = array_record_module.ArrayRecordWriter(str(directory / "documents.array_record"), "group_size:1,uncompressed")
        for ids in documents:
            writer.write(ids.tobytes())
        writer.close()

    def batches(self, directory, length, rows, workers):
        import grain

        source = grain.sources.ArrayRecordDataSource(str(directory / "documents.array_record"))
        dataset = grain.MapDataset.source(source).seed(0).shuffle().repeat()
        dataset = dataset.map(lambda record: {"tokens": np.frombuffer(record, np.uint32).astype(np.int32)})
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead))
        dataset = grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct={"tokens": length}).batch(rows)
        if workers:
            from absl import flags

            flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return iter(dataset)


class GrainDefault(Grain):
    """The same with grain's default reading options."""

    threads, ahead = 16, 500


class Streaming:
    """MosaicML StreamingDataset over MDS, a document a sample."""

    def write(self, documents, directory):
        import streaming

        with streaming.MDSWriter(out=str(directory / "mds"), columns={"tokens": "ndarray:uint32"}, size_limit=2**26) as writer:
            for ids in documents:
                writer.write({"tokens": ids})

    def batches(self, directory, length, rows, workers):
        import streaming
        import torch

        dataset = streaming.StreamingDataset(local=str(directory / "mds"), shuffle=True, shuffle_algo="py1s", batch_size=64)
        if not workers:
            return pack((sample["tokens"] for sample in forever(lambda: iter(dataset))), length, rows)
        # A list of arrays: collating ragged documents into tensors would be work that nobody needs.
        loader = torch.utils.data.DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=_tokens_of)
        return pack(itertools.chain.from_iterable(forever(lambda: iter(loader))), length, rows)


def _tokens_of(samples):
    return [sample["tokens"] for sample in samples]


class WebDataset:
    """WebDataset over uncompressed tar files, a document a sample, shuffled in a buffer."""

    def write(self, documents, directory):
        for k in range(0, len(documents), SHARD_DOCUMENTS):
            with tarfile.open(directory / f"shard-{k // SHARD_DOCUMENTS:05d}.tar", "w") as tar:
                for i, ids in enumerate(documents[k : k + SHARD_DOCUMENTS]):
                    info = tarfile.TarInfo(f"{k + i:08d}.ids")
                    info.size = ids.nbytes
                    tar.addfile(info, io.BytesIO(ids.tobytes()))

    def batches(self, directory, length, rows, workers):
        import torch
        import webdataset

        shards = sorted(str(path) for path in directory.glob("*.tar"))
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False).shuffle(1000).map(_ids_of)
        if not workers:
            return pack(forever(lambda: iter(dataset)), length, rows)
        loader = torch.utils.data.DataLoader(dataset.batched(64, collation_fn=list), batch_size=None, num_workers=workers)
        return pack(itertools.chain.from_iterable(forever(lambda: iter(loader))), length, rows)


def _ids_of(sample):
    return np.frombuffer(sample["ids"], np.uint32)


READERS = {"grain": Grain, "grain-default": GrainDefault, "streaming": Streaming, "webdataset": WebDataset}


def read(args):
    """Rates and the time of the first batch."""
    started = time.perf_counter()
    batches = READERS[args.reader]().batches(pathlib.Path(args.directory), args.length, args.batch_rows, args.workers)
    batch, rates, cpu_rates = next(batches), [], []
    first = time.perf_counter() - started
    shape = next(iter(batch.values())).shape
    assert shape == (args.batch_rows, args.length), shape
    for _ in range(args.repeats):
        begin, cpu, n = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < args.seconds or not n:
            next(batches)
            n += 1
        rates.append(n * args.batch_rows * args.length / (time.perf_counter() - begin))
        cpu_rates.append(n * args.batch_rows * args.length / (time.process_time() - cpu))
    return {"tokens_per_second": rates, "tokens_per_cpu_second": cpu_rates, "first_batch_seconds": round(first, 4)}


def main():
    """Writes a reader's files, or reads them and prints how fast."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("what", choices=("write", "read", "versions"))
    parser.add_argument("--reader", choices=READERS)
    parser.add_argument("--documents")
    parser.add_argument("--directory")
    for name in ("length", "batch-rows", "workers", "repeats"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args()
    if args.what == "versions":
        from importlib import metadata

        print(json.dumps({name: metadata.version(name) for name in ("grain", "mosaicml-streaming", "webdataset", "torch", "numpy")}))
    elif args.what == "write":
        pathlib.Path(args.directory).mkdir(parents=True)
        READERS[args.reader]().write(documents_of(args.documents), pathlib.Path(args.directory))
    else:
        result = read(args)
        print(json.dumps(result), flush=True)
        import os

        os._exit(0)  # worker processes and shared memory of the libraries are not worth waiting for
    return 0


if __name__ == "__main__":
    sys.exit(main())
