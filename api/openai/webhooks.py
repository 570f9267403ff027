"""`/v1/webhook_endpoints`, as OpenAI's client knows them: where to tell that a job has ended."""

import secrets
import uuid
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, Field

from api.context import Depot, DepotDep, PrincipalDep, SessionDep
from api.refusals import InvalidValue, MissingField, UnknownField
from api.routing import Permission, Router
from api.schemas import Body, Listing, listing, shown, unix
from registry import errors
from registry.db import transaction
from registry.ids import parse_id, public_id
from registry.jobs.clock import read_clock
from registry.models import WebhookEndpoint
from registry.webhooks import endpoints
from registry.webhooks.deliveries import encode, make_event
from registry.webhooks.endpoints import EventType
from registry.webhooks.send import deliver
from registry.webhooks.targets import parse_target

router = Router("Webhooks")
ENDPOINT = {
    "id": "webhook-4f0c3a1e8d7b4c62a9f01b2c3d4e5f60",
    "object": "webhook_endpoint",
    "name": "ci",
    "url": "https://ci.example.com/hooks/depot",
    "event_types": ["fine_tuning.job.failed", "fine_tuning.job.succeeded"],
    "signing_secret_hint": "whsec_…9aQ=",
    "created_at": 1790000000,
    "updated_at": 1790000000,
}
CREATE = {name: ENDPOINT[name] for name in ("name", "url", "event_types")}
_INVALID = (MissingField, UnknownField, InvalidValue)
Name = Annotated[str, Field(min_length=1, max_length=100)]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=10)]


class EndpointIn(Body):
    name: Name
    url: str
    event_types: EventTypes


class EndpointChange(Body):
    """What is absent or null stays."""

    name: Name | None = None
    url: str | None = None
    event_types: EventTypes | None = None


class Rotation(Body):
    keep_old_secret_active_for_24_hours: bool = False


class TestIn(Body):
    event_type: EventType


class EndpointObject(BaseModel):
    """An endpoint. Its secret is shown when it is made or rotated, and never again."""

    model_config = shown(ENDPOINT)

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    created_at: int
    updated_at: int


class EndpointWithSecret(EndpointObject):
    model_config = shown({**ENDPOINT, "signing_secret": "whsec_…"})

    signing_secret: str


class EventTypeObject(BaseModel):
    """One thing that an endpoint can be told of."""

    model_config = shown({"event_type": "fine_tuning.job.failed", "description": "A job has ended without a result."})

    object: Literal["webhook_endpoint.event_type"] = "webhook_endpoint.event_type"
    event_type: str
    description: str


class EndpointDeleted(BaseModel):
    model_config = shown({"id": ENDPOINT["id"], "object": "webhook_endpoint.deleted", "deleted": True})

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class TestResult(BaseModel):
    model_config = shown(
        {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": ENDPOINT["id"],
            "event_type": "fine_tuning.job.succeeded",
            "status_code": 200,
            "success": True,
        }
    )

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


@router.declare(
    "POST",
    "/webhook_endpoints",
    permission=Permission.WEBHOOKS_WRITE,
    summary="Be told when jobs end",
    returns=EndpointWithSecret,
    raises=(*_INVALID, errors.WebhookNotAllowed, errors.WebhookLimit),
    extra={"requestBody": {"content": {"application/json": {"example": CREATE}}}},
)
def create(body: EndpointIn, session: SessionDep, depot: DepotDep, principal: PrincipalDep) -> EndpointWithSecret:
    """Every event is sent at least once, signed after Standard Webhooks, and repeated for a day until a 2xx answers."""
    parse_target(body.url, allow_lan=depot.settings.webhook_allow_lan)
    made = endpoints.create_endpoint(session, tenant_id=principal.tenant_id, **body.model_dump())
    return _with_secret(made, depot)


@router.declare(
    "GET",
    "/webhook_endpoints",
    permission=Permission.WEBHOOKS_READ,
    summary="List webhook endpoints, newest first",
    returns=Listing[EndpointObject],
    raises=(errors.InvalidCursor,),
)
def endpoint_list(
    session: SessionDep,
    depot: DepotDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Listing[EndpointObject]:
    """Yours."""
    cursor = None
    if after is not None and (cursor := parse_id("webhook", after)) is None:
        raise errors.InvalidCursor(param="after")
    page = endpoints.list_endpoints(session, tenant_id=principal.tenant_id, after=cursor, limit=limit)
    items = [_object(endpoint, depot) for endpoint in page.items]
    return listing(EndpointObject, items, has_more=page.has_more, cursor=lambda endpoint: endpoint.id)


@router.declare(
    "GET",
    "/webhook_endpoints/event_types",
    permission=Permission.WEBHOOKS_READ,
    summary="List what a webhook can be told",
    returns=Listing[EventTypeObject],
)
def event_types() -> Listing[EventTypeObject]:
    """Every type of event, in no pages."""
    items = [EventTypeObject(event_type=name, description=text) for name, text in endpoints.EVENT_TYPES.items()]
    return listing(EventTypeObject, items, has_more=False, cursor=lambda item: item.event_type)


@router.declare(
    "GET",
    "/webhook_endpoints/{webhook_id}",
    permission=Permission.WEBHOOKS_READ,
    summary="Read a webhook endpoint",
    returns=EndpointObject,
    raises=(errors.WebhookNotFound,),
)
def endpoint(webhook_id: str, session: SessionDep, depot: DepotDep, principal: PrincipalDep) -> EndpointObject:
    """One endpoint."""
    return _object(_get(session, principal.tenant_id, webhook_id), depot)


@router.declare(
    "POST",
    "/webhook_endpoints/{webhook_id}",
    permission=Permission.WEBHOOKS_WRITE,
    summary="Change a webhook endpoint",
    returns=EndpointObject,
    raises=(*_INVALID, errors.WebhookNotFound, errors.WebhookNotAllowed),
    extra={"requestBody": {"content": {"application/json": {"example": CREATE}}}},
)
def update(
    webhook_id: str, body: EndpointChange, session: SessionDep, depot: DepotDep, principal: PrincipalDep
) -> EndpointObject:
    """Changes what is given; events that wait are sent to the new address."""
    found = _get(session, principal.tenant_id, webhook_id)
    if body.url is not None:
        parse_target(body.url, allow_lan=depot.settings.webhook_allow_lan)
    endpoints.update_endpoint(session, found, **body.model_dump())
    return _object(found, depot)


@router.declare(
    "DELETE",
    "/webhook_endpoints/{webhook_id}",
    permission=Permission.WEBHOOKS_WRITE,
    summary="Delete a webhook endpoint",
    returns=EndpointDeleted,
    raises=(errors.WebhookNotFound,),
)
def delete(webhook_id: str, session: SessionDep, principal: PrincipalDep) -> EndpointDeleted:
    """Events that wait are not sent any more."""
    session.delete(_get(session, principal.tenant_id, webhook_id))
    return EndpointDeleted(id=webhook_id)


@router.declare(
    "POST",
    "/webhook_endpoints/{webhook_id}/rotate_secret",
    permission=Permission.WEBHOOKS_WRITE,
    summary="Give a webhook endpoint a new secret",
    returns=EndpointWithSecret,
    raises=(*_INVALID, errors.WebhookNotFound),
    extra={"requestBody": {"content": {"application/json": {"example": Rotation().model_dump()}}}},
)
def rotate_secret(
    *,
    webhook_id: str,
    session: SessionDep,
    depot: DepotDep,
    principal: PrincipalDep,
    body: Rotation | None = None,
) -> EndpointWithSecret:
    """The old secret ends at once, or signs beside the new one for a day."""
    found = _get(session, principal.tenant_id, webhook_id)
    keep_old = (body or Rotation()).keep_old_secret_active_for_24_hours
    endpoints.rotate_secret(session, found, keep_old=keep_old)
    return _with_secret(found, depot)


@router.declare(
    "POST",
    "/webhook_endpoints/{webhook_id}/test",
    permission=Permission.WEBHOOKS_WRITE,
    summary="Send a test event",
    returns=TestResult,
    raises=(*_INVALID, errors.WebhookNotFound, errors.WebhookNotAllowed, errors.WebhookUnreachable),
    extra={"requestBody": {"content": {"application/json": {"example": {"event_type": "fine_tuning.job.succeeded"}}}}},
)
def send_test(webhook_id: str, body: TestIn, depot: DepotDep, principal: PrincipalDep) -> TestResult:
    """Sends an event about a job that does not exist, now and once, and tells the status of the answer."""
    with transaction(depot.sessions) as session:
        found = _get(session, principal.tenant_id, webhook_id)
        now = read_clock(session)
    event = make_event(body.event_type, f"ftjob-{secrets.token_hex(16)}", now)
    try:
        status = deliver(
            found.url,
            encode(event),
            secrets=endpoints.secrets_of(found, pepper=depot.pepper, now=now),
            event_id=event["id"],
            timestamp=event["created_at"],
            allow_lan=depot.settings.webhook_allow_lan,
        )
    except OSError as error:
        raise errors.WebhookUnreachable(reason=type(error).__name__) from None
    return TestResult(webhook_endpoint_id=webhook_id, event_type=body.event_type, status_code=status)


def _get(session: SessionDep, tenant_id: uuid.UUID, text: str) -> WebhookEndpoint:
    if (found := parse_id("webhook", text)) is None:
        raise errors.WebhookNotFound
    return endpoints.get_endpoint(session, tenant_id=tenant_id, endpoint_id=found)


def _object(endpoint: WebhookEndpoint, depot: Depot) -> EndpointObject:
    return EndpointObject(
        id=public_id("webhook", endpoint.id),
        name=endpoint.name,
        url=endpoint.url,
        event_types=endpoint.event_types,
        signing_secret_hint=f"whsec_…{endpoints.secret_of(endpoint, pepper=depot.pepper)[-4:]}",
        created_at=unix(endpoint.created_at),
        updated_at=unix(endpoint.updated_at),
    )


def _with_secret(endpoint: WebhookEndpoint, depot: Depot) -> EndpointWithSecret:
    secret = endpoints.secret_of(endpoint, pepper=depot.pepper)
    return EndpointWithSecret(**_object(endpoint, depot).model_dump(), signing_secret=secret)
