"""What the numbers were measured on, and who else was using it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

from regrpo_kernels import build_info

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of what is free when a case starts: others may need some, and lower bounds are lower bounds.
MEMORY_SHARE = 0.8


def free_memory() -> int:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match
    return 1024 * int(match.group(1))


def memory_budget() -> int:
    return int(MEMORY_SHARE * free_memory())


class ForeignLoad:
    """Cores that other processes kept busy since it was made, on average."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.monotonic(), _busy_seconds(), _own_seconds()

    def cores(self) -> float:
        elapsed = max(time.monotonic() - self.began, 1e-9)
        foreign = (_busy_seconds() - self.busy) - (_own_seconds() - self.own)
        return max(foreign / elapsed, 0.0)


def _busy_seconds() -> float:
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def describe() -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "regrpo", "liger-kernel", "trl", "cut-cross-entropy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = DEVICE.type == "cuda"
    return {
        "device": DEVICE.type,
        "device_name": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "build": {k: v for k, v in build_info().items() if k != "version"},
    }


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()
