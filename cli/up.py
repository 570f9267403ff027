"""`lora-depot up`: the whole depot on one machine, from Postgres to worker, until Ctrl-C."""

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from cli.embedded.leftovers import end_leftovers
from cli.embedded.lock import lock_home
from cli.embedded.postgres import postgres_spec
from cli.embedded.process import EmbeddedError
from cli.embedded.stack import (
    HOST,
    Commands,
    answers,
    api_spec,
    choose_port,
    environment,
    is_free,
    one_shot,
    production_commands,
    worker_spec,
)
from cli.embedded.supervisor import Supervisor
from cli.embedded.valkey import valkey_spec
from cli.home import Home, HomeError, find_home, prepare_home, read_json, write_json

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Say = Callable[[str], None]


class StopRequested(BaseException):
    """Ctrl-C or its like. No Exception, so that nothing on the way mistakes it for a failure."""


@dataclass(frozen=True)
class Start:
    """What to start. `may_move`: nobody asked for just this port."""

    commands: Callable[[int], Commands]
    port: int
    may_move: bool
    slots: int

    def environment(self, home: Home, port: int) -> dict[str, str]:
        return environment(home, url=f"http://{HOST}:{port}", slots=self.slots, inherited=os.environ)


def up(
    home: Path | None = None,
    *,
    port: int | None = None,
    slots: int = 1,
    commands: Callable[[int], Commands] = production_commands,
) -> int:
    """Runs the stack of `home` until a signal asks it to stop; returns the exit status."""
    say = _speaker()
    place = find_home(home)
    try:
        with _signals_raise():
            prepare_home(place)
            with _held(place, say) as lock:
                end_leftovers(place)
                chosen = choose_port(port)
                start = Start(commands, chosen, may_move=port is None, slots=slots)
                _run(Supervisor(place, lock, say), start, say)
    except StopRequested:
        return 0
    except (EmbeddedError, HomeError) as error:
        say(f"[red]Error:[/red] {_plain(str(error))}")
        return 1
    except OSError as error:
        say(f"[red]Error:[/red] {_plain(_explain(error))}")
        return 1
    return 0


@contextmanager
def _held(home: Home, say: Say) -> Iterator[int]:
    """The home's lock, and the state file that tells others who has it."""
    lock = lock_home(home, say)
    try:
        write_json(home.state, {"pid": os.getpid(), "url": None, "children": {}})
        yield lock
    finally:
        home.state.unlink(missing_ok=True)
        os.close(lock)


def _run(supervisor: Supervisor, start: Start, say: Say) -> None:
    try:
        say(f"Starting the depot in {_plain(str(supervisor.home.root))} …")
        url = _start(supervisor, start)
        _banner(supervisor.home, url, say)
        supervisor.watch()
    finally:
        _shut_down(supervisor, say)


def _start(supervisor: Supervisor, start: Start) -> str:
    """Starts everything; returns the API's URL."""
    home, commands = supervisor.home, start.commands(start.port)
    supervisor.start(postgres_spec(home.postgres, home.sockets, home.log("postgres")))
    supervisor.start(valkey_spec(home.valkey, home.sockets, home.log("valkey")))
    supervisor.run_once(one_shot("migrate", commands.migrate, home, start.environment(home, start.port)))
    env = _start_api(supervisor, start)
    url = env["DEPOT_PUBLIC_URL"]
    key = read_json(home.client).get("api_key")
    if not isinstance(key, str) or answers(f"{url}/v1/adapters?limit=1", api_key=key) == 401:
        key = supervisor.run_once(one_shot("create-key", commands.create_key, home, env)).strip()
    write_json(home.client, {"url": url, "api_key": key})
    supervisor.start(worker_spec(commands.worker, home, env))
    supervisor.url = url
    supervisor.save_state()
    return url


def _start_api(supervisor: Supervisor, start: Start) -> dict[str, str]:
    """Starts the API, on another port than the chosen one if somebody was faster to open that; its environment."""
    home, port = supervisor.home, start.port
    while True:
        env = start.environment(home, port)
        try:
            supervisor.start(api_spec(start.commands(port).api, home, env))
        except EmbeddedError:
            if not start.may_move or is_free(port):
                raise
            port = choose_port(None)
        else:
            return env


def _shut_down(supervisor: Supervisor, say: Say) -> None:
    """Stops everything; a second Ctrl-C kills what is slow. Nothing runs when this returns."""
    try:
        say("Stopping …")
        supervisor.stop_all()
    except StopRequested:
        say("Killing what has not stopped yet.")
    _ignore_signals()
    supervisor.kill_all()
    supervisor.close()


@contextmanager
def _signals_raise() -> Iterator[None]:
    def raise_it(_number: int, _frame: FrameType | None) -> None:
        raise StopRequested

    before = {number: signal.signal(number, raise_it) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _banner(home: Home, url: str, say: Say) -> None:
    say(f"\n[bold green]LoRA Depot is ready[/bold green] at [bold]{url}[/bold]")
    say(f"  API docs  {url}/docs")
    say(f"  API key   in {_plain(str(home.client))} (the lora-depot command finds it there)")
    say(f"  logs      in {_plain(str(home.root / 'logs'))}")
    say("  stop      Ctrl-C; everything is kept for the next `lora-depot up`\n")


def _speaker() -> Say:
    # Paths must stay whole when the output is a file: no wrapping, no colouring of what looks like a path.
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        # The terminal may be gone while the stack still has to be shut down.
        with contextlib.suppress(OSError):
            console.print(text)

    return say


def _plain(text: str) -> str:
    """Text in which rich must find no markup."""
    return text.replace("[", r"\[")


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full ({error.filename}): free some space, then run the command again."
    return f"{error.strerror}: {error.filename}"
