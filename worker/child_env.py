"""The environment of a child: what it needs to compute, and nothing that opens a door."""

import os
from collections.abc import Mapping
from pathlib import Path

import worker

# Everything else stays behind: DEPOT_*, AWS_*, tokens, proxies.
ALLOWED = frozenset(
    {
        "PATH",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
        "NVIDIA_DRIVER_CAPABILITIES",
        "CUDA_HOME",
    }
)


def child_env(workspace: Path, *, threads: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Home and temporary files lie in the workspace; the model libraries are told that there is no network."""
    home = str(workspace)
    kept = {name: value for name, value in environ.items() if name in ALLOWED}
    return kept | {
        "HOME": home,
        "TMPDIR": home,
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Without it, CUDA's matrix products do not repeat bit for bit.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        # Threads that wait must not spin: with other work on the cores, that made small models 8 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MKL_NUM_THREADS": str(threads),
        # numpy's products are those of merges, which have threads of their own.
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(worker.__file__).parent.parent),
    }
