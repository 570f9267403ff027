"""Cross-entropy over a frozen output layer, whose logits never outlive the piece they are computed in."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Large enough that a piece's product is worth reading the weight for, small enough to be forgotten.
_PIECE_BYTES = 64 * 2**20
_MIN_ROWS, _MAX_ROWS = 128, 2048
# Of a piece, what a processor's cache holds while it is gone over several times; other devices take it whole.
_CACHED_BYTES = 2 * 2**20


class OutputLoss(torch.autograd.Function):
    """(N, d) hidden states, (N,) targets → (N,) losses −log p(target), float32, W and bias frozen.

    The gradient with respect to the hidden states is computed along with the loss and kept instead of the logits:
    (N, d) in place of several (N, vocabulary).
    """

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, rows: int
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        losses = []
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = F.linear(hidden[piece], weight, bias)
            at_once = max(1, _CACHED_BYTES // (4 * len(weight))) if logits.device.type == "cpu" else rows
            for some, target in zip(logits.split(at_once), targets[piece, None].split(at_once), strict=True):
                losses.append(_losses(some, target, scale, in_place=wanted))
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[piece])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None, None, None, None


def token_losses(hidden: Tensor, output_layer: Any, targets: Tensor, *, scale: float = 1.0) -> Tensor:
    """−log softmax(scale · output_layer(hidden))[target] of each row, (N,) float32."""
    vocab: int = output_layer.weight.shape[0]
    rows = min(max(_PIECE_BYTES // (4 * vocab), _MIN_ROWS), _MAX_ROWS)
    if len(targets) and type(output_layer) is nn.Linear and not _is_trained(output_layer):
        bias = output_layer.bias
        return OutputLoss.apply(hidden, output_layer.weight, bias, targets, scale, rows)
    return torch.cat(list(_by_autograd(hidden, output_layer, targets, scale, rows)))


def _by_autograd(hidden: Tensor, layer: Any, targets: Tensor, scale: float, rows: int) -> Iterator[Tensor]:
    # An output layer that is trained, or is more than a linear one.
    for piece, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        yield F.cross_entropy(layer(piece).float() * scale, target, reduction="none")


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _losses(logits: Tensor, target: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """(n, vocabulary) logits, (n, 1) targets → (n,) losses; if `in_place`, the logits become the losses' gradients."""
    p = logits.float() if logits.dtype in {torch.bfloat16, torch.float16} else logits
    if scale != 1.0:
        p.mul_(scale)
    top, picked = p.amax(-1, keepdim=True), p.gather(1, target)
    total = p.sub_(top).exp_().sum(-1, keepdim=True)
    if in_place:
        p.mul_(scale / total)  # scale · softmax
        p.scatter_add_(1, target, p.new_full(target.shape, -scale))
        logits.copy_(p)
    return (total.log_() + top - picked)[:, 0]
