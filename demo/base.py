"""A base model of one's own: a byte-level BPE and a small Llama, trained for about a minute on real text."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cli.home import read_json, write_json
from demo import corpus

Say = Callable[[str], None]
BOS, EOS, PAD = 0, 1, 2
# ChatML without a system default, so that the base also takes rows of messages.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How the base is made. Small on purpose: what a minute on two cores can teach, a wider model learns worse."""

    vocab_size: int = 2048
    hidden_size: int = 192
    layers: int = 3
    heads: int = 3
    context: int = 256
    characters: int = 2_000_000
    steps: int = 900
    batch_size: int = 6
    window: int = 128  # tokens per row
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    seed: int = 0


def make_base(folder: Path, say: Say, recipe: Recipe | None = None) -> Path:
    """Trains the base model into `folder`, or keeps what is there if the same recipe made it."""
    recipe = recipe or Recipe()
    marker = folder.with_name(folder.name + ".json")  # written last: without it, nothing is finished
    if folder.is_dir() and read_json(marker) == asdict(recipe):
        say(f"The base model of the last demo is in {folder}.")
        return folder
    stage = folder.with_name(folder.name + ".unfinished")
    marker.unlink(missing_ok=True)
    for old in (folder, stage):
        shutil.rmtree(old, ignore_errors=True)
    stage.mkdir(parents=True)
    texts = corpus.pretraining_text(recipe.characters)
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    stream = token_stream(tokenizer, texts, seed=recipe.seed)
    say(f"A tokenizer of {recipe.vocab_size} tokens; {len(stream):,} tokens of text to learn from.")
    model = train_model(stream, recipe, say)
    model.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    stage.rename(folder)
    write_json(marker, asdict(recipe))
    return folder


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE: any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],  # BOS, EOS, PAD
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def token_stream(tokenizer: Any, texts: list[str], *, seed: int) -> Any:
    """All texts in random order as one tensor of ids, with EOS after each."""
    import torch

    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = [tokenizer(texts[index])["input_ids"] + [EOS] for index in order]
    return torch.tensor([token for text in ids for token in text])


def train_model(stream: Any, recipe: Recipe, say: Say) -> Any:
    """A Llama from random weights, by next-token prediction on random windows of `stream`."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), 4))  # more threads make so small a model slower
    torch.manual_seed(recipe.seed)
    model = new_model(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    say(f"Training a Llama of {sum(p.numel() for p in model.parameters()):,} parameters for {recipe.steps} steps …")
    started = time.monotonic()
    chance = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        starts = torch.randint(len(stream) - recipe.window, (recipe.batch_size,), generator=chance).tolist()
        rows = torch.stack([stream[start : start + recipe.window] for start in starts])
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _factor(step, recipe)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, recipe.steps // 10) == 0:
            say(f"  step {step + 1:4d}  loss {loss.item():.3f}  {time.monotonic() - started:4.0f} s")
    return model.eval()


def new_model(recipe: Recipe) -> Any:
    """The architecture of `recipe` with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.hidden_size * 8 // 3,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def _factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    return 0.1 + 0.45 * (1 + math.cos(math.pi * step / recipe.steps))
