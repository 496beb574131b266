"""A commented configuration that fits the particles: every key, what it means, and what was chosen for this input."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import yaml
from pydantic.fields import FieldInfo

from cryospire.config import Config, Discover, Preprocess, Section, Train, section
from cryospire.conventions import InputError
from cryospire.io import metadata
from cryospire.log import say

LARGEST_BOX = 128  # pixels: the paper's first stage; the second may follow at 256
SMOOTH = (2, 3, 5)  # prime factors of a box whose Fourier transform is fast


def run(
    particles: Path,
    *,
    output: Path,
    poses: Path | None = None,
    ctf: Path | None = None,
    ind: Path | None = None,
    passthrough: Sequence[Path] = (),
    datadir: Path | None = None,
    force: bool = False,
) -> None:
    """Read the particle table, choose what follows from it, write the configuration."""
    if output.is_dir():
        raise InputError(f"{output}: is a folder; --output names the file to write")
    if output.exists() and not force:
        raise InputError(f"{output}: exists; pass --force to replace it, or --output for another name")
    base = Config(particles=particles, poses=poses, ctf=ctf, ind=ind, passthrough=list(passthrough), datadir=datadir)
    table = metadata.read(particles, **base.reading())
    config = suggest(table, base)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(header(table, config) + render(config))
    os.replace(temporary, output)
    say(f"init       {len(table):,} particles, box {int(table.optics.box.max())} -> {config.preprocess.box or 'as it is'}; wrote {output}")


def suggest(table: metadata.ParticleTable, base: Config) -> Config:
    """Settings that follow from the particles: box, contrast, and half the Gaussians where the box is small."""
    box = int(table.optics.box.max())
    smaller = fitting_box(box)
    update: dict[str, Section] = {
        "preprocess": Preprocess(box=0 if smaller == box else smaller, contrast="black" if table.sign < 0 else "white")
    }
    if smaller <= 64:  # an eighth of the voxels of 128, the box for which the defaults are meant
        update |= {"discover": Discover(gaussians=1024), "train": Train(gaussians=4096)}
    return base.model_copy(update=update)


def fitting_box(box: int, largest: int = LARGEST_BOX) -> int:
    """The largest even box up to ``largest`` with small prime factors; the box itself where it is small enough."""
    if box <= largest:
        return box
    return max(n for n in range(16, largest + 1, 2) if smooth(n))


def smooth(n: int) -> bool:
    for p in SMOOTH:
        while n % p == 0:
            n //= p
    return n == 1


def header(table: metadata.ParticleTable, config: Config) -> str:
    """What was found in the particles, as comments."""
    o = table.optics
    box, pixel = int(o.box.max()), float(o.pixel_size[int(np.argmax(o.box))])
    cropped = config.preprocess.box or box
    after = pixel * box / cropped
    crop = f", cropped to {cropped} px of {after:.3f} Å" if cropped < box else ""
    half = np.bincount(table.half_set, minlength=3)
    lines = [
        "cryospire configuration, written by `cryospire init`; every key is here, with its meaning and default.",
        "",
        f"{len(table):,} particles in {len(table.stacks)} stack(s), {len(o.name)} optics group(s), {o.voltage.min():g} kV",
        f"box {box} px of {pixel:.3f} Å{crop}: no finer than {2 * after:.2f} Å",
        f"defocus {table.defocus_u.min() / 1e4:.2f} to {table.defocus_u.max() / 1e4:.2f} µm",
        f"half-sets {half[1]:,} and {half[2]:,}" + (f", {half[0]:,} unknown (assigned by seed)" if half[0] else ""),
        *table.notes,
        "",
        "Run it: snakemake --profile cluster/local --configfile THIS_FILE",
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n\n"


def render(config: Config) -> str:
    """YAML of the whole configuration, a comment before every key; absent optional sections are left out, named in a comment."""
    lines: list[str] = []
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            lines += ["", f"# {title(value)}", f"{name}:"]
            for key, inner in type(value).model_fields.items():
                lines += [f"  {line}" for line in entry(key, inner, section(value)[key])]
        elif _optional_section(field):
            lines += ["", f"# {name}: {field.description or ''}".rstrip()]
        else:
            lines += entry(name, field, section(config)[name])
    return "\n".join(lines).lstrip("\n") + "\n"


def entry(key: str, field: FieldInfo, value: Any) -> list[str]:
    """Comment and ``key: value`` of one setting."""
    words = [field.description or key.replace("_", " ")]
    if allowed := choices(field.annotation):
        words.append(f"one of {', '.join(map(str, allowed))}")
    if bounds := [f"{sign} {getattr(m, attribute):g}" for m in field.metadata for attribute, sign in BOUNDS if hasattr(m, attribute)]:
        words.append(" and ".join(bounds))
    default = field.get_default(call_default_factory=True)
    if not isinstance(default, Path | NoneType) and default not in ("", []) and default != value:
        words.append(f"default {default}")
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    return [f"# {'; '.join(words)}", f"{key}: {text}" if value is not None else f"{key}:"]


BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, else nothing."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def title(value: Section) -> str:
    return " ".join((type(value).__doc__ or type(value).__name__).split())


def _optional_section(field: FieldInfo) -> bool:
    return any(isinstance(a, type) and issubclass(a, Section) for a in get_args(field.annotation))
