"""A real Slurm cluster on one host: two slurmd, one slurmctld and a munged of their own.

Everything is in one private directory and on free ports, so it neither needs nor disturbs a running
Slurm. Debian's packages slurm-wlm and munge are enough, without systemd, database or cgroups.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.conftest import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")


def missing_programs() -> list[str]:
    """Names of the programs that the cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if which(name) is None]


def which(name: str) -> str | None:
    """The path of a program; daemons are in sbin, which is not on everybody's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class SlurmCluster:
    """Context manager: a running cluster with the nodes ``node1`` and ``node2``.

    Args:
        directory: Existing private directory for sockets, keys, spools and logs. Keep its path
            short: a socket's path may have 107 characters at most.
    """

    nodes = ("node1", "node2")
    kill_wait = 60
    """Seconds between SIGTERM and SIGKILL when a job is cancelled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    # --- life cycle -----------------------------------------------------------------------------

    def __enter__(self) -> SlurmCluster:
        try:
            self._write_configuration()
            self._start("munged", *self._munge_options())
            self._await("munge to answer", (self.directory / "munge.socket").exists)
            self._start("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
            for node in self.nodes:
                self._start("slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"])
            self._await("both nodes to be idle", lambda: self._states() == ["idle", "idle"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self.daemons) > 1:
            self._run("scancel", f"--user={getpass.getuser()}", check=False)
            deadline = time.monotonic() + 60
            while self._run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()

    def _munge_options(self) -> list[str]:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {
            "key-file": key,
            "socket": self.directory / "munge.socket",
            "pid-file": self.directory / "munge.pid",
            "log-file": self.directory / "munge.log",
            "seed-file": self.directory / "munge.seed",
        }
        # --force: munged otherwise refuses a directory whose parents others may write to.
        return ["--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())]

    def _write_configuration(self) -> None:
        controller, *node_ports = free_ports(1 + len(self.nodes))
        host = socket.gethostname().split(".")[0]
        (self.directory / "state").mkdir()
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            f"SlurmUser={getpass.getuser()}",
            f"SlurmdUser={getpass.getuser()}",
            # cred_expire is also how long a requeued job must wait: 120 s by default, 5 s at least.
            f"AuthInfo=socket={self.directory}/munge.socket,cred_expire=5",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",
            "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "ReturnToService=2",
            # Scripts derive ports from a job's number: two clusters at once must not share them.
            f"FirstJobId={1 + os.getpid() % 20_000}",
            "MpiDefault=none",
            f"KillWait={self.kill_wait}",
            f"StateSaveLocation={self.directory}/state",
            f"SlurmdSpoolDir={self.directory}/spool-%n",
            f"SlurmctldPidFile={self.directory}/slurmctld.pid",
            f"SlurmdPidFile={self.directory}/slurmd-%n.pid",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4"
                for node, port in zip(self.nodes, node_ports, strict=True)
            ),
            "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]
        (self.directory / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _start(self, program: str, *arguments: str) -> None:
        name = f"{program}-{len(self.daemons)}"
        with (self.directory / f"{name}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    [which(program) or program, *arguments],
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _await(self, what: str, condition: object, seconds: float = 120) -> None:
        assert callable(condition)
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [d.args for d in self.daemons if d.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"waited for {what}; dead: {dead}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of every daemon's log, for failure messages."""
        return "\n".join(
            f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            for log in sorted(self.directory.glob("*.log"))
        )

    # --- use ------------------------------------------------------------------------------------

    def _run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{self.logs()}")
        return done.stdout.strip()

    def _states(self) -> list[str]:
        return self._run("sinfo", "--Node", "--noheader", "-o", "%T", check=False).split()

    def sbatch(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> int:
        """Submit a job; return its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env=self.env | (env or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"sbatch {' '.join(arguments)}: {done.stderr.strip()}")
        return int(done.stdout.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """The fields of ``scontrol show job``: JobState, Restarts, NodeList, ExitCode, …"""
        text = self._run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def queue(self) -> str:
        """Jobs that are pending, running or completing."""
        return self._run("squeue", "--noheader")

    def cancel(self, number: int) -> None:
        self._run("scancel", str(number))

    def update(self, number: int, setting: str) -> None:
        """Change a job: ``update(7, "TimeLimit=30")``."""
        self._run("scontrol", "update", f"jobid={number}", setting)

    def wait(self, number: int, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until the job is in one of ``states`` (default: any final one)."""
        final = states or ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in final:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {job['JobState']} after {seconds} s")
            time.sleep(0.2)
        return job
