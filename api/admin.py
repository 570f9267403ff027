"""Administration without HTTP: make API keys, collect garbage, verify what is stored."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from api.context import Depot, make_depot
from registry.db import transaction
from registry.gc import Amount, collect, survey
from registry.keys import create_key
from registry.settings import Settings
from registry.tenants import default_tenant
from registry.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 when `verify` found a difference."""
    arguments = _parser().parse_args(argv)
    with _opened(Settings()) as depot:  # from the environment
        if arguments.command == "create-key":
            _say(new_key(depot, name=arguments.name))
            return 0
        if arguments.command == "gc":
            gc(depot, dry_run=arguments.dry_run)
            return 0
        return verify_all(depot, digests=arguments.digests)


def new_key(depot: Depot, *, name: str) -> str:
    """A key of the default tenant."""
    with transaction(depot.sessions) as session:
        return create_key(session, tenant_id=default_tenant(session).id, name=name, pepper=depot.pepper)


def gc(depot: Depot, *, dry_run: bool) -> None:
    """One collection, or what it would do."""
    grace = depot.settings.gc_grace_seconds
    if dry_run:
        with transaction(depot.sessions) as session:
            found = survey(session, grace_seconds=grace)
        _say(f"would condemn {_told(found.condemn)}")
        _say(f"would free {_told(found.sweep)}")
        return
    kept = depot.settings.keep_checkpoints_seconds
    done = collect(depot.sessions, depot.store, grace_seconds=grace, checkpoints_seconds=kept)
    _say(f"condemned {_told(done.condemned)}; they are deleted {grace:.0f} s from now at the earliest")
    _say(f"freed {_told(done.freed)}")
    _say(f"purged {done.purged_rows} rows")


def verify_all(depot: Depot, *, digests: bool) -> int:
    """Tells every difference between Postgres and the store; 1 when there is one."""
    count = 0
    for difference in verify(depot.sessions, depot.store, digests=digests):
        count += 1
        _say(f"{difference.kind}\t{difference.subject}\t{difference.message}")
    _say(f"{count} differences" if count else "Postgres and the store agree")
    return 1 if count else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m api.admin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create-key", help="make an API key and print it; it cannot be shown again")
    create.add_argument("--name", required=True, help="what the key is for")
    collector = commands.add_parser("gc", help="delete bytes that nobody refers to; workers do this by themselves")
    collector.add_argument("--dry-run", action="store_true", help="only tell what would be done")
    verifier = commands.add_parser("verify", help="compare Postgres with the store; exit status 1 on a difference")
    verifier.add_argument("--digests", action="store_true", help="also read and hash every referenced object")
    return parser


@contextmanager
def _opened(settings: Settings) -> Iterator[Depot]:
    depot = make_depot(settings)
    try:
        yield depot
    finally:
        depot.engine.dispose()


def _told(amount: Amount) -> str:
    return f"{amount.objects} objects, {amount.bytes} bytes"


def _say(line: str) -> None:
    print(line)  # noqa: T201  # a command's output


if __name__ == "__main__":
    sys.exit(main())
