"""Two hosts with a network between them that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest
import yaml

from gpt_dist.checkpoints.checkpoint import complete_checkpoints
from tests.cluster.conftest import processes_with
from tests.cluster.two_hosts import TwoHosts
from tests.conftest import BIN, read_rows, run_train, step_count, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Config = Callable[..., Path]
TIMEOUT = 8
"""``parallel.timeout``, seconds."""


class Job:
    """One torchrun on each host."""

    def __init__(self, hosts: TwoHosts, config: Path, out: Path, **options: str) -> None:
        self.hosts, self.config, self.out, self.options = hosts, config, out, options
        self.agents: dict[str, Popen[bytes]] = {}

    def start(self, identity: str, wrap: dict[str, str] | None = None) -> None:
        for host, address in self.hosts.addresses.items():
            flags = {
                "nnodes": "2",
                "nproc-per-node": "1",
                "rdzv-backend": "c10d",
                "rdzv-id": identity,
                "rdzv-endpoint": f"{self.hosts.addresses['a']}:29400",
                "rdzv-conf": f"is_host={str(host == 'a').lower()},last_call_timeout=2,"
                "keep_alive_interval=1,keep_alive_max_attempt=4",
                "local-addr": address,
            } | {name.replace("_", "-"): value for name, value in self.options.items()}
            command = [str(BIN / "torchrun"), *(f"--{k}={v}" for k, v in flags.items())]
            command += ["-m", "gpt_dist.train", "--config", str(self.config)]
            command += ["--out_dir", str(self.out), "--parallel.timeout", str(TIMEOUT)]
            if wrap and host in wrap:
                command = ["unshare", "--mount", "bash", "-c", wrap[host], "bash", *command]
            self.agents[host] = self.hosts.start(
                host,
                command,
                self.config.parent / f"{host}.log",
                cwd=self.config.parent,
                env={"GLOO_SOCKET_IFNAME": self.hosts.interface},
            )

    def log(self, host: str) -> str:
        return (self.config.parent / f"{host}.log").read_text(errors="replace")

    def logs(self) -> str:
        return "\n".join(f"== {host}\n{self.log(host)}" for host in self.agents)


@pytest.fixture
def config(tiny_config: Config) -> Path:
    """The fault decides how far the run comes, so that no machine is too fast for it."""
    return tiny_config(
        model={"dropout": 0.1},
        optim={"schedule": "constant"},
        train={"steps": 1_000_000, "checkpoint_every": 10, "eval_every": 25},
    )


def end_after(config: Path, steps: int) -> None:
    """Change a run's last step, for ranks that start from now on."""
    settings = yaml.safe_load(config.read_text())
    settings["train"]["steps"] = steps
    config.write_text(yaml.safe_dump(settings))


@pytest.mark.slow(100)
def test_a_cut_cable_ends_both_hosts_and_a_restart_continues_bitwise(
    hosts: TwoHosts, config: Path, tmp_path: Path
) -> None:
    job = Job(hosts, config, tmp_path / "cut")
    job.start("first")
    wait_until(lambda: step_count(job.out) > 15, "step 15")
    hosts.cut()
    # The ranks give up after the timeout; a torchrun that is stuck is ended 15 s later. Half an
    # hour is what a collective may take before the first step.
    for agent in job.agents.values():
        assert agent.wait(300) != 0
    assert "lost rank 1 on host-b" in job.log("a"), job.logs()
    assert "lost the connection to host-a" in job.log("b"), job.logs()
    wait_until(lambda: not processes_with(str(job.out)), "no process to be left")
    hosts.restore()
    end_after(config, step_count(job.out) + 15)
    job.start("second")
    for agent in job.agents.values():
        assert agent.wait(300) == 0, job.logs()
    run_train(config, tmp_path / "quiet", ranks=2)
    assert read_rows(job.out, timing=False) == read_rows(tmp_path / "quiet", timing=False)
    ends = [complete_checkpoints(run / "checkpoints")[-1] for run in (job.out, tmp_path / "quiet")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert len({(end / name).read_bytes() for end in ends}) == 1, name


@pytest.mark.slow(55)
def test_one_host_goes_on_when_the_other_vanishes(
    hosts: TwoHosts, config: Path, tmp_path: Path
) -> None:
    # A small learning rate, because training itself amplifies differences in the last bit.
    settings = yaml.safe_load(config.read_text())
    settings["optim"] |= {"lr": 3e-4, "min_lr": 3e-5}
    settings["model"]["dropout"] = 0.0
    config.write_text(yaml.safe_dump(settings))
    job = Job(hosts, config, tmp_path / "elastic", nnodes="1:2", max_restarts="2")
    job.start("elastic")
    wait_until(lambda: step_count(job.out) > 15, "step 15")
    hosts.vanish("b")
    end_after(config, step_count(job.out) + 15)
    assert job.agents["a"].wait(300) == 0, job.logs()
    assert "lost rank 1 on host-b" in job.log("a"), job.logs()
    assert "2 ranks ×" in job.log("a")
    assert "1 rank ×" in job.log("a").split("lost rank 1")[1], job.logs()
    run_train(config, tmp_path / "quiet", ranks=2)
    rows, quiet = read_rows(job.out), read_rows(tmp_path / "quiet")
    assert [row["step"] for row in rows] == [row["step"] for row in quiet]
    for key in ("train_loss", "val_loss"):
        ours, theirs = ([row[key] for row in run if key in row] for run in (rows, quiet))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_host_without_the_shared_directory_is_named(
    hosts: TwoHosts, tiny_config: Config, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    job = Job(hosts, tiny_config(), out / "run")
    # On host b, a file system of its own hides the directory of the run.
    job.start("private", wrap={"b": f'mount -t tmpfs none {out} && exec "$@"'})
    for agent in job.agents.values():
        assert agent.wait(300) != 0
    errors = [line for line in job.logs().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, job.logs()
    assert "rank 1 on host-b" in errors[0]
    assert "host-b does not see what rank 0 wrote there" in errors[0]
    assert not processes_with(str(out))
