import hashlib

from lora_core.digest import folder_digest


def test_a_folder_digest_is_of_sorted_lines_whatever_the_order_of_the_files():
    files = {"a": "3" * 64, "b": "2" * 64}
    lines = f"{'2' * 64}  b\n{'3' * 64}  a\n".encode()
    assert folder_digest(files) == folder_digest(dict(reversed(files.items()))) == hashlib.sha256(lines).hexdigest()
