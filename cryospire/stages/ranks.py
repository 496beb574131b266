"""MPI: a stage over any number of ranks, all of which end when one does."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryospire import log
from cryospire.conventions import InputError, explained


def over_ranks(work: Callable[[Any], None]) -> None:
    """``work(comm)`` on every rank: of mpiexec or srun, or of this process alone."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # mpiexec hands on a scheduler's word to trainings that the time limit is near
    from mpi4py import MPI  # importing it starts MPI

    comm = MPI.COMM_WORLD
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and comm.size == 1:
        raise InputError(f"{tasks} tasks of srun that do not know of each other would each do everything; start them by srun --mpi=pmi2")
    try:
        if comm.size > 1:
            nodes = sorted(set(comm.allgather(log.node())))
            log.say(f"{comm.size} ranks on {', '.join(nodes)}")
        work(comm)
    except BaseException as error:
        if comm.size == 1:
            raise
        # The others wait in a barrier for this rank: end them all, with the exit code the command alone would have.
        known = isinstance(error, InputError | OSError)
        if not known:
            import traceback

            traceback.print_exc()
        print(f"cryospire: error: {explained(error)}" + ("" if known else f" (rank {comm.rank})"), file=sys.stderr, flush=True)
        time.sleep(1)  # MPICH's launcher drops what it has not yet passed on when it is told to abort
        comm.Abort(2 if known else 1)


def add_up(comm: Any, values: NDArray[np.inexact[Any]]) -> None:
    """Sum of every rank's array, in rank 0's."""
    from mpi4py import MPI

    comm.Reduce(*((MPI.IN_PLACE, values) if comm.rank == 0 else (values, None)))
