"""The API's entry point: `uvicorn --factory api.main:create_app`."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI

from api import health, logs
from api.context import make_depot
from api.depot import adapters, base_models, merged, merges, objects, versions
from api.errors import HANDLERS
from api.guard import Guard
from api.openai import files, job_checkpoints, job_control, job_progress, job_stream, jobs, models, webhooks
from api.openai.upload import upload_folder
from api.routing import require_permissions
from registry import failpoints
from registry.settings import Settings

ROUTERS = (
    files.router,
    jobs.router,
    job_control.router,
    job_progress.router,
    job_checkpoints.router,
    job_stream.router,
    webhooks.router,
    models.router,
    base_models.router,
    adapters.router,
    versions.router,
    merges.router,
    merged.router,
    objects.router,
    health.router,
)
_STALE_SECONDS = 24 * 3600


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. Without settings it is a process of its own: reads them and sets up logging.

    Raises when a route declares no permission; so does starting, for routes that were added afterwards."""
    if settings is None:
        settings = Settings()  # from the environment
        logs.configure(settings.log_level)
        failpoints.arm(settings.failpoints)
    app = FastAPI(
        title="LoRA Depot",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        exception_handlers=HANDLERS,
    )
    app.state.depot = make_depot(settings)
    app.add_middleware(Guard)
    for router in ROUTERS:
        app.include_router(router)
    require_permissions(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    require_permissions(app)
    remove_stale(upload_folder(app.state.depot.settings))
    yield
    app.state.depot.merged.close()
    app.state.depot.engine.dispose()


def remove_stale(folder: Path) -> None:
    """Removes uploads that a killed process left behind, once none can still be arriving."""
    if folder.is_dir():
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # another process removes them too
                if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                    path.unlink()
