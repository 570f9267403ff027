"""Links that the API serves itself."""

import hashlib
import hmac
import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import LinkExpired, LinkInvalid, Unauthenticated
from registry.storage.links import attachment, open_link, sign_link
from tests.registry.storage.conftest import SECRET

TOKEN = sign_link(SECRET, key="blobs/aa/1", filename="naïve.bin", expires=1000)


def test_a_token_opens_until_it_expires() -> None:
    assert open_link(SECRET, TOKEN, now=999.9) == ("blobs/aa/1", "naïve.bin")
    with pytest.raises(LinkExpired):
        open_link(SECRET, TOKEN, now=1000.0)


def test_refused_links_are_an_authentication_matter() -> None:
    assert (LinkInvalid.code, LinkExpired.code) == ("link_invalid", "link_expired")
    assert issubclass(LinkInvalid, Unauthenticated)
    assert issubclass(LinkExpired, Unauthenticated)


@given(st.integers(0, len(TOKEN) - 1), st.characters())
def test_no_character_of_a_token_can_be_changed(place: int, other: str) -> None:
    changed = TOKEN[:place] + other + TOKEN[place + 1 :]
    if changed != TOKEN:
        with pytest.raises(LinkInvalid):
            open_link(SECRET, changed, now=0)


@given(st.text(st.characters(exclude_categories=())))
def test_garbage_is_refused(token: str) -> None:
    with pytest.raises(LinkInvalid):
        open_link(SECRET, token, now=0)


def test_another_secret_opens_nothing() -> None:
    with pytest.raises(LinkInvalid):
        open_link(SECRET[::-1], TOKEN, now=0)


def test_a_signature_made_for_another_purpose_opens_nothing() -> None:
    payload = TOKEN.partition(".")[0]
    plain = hmac.new(SECRET, payload.encode(), hashlib.sha256).hexdigest()
    with pytest.raises(LinkInvalid):
        open_link(SECRET, f"{payload}.{plain}", now=0)


@given(st.text(st.characters(exclude_categories=())))
def test_a_disposition_is_one_line_of_ascii_that_names_one_file(filename: str) -> None:
    whole = re.fullmatch(
        r'attachment; filename="([ !#-~]*)"; filename\*=UTF-8\'\'([\w.~%-]*)', attachment(filename), re.A
    )
    assert whole
    saved = unquote(whole[2], errors="strict")
    assert len(saved) == len(filename)
    assert not re.search(r"[/\\\x00-\x1f]", saved)
    assert all(a in {b, "_"} for a, b in zip(saved, filename, strict=True))
