"""The model families that are trained and merged here; tests run the whole path on each of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from lora_core.keymap import OUTPUT_LAYERS

# What the base of a family is: a language model, one that reads before it writes, or one that only reads.
Kind = Literal["decoder", "encoder-decoder", "encoder"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What differs between families, as facts.

    `embedding` is the last name of the input embedding's module; its columns are the config's `width`.
    `logits_divisor` names the config field by which the output layer's product is divided, if there is one.
    `trunk` is a prefix that modules have and that some checkpoints leave out. `not_linear` are last names of matrices
    that are not of a linear layer: positions, routers of experts. `literal_names` says that checkpoints use the
    model's own names, but for a prefix.
    """

    class_name: str
    kind: Kind = "decoder"
    embedding: str = "embed_tokens"
    width: str = "hidden_size"
    logits_divisor: str | None = None
    trunk: str = ""
    not_linear: frozenset[str] = field(default=frozenset())
    literal_names: bool = True

    def module_path(self, tensor: str) -> str:
        """The module in the model whose weight a checkpoint stores as `tensor`."""
        path = tensor.removesuffix(".weight")
        if path in OUTPUT_LAYERS:
            return OUTPUT_LAYERS[0]
        return path if path.startswith(self.trunk) else self.trunk + path


_ROUTER = frozenset({"gate"})
# of encoders
_POSITIONS = frozenset({"position_embeddings", "token_type_embeddings", "rel_embeddings"})


def _encoder(class_name: str) -> Architecture:
    return Architecture(
        class_name=class_name,
        kind="encoder",
        embedding="word_embeddings",
        not_linear=_POSITIONS,
        literal_names=False,
    )


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(class_name="LlamaForCausalLM"),
        "mistral": Architecture(class_name="MistralForCausalLM"),
        "qwen2": Architecture(class_name="Qwen2ForCausalLM"),
        "qwen3": Architecture(class_name="Qwen3ForCausalLM"),
        "gemma": Architecture(class_name="GemmaForCausalLM"),
        "gemma3_text": Architecture(class_name="Gemma3ForCausalLM"),
        "olmo2": Architecture(class_name="Olmo2ForCausalLM"),
        # its output layer has a bias of its own
        "phi": Architecture(class_name="PhiForCausalLM", literal_names=False),
        "phi3": Architecture(class_name="Phi3ForCausalLM"),
        "smollm3": Architecture(class_name="SmolLM3ForCausalLM"),
        "stablelm": Architecture(class_name="StableLmForCausalLM"),
        "starcoder2": Architecture(class_name="Starcoder2ForCausalLM"),
        "granite": Architecture(class_name="GraniteForCausalLM", logits_divisor="logits_scaling"),
        "gpt2": Architecture(
            class_name="GPT2LMHeadModel",
            embedding="wte",
            width="n_embd",
            trunk="transformer.",
            not_linear=frozenset({"wpe"}),
            literal_names=False,
        ),
        "gpt_neox": Architecture(class_name="GPTNeoXForCausalLM", embedding="embed_in", literal_names=False),
        "opt": Architecture(
            class_name="OPTForCausalLM",
            width="word_embed_proj_dim",
            not_linear=frozenset({"embed_positions"}),
            literal_names=False,
        ),
        "falcon": Architecture(
            class_name="FalconForCausalLM", embedding="word_embeddings", trunk="transformer.", literal_names=False
        ),
        "mixtral": Architecture(class_name="MixtralForCausalLM", not_linear=_ROUTER, literal_names=False),
        "qwen2_moe": Architecture(class_name="Qwen2MoeForCausalLM", not_linear=_ROUTER, literal_names=False),
        "qwen3_moe": Architecture(class_name="Qwen3MoeForCausalLM", not_linear=_ROUTER, literal_names=False),
        "t5": Architecture(
            class_name="T5ForConditionalGeneration",
            kind="encoder-decoder",
            embedding="shared",
            width="d_model",
            not_linear=frozenset({"relative_attention_bias"}),
            literal_names=False,
        ),
        "bert": _encoder("BertForMaskedLM"),
        "roberta": _encoder("RobertaForMaskedLM"),
        "deberta-v2": _encoder("DebertaV2ForMaskedLM"),
    }
)
