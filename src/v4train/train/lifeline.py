"""Keeps the processes of a run together: who has come, who failed first, and after which step all stop.

**Why not JAX's own.** JAX's coordination service tells a lost process by a missing heartbeat, 100 s late, and ends the others with an
abort in native code that names no cause. A collective in which a partner is missing may fail at once, or wait for ever (gloo does, when
one process of two is killed). And an exception is private to its process: the others learn of it by waiting for it.

**A star of TCP connections.** Every process holds one connection to process 0, from before JAX starts to the end. The kernel ties it to
the process as it does `flock` (see `checkpoint.run_lock`): after ``kill -9`` it is closed at once, when a machine vanishes TCP keep-alive
finds out, and neither depends on the interpreter, which may be busy compiling for minutes. (Rejected: heartbeats from a Python thread,
which stop when native code holds the interpreter's lock, and end a healthy run.) The messages are a line of JSON each, a few in the life
of a run:

    hello, welcome | refused     who has come, with what recipe and code; see `cluster`
    failed                       what an exception says, sent before the process ends
    stop, stopping, started, limit       see below
    stalled, heard, where, at    a process takes too long, and where all are; see `watchdog`
    end, bye                     why all end now; a normal end

**The first cause on top.** Process 0 takes what comes first, waits a moment for what came at the same time, and prints it: a cause before
its consequences (what JAX reports of a broken collective is one), the same words of several processes once. Then it ends all, itself
last: it hosts JAX's coordinator, without which the others would abort. A thread ends the process, because the main thread may hang.

**Stopping at one step.** SIGTERM may reach any process, or all, at different times. A process that would start a step which another does
not start hangs. So before each step a process notes that it starts it (`may_go`: one lock, no message, no wait). When somebody is asked
to stop, process 0 asks all how many steps they have started; from their answer on they start no other until they are told the largest
number, and that is where all stop. It takes two messages, once in the life of a run; an all-reduce of a flag in every step would cost a
synchronisation in every step, and stop a step later.
"""

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from v4train.train import watchdog

Message = dict[str, Any]

_WINDOW_SECONDS = 0.5
"""After the first failure, for those that came at the same time."""
_FAREWELL_SECONDS = 5.0
"""For the others to end before process 0 does, and for an answer of process 0 to one that failed."""
_ANSWER_SECONDS = 30.0
"""For a process to say where it is; its thread for that answers at once, unless nothing of the process runs."""
_LONGEST_LINE = 2**24
EXIT_CODE = 1
"""Of all processes when one is gone."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A process of the run, as people know it."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"host {self.process} ({self.host}, process id {self.pid})"


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why one process cannot go on.

    Attributes:
        peer: the process.
        text: for people; None if it is gone without a word.
        code: the exit code.
        symptom: it is likely a consequence of another process's failure.
    """

    peer: Peer
    text: str | None
    code: int = EXIT_CODE
    symptom: bool = False


class Wire:
    """Lines of JSON over a socket."""

    def __init__(self, connection: socket.socket, *, lost_seconds: float):
        self.socket, self._buffer, self._lock = connection, b"", threading.Lock()
        self.unread: list[Message] = []
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = max(int(lost_seconds / 3), 1)
        options = {"TCP_KEEPIDLE": idle, "TCP_KEEPINTVL": idle, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": int(lost_seconds * 1000)}
        for name, value in options.items():
            if hasattr(socket, name):  # not every system has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> None:
        """Sends it, or loses it with the connection: whoever reads finds that out."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """What has come, perhaps nothing whole yet; None at the end of the connection. Blocks until there is something.

        Raises:
            ValueError: it is not our kind of message.
        """
        try:
            content = self.socket.recv(2**16)
        except OSError:
            return None
        *lines, self._buffer = (self._buffer + content).split(b"\n")
        if len(self._buffer) > _LONGEST_LINE:
            raise ValueError("a line without an end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages if content else None

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Line:
    """This process's end of the star. Made by `cluster.join`; runs a thread until `close`."""

    def __init__(self, me: Peer, wires: Mapping[int, Wire], *, peers: Mapping[int, Peer]):
        self.me, self._wires, self._peers = me, dict(wires), dict(peers)
        self.count = len(peers)
        self._state = threading.Condition()
        self._started, self._signal, self._limit = 0, None, None
        self._on_stop: Callable[[int], None] = lambda number: None
        self._bye: set[int] = set()
        self._gone: set[int] = set()
        self._ends = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        self._asked = collections.deque[int | None]()  # numbers of signals; None: this process takes too long
        self._dog = watchdog.Watchdog(None)
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()

    def follow(self, *, started: int, on_stop: Callable[[int], None]) -> None:
        """From now on this process can stop between steps.

        Args:
            started: the steps that are done.
            on_stop: called once, from a thread, with the number of the signal that some process was sent.
        """
        with self._state:
            self._started, self._on_stop, asked = started, on_stop, self._signal
        if asked is not None:
            on_stop(asked)

    def ask_stop(self, number: int) -> None:
        """Asks all to stop because of a signal. Safe in a signal's handler: it takes no lock."""
        self._asked.append(number)
        os.write(self._wake_write, b"s")

    def watch(self, dog: watchdog.Watchdog) -> None:
        """From now on this process can say where it is."""
        self._dog = dog

    def stalled(self) -> None:
        """Something in this process takes too long: looks which process hangs, if any, and then ends all."""
        self._asked.append(None)
        self._wake()

    def may_go(self, done: int) -> bool:
        """Whether to start another step when ``done`` are; if not, all processes stop after as many."""
        with self._state:
            while self._signal is not None and self._limit is None:
                self._state.wait()
            if self._limit is not None and done >= self._limit:
                return False
            self._started = done + 1
            return True

    def fail(self, text: str, *, code: int, symptom: bool) -> NoReturn:
        """Ends all processes because of what happened in this one. Does not return."""
        raise NotImplementedError

    def close(self) -> None:
        """Leaves when the run has ended well everywhere."""
        raise NotImplementedError

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ, None)
            for process, wire in self._wires.items():
                selector.register(wire.socket, selectors.EVENT_READ, process)
            for process, wire in self._wires.items():
                self._take_all(process, wire.unread)
            while not self._ends.is_set():
                for key, _ in selector.select(self._patience()):
                    if key.data is None:
                        os.read(self._wake_read, 2**10)
                    elif not self._read(key.data):
                        selector.unregister(key.fileobj)
                while self._asked:
                    number = self._asked.popleft()
                    self._stall_was_noticed() if number is None else self._stop_was_asked(number)
                self._after_events()

    def _read(self, process: int) -> bool:
        """Takes what a process sent; False when its connection has ended."""
        try:
            messages = self._wires[process].receive()
        except ValueError:
            messages = None
        self._take_all(process, messages or [])
        if messages is None:
            self._gone.add(process)
            if process not in self._bye and not self._ends.is_set():
                self._lost(process)
        return messages is not None

    def _take_all(self, process: int, messages: list[Message]) -> None:
        for message in messages:
            self._take(process, message)

    def _wake(self) -> None:
        os.write(self._wake_write, b"w")

    def _hold(self, number: int) -> int:
        """Starts no more steps until there is a limit; the number of steps that were started."""
        with self._state:
            self._signal = number
            started, on_stop = self._started, self._on_stop
        on_stop(number)
        return started

    def _set_limit(self, limit: int) -> None:
        with self._state:
            self._limit = limit
            self._state.notify_all()

    def _patience(self) -> float | None:
        return None

    def _after_events(self) -> None:
        pass

    def _stop_was_asked(self, number: int) -> None:
        raise NotImplementedError

    def _stall_was_noticed(self) -> None:
        raise NotImplementedError

    def _take(self, process: int, message: Message) -> None:
        raise NotImplementedError

    def _lost(self, process: int) -> None:
        raise NotImplementedError


class Spoke(Line):
    """Of every process but the first."""

    _expects_by: float | None = None
    """When process 0 must have said something."""

    def fail(self, text: str, *, code: int, symptom: bool) -> NoReturn:
        self._wires[0].send({"kind": "failed", "text": text, "code": code, "symptom": symptom})
        time.sleep(_FAREWELL_SECONDS)  # the thread ends the process as soon as process 0 has told what happened
        _say(f"v4train: {self.me} failed, and host 0 does not answer:\n{text}")
        os._exit(code)

    def close(self) -> None:
        self._bye.add(0)
        self._wires[0].send({"kind": "bye"})
        self._ends.set()
        self._wake()
        self._thread.join()
        self._wires[0].close()

    def _stop_was_asked(self, number: int) -> None:
        self._wires[0].send({"kind": "stop", "signal": number})

    def _stall_was_noticed(self) -> None:
        self._wires[0].send({"kind": "stalled"})
        self._expects_by = self._expects_by or time.monotonic() + _ANSWER_SECONDS

    def _patience(self) -> float | None:
        return _until(self._expects_by)

    def _after_events(self) -> None:
        if self._expects_by is not None and time.monotonic() >= self._expects_by and self._dog.seconds is not None:
            found = {str(self._peers[0]): None, str(self.me): self._dog.where()}
            if self._is_second():
                _say(f"v4train: {watchdog.judge(found, seconds=self._dog.seconds, count=self.count)}")
            os._exit(watchdog.EXIT_CODE)

    def _is_second(self) -> bool:
        """Whether this one speaks when the first cannot."""
        return self.me.process == min(set(self._peers) - {0})

    def _take(self, process: int, message: Message) -> None:
        self._expects_by = None
        if message["kind"] == "where":
            self._wires[0].send({"kind": "at", "where": dataclasses.asdict(self._dog.where())})
        elif message["kind"] == "stopping":
            self._wires[0].send({"kind": "started", "steps": self._hold(message["signal"])})
        elif message["kind"] == "limit":
            self._set_limit(message["steps"])
        elif message["kind"] == "end":
            os._exit(message["code"])

    def _lost(self, process: int) -> None:
        if self._is_second():
            _say(f"v4train: {lost(self._peers[0], count=self.count)}")
        os._exit(EXIT_CODE)


class Hub(Line):
    """Of the first process: it alone decides and speaks."""

    def __init__(self, me: Peer, wires: Mapping[int, Wire], *, peers: Mapping[int, Peer]):
        self._causes: list[Cause] = []
        self._decide_at: float | None = None
        self._answers: dict[int, int] = {}
        self._places: dict[int, watchdog.Where] = {}
        self._judge_at: float | None = None
        super().__init__(me, wires, peers=peers)

    def fail(self, text: str, *, code: int, symptom: bool) -> NoReturn:
        self._blame(Cause(self.me, text, code, symptom))
        self._wake()
        while True:
            time.sleep(_FAREWELL_SECONDS)  # the thread ends the process

    def close(self) -> None:
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._present() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._ends.set()
        self._wake()
        self._thread.join()
        for wire in self._wires.values():
            wire.close()

    def _present(self) -> set[int]:
        return self._wires.keys() - self._bye - self._gone

    def _blame(self, cause: Cause) -> None:
        self._causes.append(cause)
        if self._decide_at is None:
            self._decide_at = time.monotonic() + _WINDOW_SECONDS

    def _patience(self) -> float | None:
        return _until(self._decide_at, self._judge_at)

    def _after_events(self) -> None:
        if self._decide_at is not None and (time.monotonic() >= self._decide_at or len(self._causes) >= self.count):
            self._end_all(*judge(self._causes, count=self.count))
        if self._judge_at is not None and time.monotonic() >= self._judge_at:
            self._judge_places()

    def _end_all(self, text: str, code: int) -> NoReturn:
        _say(f"v4train: {text}")
        for process in self._present():
            self._wires[process].send({"kind": "end", "code": code})
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for process in self._present():
            self._wires[process].socket.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(ValueError):
                while self._wires[process].receive() is not None:
                    pass
        os._exit(code)

    def _stop_was_asked(self, number: int) -> None:
        if self._signal is not None:
            return
        for process in self._present():
            self._wires[process].send({"kind": "stopping", "signal": number})
        self._answers[0] = self._hold(number)
        self._count_answers()

    def _stall_was_noticed(self) -> None:
        if self._judge_at is None and self._dog.seconds is not None:
            self._places, self._judge_at = {0: self._dog.where()}, time.monotonic() + _ANSWER_SECONDS
            for process in self._present():
                self._wires[process].send({"kind": "where"})

    def _judge_places(self) -> None:
        assert self._dog.seconds is not None
        self._judge_at, present = None, sorted(self._present() | {0})
        found = {str(self._peers[process]): self._places.get(process) for process in present}
        text = watchdog.judge(found, seconds=self._dog.seconds, count=self.count)
        if text is not None:
            self._end_all(text, watchdog.EXIT_CODE)

    def _count_answers(self) -> None:
        if self._signal is not None and self._limit is None and self._answers.keys() >= self._present() | {0}:
            limit = max(self._answers.values())
            for process in self._present():
                self._wires[process].send({"kind": "limit", "steps": limit})
            self._set_limit(limit)

    def _take(self, process: int, message: Message) -> None:
        if message["kind"] == "failed":
            self._blame(Cause(self._peers[process], message["text"], message["code"], message["symptom"]))
        elif message["kind"] == "stop":
            self._stop_was_asked(message["signal"])
        elif message["kind"] == "started":
            self._answers[process] = message["steps"]
            self._count_answers()
        elif message["kind"] == "stalled":
            self._wires[process].send({"kind": "heard"})
            self._stall_was_noticed()
        elif message["kind"] == "at":
            self._places[process] = watchdog.Where(**message["where"])
            if self._judge_at is not None and self._places.keys() >= self._present():
                self._judge_at = 0.0
        elif message["kind"] == "bye":
            self._bye.add(process)
            self._count_answers()

    def _lost(self, process: int) -> None:
        if all(cause.peer.process != process for cause in self._causes):
            self._blame(Cause(self._peers[process], None))


def lost(peer: Peer, *, count: int) -> str:
    """What to say when a process is gone without a word."""
    return (
        f"{peer} is gone without a word, and all {count} hosts stop: it was killed (perhaps by the system, for memory), it crashed in "
        "native code, or its machine or network failed; its own log and its exit code may say more. The same command goes on from the "
        "newest finished checkpoint."
    )


def judge(causes: list[Cause], *, count: int) -> tuple[str, int]:
    """What to print of several causes, in the order of their coming, and the exit code."""
    first = min(causes, key=lambda cause: cause.symptom)  # of equals the one that came first
    if first.text is None:
        return lost(first.peer, count=count), first.code
    same = [cause.peer for cause in causes if cause.text == first.text]
    if len(same) == count:
        return first.text, first.code
    who = str(same[0]) if len(same) == 1 else f"{same[0]} and {len(same) - 1} more"
    also = [cause for cause in causes if cause.text != first.text and not cause.symptom]
    more = "".join(f"\n{cause.peer}: {'is gone' if cause.text is None else cause.text.strip().splitlines()[-1]}" for cause in also)
    return f"{who} failed, and all {count} hosts stop:\n{first.text}{more and f'{chr(10)}then:{more}'}", first.code


def _until(*times: float | None) -> float | None:
    """Seconds until the first of these times, which may have passed; None if there is none."""
    known = [time for time in times if time is not None]
    return max(min(known) - time.monotonic(), 0) if known else None


def _say(text: str) -> None:
    # Not through sys.stderr: the main thread may hold its lock for ever.
    os.write(2, f"{text.rstrip()}\n".encode())
