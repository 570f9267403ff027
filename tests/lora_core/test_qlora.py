"""A base in 4 bits: to the bit what bitsandbytes computes, and what a merge into NF4 starts from."""

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_core import nf4
from lora_core.adalora_config import AdaLoraConfig
from lora_core.adapter import load_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.data import tokenize_rows
from lora_core.errors import BadConfig
from lora_core.fingerprint import take_fingerprint
from lora_core.inject import eject, inject
from lora_core.layers import LoraLinear
from lora_core.live import LiveModel
from lora_core.memory import plan_memory
from lora_core.merge import merge
from lora_core.mode import training
from lora_core.model import load_base
from lora_core.plan import plan_merge
from lora_core.qlora import NF4Weight, Packed, pack, quantise_base, resident_bytes
from lora_core.train import TrainConfig, train
from lora_core.trainable import trained_parameters
from tests.lora_core import test_memory
from tests.lora_core.recipes import TOKENS, logits_of
from tests.lora_core.test_recipe_kinds import peft_model
from tests.tiny import make_base, make_rows


def weight(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Blocks of very different size. Their maxima are multiples of 1/256: bitsandbytes sums them up in float32, in an
    order of its own, and only where no sum is rounded must its mean be the rounded mean."""
    g = torch.Generator().manual_seed(0)
    blocks = torch.rand(shape, generator=g).view(-1, 64) * 2 - 1
    largest = torch.randint(1, 256, (len(blocks), 1), generator=g) / 256
    blocks[:, 7] = 1
    return (blocks * largest).view(shape).to(dtype)


@pytest.mark.parametrize("shape", [(2, 64), (48, 384), (300, 128)])  # of the last group of 256 maxima, a part
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_that_of_bitsandbytes(dtype, shape):
    dense = weight(dtype, *shape)
    codes, state = bnb.quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = pack(dense)
    assert torch.equal(packed.levels, codes.flatten())
    assert torch.equal(packed.largest, state.state2.absmax)
    assert torch.equal(packed.offset, state.offset)
    theirs = replace(packed, maxima=state.absmax)
    assert torch.equal(theirs.unpack(dense.shape, dtype), bnb.dequantize_4bit(codes, state))
    # The code of a maximum bitsandbytes looks up, on a CPU, by a rounded number: now and then the second nearest.
    maxima = torch.from_numpy(nf4.block_maxima(dense.float().numpy()))
    differ = packed.maxima != state.absmax
    assert differ.sum() <= 0.01 * len(maxima)
    assert ((packed.block_maxima() - maxima).abs() <= (theirs.block_maxima() - maxima).abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_that_a_gpu_takes_from_bitsandbytes_gives_the_same_numbers(dtype):
    dense = weight(dtype, 48, 384)
    packed = pack(dense)
    by_kernel = torch.ops.bitsandbytes.dequantize_4bit(
        packed.levels, packed.block_maxima(), nf4.BLOCK, "nf4", dense.shape, dtype
    )
    assert torch.equal(by_kernel, packed.unpack(dense.shape, dtype))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_merge_into_four_bits_starts_from_the_same_numbers(dtype):
    dense = weight({"F32": torch.float32, "BF16": torch.bfloat16}[dtype], 300, 128)
    values = dense.double().numpy()
    maxima = nf4.block_maxima(values)
    left = nf4.to_dtype(nf4.round_trip(values, maxima, nf4.stored_maxima(maxima)), dtype)
    assert (pack(dense).unpack(dense.shape, dense.dtype).float().numpy() == left).all()


def quantised_layer(*, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 24, dtype=dtype))
    quantise_base(model)
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_the_unpacked_weight(dtype):
    layer = quantised_layer(dtype=dtype)
    dense, x = layer.weight.unpack(), torch.randn(2, 5, 128, dtype=dtype)
    x.requires_grad_()
    layer.bias.requires_grad_()
    y = layer(x)
    assert torch.equal(y, F.linear(x, dense, layer.bias))
    y.square().sum().backward()
    grads = x.grad, layer.bias.grad
    x.grad = layer.bias.grad = None
    F.linear(x, dense, layer.bias).square().sum().backward()
    for grad, expected in zip(grads, (x.grad, layer.bias.grad), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_no_dense_weight_is_kept_between_forward_and_backward(adapted):
    layer = quantised_layer()
    module = LoraLinear(layer, path="a", r=4, scaling=1.0) if adapted else layer
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(torch.randn(3, 128, requires_grad=True))
    assert not [t for t in kept if not isinstance(t, NF4Weight) and t.numel() >= 128 * 24]
    y.sum().backward()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("wide") / "base", hidden=64)


LORA = LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj", "v_proj", "down_proj"))
CONFIG = TrainConfig(n_epochs=2, batch_size=8, learning_rate=1e-2)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_between_the_passes_of_a_model_in_training_no_unpacked_weight_is_alive(base, monkeypatch, config):
    unpacked, unpack = [], Packed.unpack

    def watched(packed: Packed, *args):
        dense = unpack(packed, *args)
        unpacked.append(weakref.ref(dense))
        return dense

    model, _ = load_base(base)
    quantise_base(model)
    inject(model, replace(LORA, **config), seed=0)
    monkeypatch.setattr(Packed, "unpack", watched)
    with training(model, CONFIG, packed=False):
        loss = model(TOKENS, labels=TOKENS).loss
        gc.collect()
        assert len(unpacked) >= 14
        assert [ref() for ref in unpacked if ref() is not None] == []
        loss.backward()


def test_lora_on_four_bits_is_lora_on_the_unpacked_weight():
    layer = quantised_layer()
    dense = nn.Linear(128, 24)
    dense.load_state_dict({"weight": layer.weight.unpack(), "bias": layer.bias})
    results = []
    for base in (layer, dense):
        adapted = LoraLinear(base, path="a", r=4, scaling=1.5)
        nn.init.normal_(adapted.lora_B, generator=torch.Generator().manual_seed(1))
        x = torch.linspace(-1, 1, 256).view(2, 128).requires_grad_()
        adapted(x).square().sum().backward()
        results.append((x.grad, adapted.lora_A.grad, adapted.lora_B.grad))
    for quantised, expected in zip(*results, strict=True):
        torch.testing.assert_close(quantised, expected)


def test_a_packed_weight_cannot_be_changed_and_can_be_copied():
    layer = quantised_layer()
    for change in (lambda w: w.add_(1), lambda w: w.data.copy_(torch.zeros(24, 128)), lambda w: w.mul_(0)):
        with pytest.raises(TypeError, match="frozen in 4 bits"):
            change(layer.weight)
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, NF4Weight)
    assert twin.weight.packed.levels.data_ptr() != layer.weight.packed.levels.data_ptr()
    assert torch.equal(twin.weight.unpack(), layer.weight.unpack())


def test_rows_that_no_block_divides_are_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(96, 8))
    with pytest.raises(BadConfig, match="1 has 96 inputs"):
        quantise_base(model)
    assert not any(isinstance(p, NF4Weight) for p in model.parameters())
    with pytest.raises(BadConfig, match="no linear layers"):
        quantise_base(nn.Sequential(Conv1D(64, 64), nn.Embedding(64, 64)))


def test_a_quantised_model_takes_less_memory(base):
    model, _ = load_base(base)
    linear = sum(m.weight.nbytes for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    before = resident_bytes(model)
    assert len(quantise_base(model)) == 14
    assert before - resident_bytes(model) > 0.86 * linear  # 4.13 bits of 32 and, tensors being tiny, 256 maxima each


def test_the_memory_of_a_step_on_four_bits_is_planned(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", hidden=64, layers=3, vocab=2000)

    def load(*args, **options):
        model, tokenizer = load_base(*args, **options)
        quantise_base(model)
        return model, tokenizer

    monkeypatch.setattr(test_memory, "load_base", load)
    config = TrainConfig(batch_size=len(test_memory.LENGTHS), max_steps=2)
    plan = plan_memory(
        base,
        test_memory.LORA,
        config,
        test_memory.LENGTHS,
        labelled=test_memory.LABELLED,
        dtype=torch.float32,
        quantised=True,
    )
    assert plan.base == resident_bytes(load(base)[0])
    assert plan.step == pytest.approx(test_memory.measured(base, config), rel=0.15)


def test_what_was_trained_on_four_bits_is_what_the_merge_says(base, tmp_path):
    model, tokenizer = load_base(base)
    quantise_base(model)
    inject(model, LORA, seed=0)
    examples = tokenize_rows(tokenizer, make_rows(12), 100).examples
    reports = []
    train(model, examples, CONFIG, on_step=reports.append)
    assert reports[-1].loss < reports[0].loss
    save_adapter(model, LORA, tmp_path / "adapter")
    with torch.no_grad():
        expected = model(TOKENS).logits

    by_peft = peft_model(base, tmp_path / "adapter")
    for name, module in by_peft.named_modules():  # bitsandbytes' own round trip of each base weight
        if isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name:
            codes = bnb.quantize_4bit(module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4")
            module.weight.data = bnb.dequantize_4bit(*codes)
    with torch.no_grad():
        torch.testing.assert_close(by_peft(TOKENS).logits, expected, atol=3e-5, rtol=1e-5)

    merge(
        base, tmp_path / "adapter", tmp_path / "out", recipe=plan_merge(base, tmp_path / "adapter", start="nf4").recipe
    )
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=3e-5, rtol=1e-5)
    assert (logits_of(base) - expected).abs().max() > 0.01

    eject(model)
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)


VARIANTS = {
    "dora": replace(LORA, use_dora=True),
    "pissa": replace(LORA, init_lora_weights="pissa"),
    "olora": replace(LORA, init_lora_weights="olora"),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=LORA.target_modules),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_on_four_bits_is_the_variant_on_the_unpacked_weights(base, config):
    said = []
    for packed in (True, False):
        model, _ = load_base(base)
        quantise_base(model)
        if not packed:
            for module in model.modules():
                if isinstance(module, nn.Linear) and isinstance(module.weight, NF4Weight):
                    module.weight = nn.Parameter(module.weight.unpack())
        inject(model, config, seed=0)
        optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.1)
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        with torch.no_grad():
            said.append(model(TOKENS).logits)
    torch.testing.assert_close(said[0], said[1], atol=1e-5, rtol=1e-5)


def test_an_adapter_is_merged_in_memory_into_what_four_bits_leave_and_taken_out_again(base, tmp_path):
    model, _ = load_base(base)
    quantise_base(model)
    with torch.no_grad():
        before = model(TOKENS).logits
    inject(model, LORA, seed=0)
    for parameter in trained_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    save_adapter(model, LORA, tmp_path)
    with torch.no_grad():
        expected = model(TOKENS).logits
    eject(model)
    live = LiveModel(model)
    live.load("a", tmp_path)
    assert live.merge("a") == []
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
        live.use(None)
        assert torch.equal(model(TOKENS).logits, before)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, NF4Weight)


def test_a_run_on_four_bits_is_not_mistaken_for_one_on_the_base(base):
    prints = []
    for quantised in (False, True):
        model, tokenizer = load_base(base)
        if quantised:
            quantise_base(model)
        inject(model, LORA, seed=0)
        examples = tokenize_rows(tokenizer, make_rows(2), 100).examples
        prints.append(take_fingerprint(model, examples, CONFIG, base_digest="0").inputs["lora"])
    assert prints[0] != prints[1]


def test_a_run_on_four_bits_goes_on_with_the_same_bits(base, tmp_path):
    def run(resume_from=None, **options):
        model, tokenizer = load_base(base)
        quantise_base(model)
        inject(model, LORA, seed=0)
        states = []
        examples = tokenize_rows(tokenizer, make_rows(12), 100).examples
        train(model, examples, CONFIG, on_checkpoint=states.append, resume_from=resume_from, **options)
        return states

    straight = run()
    resumed = run(resume_from=straight[0])
    assert [state.step for state in resumed] == [2, 3, 4]
    for name, tensor in straight[-1].tensors.items():
        assert torch.equal(resumed[-1].tensors[name], tensor), name
