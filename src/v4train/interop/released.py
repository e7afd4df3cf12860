"""A checkpoint directory in the released layout as our parameters: open, check, and read one block at a time.

    released = Released.open("DeepSeek-V4-Flash")
    params = released.parameters(shardings=shardings)

Opening reads config.json and the headers only, and says everything that is wrong at once. Values are read when a shard is made: for each
block of the shard one tensor is read, dequantised, turned and copied into place, so the host holds one shard and one tensor, not the model.
A shard that is cut inside its matrices reads each of its tensors whole, so the devices of a host read such a tensor several times, from
the page cache if it is large enough. (The rejected alternative, filling all shards of a parameter from one reading, holds a whole
stack of experts on the host: 172 GB for one projection of V4-Flash.)
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from v4train.core import param
from v4train.interop import matching, names, quantised, released_config, tensor_files
from v4train.model import config as config_lib
from v4train.model import transformer

_GATE = re.compile(r"layers\.\d+\.ffn\.gate\.weight")


@dataclasses.dataclass(frozen=True)
class Released:
    """An opened directory, every tensor of which fits the model.

    Attributes:
        directory: where it is.
        config: content of its config.json.
        model: our config of it. Without MTP if there are no such tensors, whatever config.json says: `transformers` saves models so.
        files: the released tensors.
        extras: those under `names.EXTRAS_STEM`; None if there is no such file.
        slots: of the model.
        sources: where the values of each slot are, by released name.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    model: config_lib.ModelConfig
    files: tensor_files.TensorFiles
    extras: tensor_files.TensorFiles | None
    slots: tuple[names.Slot, ...]
    sources: dict[str, matching.Source]

    @classmethod
    def open(cls, directory: str | pathlib.Path) -> "Released":
        """Reads config.json and the headers of all files.

        Raises:
            ValueError: config.json is absent or cannot be used, a file is damaged, or tensors do not fit the model.
        """
        directory = pathlib.Path(directory)
        config = _config(directory / "config.json")
        files = tensor_files.TensorFiles.open(directory)
        extras = _extras(directory)
        model = released_config.model_config(config, subject=str(directory / "config.json"))
        if not any(names.canonical(name).startswith("mtp.") for name in files.table):
            model = model.model_copy(update={"mtp": None})
        _check_experts(model, files.table, subject=str(directory / "config.json"))
        table = {**files.table, **(extras.table if extras else {})}
        sources = matching.check(model, table=table, subject=str(directory))
        return cls(directory, config, model, files, extras, names.slots(model), sources)

    def tensor(self, slot: names.Slot) -> np.ndarray:
        """The tensor in their layout, dequantised: f32, hash tables as stored.

        Raises:
            ValueError: a value is not finite, or a hash table names an expert that there is not.
        """
        source = self.sources[slot.released]
        stored = self._read(source.name) if source.part is None else self._part(source.name, source.part)
        if source.format == "fp8":
            return quantised.fp8_dequantise(stored, scale=self._read(source.scale), name=source.name)
        if source.format == "fp4":
            return quantised.mxfp4_unpack(stored, scale=self._read(source.scale), name=source.name)
        if slot.kind == "hash_table":
            if stored.size and (stored.min() < 0 or stored.max() >= self.model.moe.experts):
                found, count = f"experts from {stored.min()} to {stored.max()}", self.model.moe.experts
                raise ValueError(f"{self.directory}: {source.name} has {found}, the model has {count}")
            return stored
        values = stored.astype(np.float32)
        quantised.require_finite(values, name=source.name)
        return values

    def block(self, slot: names.Slot) -> np.ndarray:
        """The block of our parameter, in our layout and declared dtype; may be a view that is not contiguous.

        A slot that may be absent (`names.Slot.otherwise`) and is, repeats the tensor that it names, or is zero.
        """
        if slot.released in self.sources:
            return slot.to_ours(self.tensor(slot)).astype(slot.dtype, copy=False)
        if slot.otherwise == "zeros":
            return np.zeros(slot.block_shape, slot.dtype)
        values = self._read(self.sources[slot.otherwise].name).astype(slot.dtype)
        return np.broadcast_to(values, slot.block_shape)

    def parameters(self, *, shardings: dict | None = None) -> dict:
        """The parameters as our nested dict of arrays.

        Args:
            shardings: where each array lives, in the structure of the parameters; None: on the default device.
        """
        by_path: dict[str, list[names.Slot]] = {}
        for slot in self.slots:
            by_path.setdefault(slot.path, []).append(slot)
        declared = param.declarations(transformer.Transformer(self.model))
        if shardings is None:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = param.map_declarations(lambda _, d: here, declared)

        def place(path: tuple, d: param.Declaration, sharding: jax.sharding.Sharding) -> jax.Array:
            slots = by_path[param.path_name(path)]
            return jax.make_array_from_callback(d.shape, sharding, lambda index: self._shard(index, d, slots))

        return jax.tree_util.tree_map_with_path(place, declared, shardings, is_leaf=param.is_declaration)

    def _shard(self, index: tuple[slice, ...] | None, d: param.Declaration, slots: list[names.Slot]) -> np.ndarray:
        """The part ``index`` of a parameter, from the slots that it touches."""
        assert index is not None
        wanted = [range(size)[part] for part, size in zip(index, d.shape, strict=True)]
        shard = np.empty([len(part) for part in wanted], d.dtype)
        for slot in slots:
            own = [*map(_extent, slot.index), *(range(size) for size in d.shape[len(slot.index) :])]
            common = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(wanted, own, strict=True)]
            if all(common):
                block = self.block(slot).reshape([len(part) for part in own])
                shard[_inside(common, wanted)] = block[_inside(common, own)]
        return shard

    def verify(self, *, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compares all files with the list of digests, if there is one; see `tensor_files.TensorFiles.verify`."""
        return sum(files.verify(progress=progress) for files in (self.files, self.extras) if files is not None)

    def _part(self, name: str, part: names.Part) -> np.ndarray:
        (matrix,) = self._read(name, rows=slice(part.expert, part.expert + 1))
        return matrix[part.rows]

    def _read(self, name: str, *, rows: slice | None = None) -> np.ndarray:
        files = self.extras if self.extras is not None and name in self.extras.table else self.files
        return files.read(name, rows=rows)


def _extent(place: int | slice) -> range:
    return range(place.start, place.stop) if isinstance(place, slice) else range(place, place + 1)


def _inside(parts: list[range], whole: list[range]) -> tuple[slice, ...]:
    """The parts as slices of an array that begins where ``whole`` does."""
    return tuple(slice(part.start - first.start, part.stop - first.start) for part, first in zip(parts, whole, strict=True))


def _check_experts(model: config_lib.ModelConfig, table: dict[str, tensor_files.TensorInfo], *, subject: str) -> None:
    """Before all tensors of all experts are listed: a count that is far off would make a list that takes minutes."""
    gates = {info.shape[0] for name, info in table.items() if _GATE.fullmatch(names.canonical(name)) and info.shape}
    if gates and model.moe.experts not in gates:
        raise ValueError(f"{subject}: n_routed_experts is {model.moe.experts}, but the routers' weights are for {sorted(gates)} experts")


def _extras(directory: pathlib.Path) -> tensor_files.TensorFiles | None:
    if not any(directory.glob(f"{names.EXTRAS_STEM}*.safetensors*")):
        return None
    return tensor_files.TensorFiles.open(directory, stem=names.EXTRAS_STEM)


def _config(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a directory with config.json and model.safetensors (or its shards and index)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, expected a mapping of keys to values")
    return config
