import json
import math

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from lora_core.config import LoraConfig, match_targets
from lora_core.errors import BadConfig, UnknownTargetModules

PATHS = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
] + ["lm_head"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 1025),
        ("r", True),
        ("r", 8.0),
        ("r", "8"),
        ("lora_alpha", 0),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", True),
        ("lora_dropout", 1),
        ("lora_dropout", -0.1),
        ("lora_dropout", math.nan),
        ("target_modules", ()),
        ("target_modules", "q_proj"),
        ("target_modules", ("q_proj.*",)),
        ("target_modules", ("",)),
        ("target_modules", (1,)),
        ("use_rslora", 1),
        ("fan_in_fan_out", None),
        ("bias", "some"),
        ("lora_bias", 1),
        ("modules_to_save", ["lm_head"]),
        ("modules_to_save", ("lm_head.*",)),
        ("exclude_modules", "q_proj"),
        ("layers_to_transform", (-1,)),
        ("layers_to_transform", ("1",)),
        ("layers_pattern", ("(",)),
        ("trainable_token_indices", (1, 2)),
        ("trainable_token_indices", {"wte": ()}),
        ("trainable_token_indices", {"wte": (1, 1)}),
        ("trainable_token_indices", {"wte": (-1,)}),
        ("trainable_token_indices", {"": (1,), "wte": (1,)}),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", False),
        ("task_type", "POETRY"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"^q_proj": 4}),
        ("alpha_pattern", {"q_proj": math.inf}),
        ("base_model_name_or_path", "a\nb"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(BadConfig, match=field):
        LoraConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 1]]),
        ("exclude_modules", ".*q_proj"),
        ("rank_pattern", {"q_proj": 2, "a.q_proj": 3}),
        ("something_new", 1),
        ("init_lora_weights", "pissa"),
        ("peft_type", "ADALORA"),
        ("target_modules", ".*q_proj"),
    ],
)
def test_peft_features_that_change_the_arithmetic_are_refused_by_name(field, value):
    document = json.loads(LoraConfig(target_modules=("q_proj",)).to_peft_json()) | {field: value}
    with pytest.raises(BadConfig, match=field):
        LoraConfig.from_peft_json(json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"r": 1, "r": 2}', b"\xff", b'{"r": NaN}', b"[" * 100_000])
def test_a_malformed_config_file_is_a_bad_config(data):
    with pytest.raises(BadConfig):
        LoraConfig.from_peft_json(data)


@pytest.mark.parametrize("name", ["r", "lora_alpha", "target_modules"])
def test_a_config_file_without_a_required_field_is_refused(name):
    document = json.loads(LoraConfig(target_modules=("q_proj",)).to_peft_json())
    del document[name]
    with pytest.raises(BadConfig, match=name):
        LoraConfig.from_peft_json(json.dumps(document).encode())


def test_json_round_trip_keeps_everything():
    config = LoraConfig(
        r=3,
        lora_alpha=7.5,
        lora_dropout=0.1,
        target_modules=("v_proj", "q_proj"),
        use_rslora=True,
        rank_pattern={"v_proj": 5, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"q_proj": 9},
        init_lora_weights="gaussian",
        exclude_modules=("lm_head",),
        layers_to_transform=(3, 1),
        layers_pattern=("layers",),
        bias="lora_only",
        lora_bias=True,
        modules_to_save=("score",),
        trainable_token_indices={"embed_tokens": (5, 3), "lm_head": (4,)},
        task_type="SEQ_CLS",
        base_model_name_or_path="org/base",
        revision="0" * 40,
    )
    assert LoraConfig.from_peft_json(config.to_peft_json()) == config


def test_rows_of_the_input_embedding_are_written_as_a_list_as_in_peft():
    config = LoraConfig(trainable_token_indices={"": (5, 3)})
    assert json.loads(config.to_peft_json())["trainable_token_indices"] == [5, 3]
    assert LoraConfig.from_peft_json(config.to_peft_json()) == config


def test_equal_configs_give_equal_bytes_in_any_order_of_their_fields():
    first = LoraConfig(target_modules=("a", "b"), rank_pattern={"a": 1, "b": 2})
    second = LoraConfig(target_modules=("b", "a"), rank_pattern={"b": 2, "a": 1})
    assert first.to_peft_json() == second.to_peft_json()


def test_peft_reads_what_we_write_and_we_read_what_peft_writes(tmp_path):
    ours = LoraConfig(r=5, lora_alpha=11, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 2})
    (tmp_path / "adapter_config.json").write_bytes(ours.to_peft_json())
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    assert (theirs.r, theirs.lora_alpha, theirs.rank_pattern) == (5, 11, {"v_proj": 2})
    theirs.save_pretrained(tmp_path)
    assert LoraConfig.from_peft_json((tmp_path / "adapter_config.json").read_bytes()) == ours


def test_scaling_follows_patterns_and_rank_stabilisation():
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"v_proj": 16}, alpha_pattern={"layers.0.self_attn.q_proj": 2})
    assert config.scaling_for("model.layers.1.self_attn.q_proj") == 2
    assert config.scaling_for("model.layers.0.self_attn.q_proj") == 0.5
    assert config.scaling_for("model.layers.0.self_attn.v_proj") == 0.5
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling_for("x") == 2


def test_a_suffix_matches_at_dots_only():
    assert match_targets(LoraConfig(target_modules=("layers.1.self_attn.q_proj",)), PATHS) == [
        "model.layers.1.self_attn.q_proj"
    ]


def test_all_linear_leaves_the_output_layer_out():
    assert match_targets(LoraConfig(), PATHS) == sorted(PATHS[:-1])


def test_modules_that_are_excluded_or_saved_whole_are_no_targets():
    spared = LoraConfig(target_modules=("q_proj", "v_proj"), exclude_modules=("layers.1.self_attn.q_proj", "v_proj"))
    assert match_targets(spared, PATHS) == ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj"]
    whole = LoraConfig(target_modules=("q_proj", "down_proj"), modules_to_save=("mlp", "lm_head"))
    assert match_targets(whole, PATHS) == [name for name in sorted(PATHS) if name.endswith("q_proj")]


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj", "down_proj")])
@pytest.mark.parametrize("pattern", [(), ("layers",), ("h", "layers")])
def test_layers_to_transform_counts_the_first_number_of_a_path(targets, pattern):
    config = LoraConfig(target_modules=targets, layers_to_transform=(1, 11), layers_pattern=pattern)
    expected = [name for name in sorted(PATHS) if ".1." in name or ".11." in name]
    assert match_targets(config, [*PATHS]) == expected


def test_a_whole_path_is_meant_whatever_its_layer():
    path = "model.layers.0.self_attn.q_proj"
    assert match_targets(LoraConfig(target_modules=(path,), layers_to_transform=(1,)), PATHS) == [path]


@pytest.mark.parametrize(
    ("last_names", "expected"),
    [
        (["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["query", "key", "value", "dense"], ["query", "value"]),
        (["q", "k", "v", "o", "wi"], ["q", "v"]),
        (["c_attn", "c_proj", "c_fc"], ["c_attn"]),
        (["query_key_value", "dense"], ["query_key_value"]),
    ],
)
def test_the_papers_preset_is_query_and_value_as_the_family_calls_them(last_names, expected):
    assert match_targets(LoraConfig(target_modules="paper"), last_names) == expected


def test_the_papers_preset_needs_projections_that_it_knows():
    with pytest.raises(UnknownTargetModules, match="paper"):
        match_targets(LoraConfig(target_modules="paper"), ["wide", "narrow"])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("q_proj", "mlp.down_proj")},
        {"target_modules": ("proj",)},
        {"target_modules": ("q_proj", "v_proj"), "exclude_modules": ("layers.1.self_attn.q_proj", "lm_head")},
        {"target_modules": ("q_proj", "down_proj"), "modules_to_save": ("layers.1.mlp",)},
        {"target_modules": ("lm_head", "q_proj"), "layers_to_transform": (1,)},
        {"target_modules": ("q_proj", "model.layers.0.self_attn.v_proj"), "layers_to_transform": (1, 11)},
        {"target_modules": ("q_proj",), "layers_to_transform": (1,), "layers_pattern": ("layer", "layers")},
        {"target_modules": ("q_proj",), "layers_to_transform": (1,), "layers_pattern": ("blocks",)},
    ],
)
def test_names_mean_what_they_mean_to_peft(settings):
    given = {name: list(value) for name, value in settings.items()}
    theirs = peft.LoraConfig(**given)
    expected = [path for path in sorted(PATHS) if check_target_module_exists(theirs, path) is True]
    try:
        found = match_targets(LoraConfig(**settings), PATHS)
    except UnknownTargetModules:
        found = []
    assert found == expected


def test_an_unknown_target_says_what_exists():
    with pytest.raises(UnknownTargetModules, match="query") as caught:
        match_targets(LoraConfig(target_modules=("q_proj", "query")), PATHS)
    assert caught.value.details == {
        "unknown": ["query"],
        "available": ["down_proj", "lm_head", "q_proj", "v_proj"],
    }
