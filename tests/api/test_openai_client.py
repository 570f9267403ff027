"""The real OpenAI client against a real server: what its users would see."""

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from registry.db import SessionFactory, transaction
from registry.jobs.lease import claim
from tests.api.conftest import BASE, ROWS


@pytest.fixture
def ai(server: str, key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server}/v1", api_key=key) as client:
        yield client


@pytest.fixture
def training_file(ai: OpenAI) -> str:
    return ai.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


class TestFiles:
    def test_the_life_of_a_file(self, ai: OpenAI) -> None:
        made = ai.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        assert ai.files.wait_for_processing(made.id).status == "processed"
        assert ai.files.retrieve(made.id).filename == "rows.jsonl"
        assert ai.files.content(made.id).read() == ROWS
        assert ai.files.delete(made.id).deleted is True
        with pytest.raises(openai.NotFoundError) as caught:
            ai.files.retrieve(made.id)
        assert caught.value.code == "file_not_found"
        assert (caught.value.request_id or "").startswith("req_")

    def test_auto_paging_ends(self, ai: OpenAI) -> None:
        made = [ai.files.create(file=("r.jsonl", ROWS), purpose="fine-tune").id for _ in range(3)]
        assert [file.id for file in ai.files.list(limit=2)] == made[::-1]

    def test_bad_rows(self, ai: OpenAI) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ai.files.create(file=("rows.jsonl", b"{}\n"), purpose="fine-tune")
        assert caught.value.code == "invalid_training_file"
        assert "line 1" in caught.value.message


class TestJobs:
    def test_the_life_of_a_job(self, ai: OpenAI, training_file: str, sessions: SessionFactory) -> None:
        job = ai.fine_tuning.jobs.create(
            model=BASE,
            training_file=training_file,
            suffix="support-bot",
            seed=3,
            metadata={"team": "a"},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": "auto"}}},
            extra_body={"lora": {"r": 4, "target_modules": ["q_proj"]}},
        )
        assert (job.status, job.model, job.seed, job.fine_tuned_model) == ("queued", BASE, 3, None)
        assert job.hyperparameters.n_epochs == 1
        assert ai.fine_tuning.jobs.retrieve(job.id).id == job.id
        assert [j.id for j in ai.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]
        assert list(ai.fine_tuning.jobs.list(metadata={"team": "b"})) == []
        with transaction(sessions) as session:
            claim(session, queues=["default"], worker="w", lease_seconds=60)
        assert ai.fine_tuning.jobs.cancel(job.id).status == "running"
        events = list(ai.fine_tuning.jobs.list_events(job.id, limit=1))
        assert len(events) >= 2
        assert events[-1].message == "The job is queued."
        assert len({event.id for event in events}) == len(events)

    def test_auto_paging_ends(self, ai: OpenAI, training_file: str) -> None:
        made = [
            ai.fine_tuning.jobs.create(model=BASE, training_file=training_file, suffix=f"s{n}").id for n in range(3)
        ]
        assert [job.id for job in ai.fine_tuning.jobs.list(limit=1)] == made[::-1]

    def test_errors_are_its_classes_with_codes(self, ai: OpenAI, training_file: str) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ai.fine_tuning.jobs.create(model="absent", training_file=training_file, suffix="x")
        assert (caught.value.code, caught.value.param) == ("unknown_base_model", "model")
        with pytest.raises(openai.NotFoundError):
            ai.fine_tuning.jobs.retrieve("ftjob-absent")

    def test_a_wrong_key(self, server: str, key: str) -> None:
        with (
            OpenAI(base_url=f"{server}/v1", api_key=key[:-1] + "!") as ai,
            pytest.raises(openai.AuthenticationError) as e,
        ):
            ai.models.list()
        assert e.value.code == "invalid_api_key"

    def test_cancelling_an_ended_job_is_asked_once(
        self, ai: OpenAI, training_file: str, sessions: SessionFactory
    ) -> None:
        from sqlalchemy import text

        job = ai.fine_tuning.jobs.create(model=BASE, training_file=training_file, suffix="x")
        with transaction(sessions) as session:
            session.execute(text("UPDATE jobs SET state = 'failed', finished_at = clock_timestamp()"))
        with pytest.raises(openai.ConflictError) as caught:
            ai.fine_tuning.jobs.cancel(job.id)
        assert caught.value.code == "job_terminal"
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_models(ai: OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == [BASE]
    assert ai.models.retrieve(BASE).owned_by == "depot"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("org/absent:x")
