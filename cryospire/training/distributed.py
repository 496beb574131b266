"""Processes of one training: alone, under torchrun, or under srun; the only place that knows torch.distributed."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cryospire import log
from cryospire.conventions import InputError, explained


class Team:
    """The ranks of this training.  ``device`` is this rank's GPU, or the CPU where there is none."""

    def __init__(self) -> None:
        env = os.environ
        launched = "MASTER_ADDR" in env and ("RANK" in env or "SLURM_PROCID" in env)
        tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
        if tasks > 1 and not launched:
            raise InputError(f"{tasks} tasks of srun that do not know of each other would each train alone; cluster/launch.sh starts ranks")
        self.rank = int(env.get("RANK", env.get("SLURM_PROCID", 0))) if launched else 0
        self.size = int(env.get("WORLD_SIZE", env.get("SLURM_NTASKS", 1))) if launched else 1
        local = int(env.get("LOCAL_RANK", env.get("SLURM_LOCALID", 0))) if launched else 0
        self.device, self.backend = torch.device("cpu"), "gloo"  # of gradients
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        elif given := log.gpus():
            log.say(f"warning: this job was given {given} GPU(s), but torch sees none: it runs on CPUs; see cryospire cluster check")
        if self.size > 1:
            backend = "gloo"
            if self.device.type == "cuda":
                backend, self.backend = "cpu:gloo,cuda:nccl", "nccl " + ".".join(map(str, torch.cuda.nccl.version()))
            dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=timedelta(minutes=10))

    def lanes(self, total: int, batch: int) -> range:
        """The lanes this rank owns.  Raises InputError unless ranks divide lanes, and lanes the batch."""
        if total % self.size:
            raise InputError(f"lanes: {total} cannot be divided among {self.size} ranks; set lanes to a multiple of {self.size}")
        if batch % total:
            raise InputError(f"batch: {batch} is no multiple of lanes ({total})")
        each = total // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP around the model: gradients are averaged over ranks, bucketed and overlapped with backward."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers change on all ranks alike: broadcasting them would only cost each step a latency.
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False)

    def sum(self, *values: float) -> list[float]:
        """Sums over ranks, in float64; NaN stays NaN."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, rows: Tensor) -> Tensor | None:
        """Rows of every rank, in rank order, in the CPU's memory of rank 0; None elsewhere."""
        rows = rows.cpu()
        if self.size == 1:
            return rows
        counts = [0] * self.size
        dist.all_gather_object(counts, len(rows))
        widest = torch.zeros((max(counts), *rows.shape[1:]), dtype=rows.dtype)
        widest[: len(rows)] = rows
        parts = [torch.empty_like(widest) for _ in counts] if self.rank == 0 else None
        dist.gather(widest, parts)
        return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)]) if parts is not None else None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def team() -> Iterator[Team]:
    """The team for the length of a stage.  An exception on one rank ends its process, which ends every collective."""
    members = Team()
    try:
        yield members
    except SystemExit:
        members.close()  # every rank leaves together, saved
        raise
    except BaseException as error:
        if members.size == 1:
            raise
        # Leaving without a goodbye: the others' collectives fail at once instead of waiting for this rank.
        if isinstance(error, InputError | OSError):
            print(f"cryospire: error: {explained(error)}", file=sys.stderr, flush=True)
            os._exit(2)
        if isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            words = str(error).splitlines()[0].partition(". ")[0]
            words = f"rank {members.rank} stops: another rank, or the way to it, has failed ({words})"
            print(f"cryospire: {words}", file=sys.stderr, flush=True)
            os._exit(1)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    members.close()


def seed_everything(*parts: int) -> None:
    """Seed torch and numpy from the run's seed and what distinguishes this use of it."""
    state = np.random.SeedSequence(parts).generate_state(2)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002 - libraries that draw from the legacy generator
