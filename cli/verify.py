"""`lora-depot verify`: Postgres compared with the store, by the service's own command."""

import os
import subprocess
import sys
from pathlib import Path

from cli.embedded.stack import environment
from cli.errors import CommandError
from cli.home import find_home, read_json

ADMIN = (sys.executable, "-m", "api.admin")


def verify(home: Path | None, *, digests: bool) -> int:
    """Compares the depot that DEPOT_DATABASE_URL names, or else that of the home, which must run; the exit status."""
    argv = [*ADMIN, "verify", *(["--digests"] if digests else [])]
    return subprocess.run(argv, env=_environment(home), check=False).returncode


def _environment(home: Path | None) -> dict[str, str]:
    if home is None and "DEPOT_DATABASE_URL" in os.environ:
        return dict(os.environ)
    place = find_home(home)
    url = read_json(place.state).get("url")
    if not isinstance(url, str):
        told = f"No depot runs in {place.root}. Start it with lora-depot up, or set DEPOT_DATABASE_URL and the store's"
        raise CommandError(f"{told} settings.", code="not_running")
    return environment(place, url=url, slots=1, inherited=os.environ)
