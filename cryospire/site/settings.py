"""A site's settings, read from one YAML file (``cluster/site.yaml``): nothing of a cluster stands in rules or code."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from cryospire.config import Section
from cryospire.conventions import InputError


class Site(Section):
    """How jobs are asked for on this cluster."""

    account: str = ""
    partition: str = ""
    gpu_partition: str = Field("", description="partition of jobs with GPUs; empty: the same")
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    exclude: str = Field("", description="nodes never to use")
    mail_user: str = ""
    mail_type: str = "FAIL"
    sbatch_flags: list[str] = Field([], description="any other flags of sbatch, as they are")
    requeue: bool = Field(True, description="jobs go back to the queue when preempted, or when a training has saved itself")
    requeue_limit: int = Field(50, ge=0, description="times a training may put itself back")
    signal_seconds: int = Field(120, ge=0, description="a training is told to save itself so long before its time limit")

    gpus_per_node: int = Field(0, ge=0, description="0: trainings run on CPUs, one rank a task")
    max_gpus: int = Field(8, ge=1, description="the most GPUs (or CPU ranks) of one training")
    gpu_request: Literal["gres", "gpus", "gpus-per-node"] = "gres"
    gpu_model: str = Field("", description="as in gres:gpu:a100:4; empty: any")
    ranks: int = Field(0, ge=0, description="ranks of a training; 0: computed from the data")
    ranks_per_node: int = Field(0, ge=0, description="0: gpus_per_node, or 1 on CPUs")
    mpi_ranks: int = Field(4, ge=1, description="ranks of reconstruct and of assemble")
    mpi_nodes: int = Field(1, ge=1, description="nodes that they are spread over")
    dask_workers: int = Field(8, ge=1, description="workers of preprocess, one CPU each")
    dask_nodes: int = Field(1, ge=1, description="nodes that they are spread over")
    cpus_per_task: int = Field(8, ge=1)
    memory: Literal["node", "cpu"] = Field("node", description="memory is asked for a node (--mem) or a CPU (--mem-per-cpu)")
    max_mem_mb: int = Field(0, ge=0, description="the largest memory of a node; 0: no bound")
    max_runtime: int = Field(1440, ge=1, description="the longest job, minutes")

    mpi: str = Field(
        # MPICH's UCX transport tells the other ranks 4 KB, most of it what its memory held before: now and then that does not fit in a
        # line of SLURM's pmi2, and the job fails.
        "srun -K1 --mpi=pmi2 --export=ALL,MPIR_CVAR_CH4_NETMOD=ofi",
        description="starts MPI ranks inside a job; -K1: all end when one dies; the variable: MPICH's transport libfabric; or mpiexec",
    )
    srun_flags: str = Field("", description="flags of the srun that starts a training's ranks")
    prologue: list[str] = Field([], description="shell lines at the start of a job: module load ..., source ...")
    container: str = Field("", description="prefix of every command, as 'apptainer exec --nv cryospire.sif'")
    tmpdir: str = Field("", description="node-local folder for temporary files")
    network_interface: str = Field("", description="interface of NCCL and gloo, as ib0; empty: their choice")
    master_port: int = Field(0, ge=0, description="port of rank 0; 0: from the job id, between 20000 and 31999")
    logs: Path = Field(Path("slurm_logs"), description="folder of the jobs' own output")

    @property
    def opening(self) -> list[str]:
        """First lines of every job."""
        return [*([f"export TMPDIR={self.tmpdir}"] if self.tmpdir else []), *self.prologue]

    @property
    def variables(self) -> str:
        """What cluster/launch.sh and cluster/dask.sh want to know, as arguments of ``env``."""
        values = {
            "CRYOSPIRE_SRUN_FLAGS": self.srun_flags,
            "CRYOSPIRE_REQUEUE_LIMIT": self.requeue_limit if self.requeue else 0,
            "CRYOSPIRE_CONTAINER": self.container,
            "MASTER_PORT": self.master_port or "",
            "NCCL_SOCKET_IFNAME": self.network_interface,
            "GLOO_SOCKET_IFNAME": self.network_interface,
        }
        return " ".join(f"{k}={shlex.quote(str(v))}" for k, v in values.items() if v != "")


def load(path: Path) -> Site:
    """Read and check a site file.  Raises InputError naming file and key."""
    try:
        values: Any = yaml.safe_load(path.read_text())
        return Site.model_validate(values or {})
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (value {e['input']!r})" for e in error.errors()]
        raise InputError(f"{path}: " + "; ".join(lines)) from None
