import hashlib
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_core.adapter import load_adapter
from lora_core.config import LoraConfig
from lora_core.errors import (
    BadAdapter,
    BadConfig,
    BadHeader,
    KeyMismatch,
    LoraError,
    NonFinite,
    ShapeMismatch,
    UnknownAdapter,
)
from lora_core.gate import WEIGHTS_FILE
from lora_core.inject import adapter_layers, inject
from lora_core.live import LiveModel
from lora_core.merge import merge
from lora_core.mixed import SplitLayer, StackedLinear
from lora_core.qlora import quantise_base
from tests.lora_core.adapters import TOKENS, logits, make_peft_adapter
from tests.lora_core.recipes import randomize
from tests.tiny import make_base, randomize_adapter

SETTINGS = {
    "plain": {},
    "wide": {"r": 7, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "pattern": {"r": 3, "rank_pattern": {"down_proj": 1}, "target_modules": ["down_proj", "v_proj", "lm_head"]},
}
# Kinds of layers that are more than a product added to a matrix.
KINDS = {
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5, 8]},
}
ROWS = torch.stack([TOKENS[0], TOKENS[0].flip(0), TOKENS[0] + 1, TOKENS[0] + 2, TOKENS[0]])


def load(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@torch.no_grad()
def say(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens).logits.float()


def digest(model: torch.nn.Module) -> str:
    """Of names and bits of all that the model holds."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {name: make_peft_adapter(llama, folder / name, **more) for name, more in (SETTINGS | KINDS).items()}
    for seed, (name, path) in enumerate(made.items()):
        _restore_copies(
            randomize(path, seed=seed) if name in KINDS else randomize_adapter(path, seed=seed, scale=0.2), llama
        )
    return made


def _restore_copies(adapter: Path, base: Path) -> None:
    """PEFT stores matrices of the base with an adapter of input or output layer; they are the base's again."""
    weights, tensors = load_file(base / "model.safetensors"), load_file(adapter / WEIGHTS_FILE)
    for name in tensors:
        if name.endswith(".base_layer.weight"):
            tensors[name] = weights[name.removeprefix("base_model.model.").replace(".base_layer", "")]
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.fixture
def live(llama, adapters) -> LiveModel:
    live = LiveModel(load(llama))
    for name, path in adapters.items():
        live.load(name, path)
    return live


@pytest.mark.parametrize("name", [*SETTINGS, *KINDS])
def test_attached_and_merged_adapters_say_what_peft_says(live, llama, adapters, name):
    expected = logits(llama, adapters[name])
    assert (expected - logits(llama)).abs().max() > 0.01
    live.use(name)
    torch.testing.assert_close(say(live.model), expected, atol=2e-5, rtol=1e-4)
    live.merge(name)
    assert (live.active, live.how) == (name, "merged")
    torch.testing.assert_close(say(live.model), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"bias": "lora_only"}),
        ("qwen2", {"bias": "all", "target_modules": ["o_proj"]}),
        ("qwen2", {"lora_bias": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_biases_and_turned_weights_are_merged_too(tmp_path, family, settings):
    base = make_base(tmp_path / "base", family)
    adapter = randomize(make_peft_adapter(base, tmp_path / "lora", **settings))
    model = load(base)
    untouched = digest(model)
    live = LiveModel(model)
    live.load("a", adapter)
    expected = logits(base, adapter)
    for how in (live.use, live.merge, live.use):
        how("a")
        torch.testing.assert_close(say(model), expected, atol=5e-5, rtol=1e-4)
    with live.rows([None, "a"]):
        torch.testing.assert_close(say(model, TOKENS.repeat(2, 1))[1], expected[0], atol=5e-5, rtol=1e-4)
    live.merge("a")
    live.use(None)
    assert digest(model) == untouched


def test_after_any_switches_the_base_has_the_bits_it_had(live, llama):
    untouched, tensors = digest(load(llama)), dict(live.model.named_parameters())
    chance = random.Random(0)
    for _ in range(60):
        name, how = chance.choice(sorted(live.adapters)), chance.choice([live.use, live.merge])
        how(name)
        assert live.active == name
    live.use(None)
    assert digest(live.model) == untouched
    assert all(parameter is tensors[name] for name, parameter in live.model.named_parameters())
    assert torch.equal(say(live.model), logits(llama))


def test_a_merged_model_is_the_base_with_other_numbers(live):
    live.merge("plain")
    assert not adapter_layers(live.model)
    assert live.merge("saved") == ["lm_head"]  # replaced as a whole, not added to
    live.merge("wide")
    assert live.merge("plain") == []


def test_merged_weights_are_rounded_once(tmp_path):
    base = make_base(tmp_path / "base", dtype="bfloat16", hidden=64)
    adapter = randomize_adapter(make_peft_adapter(base, tmp_path / "lora"), seed=1)
    merge(base, adapter, tmp_path / "merged")
    exact = load_file(tmp_path / "merged" / "model.safetensors")
    live = LiveModel(AutoModelForCausalLM.from_pretrained(base, dtype="auto"))
    live.load("a", adapter)
    live.merge("a")
    different = 0
    for name, parameter in live.model.named_parameters():
        different += int((parameter != exact[name]).sum())
    assert different < 10  # of 60 000: where a sum in float32 lies on the other side of a half


def test_merging_a_tied_output_layer_leaves_the_embedding_alone(tmp_path):
    base = make_base(tmp_path / "base", tie=True)
    adapter = make_peft_adapter(base, tmp_path / "lora", target_modules=["lm_head"])
    weights, tensors = load_file(base / "model.safetensors"), load_file(adapter / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.base_layer.weight"] = weights["model.embed_tokens.weight"]
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"format": "pt"})
    live = LiveModel(load(base))
    live.load("a", adapter)
    live.merge("a")
    torch.testing.assert_close(say(live.model), logits(base, adapter), atol=2e-5, rtol=1e-4)
    assert torch.equal(live.model.get_input_embeddings().weight, weights["model.embed_tokens.weight"])


def test_a_base_in_4_bits_takes_adapters_merged_attached_and_mixed(tmp_path):
    base = make_base(tmp_path / "base", hidden=64)
    adapter = randomize_adapter(make_peft_adapter(base, tmp_path / "lora"), scale=0.3)
    model, other = load(base), load(base)
    for either in (model, other):
        quantise_base(either)
    untouched = say(model)
    load_adapter(other, adapter)
    expected = say(other)
    live = LiveModel(model)
    live.load("a", adapter)
    live.merge("a")
    torch.testing.assert_close(say(model), expected, atol=2e-5, rtol=1e-4)
    live.use("a")
    assert torch.equal(say(model), expected)
    with live.rows([None, "a"]):
        mixed = say(model, TOKENS.repeat(2, 1))
    torch.testing.assert_close(mixed, torch.cat([untouched, expected]), atol=2e-5, rtol=1e-4)
    live.use(None)
    assert torch.equal(say(model), untouched)


@pytest.mark.parametrize("how", ["use", "merge"])
def test_loading_and_dropping_others_does_not_disturb_the_one_at_work(live, adapters, how):
    getattr(live, how)("wide")
    before = say(live.model)
    live.drop("plain")
    live.load("again", adapters["plain"])
    assert (live.active, live.how) == ("wide", "attached" if how == "use" else "merged")
    assert torch.equal(say(live.model), before)


@pytest.mark.parametrize("how", ["use", "merge"])
def test_numbers_are_replaced_in_place_and_other_adapters_as_a_whole(live, llama, adapters, tmp_path, how):
    memory = pointers(live, "plain")
    getattr(live, how)("plain")
    for seed in (7, 8, 9):
        other = randomize_adapter(make_peft_adapter(llama, tmp_path / str(seed)), seed=seed)
        live.replace("plain", other)
        assert (live.active, live.how) == ("plain", "attached" if how == "use" else "merged")
        torch.testing.assert_close(say(live.model), logits(llama, other), atol=2e-5, rtol=1e-4)
        assert (how == "merge") is not bool(adapter_layers(live.model))
    assert memory.isdisjoint(pointers(live, "plain"))
    live.replace("plain", adapters["plain"])
    assert memory == pointers(live, "plain")  # turn and turn about
    for name in ("wide", "dora"):
        live.replace("plain", adapters[name])
        torch.testing.assert_close(say(live.model), logits(llama, adapters[name]), atol=2e-5, rtol=1e-4)


def pointers(live: LiveModel, name: str) -> set[int]:
    live.use(name)
    layers = adapter_layers(live.model).values()
    return {tensor.data_ptr() for layer in layers for tensor in layer.adapter_tensors().values()}


@pytest.mark.parametrize("content", [0.0, float("nan")])
def test_a_refused_replacement_leaves_the_one_before(live, llama, tmp_path, content):
    live.use("plain")
    before = say(live.model)
    adapter = make_peft_adapter(llama, tmp_path / "lora")
    tensors = {name: torch.full_like(tensor, content) for name, tensor in load_file(adapter / WEIGHTS_FILE).items()}
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(LoraError):
            live.replace("plain", adapter)
        assert torch.equal(say(live.model), before)
    with pytest.raises(LoraError):
        live.replace("plain", tmp_path)
    assert torch.equal(say(live.model), before)


def test_a_replacement_that_has_more_bytes_than_its_header_says_is_refused(live, llama, adapters, tmp_path):
    live.use("plain")
    adapter = randomize_adapter(make_peft_adapter(llama, tmp_path / "lora"), seed=7)
    live.replace("plain", adapter)
    with (adapter / WEIGHTS_FILE).open("ab") as file:
        file.write(bytes(8))
    with pytest.raises(BadHeader, match="bytes"):
        live.replace("plain", adapter)


def test_a_replacement_that_holds_another_bases_matrix_is_refused(live, llama, adapters, tmp_path):
    adapter = make_peft_adapter(llama, tmp_path / "lora", **SETTINGS["pattern"])
    before = live.adapters["pattern"]
    with pytest.raises(BadAdapter, match="another base"):  # random numbers in the place of the copy, too
        live.replace("pattern", randomize(adapter, seed=5))
    assert live.adapters["pattern"] == before
    _restore_copies(adapter, llama)
    live.replace("pattern", adapter)


def test_nothing_changes_under_a_mixed_batch(live, adapters):
    with live.rows(["plain", "wide", None, "plain", "wide"]):
        before = say(live.model, ROWS)
        for change in (
            lambda: live.use("wide"),
            lambda: live.merge("wide"),
            lambda: live.load("new", adapters["plain"]),
            lambda: live.replace("wide", adapters["plain"]),
        ):
            with pytest.raises(BadConfig, match="block"):
                change()
        assert torch.equal(say(live.model, ROWS), before)
    live.use("wide")


def test_dropping_the_one_at_work_gives_the_base_back(live, llama):
    live.merge("plain")
    live.drop("plain")
    assert live.active is None
    assert torch.equal(say(live.model), logits(llama))


def test_buffers_are_counted_and_can_be_freed(live, llama, adapters):
    assert live.buffer_bytes == 0
    live.merge("plain")
    assert live.buffer_bytes == 4 * 2 * (32 * 32 + 16 * 32)  # q_proj and v_proj of two layers
    expected = say(live.model)
    live.free_buffers()
    assert (live.buffer_bytes, live.how) == (0, "attached")
    torch.testing.assert_close(say(live.model), expected, atol=2e-5, rtol=1e-4)


def test_an_adapter_that_is_refused_changes_nothing(live, tmp_path, llama):
    wide = make_base(tmp_path / "wide", hidden=64)
    live.use("plain")
    before = say(live.model)
    with pytest.raises(ShapeMismatch):
        live.load("wrong", make_peft_adapter(wide, tmp_path / "wrong"))
    deep = make_base(tmp_path / "deep", layers=3)
    with pytest.raises(KeyMismatch):
        live.load("wrong", make_peft_adapter(deep, tmp_path / "other"))
    assert "wrong" not in live.adapters
    assert torch.equal(say(live.model), before)


def test_names_are_unique_and_known(live, adapters, llama):
    with pytest.raises(BadConfig, match="already"):
        live.load("plain", adapters["plain"])
    for call in (live.use, live.merge, live.drop):
        with pytest.raises(UnknownAdapter, match="nobody"):
            call("nobody")
    with pytest.raises(UnknownAdapter, match="nobody"), live.rows(["plain", "nobody"]):
        pass
    adapted = load(llama)
    inject(adapted, LoraConfig(), seed=0)
    with pytest.raises(BadConfig, match="eject"):
        LiveModel(adapted)


def test_a_sum_too_large_for_float16_is_refused_and_leaves_the_base(tmp_path, llama):
    adapter = randomize_adapter(make_peft_adapter(llama, tmp_path / "lora"), scale=1e3)
    model = load(llama).half()
    before = digest(model)
    live = LiveModel(model)
    live.load("huge", adapter)
    with pytest.raises(NonFinite, match="q_proj"):
        live.merge("huge")
    assert live.active is None
    assert digest(model) == before


@pytest.mark.parametrize("content", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused_on_loading(live, tmp_path, llama, content):
    adapter = make_peft_adapter(llama, tmp_path / "lora")
    tensors = load_file(adapter / WEIGHTS_FILE)
    tensors[sorted(tensors)[1]][1, 2] = content
    save_file(tensors, adapter / WEIGHTS_FILE)
    with pytest.raises(NonFinite, match="lora_B"):
        live.load("nan", adapter)


def test_large_numbers_whose_sum_overflows_are_fine(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "lora")
    tensors = {name: torch.full_like(tensor, 1e38) for name, tensor in load_file(adapter / WEIGHTS_FILE).items()}
    save_file(tensors, adapter / WEIGHTS_FILE)
    load_adapter(load(llama), adapter)


def test_each_row_of_a_mixed_batch_is_what_its_adapter_says_alone(live):
    names = ["plain", None, "pattern", "wide", "plain"]
    with live.rows(names):
        mixed = say(live.model, ROWS)
        kinds = {type(module) for module in live.model.modules()}
    assert StackedLinear in kinds
    assert SplitLayer not in kinds
    for row, name in enumerate(names):
        live.use(name)
        torch.testing.assert_close(mixed[row], say(live.model, ROWS[row : row + 1])[0], atol=2e-5, rtol=1e-4)


def test_a_mixed_batch_is_what_peft_makes_of_it(live, llama, adapters):
    import peft

    theirs = peft.PeftModel.from_pretrained(load(llama), adapters["plain"], adapter_name="plain")
    theirs.load_adapter(adapters["wide"], adapter_name="wide")
    names = ["wide", "plain", "__base__", "plain", "wide"]
    with torch.no_grad():
        expected = theirs.eval()(ROWS, adapter_names=names).logits
    with live.rows([None if name == "__base__" else name for name in names]):
        torch.testing.assert_close(say(live.model, ROWS), expected, atol=2e-5, rtol=1e-4)


def test_every_kind_of_layer_can_be_mixed(live):
    names = [*KINDS, None]
    with live.rows(names):
        mixed = say(live.model, ROWS)
    for row, name in enumerate(names):
        live.use(name)
        torch.testing.assert_close(mixed[row], say(live.model, ROWS[row : row + 1])[0], atol=2e-5, rtol=1e-4)


def test_many_ranks_are_done_adapter_by_adapter(tmp_path, llama):
    live = LiveModel(load(llama))
    for seed, name in enumerate("ab"):
        adapter = make_peft_adapter(llama, tmp_path / name, r=300, target_modules=["v_proj"])
        live.load(name, randomize_adapter(adapter, seed=seed, scale=0.02))
    with live.rows(["a", "b", "a", None, "b"]):
        mixed = say(live.model, ROWS)
        assert any(isinstance(module, SplitLayer) for module in live.model.modules())
    live.use("b")
    torch.testing.assert_close(mixed[1], say(live.model, ROWS[1:2])[0], atol=2e-5, rtol=1e-4)


def test_one_rows_overflow_stays_in_that_row(tmp_path, llama, live):
    adapter = randomize_adapter(make_peft_adapter(llama, tmp_path / "huge"), scale=5e37)
    live.load("huge", adapter)
    with live.rows(["plain", "huge", None]):
        mixed = say(live.model, ROWS[:3])
    assert not torch.isfinite(mixed[1]).all()
    live.use("plain")
    torch.testing.assert_close(mixed[0], say(live.model, ROWS[:1])[0], atol=2e-5, rtol=1e-4)
    live.use(None)
    torch.testing.assert_close(mixed[2], say(live.model, ROWS[2:3])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("names", [["plain"], ["plain", "wide", None], ["dora", "saved"]])
def test_another_number_of_rows_is_refused(live, names):
    with live.rows(names), pytest.raises(ShapeMismatch, match=f"{len(names)} rows"):
        say(live.model, ROWS)


@pytest.mark.parametrize(
    ("family", "settings", "layer"),
    [
        ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}, "experts"),
        ("qwen2_moe", {"target_modules": ["shared_expert.up_proj"]}, "shared_expert"),
    ],
)
def test_a_layer_whose_input_is_not_in_rows_is_refused_by_name(tmp_path, family, settings, layer):
    base = make_base(tmp_path / "base", family)
    live = LiveModel(load(base))
    live.load("a", randomize_adapter(make_peft_adapter(base, tmp_path / "lora", **settings)))
    with live.rows(["a", None]), pytest.raises((ShapeMismatch, BadConfig), match=layer):
        say(live.model, ROWS[:2])


@pytest.mark.parametrize("how", ["use", "merge"])
def test_after_a_mixed_batch_the_one_before_is_at_work_again(live, how):
    getattr(live, how)("wide")
    before = say(live.model)
    with pytest.raises(RuntimeError, match="stop"), live.rows(["plain"]):
        raise RuntimeError("stop")
    assert (live.active, live.how) == ("wide", "attached" if how == "use" else "merged")
    assert torch.equal(say(live.model), before)


def test_rows_generate_what_each_would_generate_alone(live):
    names = ["plain", "wide", None, "pattern"]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    prompts = ROWS[:4, :9]
    with live.rows(names):
        together = live.model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    alone = []
    for row, name in enumerate(names):
        live.use(name)
        prompt = prompts[row : row + 1]
        alone.append(live.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row.tolist()) for row in together[:, 9:]}) == 4


def test_errors_of_loading_are_of_this_library(live, tmp_path):
    with pytest.raises(LoraError):
        live.load("nothing", tmp_path)
