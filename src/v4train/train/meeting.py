"""How the processes of a run find each other at the first one's port, before JAX starts: `lifeline` keeps together who has come."""

import contextlib
import dataclasses
import os
import selectors
import socket
import time
from collections.abc import Iterator

from v4train.train import lifeline

_GRACE_SECONDS = 5.0
"""For the first process's answer, after the time to come is over."""


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A process that has come, and what it said of itself."""

    wire: lifeline.Wire
    peer: lifeline.Peer
    hello: lifeline.Message


def listen(port: int, *, backlog: int) -> socket.socket:
    """The first process's door.

    Raises:
        ValueError: the port is taken.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
        return socket.create_server(("", port), backlog=backlog)
    except OSError as e:
        raise ValueError(
            f"cluster.coordinator: port {port} of {socket.gethostname()} cannot be used ({os.strerror(e.errno or 0)}): another program has "
            "it, perhaps an earlier run that has not ended. Choose another port (--coordinator HOST:PORT), the same for all processes"
        ) from None


def gather(door: socket.socket, *, count: int, deadline: float, lost_seconds: float) -> Iterator[Arrival]:
    """Those who come, until all but the first have or it is `time.monotonic` ``deadline``. Strangers are sent away."""
    pending: dict[int, lifeline.Wire] = {}
    arrived = 0
    with selectors.DefaultSelector() as selector:
        selector.register(door, selectors.EVENT_READ)
        while arrived < count - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is door:
                    connection, _ = door.accept()
                    pending[connection.fileno()] = lifeline.Wire(connection, lost_seconds=lost_seconds)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                wire = pending[key.fd]
                try:
                    messages = wire.receive()
                    if messages == []:
                        continue  # half a line
                    arrival = Arrival(wire, _introduced(messages[0]), messages[0]) if messages else None
                except (ValueError, KeyError, TypeError):
                    arrival = None
                selector.unregister(wire.socket)
                del pending[key.fd]
                if arrival is not None:
                    arrived += 1
                    yield arrival
                else:
                    wire.close()
    for wire in pending.values():
        wire.close()


def _introduced(hello: lifeline.Message) -> lifeline.Peer:
    return lifeline.Peer(int(hello["process"]), str(hello["host"]), int(hello["pid"]))


def knock(
    address: tuple[str, int], *, hello: lifeline.Message, seconds: float, lost_seconds: float
) -> tuple[lifeline.Wire, lifeline.Message]:
    """Comes to the first process, and waits for its answer. Tries again until the time is over: the first may start later.

    Raises:
        ValueError: nobody answers there.
    """
    deadline, reason = time.monotonic() + seconds, "no answer"
    where = f"{address[0]}:{address[1]}"
    while (left := deadline - time.monotonic()) > 0:
        try:
            wire = lifeline.Wire(socket.create_connection(address, timeout=left), lost_seconds=lost_seconds)
        except OSError as e:
            reason = e.strerror or str(e) or type(e).__name__
            time.sleep(min(0.2, max(left, 0)))
            continue
        wire.send(hello)
        # The first process says by then who is missing.
        wire.socket.settimeout(left + _GRACE_SECONDS)
        with contextlib.suppress(ValueError):
            while (messages := wire.receive()) is not None:
                if messages:
                    wire.socket.settimeout(None)
                    wire.unread = messages[1:]
                    return wire, messages[0]
        wire.close()
        reason = "the connection was closed without an answer"
        time.sleep(min(0.2, max(left, 0)))
    raise ValueError(
        f"cluster.coordinator: process {hello['process']} on {hello['host']} did not reach process 0 at {where} within {seconds:g} s "
        f"(cluster.start_seconds): {reason}. Is process 0 running on that machine, and does the network let this port through?"
    )
