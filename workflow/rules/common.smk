"""Shared by all stages: the checked config, the site, resources, and how ranks are started."""

import json
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version, validate

from cryospire import config as configuration
from cryospire.conventions import InputError
from cryospire.site import estimate, lock
from cryospire.site import settings as site_settings
from cryospire.stages import status

min_version("9.17")  # before, a stage that ran alone left its cores to be given twice

CLUSTER = Path(workflow.basedir) / "cluster"
BIN = str(Path(sys.executable).parent)


def site_of(name):
    """The settings of a site: of a file in this folder, else of the one beside the Snakefile.  Profiles find it, and their scripts, by
    the environment."""
    path = Path(name) if Path(name).exists() else Path(workflow.basedir) / name
    os.environ |= {"CRYOSPIRE_SITE": str(path.absolute()), "CRYOSPIRE_CLUSTER": str(CLUSTER), "CRYOSPIRE_PYTHON": sys.executable}
    return site_settings.load(path)


def checked_config():
    """The config file, checked by the schema and then by the program itself; and the site, where the profile names one."""
    if len(workflow.configfiles) != 1:
        raise WorkflowError("give one --configfile, not " + ", ".join(map(str, workflow.configfiles)))
    file = Path(workflow.configfiles[0]).resolve()
    site = config.pop("site", None)
    try:
        checked = configuration.load(file)  # in one line
        validate(config, "../schemas/config.schema.json", set_default=False)
        if checked != configuration.Config.model_validate(config):
            raise InputError(f"{file}: stages read this file; change it there instead of through --config")
        return file, checked, site_of(site) if site else None
    except InputError as error:
        raise WorkflowError(str(error))


CONFIG_FILE, CONFIG, SITE = checked_config()
R = CONFIG.output

# What a site wants first; then `cryospire`, `mpiexec` and `torchrun` of the environment that runs Snakemake, in jobs as well.
opening = "; ".join([*(SITE.opening if SITE else []), f"export PATH={shlex.quote(BIN)}:$PATH"])
shell.prefix(f"set -e; {opening}; set -uo pipefail; ")

DATA = estimate.measure(CONFIG)
THREADS = SITE.cpus_per_task if SITE else workflow.resource_settings.cores or 1
SIMULATED = CONFIG.particles.parent
TRUTH = CONFIG.truth or (SIMULATED / "truth" if CONFIG.simulate else None)

if CONFIG.simulate is not None and CONFIG.particles.name != "particles.star":
    raise WorkflowError(f"{CONFIG_FILE}: particles: simulate writes particles.star, not {CONFIG.particles.name}")


def store(name):
    """A store is declared by its zarr.json, the last file a stage changes."""
    return R / f"{name}.zarr" / "zarr.json"


def store_of_half(name):
    """The same of a half-set."""
    return R / "{half}" / f"{name}.zarr" / "zarr.json"


def depends(*keys):
    """The part of the config that a stage's result depends on; a change here, and nowhere else, reruns the stage."""
    values = CONFIG.model_dump(mode="json", include={*keys, "seed"})
    for key, value in values.items():
        if isinstance(value, dict):
            values[key] = {k: v for k, v in value.items() if k not in configuration.OPERATIONAL}
    return json.dumps(values, sort_keys=True)


def source_files(*keys):
    """Files of the user that the config names under these keys."""
    values = [getattr(CONFIG, key) for key in keys]
    return [v for value in values for v in (value if isinstance(value, list) else [value]) if v is not None]


def resource(stage, name):
    """One resource of a stage as a function of the attempt: a retry gets more memory and time."""

    def needed(wildcards, attempt):
        data = estimate.half_of(DATA) if wildcards.get("half") else DATA
        return getattr(estimate.need(CONFIG, stage, data, SITE, attempt, THREADS), name)

    return needed


# Functions of `resources` are left out of what Snakemake compares: neither another name of the config nor another site reruns a stage.


def config_file(wildcards, resources):
    return str(CONFIG_FILE)


def of_half(wildcards, resources):
    """Option of a stage that sees one half-set alone."""
    return f"--half {wildcards.half[-1]}" if wildcards.get("half") else ""


def alone(wildcards, resources):
    """Prefix of a command that runs as one process."""
    return SITE.container if SITE else ""


def started_by(script, threads, resources):
    """A script in cluster/ with the shape of the job, and what the site wants it to know."""
    path = shlex.quote(str(CLUSTER / script))
    return f"env {SITE.variables} {path} {resources.nodes} {resources.tasks} {threads}"


def dask(wildcards, threads, resources):
    """Prefix that starts dask workers over the nodes of a job; on one machine the stage starts its own."""
    return started_by("dask.sh", threads, resources) if SITE else ""


def shared(threads, resources):
    """Ranks on one machine share its cores: Snakemake would give each of them all."""
    return f"env OMP_NUM_THREADS={max(1, threads // resources.tasks)}"


def ddp(wildcards, threads, resources):
    """Prefix that starts the ranks of a training: cluster/launch.sh inside a job, torchrun on one machine."""
    if SITE:
        return started_by("launch.sh", threads, resources)
    return f"{shared(threads, resources)} torchrun --standalone --nproc-per-node={resources.tasks} --no-python" if resources.tasks > 1 else ""


def mpi(wildcards, threads, resources):
    """Prefix that starts MPI ranks."""
    if SITE is None:
        return f"{shared(threads, resources)} mpiexec -n {resources.tasks}" if resources.tasks > 1 else ""
    shape = f"-N {resources.nodes} -n {resources.tasks} -c {threads}" if SITE.mpi.startswith("srun") else f"-n {resources.tasks}"
    return f"{SITE.mpi} {shape} {SITE.container}"


if workflow.is_main_process:
    without = {name for name, there in (("simulate", CONFIG.simulate), ("evaluate", TRUTH)) if there is None}
    try:
        print(estimate.summary(CONFIG, without, DATA, SITE, THREADS), file=sys.stderr)
    except InputError as error:
        raise WorkflowError(str(error))
    for rule_name, settings in status.altered(CONFIG).items():
        words = f"{rule_name} was run with other settings ({', '.join(settings)})"
        print(f"  {words}; if it is not among the jobs, Snakemake has no record of that run: --forcerun {rule_name}", file=sys.stderr)


onstart:
    if workflow.is_main_process:
        try:
            lock.acquire(R, here=SITE is None)
        except InputError as error:
            raise WorkflowError(str(error))
