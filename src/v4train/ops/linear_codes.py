"""The three products of a projection by kernels that multiply codes of FP8, each divided over a mesh by hand.

The partitioner cannot look into a kernel, so every device runs it on the shard that it has (`constrain.shard_local`) and what is contracted
over a split axis is added up afterwards, in the dtype of the result. Which axes are split, the letters of the weight say. For ``w [d, f]``:

=========== =================== ===================================== =====================
product     w is whole          `tensor` splits f (``wq_b``, ``w1``)  splits d (``w2``)
=========== =================== ===================================== =====================
y = x w     as it is            as it is                              sum over `tensor`
dx = dy w^T as it is            sum over `tensor`                     as it is
dw = x^T dy sum over the tokens' axes, in all three
=========== =================== ===================================== =====================

A weight comes gathered over the axes that only store it (`constrain.unshard`), and its gradient goes back through there. Groups
(``w [g, d, f]``) are groups of the kernel, of as many rows each; `tensor` splits them and nothing is added up.

The scales are those of the emulation (`ops.products`) wherever what a device has of a contracted width or of a row is a multiple of 128.
For dw, rows that are not are filled up with zeros, so that no tile crosses a row of the batch.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from v4train.numerics import scaled
from v4train.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Products:
    """The products of one projection.

    Attributes:
        letters: of the axes of its weight, ``_`` for those that the mesh leaves whole (`constrain.evenly`).
        interpret: run the kernels without a GPU, slowly.
    """

    letters: str
    interpret: bool = False

    def forward(self, x: Float[Array, "b s *g d"], w: Float[Array, "*g d f"]) -> Float[Array, "b s *g f"]:
        """``x @ w``."""

        def local(x: Array, w: Array) -> Array:
            return _added(self._by_matrices(x, w, transposed=False), over=constrain.used_axes(self.letters)[-2])

        return constrain.shard_local(local, inputs=(self._input, self.letters), outputs=self._output)(x, w)

    def of_input(self, dy: Float[Array, "b s *g f"], w: Float[Array, "*g d f"]) -> Float[Array, "b s *g d"]:
        """``dy @ w^T``: the gradient of the input."""

        def local(dy: Array, w: Array) -> Array:
            return _added(self._by_matrices(dy, w, transposed=True), over=constrain.used_axes(self.letters)[-1])

        return constrain.shard_local(local, inputs=(self._output, self.letters), outputs=self._input)(dy, w)

    def of_weight(self, x: Float[Array, "b s *g d"], dy: Float[Array, "b s *g f"]) -> Float[Array, "*g d f"]:
        """``x^T @ dy``: the gradient of the weight."""

        def local(x: Array, dy: Array) -> Array:
            return _added(self._by_rows(x, dy), over=constrain.mesh_axes("T"))

        return constrain.shard_local(local, inputs=(self._input, self._output), outputs=self.letters)(x, dy)

    @property
    def _input(self) -> str:
        *groups, into, _ = self.letters.split()
        return " ".join(("B", "S", *groups, into))

    @property
    def _output(self) -> str:
        *groups, _, out = self.letters.split()
        return " ".join(("B", "S", *groups, out))

    def _by_matrices(self, x: Array, w: Array, *, transposed: bool) -> Array:
        from v4train.ops.kernels import fp8_matmul_triton  # Pallas takes a third of a second to import

        matrices = w if w.ndim == 3 else w[None]
        rows = _by_group(x)
        y = fp8_matmul_triton.rows_by_matrices(
            rows, matrices, _sizes(rows, groups=len(matrices)), transposed=transposed, interpret=self.interpret
        )
        if w.ndim == 2:
            return y.reshape(*x.shape[:2], -1)
        return jnp.moveaxis(y.reshape(len(matrices), *x.shape[:2], -1), 0, 2)

    def _by_rows(self, x: Array, dy: Array) -> Array:
        from v4train.ops.kernels import fp8_matmul_triton

        grouped = x.ndim == 4
        groups = x.shape[2] if grouped else 1
        x, dy = (_by_group(_filled_up(a)) for a in (x, dy))
        dw = fp8_matmul_triton.rows_by_rows(x, dy, _sizes(x, groups=groups), interpret=self.interpret)
        return dw if grouped else dw[0]


def _by_group(x: Float[Array, "b s *g d"]) -> Float[Array, "R d"]:
    """All tokens of the first group, then all of the next."""
    return (jnp.moveaxis(x, 2, 0) if x.ndim == 4 else x).reshape(-1, x.shape[-1])


def _sizes(rows: Array, *, groups: int) -> Array:
    return jnp.full((groups,), len(rows) // groups, jnp.int32)


def _filled_up(x: Float[Array, "b s *g d"]) -> Float[Array, "b t *g d"]:
    """Rows of the batch with zeros at their ends, up to whole tiles."""
    spare = -x.shape[1] % scaled.FP8_TILE
    return jnp.pad(x, [(0, spare if axis == 1 else 0) for axis in range(x.ndim)]) if spare else x


def _added(x: Array, *, over: tuple[str, ...]) -> Array:
    return lax.psum(x, over) if over else x
