"""The model families that are trained and merged here; tests run the whole path on each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Architecture:
    """What differs between families, as facts.

    `logits_divisor` names the config field by which the output layer's product is divided, if there is one.
    """

    class_name: str
    embedding: str = "model.embed_tokens"
    logits_divisor: str | None = None


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("LlamaForCausalLM"),
        "mistral": Architecture("MistralForCausalLM"),
        "qwen2": Architecture("Qwen2ForCausalLM"),
        "qwen3": Architecture("Qwen3ForCausalLM"),
        "gemma": Architecture("GemmaForCausalLM"),
        "olmo2": Architecture("Olmo2ForCausalLM"),
        "phi3": Architecture("Phi3ForCausalLM"),
        "granite": Architecture("GraniteForCausalLM", logits_divisor="logits_scaling"),
    }
)
