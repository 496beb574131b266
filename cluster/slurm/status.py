#!/usr/bin/env python3
"""Status of a SLURM job for Snakemake: prints success, running or failed.

Asks squeue, then sacct, until one of them answers: a controller that is restarting is waited for, not taken for a failure.
"""

import subprocess
import sys
import time

RUNNING = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
    "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip
FORGOTTEN = 20  # answers without the job before it counts as lost


def ask(command: list[str]) -> tuple[bool, str]:
    """Whether the command answered, and its first word."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False, ""
    gone = "Invalid job id" in done.stderr  # an answer: the controller knows the job no more
    words = done.stdout.replace("|", " ").split()
    return done.returncode == 0 or gone, words[0].rstrip("+") if words else ""


def verdict(state: str) -> str:
    if state == "COMPLETED":
        return "success"
    return "running" if state in RUNNING else "failed"


def own_log(job: str) -> str:
    """Where SLURM has written what the job said; empty where the controller has forgotten it."""
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=60).stdout
    return "".join(f"; its own log is {word.removeprefix('StdOut=')}" for word in shown.split() if word.startswith("StdOut="))


def main() -> None:
    job, missing = sys.argv[1], 0
    while True:
        answered, state = ask(["squeue", "-h", "--states=all", "-j", job, "-o", "%T"])
        if not state:
            recorded, state = ask(["sacct", "-X", "-n", "-P", "-j", job, "-o", "State"])
            answered = answered or recorded
        if state:
            if verdict(state) == "failed":
                print(f"job {job}: {state}{own_log(job)}", file=sys.stderr)
            print(verdict(state))
            return
        missing += answered
        if missing >= FORGOTTEN:
            print("failed")
            return
        time.sleep(1)


if __name__ == "__main__":
    main()
