"""What routes are given: the parts made at start, the caller, and a session that commits before the response."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.streams import StreamLimit
from registry.db import SessionFactory, make_engine, make_sessions, transaction
from registry.failpoints import hit
from registry.keys import Principal
from registry.merged import VirtualMerges
from registry.settings import Settings
from registry.storage import ObjectStore
from registry.storage.open import make_store


@dataclass(frozen=True)
class Depot:
    """The parts of the service that one API process holds."""

    settings: Settings
    engine: Engine
    sessions: SessionFactory
    store: ObjectStore
    pepper: bytes
    merged: VirtualMerges
    streams: StreamLimit = field(default_factory=StreamLimit)


def make_depot(settings: Settings) -> Depot:
    """The parts that these settings describe. Connects to nothing yet."""
    secret, access = settings.s3_secret_access_key, settings.s3_access_key_id
    store = make_store(
        settings.store_url,
        secret_key=settings.secret_key.get_secret_value(),
        public_url=settings.public_url,
        s3_endpoint_url=settings.s3_endpoint_url,
        s3_public_endpoint_url=settings.s3_public_endpoint_url,
        s3_region=settings.s3_region,
        s3_access_key_id=access.get_secret_value() if access else None,
        s3_secret_access_key=secret.get_secret_value() if secret else None,
    )
    engine = make_engine(settings.database_url, pool_size=20)
    pepper = settings.secret_key.get_secret_value().encode()
    return Depot(settings, engine, make_sessions(engine), store, pepper, VirtualMerges(store))


def get_depot(request: Request) -> Depot:
    return cast(Depot, request.app.state.depot)


DepotDep = Annotated[Depot, Depends(get_depot)]


def get_session(depot: DepotDep) -> Iterator[Session]:
    """One unit of work per request."""
    with transaction(depot.sessions) as session:
        yield session
    hit("api.after_commit")


# With FastAPI's default scope the commit would follow the response, and a failed one would still look like success.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]


def get_store(depot: DepotDep) -> ObjectStore:
    return depot.store


StoreDep = Annotated[ObjectStore, Depends(get_store)]


def get_principal(request: Request) -> Principal:
    """Who calls; the route has found that out before it read the body."""
    return cast(Principal, request.state.principal)


PrincipalDep = Annotated[Principal, Depends(get_principal)]
