"""What `lora_core.launch` understands on its command line."""

import pytest

from lora_core.errors import BadConfig
from lora_core.launch_options import lora_config, parse_options, train_config

FOLDERS = ["--base", "models/base", "--rows", "rows.jsonl", "--out", "adapter"]


def test_settings_are_json_or_text() -> None:
    given = ('target_modules=["q_proj"]', 'trainable_token_indices={"": [3]}', "bias=all", "use_rslora=true")
    found = lora_config(parse_options([*FOLDERS, *(part for setting in given for part in ("--lora", setting))]))
    assert (found.target_modules, found.trainable_token_indices) == (("q_proj",), {"": (3,)})
    assert (found.bias, found.use_rslora, found.base_model_name_or_path) == ("all", True, "base")


def test_an_unknown_setting_is_named_with_those_there_are() -> None:
    with pytest.raises(BadConfig, match=r"no setting sharding; these are: .*tokens_per_batch"):
        train_config(parse_options([*FOLDERS, "--train", "sharding=full"]))


@pytest.mark.parametrize("wrong", [["--lora", "r"], ["--sharding", "half"], ["--save-steps", "0"]])
def test_what_is_not_understood_ends_with_the_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options([*FOLDERS, *wrong])
    assert wrong[0] in capsys.readouterr().err
