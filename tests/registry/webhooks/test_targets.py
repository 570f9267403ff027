"""Where webhooks may go, and every way in that is closed."""

import pytest

from registry.errors import WebhookNotAllowed
from registry.webhooks.targets import is_public, parse_target, resolve


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "http://127.0.0.1",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://0/",
        "https://169.254.169.254/latest/meta-data",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://017700000001/",
        "https://[::ffff:10.0.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://[2002:7f00:1::]/",
        "https://[fe80::1%25eth0]/",
        "https://10.1.2.3/",
        "https://100.64.0.1/",
        "https://224.0.0.1/",
        "https://localhost/",
        "https://localhost./",
        "https://metadata/",
        "https://example.com./",
        "https://user@example.com/",
        "https://a:b@example.com/",
        "https://example.com:22/",
        "https://example.com:6379/",
        "https://example.com:80/",
        "https://example.com:99999/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "ftp://example.com/",
        "//example.com/",
        "https:///path",
        "https://exämple.com/",
        "https://example.com/a b",
        "https://example.com/\r\nAuthorization: x",
        "https://example.com/#part",
        "https://example.com\\@127.0.0.1/",
        "https://exa_mple..com/",
        "https://example.com/" + "a" * 2048,
        "",
    ],
)
def test_what_is_not_public_is_refused(url: str) -> None:
    with pytest.raises(WebhookNotAllowed):
        parse_target(url)


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("https://hooks.example.com", "hooks.example.com", "/"),
        ("https://Hooks.Example.com:8443/a/b?c=d", "hooks.example.com:8443", "/a/b?c=d"),
        ("https://8.8.8.8/x", "8.8.8.8", "/x"),
        ("https://[2606:4700::1111]/", "[2606:4700::1111]", "/"),
    ],
)
def test_public_addresses_are_targets(url: str, authority: str, path: str) -> None:
    target = parse_target(url)
    assert (target.authority, target.path, target.secure) == (authority, path, True)


def test_an_operator_may_allow_addresses_inside_and_nothing_else_that_is_odd() -> None:
    assert parse_target("http://127.0.0.1:9000/x", allow_lan=True).port == 9000
    for url in ("file:///etc/passwd", "http://u@127.0.0.1/", "http://127.0.0.1/\r\nX: y"):
        with pytest.raises(WebhookNotAllowed):
            parse_target(url, allow_lan=True)


@pytest.mark.parametrize("inside", ["10.0.0.1", "::1", "::ffff:192.168.1.1", "169.254.169.254", "fd00::1", "0.0.0.0"])
def test_a_name_with_any_address_inside_is_refused(inside: str) -> None:
    target = parse_target("https://rebind.example.com/")
    assert not is_public(inside)
    assert resolve(target, lookup=lambda host, port: ["8.8.8.8"]) == "8.8.8.8"
    with pytest.raises(WebhookNotAllowed):
        resolve(target, lookup=lambda host, port: ["8.8.8.8", inside])


def test_a_name_is_looked_up_once() -> None:
    answers = [["8.8.8.8"], ["127.0.0.1"]]
    assert resolve(parse_target("https://rebind.example.com/"), lookup=lambda host, port: answers.pop(0)) == "8.8.8.8"
    assert len(answers) == 1
