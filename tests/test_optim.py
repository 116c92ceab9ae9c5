"""One optimizer step: learning rates, weight decay and gradient clipping."""

from minirlhf.model import Transformer
from minirlhf.run.optimizer import make_optimizer, step_optimizer, warmup_then_decay

import pytest
import torch
from tiny import random_model
from torch import Tensor

LR = 1e-3


def model_with_gradients() -> Transformer:
    """A model whose gradients are all 1."""
    model = random_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def changes(weight_decay: float = 0.0, value_lr_scale: float = 1.0) -> dict[str, Tensor]:
    """The change of each parameter in one step."""
    model = model_with_gradients()
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, LR, weight_decay, value_lr_scale)
    step_optimizer(model, optimizer, LR, max_grad_norm=0.0)
    return {name: parameter.detach() - old[name] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_only_the_value_head_has_a_scaled_learning_rate(scale):
    """The value head starts at 0 and Adam changes a weight by at most lr per step.

    At the policy's learning rate it would learn too slowly to be a useful baseline.
    """
    for name, change in changes(value_lr_scale=scale).items():
        expected = -LR * (scale if name.startswith("value_head") else 1.0)
        torch.testing.assert_close(change, torch.full_like(change, expected), rtol=1e-3, atol=1e-7)


def test_weight_decay_applies_to_matrices_only():
    """Biases, norms and embeddings do not decay."""
    without = changes()
    for name, change in changes(weight_decay=0.5).items():
        weight = random_model().get_parameter(name)
        is_matrix = weight.dim() == 2 and not name.startswith(("wte", "wpe"))
        decay = LR * 0.5 * weight if is_matrix else 0.0
        torch.testing.assert_close(change, without[name] - decay, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("max_grad_norm, scale", [(0.0, 1.0), (1e6, 1.0), (1.0, None)])
def test_the_step_uses_the_clipped_norm_and_returns_the_norm_before_clipping(max_grad_norm, scale):
    """0 means no clipping. Adam's first moment is a tenth of the clipped gradient."""
    model = model_with_gradients()
    norm = sum(parameter.numel() for parameter in model.parameters()) ** 0.5
    optimizer = make_optimizer(model, LR)
    assert step_optimizer(model, optimizer, LR, max_grad_norm) == pytest.approx(norm)
    for state in optimizer.state.values():
        moment = torch.full_like(state["exp_avg"], 0.1 * (scale or max_grad_norm / norm))
        torch.testing.assert_close(state["exp_avg"], moment, rtol=1e-4, atol=0)


@pytest.mark.parametrize("step, fraction", [(0, 0.02), (24, 0.5), (49, 0.951), (999, 0.001)])
def test_the_learning_rate_rises_for_a_twentieth_of_the_steps_by_hand(step, fraction):
    assert warmup_then_decay(step, 1000) == pytest.approx(fraction)
    assert warmup_then_decay(0, 1) == 1.0
