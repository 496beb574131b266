"""A real SLURM on this machine: two nodes with two CPUs' worth of slots and two fake GPUs each, for the length of the tests.

It keeps accounts, as sites do, where slurmdbd and MariaDB are installed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

SLURM_CONF = """
ClusterName=ci
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/run/munge.sock,cred_expire=10
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
TmpFS={base}/tmp/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/{gather}
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
AccountingStorageType=accounting_storage/{accounting}
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port_accounting}
AccountingStoragePass={base}/run/munge.sock
{tres}
JobCompType=jobcomp/none
MinJobAge=300
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=200
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=16000 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=16000 Gres=gpu:2
PartitionName=debug Nodes=node[1-2] Default=YES MaxTime=1-00:00:00 PriorityTier=1
PartitionName=urgent Nodes=node[1-2] MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
PartitionName=cxl Nodes=node[1-2] MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=CANCEL
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={base}/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={base}/log/slurmdbd.log
PidFile={base}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={port_database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


@dataclass
class Slurm:
    base: Path
    env: dict[str, str]
    accounting: bool

    def sh(self, command: str, cwd: Path | None = None, timeout: float = 60, check: bool = True) -> str:
        """Output of a shell command with this SLURM's configuration."""
        done = subprocess.run(command, shell=True, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise AssertionError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def until(self, command: str, wanted: str, seconds: float = 60) -> str:
        """Wait until a command's output contains ``wanted``."""
        end = time.monotonic() + seconds
        while True:
            out = self.sh(command, check=False)
            if wanted in out:
                return out
            assert time.monotonic() < end, f"{command}: no {wanted!r} within {seconds} s; last: {out}"
            time.sleep(0.3)

    def daemon(self, *command: str) -> None:
        subprocess.run(command, env=self.env, check=True, timeout=30)

    def stop(self, pidfile: str, number: int = signal.SIGTERM) -> None:
        """End one daemon by its own pid file, and wait until it is gone."""
        file = self.base / "run" / pidfile
        pid = int(file.read_text())
        os.kill(pid, number)
        end = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """SLURM up and idle; everything it started is gone at the end."""
    missing = [p for p in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"NEEDS SLURM: {', '.join(missing) or 'root'} (apt-get install slurm-wlm munge); nothing of the cluster is tested here")
    base = tmp_path_factory.mktemp("slurm")
    for folder in ("run", "log", "state", "spool/node1", "spool/node2", "tmp/node1", "tmp/node2"):
        (base / folder).mkdir(parents=True)
    port, port1, port2, port_accounting, port_database = _free_ports(5)
    accounting = all(shutil.which(p, path="/usr/bin:/usr/sbin") for p in ("slurmdbd", "mariadbd", "my_print_defaults"))
    (base / "slurm.conf").write_text(
        SLURM_CONF.format(
            # As in life, no job has the id of an older one: MPICH names shared memory by it, and what a killed rank leaves would be found.
            first=1000 * random.randrange(1, 60_000),
            host=socket.gethostname().split(".")[0], base=base, port=port, port1=port1, port2=port2, port_accounting=port_accounting,
            accounting="slurmdbd" if accounting else "none", gather="linux" if accounting else "none",
            tres="AccountingStorageTRES=gres/gpu" if accounting else "",
        )
    )  # fmt: skip
    (base / "gres.conf").write_text("NodeName=node[1-2] Name=gpu File=/dev/tty[0-1]\n")
    key = base / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_"))}
    env |= {"SLURM_CONF": str(base / "slurm.conf"), "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1"}
    cluster = Slurm(base, env, accounting)
    run = base / "run"
    try:
        cluster.daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid",
            f"--log-file={base}/log/munged.log", f"--seed-file={run}/munge.seed",
        )  # fmt: skip
        if accounting:
            _keep_accounts(cluster, port_accounting, port_database)
        cluster.daemon("slurmctld", "-c")
        cluster.daemon("slurmd", "-N", "node1")
        cluster.daemon("slurmd", "-N", "node2")
        cluster.until("sinfo -h -p debug -N -o %T | sort | uniq -c", "2 idle", 30)
        yield cluster
        cluster.sh("scancel --me", check=False)
        cluster.until("squeue -h | wc -l", "0", 30)
    finally:
        for name in ("slurmd-node1.pid", "slurmd-node2.pid", "slurmctld.pid", "slurmdbd.pid", "database.pid", "munged.pid"):
            if (run / name).exists():
                cluster.stop(name)
        for process in _children_of(cluster):
            os.kill(process, signal.SIGKILL)


@pytest.fixture
def accounted(slurm: Slurm) -> Slurm:
    if not slurm.accounting:
        pytest.skip("NEEDS ACCOUNTING: slurmdbd, mariadb-server-core, mariadb-client-core; nothing of sacct is tested here")
    return slurm


def _keep_accounts(cluster: Slurm, port: int, port_database: int) -> None:
    """Start a database of this SLURM's own, and slurmdbd before it."""
    base, data = cluster.base, cluster.base / "database"
    cluster.sh(f"mariadb-install-db --no-defaults --user=root --datadir={data} --auth-root-authentication-method=normal --skip-test-db")
    (base / "database.sql").write_text(
        "CREATE DATABASE slurm;\nCREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\nGRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n"
    )
    cluster.sh(
        f"mariadbd --no-defaults --user=root --datadir={data} --bind-address=127.0.0.1 --port={port_database} --skip-name-resolve"
        f" --init-file={base}/database.sql --socket={base}/run/database.sock --pid-file={base}/run/database.pid"
        f" --innodb-flush-log-at-trx-commit=0 > {base}/log/database.log 2>&1 &"
    )
    cluster.until(f"cat {base}/log/database.log", "ready for connections", 60)
    conf = base / "slurmdbd.conf"
    conf.write_text(SLURMDBD_CONF.format(base=base, port=port, port_database=port_database))
    conf.chmod(0o600)
    cluster.daemon("slurmdbd")
    cluster.until("sacctmgr -i add cluster ci", "ci", 60)


def _children_of(cluster: Slurm) -> list[int]:
    """Processes whose environment names this SLURM (inner Snakemakes outlive a failed node); never this one."""
    mark = f"SLURM_CONF={cluster.env['SLURM_CONF']}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it ended meanwhile
                continue
    return found
