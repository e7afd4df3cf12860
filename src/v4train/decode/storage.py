"""Opens the tiers that a config asks for. With reuse of prefixes half of the disk's bytes are for their blocks, else all for entries."""

import os
import pathlib

from v4train.decode import cache as cache_lib
from v4train.decode import disk, host, tiers


def open_blocks(layout: cache_lib.Layout) -> disk.Blocks | None:
    """The blocks of prefixes on disk; None if the config does not ask for them.

    Raises:
        ValueError: the disk tier cannot be used.
    """
    config = layout.config
    if config.tiers is None or config.tiers.disk is None or not config.prefix_bytes:
        return None
    return disk.Blocks(pathlib.Path(config.tiers.disk.path), limit=config.tiers.disk.bytes // 2)


def open_tiers(layout: cache_lib.Layout) -> tiers.Tiers | None:
    """The tiers of a layout; None if it has none.

    Raises:
        ValueError: the disk tier cannot be used.
    """
    config = layout.config.tiers
    if config is None:
        return None
    (ratio,) = layout.selecting_ratios
    structure = tiers.structure_of(layout.entries_format().structure((1,)))
    swap = None
    if config.disk is not None:
        path = pathlib.Path(config.disk.path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            segments = layout.swap_bytes // layout.segment_bytes
            swap = host.Swap(path / f"swap-{os.getpid()}", segment_bytes=layout.segment_bytes, segments=segments)
        except OSError as error:
            raise disk.refusal(path, error) from None
    sizes = tiers.Sizes(
        layers=layout.host_layer_count,
        slots=layout.config.slots,
        hot=config.hot_entries,
        ratio=ratio,
        per_page=layout.entries_per_page(ratio),
        pages=layout.pages,
    )
    pool = host.HostPool(structure, per_page=sizes.per_page, pages=sizes.pages, layers=sizes.layers, limit=config.host_bytes, swap=swap)
    return tiers.Tiers(sizes, structure=structure, pool=pool)
