"""The real `lora-depot up` on one home, and a user who has nothing but the command and an API key."""

import os
import re
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from openai import DefaultHttpxClient, OpenAI

from cli.home import read_json
from tests.cli.depot import Depot, wait_for

SCRIPTS = Path(sysconfig.get_path("scripts"))
LORA_DEPOT = SCRIPTS / "lora-depot"
# A lost worker is noticed soon; computing threads do not fight for the machine's few cores.
QUICK = {
    "DEPOT_HEARTBEAT_SECONDS": "0.5",
    "DEPOT_LEASE_SECONDS": "6",
    "DEPOT_REAPER_SECONDS": "0.5",
    "DEPOT_POLL_SECONDS": "1",
    "OMP_NUM_THREADS": "1",
}
DEADLINE = 240.0
TINY_JOB = ("--r", "4", "--target-modules", "q_proj,v_proj", "--learning-rate", "1e-2", "--max-length", "128")


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without any depot of its user, and with `settings`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEPOT_")}
    return {**kept, **settings}


@dataclass(frozen=True)
class User:
    """Types commands in `folder`; `env` says where the depot is."""

    folder: Path
    env: Mapping[str, str]

    def types(self, *words: str | Path, status: int = 0) -> str:
        """What `lora-depot` printed; it ended with `status` and without a traceback."""
        done = subprocess.run(
            [LORA_DEPOT, *words], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=DEADLINE
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def submits(self, *words: str | Path) -> str:
        """The id of a new tiny job."""
        return found(r"ftjob-[0-9a-f]{32}", self.types("jobs", "submit", *TINY_JOB, *words))


class Stack(Depot):
    """A home, the real stack on it, and the user's folder beside it."""

    def up(self, *arguments: str, ready: bool = True) -> subprocess.Popen[bytes]:
        env = clean_environment(DEPOT_HOME=str(self.home.root), **QUICK)
        with self.output.open("ab") as output:
            process = subprocess.Popen(
                [LORA_DEPOT, "up", *arguments],
                cwd=self.home.root.parent,
                env=env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started.append(process)
        if ready:
            wait_for(lambda: self.state().get("url") or process.poll() is not None, "ready or ended")
            assert process.poll() is None, self.said()
        return process

    @property
    def user(self) -> User:
        return User(self.home.root.parent, clean_environment(DEPOT_HOME=str(self.home.root)))

    def ai(self, *, api_key: str | None = None) -> OpenAI:
        client = read_json(self.home.client)
        return OpenAI(
            base_url=f"{client['url']}/v1",
            api_key=api_key or client["api_key"],
            http_client=DefaultHttpxClient(trust_env=False),  # no proxy stands between two processes of one machine
        )

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.home.log("x").parent.iterdir()))


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[0]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40).unsqueeze(0)).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
