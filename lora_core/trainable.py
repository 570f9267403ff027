"""What of a model is trained: every parameter that wants a gradient, by name."""

from torch import nn


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, sorted by name: factors, magnitudes, biases, saved modules, whatever was left unfrozen."""
    return dict(sorted((name, value) for name, value in model.named_parameters() if value.requires_grad))
