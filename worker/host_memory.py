"""What Linux tells about memory: how much a process holds, how much there is, and whom the kernel killed for it."""

import os
from pathlib import Path

PROC = Path("/proc")
GIB = 2**30


def oom_kills(proc: Path = PROC) -> int:
    """How many processes of this machine the kernel has killed to get memory back; 0 where it does not say."""
    try:
        lines = (proc / "vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def resident_bytes(pid: int, proc: Path = PROC) -> int:
    """What the process holds now; 0 where nobody says."""
    try:
        return int((proc / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def machine_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
