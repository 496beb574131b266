#!/usr/bin/env bash
# Run a command with dask workers over the nodes of this SLURM job:  dask.sh NODES WORKERS CPUS COMMAND...
# SIGUSR1, which tells trainings that the time limit is near, is nothing to the workers.
# The scheduler lives here, a worker in each task of srun; the command finds them through DASK_SCHEDULER_ADDRESS.
set -euo pipefail

nodes=$1 workers=$2 cpus=$3
shift 3
if [ "$workers" = 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    export CRYOSPIRE_WORKERS=$workers # threads of the command itself, on one node
    # shellcheck disable=SC2086
    exec ${CRYOSPIRE_CONTAINER:-} "$@"
fi

port=$((20000 + SLURM_JOB_ID % 12000))
node=${SLURMD_NODENAME:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
host=$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export DASK_LOGGING__DISTRIBUTED=critical # a task's error is raised in the command; the rest is hellos and goodbyes
export DASK_SCHEDULER_ADDRESS="tcp://${host:-$node}:$port"

# shellcheck disable=SC2086
${CRYOSPIRE_CONTAINER:-} dask scheduler --host "${host:-$node}" --port "$port" --no-dashboard >&2 &
scheduler=$!
trap 'kill $scheduler 2>/dev/null || true' EXIT
# shellcheck disable=SC2086
srun -K1 -N "$nodes" -n "$workers" -c "$cpus" ${CRYOSPIRE_CONTAINER:-} \
    sh -c 'trap "" USR1; echo "dask worker on ${SLURMD_NODENAME:-$(hostname)}" && exec "$@"' worker \
    dask worker "$DASK_SCHEDULER_ADDRESS" --nthreads 1 --no-nanny --no-dashboard --death-timeout 60 >&2 &
pool=$!
# shellcheck disable=SC2086
${CRYOSPIRE_CONTAINER:-} "$@" &
command=$!

code=0
wait -n "$pool" "$command" || code=$?
if kill -0 "$command" 2>/dev/null; then # the workers ended first: there is nobody left to do the work
    echo "dask workers ended (exit code $code) before the command did" >&2
    kill "$command" 2>/dev/null || true
    exit 1
fi
exit "$code"
