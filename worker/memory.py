"""What Linux tells about memory: how much there is and is left, who holds how much, whom the kernel killed for it."""

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
GIB = 2**30


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """The less of what the machine and the container have left; None where neither says."""
    found = []
    if (kilobytes := _number(proc / "meminfo", "MemAvailable:")) is not None:
        found.append(kilobytes * 1024)
    if (left := _left_in_container(cgroup)) is not None:
        found.append(left)
    return min(found, default=None)


def machine_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes(pid: int, proc: Path = PROC) -> int:
    """What the process holds now; 0 where nobody says."""
    try:
        return int((proc / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def oom_kills(proc: Path = PROC) -> int:
    """How many processes of this machine the kernel has killed to get memory back; 0 where it does not say."""
    return _number(proc / "vmstat", "oom_kill") or 0


def in_gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _left_in_container(cgroup: Path) -> int | None:
    """None where there is no limit, or nobody says."""
    with suppress(OSError, ValueError):  # "max" is no number
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        # pages of files give way to those of processes
        if (cached := _number(cgroup / "memory.stat", "inactive_file")) is not None:
            return max(limit - used + cached, 0)
    return None


def _number(path: Path, name: str) -> int | None:
    """What follows `name` in a file that has a name and a number on each line; None where it is not."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), None)
