"""What the merging child measured, on its way to the report."""

from pathlib import Path

import pytest

from lora_core.merge import TensorReport
from worker.certificate import CERTIFICATE_FILE, read_certificate, write_certificate
from worker.errors import JobFailed

TENSOR = TensorReport("lm_head.weight", relative_delta=0.1, rounding_loss=0.01, cosine=0.99, changed_share=1.0)


@pytest.mark.parametrize(("changes", "untied"), [({"tie_word_embeddings": False}, True), ({"vocab_size": 9}, False)])
def test_what_was_written_is_read(tmp_path: Path, changes: dict[str, object], untied: bool) -> None:
    write_certificate(tmp_path, [TENSOR], changes)
    numbers = {"relative_delta": 0.1, "rounding_loss": 0.01, "cosine": 0.99, "changed_share": 1.0}
    expected = {"tensors": [{"name": "lm_head.weight", **numbers}], "untied": untied, "unmatched_keys": 0}
    assert read_certificate(tmp_path) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"tensors": []}',
        '{"tensors": [], "untied": false, "live": true}',
        '{"untied": false, "tensors": [{"name": "x", "relative_delta": NaN, "rounding_loss": 0, "cosine": 0, '
        '"changed_share": 0}]}',
    ],
)
def test_what_is_no_certificate_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CERTIFICATE_FILE).write_text(text)
    with pytest.raises(JobFailed, match="certificate"):
        read_certificate(tmp_path)


def test_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="no certificate"):
        read_certificate(tmp_path)
    (tmp_path / CERTIFICATE_FILE).symlink_to("/etc/hostname")
    with pytest.raises(JobFailed, match="no certificate"):
        read_certificate(tmp_path)
