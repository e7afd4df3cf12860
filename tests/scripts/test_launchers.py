"""The launchers without a cluster: the shell reads them, and Kubernetes would tell the pods what JAX's own detection would find out."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import yaml

from v4train import recipe
from v4train.cli import train as train_command
from v4train.train import cluster

PROJECT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((PROJECT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_reads_it(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False).stderr == ""
    if checker := shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent)):
        assert subprocess.run([checker, script], capture_output=True, text=True, check=False).stdout == ""
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_it_says_what_it_wants(script):
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"scripts/{script.name}" in done.stderr
    assert "RECIPE" in done.stderr


# Stands in for Python: `-c` finds a port, `--dry-run` knows the recipe, anything else is a process of the run and does $ACT.
INTERPRETER = """#!/bin/bash
for word in "$@"; do last=$word; done
case $* in
  -c*) echo 8476 ;;
  *--dry-run) [[ $* == *wrong.yaml* ]] && { echo wrong >&2; exit 2; }; echo name: x ;;
  *) eval "$ACT" ;;
esac
"""


# A shell cannot trap what was ignored when it began, as Ctrl-C is in whatever runs in the background.
HEAR = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.fixture
def local(tmp_path):
    """Runs launch_local.sh with processes that do ``act``; ``$last`` is their number. Gives exit code, both outputs, and the seconds."""
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)

    def run(*words: str, act: str, send: int | None = None, python: str | None = None) -> tuple[int, str, str, float]:
        environment = os.environ | {"V4TRAIN_PYTHON": python or str(interpreter), "ACT": act, "TMP": str(tmp_path)}
        command, started = [str(PROJECT / "scripts" / "launch_local.sh"), *words], time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", HEAR, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if send is not None:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(send)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err, time.monotonic() - started

    return run


def test_every_process_gets_its_place_and_the_options(local):
    code, out, err, _ = local("3", "r.yaml", "--set", "a=b", act='echo "$*"')
    assert (code, err) == (0, "")
    common = "-m v4train.train --config r.yaml --set a=b --coordinator 127.0.0.1:8476 --processes 3 --process"
    assert sorted(out.splitlines()) == [f"{common} {i}" for i in range(3)]


def test_a_killed_process_is_named_and_all_are_started_again(local):
    kill_once = "if [[ $last == 1 && ! -e $TMP/once ]]; then touch $TMP/once; kill -9 $$; fi"
    act = f"echo $last; {kill_once}; [[ -e $TMP/once ]]"
    code, out, err, seconds = local("2", "r.yaml", "--restarts", "1", act=act)
    assert code == 0
    assert sorted(out.split()) == ["0", "0", "1", "1"]
    named = "launch_local.sh: process 1 was ended by signal 9\n"
    assert named in err
    assert re.fullmatch(r"launch_local\.sh: exit code (137|1); restart 1 of 1\n", err.replace(named, ""))
    assert seconds < 10


@pytest.mark.parametrize("ends, tries", [(2, 1), (130, 1), (1, 3)])
def test_only_a_failure_of_the_machine_is_tried_again(local, ends, tries):
    code, out, _, _ = local("1", "r.yaml", "--restarts", "2", act=f"echo x; exit {ends}")
    assert (code, out) == (ends, "x\n" * tries)


def test_an_interpreter_is_found_on_the_path_or_refused(local, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "python3.99").symlink_to(tmp_path / "python")
    assert local("1", "r.yaml", act="echo here", python="python3.99")[:3] == (0, "here\n", "")
    complaint = "launch_local.sh: V4TRAIN_PYTHON: there is no program python3.98\n"
    assert local("1", "r.yaml", act="echo here", python="python3.98")[:3] == (2, "", complaint)


def test_a_wrong_recipe_is_told_once(local):
    assert local("4", "wrong.yaml", act="echo started")[:3] == (2, "", "wrong\n")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_go_to_all_once_and_nothing_is_started_again(local, number, code):
    act = f"trap 'echo told $last; exit {code}' {signal.Signals(number).name[3:]}; [[ $last == 0 ]] && sleep 1 && echo ready; "
    found, out, err, seconds = local("2", "r.yaml", "--restarts", "5", act=act + "while :; do sleep 0.05; done", send=number)
    assert (found, err) == (code, "")
    assert sorted(out.splitlines()) == ["told 0", "told 1"]
    assert seconds < 10


@pytest.mark.slow  # waits for the 15 s that the others are given
def test_who_does_not_end_after_a_failure_is_killed(local):
    code, _, _, seconds = local("2", "r.yaml", act="[[ $last == 1 ]] && exit 1; exec sleep 60")
    assert code == 1
    assert 14 < seconds < 40


# Stands in for srun: says what it was given, and does $ACT.
SRUN = """#!/bin/bash
echo "srun $*"
eval "$ACT"
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs launch_slurm.sh as a batch script: exit code, output, and what scontrol was told. ``send``: a signal to the script alone."""
    for name, text in {"python": INTERPRETER, "srun": SRUN, "scontrol": '#!/bin/sh\necho "$@" >> "$TMP/told"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*words: str, act: str, send: int | None = None, **environment: str) -> tuple[int, str, str]:
        place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "V4TRAIN_PYTHON": str(tmp_path / "python"), "TMP": str(tmp_path)}
        command = [str(PROJECT / "scripts" / "launch_slurm.sh"), *words]
        environment = os.environ | place | {"ACT": act, "SLURM_JOB_ID": "4711"} | environment
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        begun = process.stdout.readline() if send is not None else ""
        if send is not None:
            process.send_signal(send)
        out, _ = process.communicate(timeout=60)
        told = tmp_path / "told"
        return process.returncode, begun + out, told.read_text() if told.exists() else ""

    return run


def test_slurms_tasks_get_options_that_the_user_may_overrule_and_the_jobs_cores(slurm):
    act = 'echo "cores $SRUN_CPUS_PER_TASK"'
    code, out, told = slurm("r.yaml", "--set", "train.stall_seconds=60", act=act, SLURM_CPUS_PER_TASK="16")
    assert (code, told) == (0, "")
    [srun, cores] = out.splitlines()
    assert srun.index("stall_seconds=1800") < srun.index("stall_seconds=60")
    assert "--config r.yaml" in srun
    assert "--stopped-code 75" in srun
    assert cores == "cores 16"


@pytest.mark.parametrize("ends, requeued", [(75, True), (1, True), (137, True), (0, False), (2, False), (130, False)])
def test_slurm_queues_again_what_another_attempt_may_finish(slurm, ends, requeued):
    code, _, told = slurm("r.yaml", act=f"exit {ends}")
    assert (code, told) == (ends, "requeue 4711\n" if requeued else "")


def test_slurm_does_not_queue_again_for_ever(slurm):
    assert slurm("r.yaml", act="exit 1", SLURM_RESTART_COUNT="20")[::2] == (1, "")
    assert slurm("r.yaml", act="exit 1", SLURM_RESTART_COUNT="3", V4TRAIN_RESTARTS="3")[::2] == (1, "")


def test_a_wrong_recipe_starts_no_task(slurm):
    code, out, told = slurm("wrong.yaml", act="echo started")
    assert (code, out, told) == (2, "wrong\n", "")


def test_a_job_that_slurm_ends_is_waited_for_and_stays_ended(slurm):
    """As after scancel: the shell gets SIGTERM, too, and the tasks save and end with the code that otherwise means: again."""
    code, out, told = slurm("r.yaml", act="sleep 1; echo saved; exit 75", send=signal.SIGTERM)
    assert (code, told) == (75, "")
    assert "saved\nlaunch_slurm.sh: Slurm has ended the job" in out


def test_the_time_to_save_fits_into_slurms_notice():
    text = (PROJECT / "scripts" / "launch_slurm.sh").read_text()
    notice, grace = re.search(r"--signal=TERM@(\d+)", text), re.search(r"train\.grace_seconds=(\d+)", text)
    assert notice
    assert grace
    assert float(grace[1]) + 10 <= float(notice[1])


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((PROJECT / "scripts" / "launch_k8s.yaml").read_text())


@pytest.fixture(scope="module")
def job(jobset):
    [group] = jobset["spec"]["replicatedJobs"]
    assert group["replicas"] == 1
    return group["template"]["spec"]


@pytest.fixture(scope="module")
def options(job):
    """What the trainer makes of a pod's command line; `$(JOB_COMPLETION_INDEX)` is what Kubernetes puts into pods of indexed jobs."""
    import argparse

    [container] = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "v4train.train"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    train_command.configure(parser)
    return parser.parse_args([word.replace("$(JOB_COMPLETION_INDEX)", "5") for word in container["args"]])


def test_pods_of_kubernetes_know_their_places(jobset, job, options):
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == options.processes
    assert options.process == 5
    path = options.config.replace("/opt/v4train", str(PROJECT))
    overrides = [*options.overrides, *(f"cluster.{key}={getattr(options, key)}" for key in ("coordinator", "processes", "process"))]
    place = cluster.find(recipe.resolve(path, overrides=overrides).config.cluster)
    assert place == cluster.Place(("v4train-hosts-0-0.v4train", 8476), 64, 5)


def test_the_coordinator_is_the_one_that_jax_would_find(jobset, job, options, monkeypatch):
    """JAX asks the API server about the pod's job; here it is answered from the file, by JobSet's rules for names and labels."""
    from jax._src import clusters

    k8s = clusters.K8sCluster
    name, group = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
    labels = {"jobset.sigs.k8s.io/jobset-name": name}
    metadata = types.SimpleNamespace(name=f"{name}-{group}-0", labels=labels)
    found = types.SimpleNamespace(metadata=metadata, spec=types.SimpleNamespace(parallelism=job["parallelism"]))
    monkeypatch.setattr(k8s, "_job", lambda: found)
    monkeypatch.setattr(k8s, "_pod", lambda: None)
    monkeypatch.setattr(k8s, "_controller", lambda: types.SimpleNamespace(kind="Job"))
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "5")
    assert k8s.get_coordinator_address(timeout_secs=None, override_coordinator_port="8476") == options.coordinator
    assert (k8s.get_process_count(), k8s.get_process_id()) == (options.processes, options.process)
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": name}


def test_the_time_to_save_fits_into_what_kubernetes_gives(job, options):
    grace = next(float(text.split("=")[1]) for text in options.overrides if text.startswith("train.grace_seconds"))
    assert grace + 10 <= job["template"]["spec"]["terminationGracePeriodSeconds"]
    assert options.stopped_code != 0, "a job whose pods end with 0 is complete"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert rule["onExitCodes"]["values"] == [2]
