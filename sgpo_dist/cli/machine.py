"""Facts of the machine we stand on, looked up once, so that ``plan`` stays a pure function. Starts nothing but nvidia-smi, bounded."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 where the system keeps shared memory
GPU_QUERY: Final = ("--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
GPU_DEADLINE_S: Final = 10.0
CGROUP_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device; memory in bytes."""

    name: str
    memory: int
    free: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run can use here; sizes in bytes. ``ram`` respects a container's limit."""

    cores: int
    ram: int
    ram_available: int
    disk_free: int
    shm_free: int
    gpus: tuple[Gpu, ...] = ()


def observe_machine(output_dir: Path) -> Machine:
    """This machine now; ``output_dir`` (which need not exist yet) names the disk."""
    memory = psutil.virtual_memory()
    ram = min(memory.total, container_limit() or memory.total)
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        ram=ram,
        ram_available=min(memory.available, ram),
        disk_free=shutil.disk_usage(existing_parent(output_dir)).free,
        shm_free=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        gpus=find_gpus(),
    )


def existing_parent(path: Path) -> Path:
    """``path`` or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def container_limit() -> int | None:
    """Memory limit of the control group in bytes, None when there is none."""
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            return int(text)
    return None


def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA devices that CUDA_VISIBLE_DEVICES leaves; none when nvidia-smi is missing, fails or hangs for 10 s."""
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or visible == "":
        return ()
    try:
        done = subprocess.run([program, *GPU_QUERY], capture_output=True, text=True, timeout=GPU_DEADLINE_S, check=False)  # noqa: S603 found by which
    except (subprocess.TimeoutExpired, OSError):
        return ()
    gpus = parse_gpus(done.stdout) if done.returncode == 0 else ()
    return gpus if visible is None else gpus[: len([part for part in visible.split(",") if part.strip()])]


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Devices from nvidia-smi's CSV (name, total MiB, free MiB); lines that are not such rows are passed over."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[1].isdigit() and cells[2].isdigit():
            gpus.append(Gpu(cells[0], int(cells[1]) << 20, int(cells[2]) << 20))
    return tuple(gpus)
