"""What one step of the optimiser does to which weights."""

import pytest
import torch
from tiny import random_model

from minirlhf.optim import make_optimizer, step_optimizer


def moves(lr, **settings):
    """How far each parameter moved in one step with a gradient of 1 everywhere."""
    model = random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step_optimizer(model, make_optimizer(model, lr, **settings), lr, 0.0)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}, before


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_the_value_head_alone_takes_scaled_steps(scale):
    """It starts at 0 and Adam moves a weight by at most lr a step: at the policy's own step size it had learnt nothing by the
    end of a run, and `baseline` and `gae` were worse than no baseline at all."""
    for name, move in moves(1e-3, value_lr_scale=scale)[0].items():
        expected = 1e-3 * (scale if name.startswith("value_head") else 1.0)
        torch.testing.assert_close(move, torch.full_like(move, -expected), rtol=1e-3, atol=1e-7)


def test_decay_shrinks_matrices_and_nothing_else():
    (plain, before), (decayed, _) = moves(1e-3), moves(1e-3, weight_decay=0.5)
    for name, move in decayed.items():
        matrix = move.dim() == 2 and not name.startswith(("wte", "wpe"))
        expected = plain[name] - (1e-3 * 0.5 * before[name] if matrix else 0.0)
        torch.testing.assert_close(move, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("limit, share", [(0.0, 1.0), (1e6, 1.0), (1.0, None)])
def test_the_norm_is_clipped_for_the_step_and_told_from_before(limit, share):
    """0: never. Adam's first moment is a tenth of the gradient that it was given."""
    model = random_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    whole = sum(p.numel() for p in model.parameters()) ** 0.5
    optimizer = make_optimizer(model, 1e-3)
    assert step_optimizer(model, optimizer, 1e-3, limit) == pytest.approx(whole)
    for state in optimizer.state.values():
        moment = torch.full_like(state["exp_avg"], 0.1 * (share or limit / whole))
        torch.testing.assert_close(state["exp_avg"], moment, rtol=1e-4, atol=0)
