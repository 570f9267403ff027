import hmac
import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.errors import InvalidApiKey, KeyNotFound, KeyRevoked
from registry.keys import PREFIX, Principal, authenticate, create_key, revoke_key
from registry.models import ApiKey
from tests.factories import make_tenant

PEPPER = b"p" * 32
BODY = "ld_0000TESTKEY1abcdefghijklmnopqrstuvwxyz012345"


def well_formed(body: str = BODY) -> str:
    """A key by the documented format, written independently of the code."""
    import zlib

    digits, number = "", zlib.crc32(body.encode())
    alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    while number:
        number, rest = divmod(number, 62)
        digits = alphabet[rest] + digits
    return body + digits.rjust(6, "0")


def without_database() -> Session:
    """A session on which every query fails."""
    return Session()


class TestFormat:
    def test_the_expected_checksum_is_right(self) -> None:
        # A fixed vector of the same format under another prefix: it keeps this file's own arithmetic honest.
        assert well_formed("ftu_0000TESTKEY1abcdefghijklmnopqrstuvwxyz012345").endswith("0F3f2f")

    def test_a_new_key_has_the_documented_format(self, session: Session) -> None:
        key = create_key(session, tenant_id=make_tenant(session).id, name="ci", pepper=PEPPER)
        assert re.fullmatch(r"ld_[0-9A-Za-z]{50}", key)
        assert well_formed(key[:-6]) == key

    def test_keys_are_all_different(self, session: Session) -> None:
        tenant = make_tenant(session)
        keys = {create_key(session, tenant_id=tenant.id, name="ci", pepper=PEPPER) for _ in range(20)}
        assert len({key[3:15] for key in keys}) == len({key[15:47] for key in keys}) == 20

    @given(position=st.integers(0, 52), replacement=st.characters())
    def test_any_single_changed_character_is_refused_without_a_query(self, position: int, replacement: str) -> None:
        key = well_formed()
        changed = key[:position] + replacement + key[position + 1 :]
        if changed != key:
            with pytest.raises(InvalidApiKey):
                authenticate(without_database(), changed, pepper=PEPPER)

    @given(st.text(max_size=80))
    def test_any_text_is_refused_without_a_query(self, text: str) -> None:
        with pytest.raises(InvalidApiKey):
            authenticate(without_database(), text, pepper=PEPPER)

    @pytest.mark.parametrize("wrong", [well_formed() + "\n", well_formed()[:-1], " " + well_formed(), "", PREFIX])
    def test_a_cut_or_padded_key_is_refused_without_a_query(self, wrong: str) -> None:
        with pytest.raises(InvalidApiKey):
            authenticate(without_database(), wrong, pepper=PEPPER)


class TestAuthenticate:
    def test_a_key_says_whose_it_is(self, session: Session) -> None:
        tenant = make_tenant(session)
        key = create_key(session, tenant_id=tenant.id, name="ci", pepper=PEPPER)
        assert authenticate(session, key, pepper=PEPPER) == Principal(tenant.id, key[3:15], "ci")

    def test_an_id_that_does_not_exist_is_refused(self, session: Session) -> None:
        with pytest.raises(InvalidApiKey):
            authenticate(session, well_formed(), pepper=PEPPER)

    def test_the_secret_of_another_key_is_refused(self, session: Session) -> None:
        tenant = make_tenant(session)
        mine, other = (create_key(session, tenant_id=tenant.id, name="ci", pepper=PEPPER) for _ in range(2))
        with pytest.raises(InvalidApiKey) as caught:
            authenticate(session, well_formed(mine[:15] + other[15:47]), pepper=PEPPER)
        assert caught.value.message == InvalidApiKey().message

    def test_another_pepper_is_refused(self, session: Session) -> None:
        key = create_key(session, tenant_id=make_tenant(session).id, name="ci", pepper=PEPPER)
        with pytest.raises(InvalidApiKey):
            authenticate(session, key, pepper=b"q" * 32)

    def test_the_secret_is_not_stored(self, session: Session) -> None:
        key = create_key(session, tenant_id=make_tenant(session).id, name="ci", pepper=PEPPER)
        row = session.scalars(select(ApiKey)).one()
        stored = " ".join(str(getattr(row, column.key)) for column in ApiKey.__table__.columns)
        assert key[15:47] not in stored
        assert row.secret_hmac == hmac.new(PEPPER, key[15:47].encode(), "sha256").hexdigest()

    def test_neither_principal_nor_error_shows_the_secret(self, session: Session) -> None:
        key = create_key(session, tenant_id=make_tenant(session).id, name="ci", pepper=PEPPER)
        shown = repr(authenticate(session, key, pepper=PEPPER)) + repr(session.scalars(select(ApiKey)).one())
        with pytest.raises(InvalidApiKey) as caught:
            authenticate(session, key, pepper=b"q" * 32)
        assert key[15:47] not in shown + repr(caught.value) + str(caught.value.details)

    def test_a_known_and_an_unknown_id_cost_the_same_comparison(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = create_key(session, tenant_id=make_tenant(session).id, name="ci", pepper=PEPPER)
        compared: list[int] = []
        real = hmac.compare_digest

        def spy(left: str, right: str) -> bool:
            compared.append(len(left) + len(right))
            return real(left, right)

        monkeypatch.setattr("registry.keys.hmac.compare_digest", spy)
        authenticate(session, key, pepper=PEPPER)
        with pytest.raises(InvalidApiKey):
            authenticate(session, well_formed(), pepper=PEPPER)
        assert compared == [128, 128]


class TestRevoke:
    def test_a_revoked_key_is_refused_by_name(self, session: Session) -> None:
        tenant = make_tenant(session)
        key = create_key(session, tenant_id=tenant.id, name="ci", pepper=PEPPER)
        first = revoke_key(session, tenant_id=tenant.id, key_id=key[3:15]).revoked_at
        with pytest.raises(KeyRevoked):
            authenticate(session, key, pepper=PEPPER)
        assert first is not None
        assert revoke_key(session, tenant_id=tenant.id, key_id=key[3:15]).revoked_at == first

    def test_only_the_holder_of_the_secret_learns_that_a_key_is_revoked(self, session: Session) -> None:
        tenant = make_tenant(session)
        key = create_key(session, tenant_id=tenant.id, name="ci", pepper=PEPPER)
        revoke_key(session, tenant_id=tenant.id, key_id=key[3:15])
        with pytest.raises(InvalidApiKey):
            authenticate(session, well_formed(key[:15] + "x" * 32), pepper=PEPPER)

    def test_another_tenants_key_is_not_found(self, session: Session) -> None:
        tenant = make_tenant(session)
        key = create_key(session, tenant_id=tenant.id, name="ci", pepper=PEPPER)
        with pytest.raises(KeyNotFound):
            revoke_key(session, tenant_id=uuid.uuid4(), key_id=key[3:15])
        authenticate(session, key, pepper=PEPPER)
