"""From a recipe to a run of many processes: find the others, see that all mean the same run, start JAX among them, end together.

One process a host (or one a GPU) runs the same command. Where it belongs is said, in this order, by the options ``--coordinator``,
``--processes``, ``--process``, which are the recipe's section `cluster`; or found by JAX's own detection, which knows Slurm, Open MPI,
Cloud TPU, GKE and Kubernetes' indexed jobs. Nothing said and nothing found: one process, and nothing of this file happens.

Before JAX starts, the processes meet at the coordinator's port (`lifeline`), because JAX would answer a wrong address, a missing process
or a recipe that differs on one host with a timeout or a hang. There each says who it is, and what recipe, code and versions it has;
process 0 compares them with its own and names whoever differs. Then it tells the others where JAX's coordinator is: a port that is free
on its host.

Only process 0 writes to standard output. Native code (gloo names every connection) would, too: file descriptor 1 of the others is closed,
and in process 0 it belongs to Python alone.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import platform
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from v4train import recipe as recipe_lib
from v4train.checkpoint import hosts
from v4train.config import dump
from v4train.sharding import mesh as mesh_lib
from v4train.train import config as config_lib
from v4train.train import lifeline, meeting, resilience, watchdog

_SEEN_SECONDS = 10.0
"""For a file of one host to be seen by another: network file systems keep what they know for a few seconds."""
_OWN_BUSINESS = ("cluster",)
"""Keys of the recipe in which hosts may differ."""
_LISTED = 5

Describe = Callable[[BaseException], tuple[str, int] | None]
"""What to tell the user of an exception and the exit code; None: show the stack trace."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among all.

    Attributes:
        address: host and port of process 0.
        processes: how many there are.
        process: which one this is.
        local_devices: numbers of the accelerators of this host that are this process's; None: all of them.
    """

    address: tuple[str, int]
    processes: int
    process: int
    local_devices: list[int] | None = None


def find(config: config_lib.ClusterConfig) -> Place | None:
    """Where this process belongs; None if it is alone.

    Raises:
        ValueError: only a part of it is known, or it contradicts itself.
    """
    if config.processes == 1:
        return None
    said = (config.coordinator, config.processes, config.process)
    detected = (None, None, None, None) if None not in said else _detected(config.start_seconds)
    coordinator, processes, process = (mine if mine is not None else theirs for mine, theirs in zip(said, detected[:3], strict=True))
    if processes == 1 or (coordinator, processes, process) == (None, None, None):
        return None
    options = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": process}
    if missing := [option for option, value in options.items() if value is None]:
        raise ValueError(
            f"cluster: {' and '.join(missing)} is missing, and neither Slurm nor Kubernetes nor a TPU says it. Give all three options to "
            "every process, or none to train with one process"
        )
    assert isinstance(coordinator, str)
    assert isinstance(processes, int)
    assert isinstance(process, int)
    if not 0 <= process < processes:
        raise ValueError(f"cluster.process: {process} is not one of 0 to {processes - 1} (cluster.processes {processes})")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"cluster.coordinator: {coordinator!r} is not HOST:PORT, such as node17:8476")
    return Place((host.strip("[]"), int(port)), processes, process, detected[3])


def _detected(seconds: float) -> tuple[str | None, int | None, int | None, list[int] | None]:
    """Coordinator, processes, process and local devices by JAX's detection; its address is that of process 0."""
    from jax._src import clusters  # the public function detects, starts and waits all at once

    environment = os.environ
    indexed = "JOB_COMPLETION_INDEX" in environment or "TPU_WORKER_HOSTNAMES" in environment
    if "KUBERNETES_SERVICE_HOST" in environment and not indexed:
        return None, None, None, None  # a pod like any other; asking the API server about its job would fail
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    coordinator, processes, process, devices = detect(None, None, None, None, None, int(seconds))
    # JAX takes one process a GPU for granted. With one process a node, that would leave all GPUs but the first idle.
    nodes, local = environment.get("SLURM_STEP_NUM_NODES"), environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if local == "1" or (nodes and local is None and processes is not None and processes <= int(nodes)):
        devices = None
    return coordinator, processes, process, None if devices is None else list(devices)


class Cluster:
    """The processes of a run, for the code that trains. Of one process it is: everything is allowed, nothing is sent.

    Attributes:
        first: whether this process speaks and writes.
    """

    def __init__(self, line: lifeline.Line | None = None):
        self._line = line
        self.first = line is None or line.me.process == 0
        self._stop: resilience.Stop | None = None

    def follow(self, stop: resilience.Stop, *, started: int) -> None:
        """From now on all processes stop after the same step when one is asked to. ``started``: the steps that are done."""
        self._stop = stop
        if self._line is not None:
            line = self._line
            stop.tell, stop.end = line.ask_stop, lambda text, code: line.fail(text, code=code, symptom=False)
            self._line.follow(started=started, on_stop=stop.ask)
            if stop.signal is not None:
                self._line.ask_stop(stop.signal)

    @contextlib.contextmanager
    def watching(self, dog: watchdog.Watchdog) -> Iterator[None]:
        """While this lasts, a hang in one process, or in several, ends all with a message that says where. Comes after `follow`."""
        if self._line is not None:
            self._line.watch(dog)
        with dog.watching(self._end_alone(dog) if self._line is None else self._line.stalled):
            yield

    def _end_alone(self, dog: watchdog.Watchdog) -> Callable[[], None]:
        assert self._stop is not None
        end = self._stop.end
        return lambda: end(watchdog.alone(dog.where(), seconds=dog.seconds or 0), watchdog.EXIT_CODE)

    def may_go(self, done: int) -> bool:
        """Whether to start another step when ``done`` are; the same answer in all processes."""
        if self._line is not None:
            return self._line.may_go(done)
        return self._stop is None or self._stop.signal is None

    def check_shared(self, directory: pathlib.Path) -> None:
        """Sees that the directory, which the first process has made, is the same on all hosts.

        Raises:
            ValueError: a host does not see what the first wrote there.
        """
        if self._line is None:
            return
        [token] = hosts.from_first([int.from_bytes(os.urandom(3), "big")])
        path = directory / f".host-0-was-here-{token}"
        if self.first:
            path.touch()
        hosts.barrier(f"cluster/shared/{token}")
        deadline = time.monotonic() + _SEEN_SECONDS
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                os.listdir(directory)  # makes a network file system look again
        missing = None if path.exists() else f"{self._line.me} does not see there what host 0 has written"
        reason = hosts.first_reason(missing)
        if self.first:
            path.unlink(missing_ok=True)
        if reason is not None:
            raise ValueError(f"train.run_directory: {directory} must be one directory that all hosts share (NFS, Lustre, ...); {reason}")


@contextlib.contextmanager
def join(recipe: recipe_lib.Recipe, *, describe: Describe = lambda _: None) -> Iterator[Cluster]:
    """The processes that train this recipe, from here to the end of the ``with`` block. Must run before anything uses a device.

    Among several processes, an exception that leaves the block, here or in another process, ends them all; it is told by the first one.

    Args:
        recipe: what to train, as this process has it.
        describe: how to tell an exception.

    Raises:
        ValueError: the processes do not come together; in the first process, or where that one cannot be reached.
        SystemExit: the same in all others, without a word.
    """
    place = find(recipe.cluster)
    if place is None:
        yield Cluster()
        return
    line, jax_address = _meet(place, recipe)
    _own_stdout(keep=place.process == 0)
    try:
        if recipe.mesh.emulate_devices is not None:
            mesh_lib.emulate(recipe.mesh.emulate_devices, processes=place.processes)
        _start_jax(place, jax_address, recipe)
        yield Cluster(line)
        jax.distributed.shutdown()
    except BaseException as e:
        text, code = describe(e) or _trace(e)
        line.fail(text, code=code, symptom=isinstance(e, jax.errors.JaxRuntimeError))
    line.close()


def _start_jax(place: Place, address: str, recipe: recipe_lib.Recipe) -> None:
    config = recipe.cluster
    # JAX would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        num_processes=place.processes,
        process_id=place.process,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(config.start_seconds),
        heartbeat_timeout_seconds=int(max(100, 2 * config.lost_seconds, 2 * (recipe.train.stall_seconds or 0))),  # we are to notice first
    )


def _trace(e: BaseException) -> tuple[str, int]:
    if isinstance(e, SystemExit):
        return f"exit {e.code}", e.code if isinstance(e.code, int) else 1
    return "".join(traceback.format_exception(e)), 1


def _meet(place: Place, recipe: recipe_lib.Recipe) -> tuple[lifeline.Line, str]:
    """The line to the others, and the address of JAX's coordinator."""
    me = lifeline.Peer(place.process, socket.gethostname(), os.getpid())
    hello = dataclasses.asdict(me) | {"processes": place.processes, "facts": facts(recipe)}
    times = {"seconds": recipe.cluster.start_seconds, "lost_seconds": recipe.cluster.lost_seconds}
    if place.process == 0:
        return _receive(place, me, hello["facts"], **times)
    wire, answer = meeting.knock(place.address, hello=hello, **times)
    if answer["kind"] != "welcome":
        wire.close()
        sys.exit(2)
    peers = {p: lifeline.Peer(p, host, pid) for p, (host, pid) in enumerate(answer["peers"])}
    return lifeline.Spoke(me, {0: wire}, peers=peers), answer["jax"]


def _receive(place: Place, me: lifeline.Peer, mine: dict[str, Any], *, seconds: float, lost_seconds: float) -> tuple[lifeline.Line, str]:
    arrivals: dict[int, meeting.Arrival] = {}
    problems: list[str] = []
    with meeting.listen(place.address[1], backlog=place.processes) as door:
        deadline = time.monotonic() + seconds
        for arrival in meeting.gather(door, count=place.processes, deadline=deadline, lost_seconds=lost_seconds):
            known = me if arrival.peer.process == 0 else (found := arrivals.get(arrival.peer.process)) and found.peer
            if known:
                problems.append(f"both {known} and {arrival.peer} say that they are process {known.process}; each needs its own --process")
            elif arrival.hello["processes"] != place.processes:
                said = arrival.hello["processes"]
                problems.append(f"{arrival.peer} was started as one of {said} processes, host 0 as one of {place.processes} (--processes)")
            arrivals[arrival.peer.process if not known else -len(arrivals) - 1] = arrival
    if not problems and (absent := sorted(set(range(1, place.processes)) - arrivals.keys())):
        came = ", ".join(str(a.peer) for _, a in sorted(arrivals.items())[:_LISTED]) or "nobody"
        missing = f"process{'es' if len(absent) > 1 else ''} {_listed(absent)} of {place.processes}"
        where = f"{place.address[0]}:{place.address[1]}"
        problems.append(
            f"{missing} did not come to {where} within {seconds:g} s (cluster.start_seconds); {came} did. Were they started, with this "
            "address, and does the network let them through?"
        )
    problems = problems or _differences(mine, arrivals)
    answer: lifeline.Message = {"kind": "refused"}
    if not problems:
        peers = [me, *(arrivals[p].peer for p in range(1, place.processes))]
        host = place.address[0]
        address = f"{f'[{host}]' if ':' in host else host}:{_free_port()}"
        answer = {"kind": "welcome", "jax": address, "peers": [(peer.host, peer.pid) for peer in peers]}
    for arrival in arrivals.values():
        arrival.wire.send(answer)
        if problems:
            arrival.wire.close()
    if problems:
        raise ValueError("cluster: the processes cannot train together:\n" + "\n".join(f"  - {problem}" for problem in problems))
    wires = {process: arrival.wire for process, arrival in arrivals.items()}
    return lifeline.Hub(me, wires, peers=dict(enumerate(peers))), address


def facts(recipe: recipe_lib.Recipe) -> dict[str, Any]:
    """What must be the same in all processes: recipe, code, versions."""
    return {
        "recipe": {key: value for key, value in _dotted(dump.values(recipe)).items() if key.split(".")[0] not in _OWN_BUSINESS},
        "v4train": code_digest(),
        "jax": jax.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def code_digest() -> str:
    """SHA-256 of v4train's sources."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _differences(mine: dict[str, Any], arrivals: dict[int, meeting.Arrival]) -> list[str]:
    """What others have that differs, a line for each way to differ; many hosts that differ alike are one line."""
    found: dict[str, list[lifeline.Peer]] = {}
    for _, arrival in sorted(arrivals.items()):
        for line in differences(mine, arrival.hello["facts"]):
            found.setdefault(line, []).append(arrival.peer)
    return [f"{_listed([str(peer) for peer in peers])}: {line}" for line, peers in found.items()]


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """How the facts of another process differ from those of host 0."""
    lines = []
    old, new = mine["recipe"], theirs["recipe"]
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if keys:
        shown = "; ".join(f"{key} {new.get(key, 'absent')!r} there, {old.get(key, 'absent')!r} on host 0" for key in keys[:_LISTED])
        lines.append(f"has another recipe: {shown}" + (f"; and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""))
    if mine["v4train"] != theirs["v4train"]:
        lines.append("has another version of v4train's code than host 0: install the same on all hosts")
    for name in ("jax", "python"):
        if mine[name] != theirs[name]:
            lines.append(f"has {name} {theirs[name]}, host 0 has {mine[name]}: install the same on all hosts")
    return lines


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": [1]}}`` -> ``{"a.b": "[1]"}``: comparable after a trip through JSON."""
    if not isinstance(value, dict):
        return {prefix: str(value)}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _dotted(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _listed(items: list[Any]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(str(item) for item in items[:_LISTED]) + more


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _own_stdout(*, keep: bool) -> None:
    """Takes file descriptor 1 from native code, and standard output from all but the process that speaks."""
    sys.stdout.flush()
    spoken = os.dup(1) if keep else None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    if spoken is not None:
        sys.stdout = os.fdopen(spoken, "w", encoding=sys.stdout.encoding, buffering=1)
