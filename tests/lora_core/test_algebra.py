import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_core.algebra import combine, scale, truncate
from lora_core.errors import BadAdapter, BadConfig, DifferentBases, LoraError, ShapeMismatch
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE
from lora_core.lowrank import Decomposition, subspace_similarity
from lora_core.sparsify import PRUNED, joined
from tests.lora_core.adapters import make_peft_adapter
from tests.tiny import make_base, randomize_adapter

Deltas = dict[str, torch.Tensor]


def adapter(base: Path, directory: Path, *, seed: int, **settings: Any) -> Path:
    return randomize_adapter(make_peft_adapter(base, directory, **settings), seed=seed, scale=0.3)


def peft_model(base: Path, *adapters: Path) -> Any:
    """PEFT with the adapters under the names "0", "1", …"""
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="0", low_cpu_mem_usage=True
    )
    for number, directory in enumerate(adapters[1:], start=1):
        model.load_adapter(directory, adapter_name=str(number))
    return model


def deltas(model: Any, name: str) -> Deltas:
    """What PEFT adds to each weight."""
    return {
        path: module.get_delta_weight(name).detach()
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and name in {*module.lora_A, *module.lora_embedding_A}
    }


def read_deltas(base: Path, directory: Path) -> Deltas:
    return deltas(peft_model(base, directory), "0")


def assert_equal(ours: Deltas, theirs: Deltas) -> None:
    assert ours.keys() == theirs.keys()
    for path, delta in ours.items():
        torch.testing.assert_close(delta, theirs[path], atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def trio(llama, tmp_path_factory) -> list[Path]:
    """Three adapters of rank 4 and different scalings on the same modules."""
    folder = tmp_path_factory.mktemp("trio")
    settings = [{}, {"lora_alpha": 2, "use_rslora": True}, {"alpha_pattern": {"v_proj": 3}}]
    return [adapter(llama, folder / str(n), seed=n, **more) for n, more in enumerate(settings)]


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("method", ["cat", "svd", *PRUNED])
def test_a_combination_is_what_peft_makes_of_the_same_adapters(tmp_path, llama, trio, method, density):
    prunes = method not in ("cat", "svd", "linear")
    if density < 1 and (not prunes or method.startswith("dare")):
        return  # nothing to prune, or by random numbers of another generator
    weights = [0.7, -1.3, 0.5]
    combine(trio, tmp_path / "out", method, weights=weights, density=density)
    theirs = peft_model(llama, *trio)
    theirs.add_weighted_adapter(["0", "1", "2"], weights, "sum", combination_type=method, density=density)
    assert_equal(read_deltas(llama, tmp_path / "out"), deltas(theirs, "sum"))


def test_different_ranks_and_modules_add_up(tmp_path, llama):
    parts = [
        adapter(llama, tmp_path / "a", seed=1, r=3, target_modules=["q_proj", "up_proj"]),
        adapter(llama, tmp_path / "b", seed=2, r=5, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"]),
        adapter(llama, tmp_path / "c", seed=3, layers_to_transform=[1], target_modules=["v_proj", "lm_head"]),
    ]
    weights = [1.0, -0.5, 2.0]
    expected: Deltas = {}
    for weight, part in zip(weights, parts, strict=True):
        for path, delta in read_deltas(llama, part).items():
            expected[path] = expected.get(path, torch.zeros_like(delta)) + weight * delta
    reports = combine(parts, tmp_path / "cat", "cat", weights=weights)
    assert_equal(read_deltas(llama, tmp_path / "cat"), expected)
    assert {report.path.rpartition(".")[2]: report.rank for report in reports if "layers.1" in report.path} == {
        "q_proj": 8,
        "up_proj": 3,
        "v_proj": 6,
    }
    assert all(report.retained_energy == 1 for report in reports)
    reports = combine(parts, tmp_path / "svd", "svd", weights=weights, rank=4)
    for path, delta in read_deltas(llama, tmp_path / "svd").items():
        left, sigma, right = torch.linalg.svd(expected[path])
        torch.testing.assert_close(delta, left[:, :4] * sigma[:4] @ right[:4], atol=2e-5, rtol=1e-4)
        report = next(report for report in reports if path.endswith(report.path))
        share = (sigma[:4].square().sum() / sigma.square().sum()).item()
        assert report.retained_energy == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("factor", [2.5, -0.3])
def test_scaling_keeps_the_numbers_of_the_factors(tmp_path, llama, trio, factor):
    scale(trio[2], tmp_path / "out", factor)
    expected = {path: factor * delta for path, delta in read_deltas(llama, trio[2]).items()}
    assert_equal(read_deltas(llama, tmp_path / "out"), expected)
    before, after = (load_file(folder / WEIGHTS_FILE) for folder in (trio[2], tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].abs(), before[name].abs()) for name in before)


def test_truncating_gives_the_best_product_of_the_rank_and_says_what_it_kept(tmp_path, llama, trio):
    reports = truncate(trio[1], tmp_path / "out", rank=2)
    expected, found = read_deltas(llama, trio[1]), read_deltas(llama, tmp_path / "out")
    assert expected.keys() == found.keys()
    for report in reports:
        path = f"base_model.model.{report.path}"
        left, sigma, right = torch.linalg.svd(expected[path])
        torch.testing.assert_close(found[path], left[:, :2] * sigma[:2] @ right[:2], atol=2e-5, rtol=1e-4)
        kept = 1 - (expected[path] - found[path]).square().sum() / expected[path].square().sum()
        assert (report.rank_before, report.rank) == (4, 2)
        assert report.retained_energy == pytest.approx(kept.item(), abs=1e-5)


def test_truncating_to_an_energy_takes_the_least_rank_that_keeps_it(tmp_path, llama, trio):
    reports = truncate(trio[1], tmp_path / "out", energy=0.8)
    expected = read_deltas(llama, trio[1])
    assert len({report.rank for report in reports}) > 1
    for report in reports:
        energies = torch.linalg.svdvals(expected[f"base_model.model.{report.path}"]).square().cumsum(0)
        shares = energies / energies[-1]
        assert report.rank == int((shares < 0.8).sum()) + 1
    assert read_deltas(llama, tmp_path / "out").keys() == expected.keys()


def test_a_truncation_that_cuts_nothing_keeps_the_bytes(tmp_path, trio):
    truncate(trio[0], tmp_path / "out", rank=4)
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (trio[0] / WEIGHTS_FILE).read_bytes()


def test_equal_calls_give_equal_bytes_and_dare_another_adapter_for_another_seed(tmp_path, trio):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        combine(trio, tmp_path / name, "dare_linear", density=0.5, seed=seed)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / WEIGHTS_FILE).read_bytes() != (tmp_path / "other" / WEIGHTS_FILE).read_bytes()


def test_dare_keeps_a_share_at_random_and_scales_it_up():
    ones = np.ones((200, 200))
    pruned = joined("dare_linear", [ones], [1.0], density=0.25, seed="x")
    assert set(np.unique(pruned)) == {0.0, 4.0}
    assert (pruned != 0).mean() == pytest.approx(0.25, abs=0.01)
    both = joined("dare_linear", [ones, ones], [1.0, 1.0], density=0.25, seed="x")
    assert {0.0, 4.0, 8.0} == set(np.unique(both))  # each by its own mask


def test_convolutions_and_embeddings_are_matrices_too(tmp_path, llama):
    parts = [
        adapter(llama, tmp_path / name, seed=seed, target_modules=["embed_tokens", "q_proj"])
        for name, seed in (("a", 1), ("b", 2))
    ]
    for part in parts:  # the copy of the base's matrix is random now; as PEFT wrote it, it is the base's
        path = part / WEIGHTS_FILE
        tensors = load_file(path)
        tensors["base_model.model.model.embed_tokens.base_layer.weight"] = load_file(llama / "model.safetensors")[
            "model.embed_tokens.weight"
        ]
        save_file(tensors, path, metadata={"format": "pt"})
    one, two = (read_deltas(llama, part) for part in parts)
    combine(parts, tmp_path / "cat", "cat")
    assert_equal(read_deltas(llama, tmp_path / "cat"), {path: one[path] + two[path] for path in one})
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "cat" / WEIGHTS_FILE)
    other = parts[1] / WEIGHTS_FILE
    save_file({name: tensor + 1 for name, tensor in load_file(other).items()}, other, metadata={"format": "pt"})
    with pytest.raises(DifferentBases, match="base_layer"):
        combine(parts, tmp_path / "refused", "cat")


def test_convolutions_are_truncated_like_their_flattened_product(tmp_path):
    base = torch.nn.Sequential(torch.nn.Conv2d(6, 10, 3))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "a")
    randomize_adapter(tmp_path / "a", seed=1)
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    truncate(tmp_path / "a", tmp_path / "out", rank=2)
    cut = load_file(tmp_path / "out" / WEIGHTS_FILE)
    lora_A, lora_B = cut["base_model.model.0.lora_A.weight"], cut["base_model.model.0.lora_B.weight"]
    assert (lora_A.shape, lora_B.shape) == ((2, 6, 3, 3), (10, 2, 1, 1))
    whole = 2 * (
        tensors["base_model.model.0.lora_B.weight"][:, :, 0, 0] @ tensors["base_model.model.0.lora_A.weight"].flatten(1)
    )
    left, sigma, right = torch.linalg.svd(whole)
    torch.testing.assert_close(lora_B[:, :, 0, 0] @ lora_A.flatten(1), left[:, :2] * sigma[:2] @ right[:2])


def test_adalora_becomes_plain_lora(tmp_path, llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    config = peft.AdaLoraConfig(init_r=5, lora_alpha=7, target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    randomize_adapter(tmp_path / "a", seed=4, scale=0.5)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "a")
    expected = {
        path: module.get_delta_weight("default").detach()
        for path, module in theirs.named_modules()
        if hasattr(module, "lora_E")
    }
    combine([tmp_path / "a"], tmp_path / "out", "cat")
    assert_equal(read_deltas(llama, tmp_path / "out"), expected)


def test_adapters_of_different_bases_are_refused_unless_it_is_said_which_it_is(tmp_path, llama, trio):
    copy = make_base(tmp_path / "copy")
    stranger = adapter(copy, tmp_path / "stranger", seed=9)
    with pytest.raises(DifferentBases, match="base model"):
        combine([trio[0], stranger], tmp_path / "out", "cat")
    combine([trio[0], stranger], tmp_path / "out", "cat", base="tiny")
    assert '"base_model_name_or_path": "tiny"' in (tmp_path / "out" / CONFIG_FILE).read_text()


def test_other_shapes_are_refused_by_name(tmp_path, trio):
    wide = make_base(tmp_path / "wide", hidden=64)
    stranger = adapter(wide, tmp_path / "stranger", seed=9)
    with pytest.raises(ShapeMismatch, match=r"layers\.0\.self_attn\.q_proj"):
        combine([trio[0], stranger], tmp_path / "out", "cat", base="x")
    assert not (tmp_path / "out").exists()


def test_sums_of_factors_want_equal_ranks(tmp_path, llama, trio):
    other = adapter(llama, tmp_path / "other", seed=1, r=2)
    with pytest.raises(ShapeMismatch, match="ranks"):
        combine([trio[0], other], tmp_path / "out", "ties")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["mlp.up_proj.weight"]},
    ],
)
def test_what_is_more_than_factors_is_refused_by_name(tmp_path, llama, settings):
    part = make_peft_adapter(llama, tmp_path / "a", **settings)
    with pytest.raises(LoraError) as refusal:
        scale(part, tmp_path / "out", 2.0)
    assert isinstance(refusal.value, BadAdapter)
    assert not (tmp_path / "out").exists()


def test_a_result_that_changes_nothing_is_refused(tmp_path, trio):
    with pytest.raises(BadAdapter, match="nothing"):
        combine([trio[0], trio[0]], tmp_path / "out", "linear", weights=[1.0, -1.0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "average"},
        {"method": "cat", "weights": [1.0]},
        {"method": "cat", "weights": [1.0, 0.0, 1.0]},
        {"method": "cat", "weights": [1.0, math.nan, 1.0]},
        {"method": "cat", "rank": 3},
        {"method": "svd", "rank": 0},
        {"method": "svd", "density": 0.5},
        {"method": "ties", "density": 0.0},
    ],
)
def test_a_request_that_makes_no_sense_is_refused(tmp_path, trio, arguments):
    with pytest.raises(BadConfig):
        combine(trio, tmp_path / "out", **arguments)


def test_singular_values_of_a_product_are_those_of_the_dense_matrix():
    random = np.random.default_rng(0)
    lora_B, lora_A = random.standard_normal((40, 7)), random.standard_normal((7, 30))
    parts = Decomposition.of_product(lora_B, lora_A)
    np.testing.assert_allclose(parts.sigma, np.linalg.svd(lora_B @ lora_A)[1][:7], rtol=1e-10)
    assert parts.energy == pytest.approx(((lora_B @ lora_A) ** 2).sum())


def test_similarity_is_one_for_the_same_space_and_zero_for_an_orthogonal_one():
    random = np.random.default_rng(0)
    lora_A = random.standard_normal((8, 100))
    rotated = np.linalg.qr(random.standard_normal((8, 8)))[0] @ lora_A
    assert subspace_similarity(lora_A, rotated, 8, 8) == pytest.approx(1)
    assert subspace_similarity(lora_A, rotated, 3, 8) == pytest.approx(1)
    orthogonal = np.linalg.svd(lora_A)[2][8:16]
    assert subspace_similarity(lora_A, orthogonal, 8, 8) == pytest.approx(0, abs=1e-12)
    # of two random spaces: max(i, j) / in
    found = [subspace_similarity(*random.standard_normal((2, 8, 100)), 4, 8) for _ in range(200)]
    assert np.mean(found) == pytest.approx(0.08, rel=0.1)
