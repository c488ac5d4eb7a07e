"""A Slurm with two kinds of node, on this machine: real daemons, started once for all tests that ask for them."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
START = 60  # seconds that the daemons may take
NODES = ("a40-0", "v100-0", "v100-1")

# Nodes of one machine differ in name and port. They claim more than it has, hence config_overrides; its GPUs are files
# that are there everywhere. Heterogeneous jobs are placed by the backfill scheduler, every second.
CONF = """
ClusterName=test
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
JobRequeue=1
KillWait=2
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,bf_hetjob_immediate
GresTypes=gpu
NodeName=a40-0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Feature=a40 Gres=gpu:a40:2
NodeName=v100-0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Feature=v100 Gres=gpu:v100:2
NodeName=v100-1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 Feature=v100 Gres=gpu:v100:2
PartitionName=a40 Nodes=a40-0 MaxTime=INFINITE
PartitionName=v100 Nodes=v100-0 MaxTime=INFINITE
PartitionName=old Nodes=v100-0,v100-1 MaxTime=INFINITE
PartitionName=mixed Nodes=a40-0,v100-0 MaxTime=INFINITE Default=YES
"""
GRES = "AutoDetect=off\n" + "".join(
    f"NodeName={node} Name=gpu Type={node.partition('-')[0]} File={device}\n" for node in NODES
    for device in ("/dev/null", "/dev/zero"))


@dataclass(frozen=True)
class Slurm:
    """A running cluster: nodes a40-0, v100-0 and v100-1 with two GPUs each. Partitions a40 and v100 have one node, mixed
    has both of these, and old has both of the older kind.

    Attributes:
        env: the environment of commands that talk to it.
        daemons: by node, the process that runs it; by name, those of the cluster.
    """

    env: dict[str, str]
    daemons: dict[str, subprocess.Popen]

    def run(self, *command: object, **options: object) -> str:
        """What a command prints; fails with what it says where it fails."""
        ended = subprocess.run([*map(str, command)], env=self.env, capture_output=True, text=True, timeout=60, **options)
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
        return ended.stdout.strip()

    def start_again(self, job: str) -> None:
        """Does not wait the two minutes that Slurm lets pass after a requeue. A node refuses a job's credential that is of
        the same second in which it revoked the one before."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+1")

    @contextmanager
    def without(self, node: str) -> Iterator[None]:
        """A node has failed, while the block runs."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        try:
            yield
        finally:
            self.daemons[node] = subprocess.Popen(self.daemons[node].args, env=self.env, stdout=subprocess.DEVNULL,
                                                  stderr=subprocess.DEVNULL)

    def state(self, job: str) -> str:
        """Of a job's first component, as PENDING; empty when it has ended."""
        return self.run("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job).partition("\n")[0]

    def wait(self, job: str, log: Path, until: Callable[[str, str], bool], seconds: float = 240) -> str:
        """The log of a job, once ``until(state, log's text)`` holds."""
        deadline = time.monotonic() + seconds
        while True:
            state, text = self.state(job), log.read_text(errors="replace") if log.exists() else ""
            if until(state, text):
                return text
            assert time.monotonic() < deadline and state not in ("FAILED", "NODE_FAIL"), f"{state}\n{text[-4000:]}"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster."""
    missing = [name for name in DAEMONS if not find(name)]
    if missing or os.geteuid():
        pytest.skip(f"needs {', '.join(missing)} (apt install slurmctld slurmd slurm-client munge)" if missing else
                    "Slurm's daemons run as root here")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, since a socket's path may have 108 letters only
    daemons: dict[str, subprocess.Popen] = {}
    try:
        yield start(folder, daemons)
    finally:
        for process in reversed(daemons.values()):
            process.terminate()
        for process in daemons.values():
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def find(name: str) -> str | None:
    """A daemon's path; they are in folders that PATH may lack."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def start(folder: Path, daemons: dict[str, subprocess.Popen]) -> Slurm:
    """Starts the daemons, all in the foreground so that they end with their handles, and waits for the nodes."""
    (folder / "slurm.conf").write_text(CONF.format(
        folder=folder, ports=free_ports(1 + len(NODES)), first=random.randrange(1, 10_000),
        host=socket.gethostname().partition(".")[0]))
    (folder / "gres.conf").write_text(GRES)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    cluster = Slurm({**env, "SLURM_CONF": str(folder / "slurm.conf")}, daemons)
    commands = {
        "munged": ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
         f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"],
        "slurmctld": ["slurmctld", "-D"], **{node: ["slurmd", "-D", "-N", node] for node in NODES},
    }
    with open(folder / "daemons.log", "ab") as log:
        for name, command in commands.items():
            daemons[name] = subprocess.Popen([find(command[0]), *command[1:]], env=cluster.env, stdout=log, stderr=log)
            if name == "munged":
                await_(lambda: (folder / "munge.socket").exists(), folder, daemons)
    await_(lambda: nodes(cluster.env).split() == ["idle"] * len(NODES), folder, daemons)
    return cluster


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, and that differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def nodes(env: dict[str, str]) -> str:
    ended = subprocess.run(["sinfo", "--noheader", "--Node", "--partition=a40,old", "--format=%T"], env=env,
                           capture_output=True, text=True)
    return ended.stdout


def await_(ready: Callable[[], bool], folder: Path, daemons: Mapping[str, subprocess.Popen]) -> None:
    """Waits for the daemons, and shows what they say when they do not come up."""
    deadline = time.monotonic() + START
    while not ready():
        gone = [name for name, process in daemons.items() if process.poll() is not None]
        if gone or time.monotonic() > deadline:
            said = "\n".join(path.read_text(errors="replace")[-1500:] for path in folder.glob("*.log"))
            pytest.fail(f"Slurm did not start ({', '.join(gone) or 'no daemon ended'}):\n{said}")
        time.sleep(0.1)
