"""`/v1/models`: everything that can be named as a model, as OpenAI's clients list it."""

from api.context import PrincipalDep, SessionDep
from api.openai.schemas import ModelList, ModelObject
from api.refusals import ModelNotFound
from api.routing import Permission, Router
from api.schemas import unix
from registry.adapters import latest_numbers, list_adapters, resolve_version
from registry.base_models import find_base_model, list_base_models
from registry.errors import AdapterNotFound, VersionNotFound
from registry.ids import public_id
from registry.models import Adapter, BaseModel

router = Router("Models")
_MOST = 1000


@router.declare("GET", "/models", permission=Permission.MODELS_READ, summary="List models", returns=ModelList)
def models(session: SessionDep, principal: PrincipalDep) -> ModelList:
    """Base models, then the latest version of each of your adapters. `/v1/adapters` has them all, in pages."""
    bases = list_base_models(session, limit=_MOST).items
    adapters = list_adapters(session, tenant_id=principal.tenant_id, limit=_MOST).items
    latest = latest_numbers(session, adapters)
    published = [_adapter(adapter, latest[adapter.id]) for adapter in adapters if adapter.id in latest]
    return ModelList(data=[*map(_base, bases), *published])


@router.declare(
    "GET",
    "/models/{model:path}",
    permission=Permission.MODELS_READ,
    summary="Read a model",
    returns=ModelObject,
    raises=(ModelNotFound,),
)
def model(model: str, session: SessionDep, principal: PrincipalDep) -> ModelObject:
    """A base model by its name, or a version as `name@7`, `name@alias` or `name@latest`."""
    name, at, ref = model.partition("@")
    if not at:
        if (base := find_base_model(session, model)) is None:
            raise ModelNotFound
        return _base(base)
    try:
        version = resolve_version(session, tenant_id=principal.tenant_id, name=name, ref=ref)
    except (AdapterNotFound, VersionNotFound):
        raise ModelNotFound from None
    found = _adapter(version.adapter, version.version)
    return found.model_copy(update={"created": unix(version.created_at)})


def _base(base: BaseModel) -> ModelObject:
    return ModelObject(id=base.name, created=unix(base.created_at), owned_by="depot")


def _adapter(adapter: Adapter, number: int) -> ModelObject:
    owner = public_id("org", adapter.tenant_id)
    return ModelObject(id=f"{adapter.name}@{number}", created=unix(adapter.created_at), owned_by=owner)
