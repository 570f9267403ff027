"""Administration without HTTP: `python -m api.admin create-key --name NAME` prints a new API key, once."""

import argparse
from collections.abc import Sequence

from registry.db import make_engine, make_sessions, transaction
from registry.keys import create_key
from registry.settings import Settings
from registry.tenants import default_tenant


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m api.admin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create-key", help="make an API key and print it; it cannot be shown again")
    create.add_argument("--name", required=True, help="what the key is for")
    arguments = parser.parse_args(argv)
    settings = Settings()  # from the environment
    print(new_key(settings, name=arguments.name))  # noqa: T201  # the key is this command's output


def new_key(settings: Settings, *, name: str) -> str:
    """A key of the default tenant."""
    engine = make_engine(settings.database_url, pool_size=1)
    try:
        with transaction(make_sessions(engine)) as session:
            pepper = settings.secret_key.get_secret_value().encode()
            return create_key(session, tenant_id=default_tenant(session).id, name=name, pepper=pepper)
    finally:
        engine.dispose()


if __name__ == "__main__":
    main()
