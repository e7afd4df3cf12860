"""Make the device mesh: of real devices, or of emulated ones on a single CPU."""

import jax
import numpy as np

from v4train.sharding import config as config_lib


def emulate(devices: int) -> None:
    """Splits the CPU into ``devices`` devices. Must run before anything uses a device.

    Raises:
        ValueError: JAX has already started with another number of devices.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        pass  # JAX has started already: fine if it has enough devices
    if len(jax.devices("cpu")) < devices:
        raise ValueError(
            f"mesh.emulate_devices: {devices} CPU devices were asked for, but JAX has already started with {len(jax.devices('cpu'))}; "
            "ask for them before the first use of JAX, or set XLA_FLAGS=--xla_force_host_platform_device_count"
        )


def make(config: config_lib.MeshConfig) -> jax.sharding.Mesh:
    """The mesh of the first ``config.devices`` devices.

    Raises:
        ValueError: fewer devices are present than the mesh needs.
    """
    if config.emulate_devices is not None:
        emulate(config.emulate_devices)
    present = jax.devices()
    if config.devices > len(present):
        product = " x ".join(f"{name} {size}" for name, size in config.sizes.items() if size > 1)
        raise ValueError(
            f"mesh: {product} needs {config.devices} devices, but {len(present)} {present[0].platform} device(s) are present; make the "
            f"mesh smaller, or set mesh.emulate_devices: {config.devices} to emulate it on the CPU"
        )
    if config.devices == len(present):
        return jax.make_mesh(
            tuple(config.sizes.values()), tuple(config.sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(config.sizes)
        )
    devices = np.array(present[: config.devices]).reshape(tuple(config.sizes.values()))
    return jax.sharding.Mesh(devices, tuple(config.sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(config.sizes))
