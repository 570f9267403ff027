"""A Postgres data directory made once: initdb waits for the disk, and most tests are not about initdb."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from cli.embedded.postgres import start_postgres


@cache
def fresh_cluster() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lora-depot-test-"))
    atexit.register(shutil.rmtree, folder)
    start_postgres(folder / "pg", folder / "run", folder / "pg.log").stop()
    return folder / "pg"


def copy_cluster(data_dir: Path) -> None:
    shutil.copytree(fresh_cluster(), data_dir)
    data_dir.chmod(0o700)
