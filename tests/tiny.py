"""Tiny seeded base models, a tokenizer and training rows on disk. Every test that needs a model starts here."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TEXT = (
    "The quick brown fox jumps over the lazy dog. A small model learns a small thing, and says so. "
    "User asks a question; assistant gives an answer. Low rank adapters change few numbers. "
    "0 1 2 3 4 5 6 7 8 9 plus minus times equals. Hello world, how are you today? I am fine, thank you."
)

# ChatML without a system default: the first messages of a conversation render to a prefix of its text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Family → what its configuration needs beside, or in place of, what all have.
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {},
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},  # the defaults are 1
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48},
    "falcon": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24},
}
FAMILIES = tuple(_SETTINGS)  # that write
ENCODERS: dict[str, dict[str, Any]] = {"bert": {}, "roberta": {"type_vocab_size": 1}, "deberta-v2": {}}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2}


def make_tokenizer(directory: Path, *, vocab: int = 312, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE trained on `TEXT`, saved to `directory`; any text round-trips; ids 0, 1, 2: bos, eos, pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return tokenizer


def make_base(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    vocab: int = 320,
    tie: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """A random model of `family` in `directory`, as `save_pretrained` writes it, with about `shards` shards."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": tie,
        **(_T5 if family == "t5" else (_SETTINGS | ENCODERS)[family]),
    }
    if "num_experts" in settings:
        settings["num_experts_per_tok"] = 2
    if family == "opt":
        settings["word_embed_proj_dim"] = hidden
    if family in ("falcon", "t5"):
        del settings["head_dim"]
    maker: Any = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    if family == "t5":
        maker = AutoModelForSeq2SeqLM
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = maker.from_config(config, dtype=getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit: int | str = "50GB" if shards == 1 else size // shards
    model.save_pretrained(directory, max_shard_size=limit)
    if tokenizer:
        make_tokenizer(directory, vocab=min(vocab, 320) - 8)  # some tokenizer classes add tokens of their own
    return directory


def make_rows(n: int, kind: str = "chat") -> list[dict[str, Any]]:
    """`n` different training rows: `chat` = {"messages": …}, `prompt` = {"prompt", "completion"}."""
    pairs = [(f"What is {i} plus {i % 7}?", f"{i} plus {i % 7} equals {i + i % 7}.") for i in range(n)]
    if kind == "prompt":
        return [{"prompt": question, "completion": " " + answer} for question, answer in pairs]
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """The rows as JSON lines, UTF-8."""
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return path


def randomize_adapter(directory: Path, *, seed: int = 0, scale: float = 0.05) -> Path:
    """Fill the adapter in `directory` with seeded normal numbers, so that it changes what the base says."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    path = directory / "adapter_model.safetensors"
    tensors = {k: torch.randn(v.shape, generator=generator) * scale for k, v in sorted(load_file(path).items())}
    save_file(tensors, path, metadata={"format": "pt"})
    return directory
