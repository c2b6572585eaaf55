"""A SLURM cluster of two one-CPU nodes on this machine, in a folder of its own."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
CONFIG = """
ClusterName=alignsae
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued begins again when its credential has expired, two minutes later by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=10
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=1
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of slurm-wlm and munge that this machine lacks."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def _free_ports() -> tuple[int, int, int]:
    """A free port, and two free ports next to each other."""
    while True:
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            a.bind(("127.0.0.1", 0))
            b.bind(("127.0.0.1", 0))
            first = b.getsockname()[1]
            try:
                c.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return a.getsockname()[1], first, first + 1


class Cluster:
    """Context in which the cluster runs; its daemons are ended on exit."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
        }
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        for name in ("munge", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(mode=0o755, parents=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        controller, first, second = _free_ports()
        text = CONFIG.format(folder=self.folder, controller=controller, first=first, second=second)
        (self.folder / "slurm.conf").write_text(text)
        munge = [
            f"--{name}={self.folder}/munge/{name}"
            for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
        ]
        munge = [option.replace("/munge/key-file", "/munge/key") for option in munge]
        self._start("munged", "--foreground", "--force", *munge)
        self._wait(lambda: (self.folder / "munge" / "socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        self._wait(lambda: self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"], "the nodes")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=self.env, capture_output=True)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Output of a client command; "" when it fails."""
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def state(self, job: str) -> str:
        """JobState of a job, and how often it was restarted: `RUNNING 0`."""
        words = dict(word.partition("=")[::2] for word in self.run("scontrol", "-o", "show", "job", job).split())
        return f"{words.get('JobState')} {words.get('Restarts')}"

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{len(self._daemons)}.log").open("w") as log:
            self._daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT))

    def _wait(self, ready, what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.log"))
                raise TimeoutError(f"{what} did not come up\n{logs}")
            time.sleep(0.3)
