"""A device that is not the CPU, for machines that have none.

Its tensors say that they lie on ``meta``; what is asked of them is done on the CPU. As a GPU's do, they refuse to meet tensors of the
CPU's memory, but for single numbers, copies and indices; and every place where the CPU must wait for one of their values is counted.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("meta")
aten = torch.ops.aten
MEETS = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten._index_put_impl_.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default}


class Far(torch.Tensor):
    """A tensor of that device; ``here`` holds its values."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Far:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, **layout, device=FAR)  # type: ignore[attr-defined]
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a far tensor outside the device's mode")

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Device(TorchDispatchMode):
    """Where far tensors live; ``waits`` counts the lines of cryospire that waited for one."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        far = [t for t in tensors if isinstance(t, Far)]
        asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if far and func not in MEETS and any(t.dim() for t in tensors if not isinstance(t, Far)):
            raise RuntimeError(f"{func}: tensors on two devices")
        if func in (aten.index.Tensor, aten._index_put_impl_.default) and far and not isinstance(args[0], Far):
            raise RuntimeError(f"{func}: indices on the device, values on the CPU")
        masked = func is aten.index.Tensor and any(isinstance(i, Far) and i.dtype == torch.bool for i in args[1])
        home = func is aten.copy_.default and not isinstance(args[0], Far)
        sent = func is aten._to_copy.default and asked == FAR.type and not far and not kwargs.get("non_blocking")
        if (far and (func in WAITS or masked or home or asked == "cpu")) or (sent and tensors[0].dim()):
            self.waits[place()] += 1
        if asked == FAR.type:
            kwargs = kwargs | {"device": torch.device("cpu")}
        found = func(*tree_map(here, args), **tree_map(here, kwargs))
        given = {id(here(t)): t for t in tensors}  # what is changed in place is given back
        away = asked == FAR.type or (bool(far) and asked != "cpu")
        return tree_map(lambda t: given[id(t)] if id(t) in given else Far(t) if away and isinstance(t, torch.Tensor) else t, found)


def here(value: Any) -> Any:
    return value.here if isinstance(value, Far) else value


def place() -> str:
    frames = [f for f in traceback.extract_stack() if "/cryospire/" in f.filename]
    return f"{frames[-1].filename.split('/cryospire/')[-1]}: {frames[-1].line}" if frames else "torch"


@contextmanager
def device(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The device in this thread and those that it starts; yields what waited."""
    mode, tensor, work = Device(Counter()), torch.tensor, threading.Thread.run

    def made(values: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return tensor(values, *args, **kwargs).to(device)  # torch.tensor asks the mode for nothing

    def thread(self: threading.Thread) -> None:
        with Device(mode.waits):
            work(self)

    patch.setattr(torch, "tensor", made)
    patch.setattr(threading.Thread, "run", thread)
    with mode:
        yield mode.waits
