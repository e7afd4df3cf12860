"""Make the device mesh: of real devices, of emulated ones on CPUs, or of a topology that is only described.

**Order.** The axes are ``replica, fsdp, expert, context, tensor``, from the one that can bear the slowest link to the one that needs the
fastest. Devices are laid out with those of one process next to each other along the inner axes, so that tensor, context and expert groups
stay inside a host (NVLink) or a torus neighbourhood as long as they fit, and only the outer axes cross the network. TPUs know their
places in the torus: there JAX chooses.

**Slices.** TPU slices are joined by the data centre's network, some 50 times slower than the links inside. Only ``replica`` may cross it:
it sends a device's part of the gradients once a microbatch, while an all-gather of ``fsdp`` runs in every layer and pass. So the
number of replicas must be a multiple of the number of slices. On GPUs and CPUs every host is its own "slice" in this sense; there the
order alone keeps the inner axes together, and nothing is refused.

**Emulation.** ``mesh.emulate_devices`` is the number of devices of the whole run. Among N processes on one machine each emulates an N-th of
it: one recipe, the same mesh, whatever the number of processes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from v4train.sharding import config as config_lib


def emulate(devices: int, *, processes: int = 1) -> None:
    """Splits the CPU into this process's part of ``devices`` devices. Must run before anything uses a device.

    Raises:
        ValueError: JAX has already started with another number of devices, or the processes do not divide the devices.
    """
    if devices % processes:
        raise ValueError(
            f"mesh.emulate_devices: {devices} devices cannot be divided among {processes} processes; make it a multiple of {processes}"
        )
    here = devices // processes
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", here)
    except RuntimeError:
        pass  # JAX has started already: fine if it has enough devices
    if processes == 1 and len(jax.devices("cpu")) < devices:
        raise ValueError(
            f"mesh.emulate_devices: {devices} CPU devices were asked for, but JAX has already started with {len(jax.devices('cpu'))}; "
            "ask for them before the first use of JAX, or set XLA_FLAGS=--xla_force_host_platform_device_count"
        )


def make(config: config_lib.MeshConfig) -> jax.sharding.Mesh:
    """The mesh of the devices that are present; among several processes it takes all of them, otherwise the first ``config.devices``.

    Raises:
        ValueError: fewer devices are present than the mesh needs, or it would leave out some of another process.
    """
    if config.emulate_devices is not None and not jax.distributed.is_initialized():
        emulate(config.emulate_devices)
    present = jax.devices()
    if config.devices > len(present):
        raise ValueError(
            f"mesh: {_product(config)} needs {config.devices} devices, but {len(present)} {present[0].platform} device(s) are present"
            f"{_of_processes()}; make the mesh smaller, or set mesh.emulate_devices: {config.devices} to emulate it on the CPU"
        )
    if config.devices < len(present) and jax.process_count() > 1:
        raise ValueError(
            f"mesh: {_product(config)} takes {config.devices} of {len(present)} devices{_of_processes()}, and some process would have "
            f"none of them or too few; make the sizes' product {len(present)}, or start fewer processes"
        )
    return arrange(config, present[: config.devices])


def arrange(config: config_lib.MeshConfig, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh of just these `jax.Device`, which may be those of a topology's description.

    Raises:
        ValueError: their number is not the mesh's, or ``replica`` does not divide among their slices.
    """
    shape = tuple(config.axes.values())
    if len(devices) != config.devices:
        raise ValueError(f"mesh: {_product(config)} needs {config.devices} devices, but there are {len(devices)}")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        if config.replica % slices:
            raise ValueError(
                f"mesh.replica: {config.replica} is not a multiple of the {slices} slices that the devices lie in, and no other axis may "
                f"cross the slow network between them; set mesh.replica: {slices}"
            )
        across = (slices, *(1 for _ in shape[1:]))
        inside = (config.replica // slices, *shape[1:])
        laid_out = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        laid_out = np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
    return jax.sharding.Mesh(laid_out, tuple(config.axes), axis_types=_types(config))


def abstract(config: config_lib.MeshConfig) -> jax.sharding.AbstractMesh:
    """The mesh without devices: enough to place and to trace, not to compile."""
    return jax.sharding.AbstractMesh(tuple(config.axes.values()), tuple(config.axes), axis_types=_types(config))


def _types(config: config_lib.MeshConfig) -> tuple[jax.sharding.AxisType, ...]:
    return (jax.sharding.AxisType.Auto,) * len(config.axes)


def _product(config: config_lib.MeshConfig) -> str:
    return " x ".join(f"{name} {size}" for name, size in config.sizes.items() if size > 1) or "one device"


def _of_processes() -> str:
    return f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
