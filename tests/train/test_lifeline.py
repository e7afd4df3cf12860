"""The line between processes, with real processes that do nothing else: deaths, errors, signals. None of them imports JAX."""

import dataclasses
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from v4train.train import lifeline, meeting

# Whatever the main threads do (sleep for a minute, as in a collective that hangs), the line has to end them.
PROCESS = """
import os, random, signal, sys, time
from v4train.train import lifeline, meeting

me, count, port, act = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
peers = {i: lifeline.Peer(i, f"node{i}", 1000 + i) for i in range(count)}
times = {"lost_seconds": 30}
if me == 0:
    with meeting.listen(port, backlog=count) as door:
        arrived = {a.peer.process: a.wire for a in meeting.gather(door, count=count, deadline=time.monotonic() + 60, **times)}
    for wire in arrived.values():
        wire.send({"kind": "welcome"})
    line = lifeline.Hub(peers[0], arrived, peers=peers)
else:
    hello = {"process": me, "host": f"node{me}", "pid": 1000 + me}
    wire, _ = meeting.knock(("127.0.0.1", port), hello=hello, seconds=60, **times)
    line = lifeline.Spoke(peers[me], {0: wire}, peers=peers)
print("here", flush=True)
exec(act)
"""


@dataclasses.dataclass
class Ended:
    code: int
    err: str


class Processes:
    def __init__(self, count: int, act: str):
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        words = [[sys.executable, "-c", PROCESS, str(i), str(count), str(port), act] for i in range(count)]
        self.processes = [subprocess.Popen(w, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for w in words]

    def wait_for_all(self):
        for process in self.processes:
            assert process.stdout.readline() == "here\n", process.stderr.read()

    def end(self) -> list[Ended]:
        try:
            return [Ended((out := process.communicate(timeout=60)) and process.returncode, out[1]) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


HANG = "time.sleep(60)"


def test_a_normal_end_is_silent():
    assert Processes(3, "time.sleep(0.1 * me); line.close()").end() == [Ended(0, "")] * 3


def test_an_error_ends_all_and_is_told_once_by_the_first():
    processes = Processes(3, f"line.fail('boom', code=2, symptom=False) if me == 1 else {HANG}")
    processes.wait_for_all()
    started = time.monotonic()
    first, *others = processes.end()
    assert time.monotonic() - started < 15
    assert (first.code, first.err) == (2, "v4train: host 1 (node1, process id 1001) failed, and all 3 hosts stop:\nboom\n")
    assert others == [Ended(2, "")] * 2


def test_the_cause_stands_above_its_consequences():
    act = f"""
if me == 2: line.fail("connection closed by peer", code=1, symptom=True)
if me == 1: time.sleep(0.2); line.fail("no such file", code=2, symptom=False)
{HANG}"""
    first, *others = Processes(4, act).end()
    assert first.err == "v4train: host 1 (node1, process id 1001) failed, and all 4 hosts stop:\nno such file\n"
    assert [first.code, *(o.code for o in others)] == [2] * 4


def test_what_all_say_is_said_once():
    first, *others = Processes(3, "line.fail('no such recipe', code=2, symptom=False)").end()
    assert first == Ended(2, "v4train: no such recipe\n")
    assert others == [Ended(2, "")] * 2


def test_a_killed_process_is_named():
    processes = Processes(3, HANG)
    processes.wait_for_all()
    processes.processes[2].send_signal(signal.SIGKILL)
    started = time.monotonic()
    first, second, third = processes.end()
    assert time.monotonic() - started < 15
    assert first.code == second.code == 1
    assert first.err.startswith("v4train: host 2 (node2, process id 1002) is gone without a word, and all 3 hosts stop: it was killed")
    assert first.err.count("\n") == 1
    assert (second.err, third.code) == ("", -9)


def test_when_the_first_is_killed_the_second_speaks():
    processes = Processes(3, HANG)
    processes.wait_for_all()
    processes.processes[0].send_signal(signal.SIGKILL)
    first, second, third = processes.end()
    assert (first.code, second.code) == (-9, 1)
    assert second.err.startswith("v4train: host 0 (node0, process id 1000) is gone without a word, and all 3 hosts stop")
    assert third == Ended(1, "")


@pytest.mark.parametrize("who", [0, 2])
def test_all_stop_after_the_same_step(who):
    """Processes of different speeds, without anything that keeps them in step: the slower ones go on to where the fastest one is."""
    act = f"""
told = []
line.follow(started=5, on_stop=told.append)
done = 5
while line.may_go(done):
    time.sleep(random.random() * 0.02 * (me + 1))
    done += 1
    if me == {who} and done == 15: line.ask_stop(15)
line.close()
print(done, told, file=sys.stderr)
"""
    ended = Processes(3, act).end()
    assert [e.code for e in ended] == [0] * 3
    assert len({e.err for e in ended}) == 1, ended
    done, told = ended[0].err.split(maxsplit=1)
    assert int(done) >= 15
    assert told == "[15]\n"


def test_stopping_before_the_first_step_starts_none():
    act = "line.ask_stop(2) if me == 1 else None; time.sleep(0.5); told = []; line.follow(started=7, on_stop=told.append)\n"
    act += "assert not line.may_go(7) and told == [2], told\nline.close()"
    assert Processes(2, act).end() == [Ended(0, "")] * 2


def test_several_signals_at_once_are_one():
    act = """
line.follow(started=0, on_stop=lambda number: None)
line.ask_stop(15); line.ask_stop(15)
done = 0
while line.may_go(done): done += 1
line.close()
print(done, file=sys.stderr)
"""
    ended = Processes(4, act).end()
    assert [e.code for e in ended] == [0] * 4
    assert len({e.err for e in ended}) == 1


def test_strangers_at_the_door_are_sent_away():
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    with meeting.listen(port, backlog=4) as door:
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x"}\n', b""):
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.sendall(content)
            stranger.close()
        friend = socket.create_connection(("127.0.0.1", port))
        friend.sendall(b'{"process": 1, "host": "n", ')
        friend.sendall(b'"pid": 7}\n')
        arrived = list(meeting.gather(door, count=2, deadline=time.monotonic() + 10, lost_seconds=30))
        friend.close()
        arrived[0].wire.close()
    assert [a.peer for a in arrived] == [lifeline.Peer(1, "n", 7)]


def test_who_leaves_late_is_not_ended_by_those_who_have_left():
    """The first process goes as soon as it has heard the farewell of the other, which is still about to leave."""
    linger = "wire, send = line._wires[0], line._wires[0].send\nwire.send = lambda message: (send(message), time.sleep(1))\n"
    assert Processes(2, f"if me == 1:\n  {linger.replace(chr(10), '; ')}\nline.close()").end() == [Ended(0, "")] * 2


# Sections of half a second at most; main threads that hang, or go on, from section to section.
TIMED = """
from v4train.train import watchdog
lifeline._ANSWER_SECONDS = 2.0
dog = watchdog.Watchdog(1.0)
def go(section, step, seconds, **timed):
    dog.at(section, step, **timed)
    time.sleep(seconds)
line.watch(dog)
with dog.watching(line.stalled):
    go("data", 1, 0.1)
    go("step", 1, 0.1)
"""


def hanging(text: str) -> Processes:
    return Processes(3, TIMED + textwrap.indent(textwrap.dedent(text), "    ") + "\nline.close()")


@pytest.mark.parametrize("who", [0, 2])
def test_a_hang_is_told_with_host_section_and_step_and_not_blamed_on_those_who_wait(who):
    """The others have waited for longer than the one that hangs, and call first."""
    first, *others = hanging(f"""
        if me == {who}:
            time.sleep(0.5)
            go("data", 2, 60)
        go("data", 2, 0)
        go("step", 2, 60)
    """).end()
    assert [first.code, *(o.code for o in others)] == [1] * 3
    assert others == [Ended(1, "")] * 2
    told, waiting, *stack = first.err.splitlines()
    assert re.fullmatch(
        rf"v4train: host {who} \(node{who}, process id 100{who}\) hangs, and all 3 hosts stop \(train\.stall_seconds: 1\): in section "
        r"'data' of step 2 for [12] s\. The same command goes on from the newest finished checkpoint\.",
        told,
    )
    assert waiting.count("in section 'step' of step 2 for") == 2
    assert stack[-1].endswith("in go")


def test_processes_that_all_wait_at_one_place_are_not_told_apart():
    first, *others = hanging("go('evaluation', 4, 60)").end()
    assert first.err.startswith(
        "v4train: all 3 hosts hang, and are ended (train.stall_seconds: 1): in section 'evaluation' of step 4 for 1 s"
    )
    assert "a device or the network between them does not answer" in first.err
    assert others == [Ended(1, "")] * 2


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_stopped_process_is_named_by_the_others(who):
    processes = hanging("go('data', 2, 0)\ngo('step', 2, 60)")
    processes.wait_for_all()
    time.sleep(0.1)
    processes.processes[who].send_signal(signal.SIGSTOP)
    processes.processes[who == 0].wait(timeout=30)
    processes.processes[who].send_signal(signal.SIGCONT)
    ended = processes.end()
    assert [e.code for e in ended] == [1] * 3
    told = ended.pop(who == 0).err
    assert told.startswith(
        f"v4train: host {who} (node{who}, process id 100{who}) hangs, and all 3 hosts stop (train.stall_seconds: 1): no answer;"
    )
    assert "section 'step' of step 2" in told
    if who != 0:  # which, awake again, finds the others gone and says so
        assert [e.err for e in ended] == ["", ""]


def test_who_is_slow_or_compiles_does_not_hang():
    """One process spends longer than the limit in all, but not in one section; then it compiles for as long."""
    ended = hanging("""
        if me == 1:
            for _ in range(3):
                go("save", 1, 0.8)
            go("compilation", 1, 2.5, timed=False)
            go("step", 2, 0.6)
        else:
            for _ in range(4):
                go("save", 1, 0, timed=_ < 3)
            go("step", 2, 5.2)
        go("step", 2, 0)
    """).end()
    assert ended == [Ended(0, "")] * 3
