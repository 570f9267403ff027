"""Settings: what stops a process, and what the error may say about it."""

import pytest
from pydantic import ValidationError

from registry.settings import Settings

GIVEN = {
    "DEPOT_DATABASE_URL": "postgresql+psycopg://depot:hush@db/depot",
    "DEPOT_STORE_URL": "s3://bucket",
    "DEPOT_S3_SECRET_ACCESS_KEY": "hush",
    "DEPOT_SECRET_KEY": "hush" * 8,
}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DEPOT_SLOT", "2", "unknown settings: DEPOT_SLOT"),
        ("DEPOT_LEASE_SECONDS", "1", "DEPOT_LEASE_SECONDS must be at least"),
        ("DEPOT_SECRET_KEY", "hush", "at least 32"),
    ],
)
def test_an_error_names_the_setting_and_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    for variable, given in {**GIVEN, name: value}.items():
        monkeypatch.setenv(variable, given)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)
