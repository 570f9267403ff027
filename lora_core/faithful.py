"""Whether a merged model says what base and adapter say together. Measured by lora_core.canary, judged here.

How far apart two models are is told by KL(adapter ‖ merged), in nats, at the median token: a router of experts that
decides a close call otherwise says little about a merge. What rounding alone explains is not a number for all models;
it is measured too, as the distance that rounding each changed weight at random would make."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Eight times the distance that random rounding makes; KL grows with the square of a distance.
_ROUNDING_FACTOR = 64.0
# Half of what the adapter does, counted only where it is twice as much as random rounding does.
_LOST_SHARE, _NOISE_FACTOR = 0.25, 4.0
# What float32 logits cannot tell apart.
_FLOOR = 1e-12


@dataclass(frozen=True)
class PromptDifference:
    """Adapter against merged model on one prompt, over its tokens: KL in nats, the largest difference of any logit,
    and the share of positions where both hold the same token for the most likely."""

    name: str
    tokens: int
    kl_mean: float
    kl_max: float
    max_logit_difference: float
    top1_agreement: float


@dataclass(frozen=True)
class Comparison:
    """`kl`: KL(adapter ‖ merged). `rounding_kl`: KL between the merged model and itself with its changed weights
    rounded at random. `effect_kl`: KL(adapter ‖ base). All at the median token. `losses`: mean per token of the prompts
    that are text, by model."""

    prompts: tuple[PromptDifference, ...]
    kl: float
    rounding_kl: float
    effect_kl: float
    losses: Mapping[str, float] = field(default_factory=dict)


def why_unfaithful(found: Comparison, dtype: str) -> str | None:
    """What is wrong with a merge to `dtype`, and what to do about it; None if it is what the adapter does."""
    if found.kl <= _FLOOR:
        return None
    measured = f"KL(adapter ‖ merged) is {found.kl:.2g} nats at the median token of the canary prompts"
    advice = "Report this with the version's merge recipe." if dtype == "float32" else "Merge with dtype float32."
    if found.kl > _ROUNDING_FACTOR * found.rounding_kl:
        return (
            "The merged model does not say what base and adapter say together, so nothing was published. "
            f"{measured}; rounding to {dtype} explains about {found.rounding_kl:.2g}. {advice}"
        )
    if found.kl > max(_LOST_SHARE * found.effect_kl, _NOISE_FACTOR * found.rounding_kl):
        return (
            f"Rounding to {dtype} takes most of this adapter's effect away, so nothing was published. "
            f"{measured}, KL(adapter ‖ base) only {found.effect_kl:.2g}. {advice}"
        )
    return None
