"""A base that FSDP2 keeps in pieces trains to the bits of one that lies whole, whatever is adapted and learnt.

Here in a group of one process, which gathers and frees every layer as any other; `test_launch.py` has two.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from lora_core.adalora_config import AdaLoraConfig
from lora_core.allocator import RankAllocator
from lora_core.classification import Classification, Labelled
from lora_core.config import LoraConfig
from lora_core.data import Example
from lora_core.dpo import DPO, Preference
from lora_core.errors import BadConfig
from lora_core.inject import inject
from lora_core.qlora import quantise_base
from lora_core.seq2seq import Pair, Seq2Seq
from lora_core.sharding import base_bytes, shard_base, sharded_layers
from lora_core.task import CausalLM, Task
from lora_core.train import TrainConfig, TrainResult, train
from lora_core.trainable import trained_parameters
from tests.lora_core.kinds import KINDS, causal, classifier

# of those in KINDS, each way in which a layer reads the base
NAMES = (
    *("llama_linear", "llama_dropout", "llama_both_ends", "llama_saved_ends", "llama_head_tokens", "tied_both_ends"),
    *("tied_tokens", "gpt2_all", "gpt2_conv1d_bias_all", "qwen2_bias_all", "gpt_neox_fused", "falcon_fused"),
    *("phi3_fused", "dora", "dora_embedding", "dora_conv1d"),
)
CONFIG = TrainConfig(n_epochs=2, batch_size=4, learning_rate=1e-2, tokens_per_batch=40)
FAMILIES = ("olmo2", "stablelm", "opt")


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rows(n: int = 6) -> list[Example]:
    chance = np.random.default_rng(3)
    ids = [chance.integers(3, 64, size=6 + 3 * row, dtype=np.int32) for row in range(n)]
    return [Example(row, row) for row in ids]


def end(model: Any, config: TrainConfig = CONFIG, **over: Any) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    result = train(model, over.pop("examples", rows()), config, **over)
    return result, {name: value.detach() for name, value in trained_parameters(model).items()}


def assert_same(
    build: Callable[[], nn.Module],
    lora: LoraConfig,
    config: TrainConfig = CONFIG,
    *,
    task: Callable[[nn.Module], Task | None] = lambda _: None,
    **over: Any,
) -> None:
    whole, pieces = both(build, lora, config, task=task, **over)
    assert pieces[0] == whole[0]
    assert [name for name, value in whole[1].items() if not torch.equal(pieces[1][name], value)] == []


def both(
    build: Callable[[], nn.Module],
    lora: LoraConfig,
    config: TrainConfig = CONFIG,
    *,
    task: Callable[[nn.Module], Task | None] = lambda _: None,
    **over: Any,
) -> list[tuple[TrainResult, dict[str, torch.Tensor]]]:
    """Train twice, the second time sharded."""
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model: Any = build().requires_grad_(False)
        inject(model, lora, seed=0)
        if sharded:
            shard_base(model)
        found.append(end(model, config, task=task(model), **over))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_trains_to_the_same_bits(name: str) -> None:
    assert_same(KINDS[name].build, KINDS[name].config(), eval_examples=rows(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_of_layer_is_gathered_where_it_computes(family: str) -> None:
    assert_same(lambda: causal(family), LoraConfig(r=2), eval_examples=rows(2))


@pytest.mark.parametrize("packing", [True, False])
def test_layers_that_are_computed_again_in_the_backward_pass(packing: bool) -> None:
    config = TrainConfig(**{**vars(CONFIG), "activation_checkpointing": True, "packing": packing})
    assert_same(lambda: causal("llama"), LoraConfig(r=2, lora_dropout=0.2), config)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_start_in_the_base(start: Any) -> None:
    assert_same(lambda: causal("llama"), LoraConfig(r=2, init_lora_weights=start))


def test_experts_whose_parameters_are_adapted() -> None:
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    lora = LoraConfig(r=2, target_modules=("q_proj",), target_parameters=names)
    assert_same(lambda: causal("qwen3_moe", **settings), lora)


def test_preferences_whose_reference_is_the_base_itself() -> None:
    pairs = [Preference(better, worse) for better, worse in zip(rows(6), rows(8)[2:], strict=True)]
    assert_same(lambda: causal("llama"), LoraConfig(r=2), task=lambda _: DPO(), examples=pairs, eval_examples=pairs[:2])


def test_ranks_that_are_given_to_the_modules_that_need_them() -> None:
    lora = AdaLoraConfig(init_r=4, target_r=2, tinit=0, tfinal=1, deltaT=1, total_step=4)
    made = []

    def regularised(model: nn.Module) -> Task:
        made.append(RankAllocator(model, lora))
        return made[-1].task(CausalLM())

    def allocate(step: int) -> None:
        made[-1].after_step(step)

    assert_same(lambda: causal("llama"), lora, task=regularised, after_step=allocate)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_classifiers(family: str) -> None:
    labelled = [Labelled(example.input_ids, row % 3) for row, example in enumerate(rows())]
    kind = KINDS["classifier"] if family == "llama" else KINDS["bert"]
    head = "score" if family == "llama" else "classifier"
    lora = LoraConfig(**kind.settings, r=2, task_type="SEQ_CLS", modules_to_save=(head,))
    task = Classification(3, pad_token_id=2)
    assert_same(lambda: classifier(family), lora, task=lambda _: task, examples=labelled, eval_examples=labelled[:3])


def test_a_model_that_reads_and_writes() -> None:
    """Close, not bit-equal: what all its decoder layers send back to the encoder is added in another order."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2}
    config = AutoConfig.for_model("t5", vocab_size=64, dropout_rate=0.0, **sizes)
    pairs = [Pair(a.input_ids, b.input_ids) for a, b in zip(rows(6), rows(7)[1:], strict=True)]
    lora = LoraConfig(r=2, task_type="SEQ_2_SEQ_LM")
    build = partial(AutoModelForSeq2SeqLM.from_config, config)
    (whole, factors), (pieces, found) = both(build, lora, task=lambda _: Seq2Seq(), examples=pairs)
    assert pieces.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    for name, value in factors.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_a_layer_is_whole_only_while_it_computes_forward_and_backward() -> None:
    model: Any = causal("llama", num_hidden_layers=3)
    inject(model, LoraConfig(r=2), seed=0)
    shard_base(model)
    layers = sharded_layers(model)
    seen: dict[str, list[list[int]]] = {"forward": [], "backward": []}

    def note(when: str) -> None:
        whole = [place for place, layer in enumerate(layers) if not _in_pieces(layer)]
        if model.training:
            seen[when].append(whole)

    def watch(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        note("forward")
        if output.requires_grad:
            output.register_hook(lambda _grad: note("backward"))

    for layer in layers:
        layer.mlp.register_forward_hook(watch)
    train(model, rows(2), TrainConfig(batch_size=2, learning_rate=1e-2))
    assert seen == {"forward": [[0], [1], [2]], "backward": [[2], [1], [0]]}
    assert all(_in_pieces(layer) for layer in layers)


def _in_pieces(module: nn.Module) -> bool:
    kinds = {isinstance(value, DTensor) for value in module.parameters() if not value.requires_grad}
    assert len(kinds) == 1
    return kinds == {True}


@pytest.mark.parametrize("tied", [True, False])
def test_the_ends_of_the_model_are_in_pieces_after_a_step_and_after_an_evaluation(tied: bool) -> None:
    model: Any = causal("llama", tie_word_embeddings=tied)
    before = sum(value.nbytes for value in model.parameters())
    inject(model, LoraConfig(r=2), seed=0)
    shard_base(model)
    kept = []

    def count(_report: Any) -> None:
        kept.append((base_bytes(model), _in_pieces(model)))

    end(model, eval_examples=rows(2), on_step=count)
    assert set(kept) == {(before, True)}  # all of it, as there is one process
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_memory_that_runs_out_in_a_sharded_layer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes are in the same layer: to go on in smaller pieces alone would keep them waiting."""
    model: Any = causal("llama")
    inject(model, LoraConfig(r=2), seed=0)
    shard_base(model)
    tries = []

    def full(*_: Any) -> torch.Tensor:
        tries.append(1)
        raise MemoryError

    monkeypatch.setattr("lora_core.task.CausalLM.loss_sum", full)
    with pytest.raises(MemoryError):
        end(model)
    assert len(tries) == 1


def test_what_cannot_be_sharded_is_refused_by_name_and_left_as_it_was() -> None:
    refused(causal("llama").requires_grad_(requires_grad=False), "nothing to train")
    four_bits: Any = causal("llama", hidden_size=64, intermediate_size=64)
    quantise_base(four_bits)
    inject(four_bits, LoraConfig(r=2), seed=0)
    refused(four_bits, "4 bits")
    sharded: Any = causal("llama")
    inject(sharded, LoraConfig(r=2), seed=0)
    shard_base(sharded)
    refused(sharded, "already")
    refused(nn.Linear(2, 2), "Linear has no layers")


def refused(model: Any, why: str) -> None:
    before = [type(value) for value in model.parameters()]
    with pytest.raises(BadConfig, match=why):
        shard_base(model)
    assert [type(value) for value in model.parameters()] == before
