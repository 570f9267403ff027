"""How much memory a process may still take."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """The less of what the machine and the container have left; None where neither says."""
    found = [left for left in (_left_in_machine(), _left_in_container()) if left is not None]
    return min(found, default=None)


def _left_in_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_container() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # pages of files give way to those of processes
        return None if limit == "max" else max(int(limit) - used + int(cached["inactive_file"]), 0)
    except (OSError, KeyError, ValueError):
        return None
