#!/usr/bin/env bash
# Start the ranks of a training:  launch.sh NODES TASKS CPUS COMMAND...
# Inside a SLURM job: srun, one rank a task, also for one task, so that the signal before the time limit reaches it.  Elsewhere:
# torchrun on one node, mpiexec over several.  A training that saved itself and wants to go on (exit code 75) is put back in the queue.
set -euo pipefail

if [ "$1" = rank ]; then # a rank, as started below
    shift
    export RANK=${SLURM_PROCID:-${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}}
    export WORLD_SIZE=${SLURM_NTASKS:-${PMI_SIZE:-${OMPI_COMM_WORLD_SIZE:-1}}}
    export LOCAL_RANK=${SLURM_LOCALID:-${MPI_LOCALRANKID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}}
    if [ -n "${SLURM_STEP_NODELIST:-}" ]; then
        first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
        address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        export MASTER_ADDR=${address:-$first}
    fi
    trap : USR1 TERM # they are for the command
    code=0
    # shellcheck disable=SC2086
    ${CRYOSPIRE_CONTAINER:-} "$@" || code=$?
    [ "$code" = 75 ] || exit "$code"
    # Saved, and wants to go on.  Rank 0 is the last to be done with saving: the others leave quietly, so that srun does not kill it.
    [ "$RANK" = 0 ] || exit 0
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        shown=$(scontrol show job "$SLURM_JOB_ID")
        restarts=$(sed -n 's/.*Restarts=\([0-9]*\).*/\1/p' <<<"$shown")
        # A job that is being cancelled or preempted is not RUNNING any more.
        if grep -q JobState=RUNNING <<<"$shown" && [ "${restarts:-0}" -lt "${CRYOSPIRE_REQUEUE_LIMIT:-0}" ]; then
            echo "saved itself; job $SLURM_JOB_ID goes back to the queue" >&2
            scontrol requeue "$SLURM_JOB_ID" && sleep 300 # until SLURM ends this run of the job
        fi
    fi
    exit 75
fi

nodes=$1 tasks=$2 cpus=$3
shift 3
job=${SLURM_JOB_ID:-${PBS_JOBID:-${LSB_JOBID:-${JOB_ID:-$$}}}}
digits=${job//[!0-9]/}
# Below the range from which the kernel gives ports to outgoing connections.
export MASTER_PORT=${MASTER_PORT:-$((20000 + 10#${digits:0:15} % 12000))}

if [ -n "${SLURM_JOB_ID:-}" ]; then
    export OMP_NUM_THREADS=$cpus # not every site binds a task to its CPUs
    # -K1: when one rank dies, all end.
    # shellcheck disable=SC2086
    exec srun -K1 -N "$nodes" -n "$tasks" -c "$cpus" ${CRYOSPIRE_SRUN_FLAGS:-} "$0" rank "$@"
elif [ "$tasks" = 1 ]; then
    # shellcheck disable=SC2086
    exec ${CRYOSPIRE_CONTAINER:-} "$@"
elif [ "$nodes" = 1 ]; then
    handed_on=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # to the ranks, which save themselves
    # shellcheck disable=SC2086
    exec ${CRYOSPIRE_CONTAINER:-} torchrun --standalone --nproc-per-node="$tasks" --no-python \
        --signals-to-handle "$handed_on" --shutdown-timeout 100 "$@"
else
    MASTER_ADDR=${MASTER_ADDR:-$(hostname)}
    export MASTER_ADDR
    exec mpiexec -n "$tasks" "$0" rank "$@"
fi
