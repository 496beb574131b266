#!/usr/bin/env python3
"""Submit one Snakemake job to SLURM, with the settings of a site; prints the job's id.

    submit.py --site cluster/site.yaml JOBSCRIPT

A job of the same outputs that is still in the queue is taken up again: after Snakemake was killed, no stage runs twice.  One with other
settings, from before the config was changed, is cancelled first: two would write one store; and so is one that waits and was asked for
with other flags, from before the site's file was changed.
"""

import argparse
import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from snakemake.utils import read_job_properties

from cryospire.conventions import InputError
from cryospire.site.sbatch import flags
from cryospire.site.settings import load


def names_of(properties: dict[str, Any], asked: list[str]) -> tuple[str, str, str]:
    """How the names of all jobs of this rule with these outputs begin, of those with these settings, and the name of one asked for so."""
    outputs = "\n".join(str(Path(p).resolve()) for p in properties["output"])
    settings = str(properties.get("params", {}).get("settings", ""))
    hashes = [hashlib.blake2b(text.encode(), digest_size=6).hexdigest() for text in (outputs, settings, "\n".join(asked))]
    begin = f"cryospire-{properties['rule']}-{hashes[0]}-"
    return begin, f"{begin}{hashes[1]}-", f"{begin}{hashes[1]}-{hashes[2]}"


def queued(begin: str) -> dict[str, tuple[str, bool]]:
    """Own jobs that are in the queue and whose names begin so: by id the name, and whether the job still waits."""
    lines = patiently(["squeue", "-h", "--me", "--states=PD,R,CF,CG,S", "-o", "%i %t %j"]).splitlines()
    rows = [line.split(maxsplit=2) for line in lines]
    return {job: (name, state == "PD") for job, state, name in rows if name.startswith(begin)}


def patiently(command: list[str], script: str | None = None) -> str:
    """Run a SLURM command; a controller that does not answer is asked again for ten minutes."""
    until = time.monotonic() + 600
    while True:
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
        away = any(
            words in done.stderr
            for words in ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "slurm_load_jobs error")
        )
        if not away or time.monotonic() > until:
            sys.exit(f"{command[0]}: {done.stderr.strip()}")
        time.sleep(3)


def submitted(properties: dict[str, Any], job: str) -> None:
    """Tell Snakemake the id of the job, and ``cryospire status`` beside the stage's log."""
    for log in properties.get("log", []):
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        Path(log).with_suffix(".job").write_text(f"{job}\n")
    print(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("jobscript", type=Path)
    args = parser.parse_args()
    try:
        site = load(args.site)
    except InputError as error:
        sys.exit(f"cryospire: error: {error}")
    properties = read_job_properties(str(args.jobscript))
    asked = flags(site, properties["rule"], properties["threads"], properties["resources"])
    begin, alike, name = names_of(properties, asked)
    found = queued(begin)
    usable = [job for job, (other, waits) in found.items() if other == name or (other.startswith(alike) and not waits)]
    for job in found.keys() - set(usable):
        other = found[job][0]
        what = "was asked for with other flags" if other.startswith(alike) else "has other settings than the config's"
        print(f"cryospire: job {job} {what}: cancelled", file=sys.stderr)
        patiently(["scancel", job])
        while job in queued(begin):
            time.sleep(1)
    if usable:
        print(f"cryospire: job {usable[0]} of an earlier start is taken up", file=sys.stderr)
        submitted(properties, usable[0])
        return
    site.logs.mkdir(parents=True, exist_ok=True)
    shebang, rest = args.jobscript.read_text().split("\n", 1)
    script = "\n".join([shebang, *site.opening, rest])
    submitted(properties, patiently(["sbatch", "--parsable", f"--job-name={name}", *asked], script).split(";")[0])


if __name__ == "__main__":
    main()
