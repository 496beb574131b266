#!/bin/sh
# PBS Pro: status of one job for Snakemake.
state=$(qstat -x -f "$1" | sed -n 's/^ *job_state = //p')
code=$(qstat -x -f "$1" | sed -n 's/^ *Exit_status = //p')
case "$state" in
    F | C) [ "$code" = 0 ] && echo success || echo failed ;;
    *) echo running ;;
esac
