#!/usr/bin/env bash
# One job on PBS Pro, Grid Engine or LSF, whichever is there:
#   scheduler.sh submit NODES TASKS CPUS GPUS MEM_MB MINUTES NAME JOBSCRIPT   prints the job's id
#   scheduler.sh status ID                                                    prints success, running or failed
#   scheduler.sh cancel ID...
# NODES, GPUS and TASKS are of the whole job, CPUS of a task, MEM_MB of a node.  Queue, account and the like: FLAGS.
# A scheduler that does not answer is taken to be busy, and the job to be running.
set -euo pipefail
FLAGS=()                      # as (-q long -P cryo)
PE_NODE=smp PE_NODES=mpi      # Grid Engine: parallel environments on one node and over several
GPU=gpu                       # Grid Engine: the complex that counts GPUs, of a job and not of a slot (consumable JOB)
BEFORE=120                    # seconds before its time limit at which a training is signalled, to save itself (PBS only sends SIGTERM at the limit)
logs=cluster_logs
ask=$1
shift

if command -v bsub >/dev/null; then
    scheduler=lsf
elif command -v qconf >/dev/null; then
    scheduler=sge
else
    scheduler=pbs
fi

# The signal comes to all processes of a job, but is for the training, which asks for it.
deaf() {
    head -n 1 "$1"
    echo "trap '' USR1"
    tail -n +2 "$1"
}

submit() {
    local nodes=$1 tasks=$2 cpus=$3 gpus=$4 mem=$5 minutes=$6 name=$7 script=$8
    local each=$(((tasks + nodes - 1) / nodes)) slots=$((tasks * cpus))
    local here=$((each * cpus)) gpus_here=$(((gpus + nodes - 1) / nodes))
    mkdir -p "$logs"
    case $scheduler in
        pbs)
            qsub -N "$name" -V -j oe -o "$logs/" "${FLAGS[@]}" -l "walltime=$(printf %d:%02d:00 $((minutes / 60)) $((minutes % 60)))" -l place=scatter \
                -l "select=$nodes:ncpus=$here:mpiprocs=$each:mem=${mem}mb$([ "$gpus" = 0 ] || echo ":ngpus=$gpus_here")" "$script"
            ;;
        sge) # memory is counted for every slot
            local needs=(-l "h_rt=$((minutes * 60)),s_rt=$((minutes * 60 - BEFORE)),mem_free=$(((mem + here - 1) / here))M")
            [ "$gpus" = 0 ] || needs+=(-l "$GPU=$gpus")
            [ "$slots" = 1 ] || needs+=(-pe "$([ "$nodes" = 1 ] && echo $PE_NODE || echo $PE_NODES)" "$slots")
            qsub -terse -N "$name" -V -cwd -S /bin/bash -j y -o "$logs/" "${FLAGS[@]}" "${needs[@]}" < <(deaf "$script")
            ;;
        lsf)
            local needs=(-n "$slots" -R "span[ptile=$here] rusage[mem=$mem]" -W "$minutes" -wa USR1 -wt $((BEFORE / 60)))
            [ "$gpus" = 0 ] || needs+=(-gpu "num=$gpus_here")
            bsub -J "$name" -o "$logs/$name-%J.log" "${FLAGS[@]}" "${needs[@]}" < <(deaf "$script") | sed -n 's/^Job <\([0-9]*\)>.*/\1/p'
            ;;
    esac
}

status() {
    local verdict id=${1%%[!0-9]*}
    verdict=$(judged "$1")
    if [ "$verdict" = failed ]; then
        echo "job $1: its own log is $(find "$logs" -regextype posix-extended -regex "(.*[^0-9])?$id([^0-9].*)?")" >&2
    fi
    echo "$verdict"
}

judged() {
    local shown state code
    case $scheduler in
        pbs)
            # PBS remembers ended jobs where job_history_enable is set, as it has to be.
            shown=$(qstat -x -f "$1" 2>&1) || { [[ $shown == *"Unknown Job"* ]] && echo failed || echo running; return; }
            state=$(sed -n 's/^ *job_state = //p' <<<"$shown")
            code=$(sed -n 's/^ *Exit_status = //p' <<<"$shown")
            case $state in
                F | C) [ "$code" = 0 ] && echo success || echo failed ;;
                *) echo running ;;
            esac
            ;;
        sge) # a job that has ended is in the accounts, some seconds later
            for _ in {1..60}; do
                shown=$(qstat -u '*') || { echo running && return; }
                state=$(awk -v id="$1" '$1 == id { print $5; exit }' <<<"$shown")
                case $state in
                    E*) echo failed && return ;;
                    ?*) echo running && return ;;
                esac
                code=$(qacct -j "$1" 2>/dev/null | awk '$1 == "failed" || $1 == "exit_status" { print $2 }' | tail -n 2 | tr '\n' ' ') || true
                [ -z "$code" ] || { [ "$code" = "0 0 " ] && echo success || echo failed; return; }
                sleep 1
            done
            echo failed
            ;;
        lsf)
            shown=$(bjobs -noheader -o stat "$1" 2>&1) || true
            case $shown in
                DONE) echo success ;;
                EXIT | ZOMBI | *"not found"*) echo failed ;;
                *) echo running ;;
            esac
            ;;
    esac
}

cancel() {
    if [ $scheduler = lsf ]; then bkill "$@"; else qdel "$@"; fi
}

"$ask" "$@"
