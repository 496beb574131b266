"""Flags of sbatch: what a job needs, in the words of a site."""

from __future__ import annotations

from typing import Any

from cryospire.site.settings import Site


def flags(site: Site, rule: str, threads: int, resources: dict[str, Any]) -> list[str]:
    """Flags of sbatch for one job."""
    nodes, tasks, gpu, mem = (int(resources.get(k, d)) for k, d in (("nodes", 1), ("tasks", 1), ("gpu", 0), ("mem_mb", 2000)))
    given = {
        "account": site.account,
        "partition": (gpu and site.gpu_partition) or site.partition,
        "qos": site.qos,
        "reservation": site.reservation,
        "constraint": site.constraint,
        "exclude": site.exclude,
        "mail-user": site.mail_user,
        "mail-type": site.mail_type if site.mail_user else "",
        "nodes": nodes,
        "ntasks": tasks,
        "cpus-per-task": threads,
        "time": int(resources.get("runtime", 60)),
        "output": site.logs / f"{rule}-%j.log",
        "open-mode": "append",
        "signal": f"USR1@{site.signal_seconds}" if site.signal_seconds else "",
    }
    found = [f"--{key}={value}" for key, value in given.items() if value not in ("", 0)]
    per_node = -(-tasks // nodes)
    if nodes > 1:
        found.append(f"--ntasks-per-node={per_node}")
    if site.memory == "node":
        found.append(f"--mem={mem}")
    else:
        found.append(f"--mem-per-cpu={-(-mem // (per_node * threads))}")
    if gpu:
        model = f"{site.gpu_model}:" if site.gpu_model else ""
        number = -(-gpu // nodes)
        found.append(
            {"gres": f"--gres=gpu:{model}{number}", "gpus": f"--gpus={model}{gpu}", "gpus-per-node": f"--gpus-per-node={model}{number}"}[
                site.gpu_request
            ]
        )
    return [*found, "--requeue" if site.requeue else "--no-requeue", *site.sbatch_flags]
