"""The exact expected gradient of any loss, in a world of 15 responses of 1 to 3 tokens.

The loss is called on every batch of a given size, so its expected gradient is a sum without
sampling noise. There are K settings, each with its own policy, reference and score function.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from minirlhf.lab.small_world import (
    batch_gradients,
    gradient,
    make_world,
    move,
    probabilities,
    random_logits,
    random_scores,
    response_kl,
    state_kl,
    token_logprobs,
)
from minirlhf.run.errors import UserError, call_users_function
from minirlhf.run.seeding import generator

import torch
import torch.nn.functional as F
from torch import Tensor

WORLD = make_world(vocab=3, limit=3)
SETTINGS = 3
SHAPES = ((1, 3), (1, 5), (2, 4))  # (batch size, width)
TOLERANCE = 1e-9

CLAIMS = {
    "policy-gradient": "-grad E[score]",
    "reverse-kl": "grad KL(policy || reference) of whole responses",
    "reverse-kl-per-state": "sum_s d(s) grad KL(policy(. | s) || reference(. | s)), d constant",
    "forward-kl-per-state": "sum_s d(s) grad KL(reference(. | s) || policy(. | s)), d constant",
}


class Setting(NamedTuple):
    """A policy, the one that sampled, and the reference: [S, V] logits. Scores: [N]."""

    logits: Tensor
    old: Tensor
    ref: Tensor
    scores: Tensor


class Batches(NamedTuple):
    """All M batches of B responses in one setting."""

    setting: Setting
    rows: Tensor  # [M, B] numbers of the responses
    probability: Tensor  # [M]
    arguments: tuple[Tensor, ...]  # of the loss, each [M, B, R]

    @property
    def mask(self) -> Tensor:
        return self.arguments[-1]


def list_batches(setting: Setting, shape: tuple[int, int]) -> Batches:
    """All batches in all orders. Beyond the mask are random numbers as large as the real ones."""
    size, width = shape
    numbers = torch.arange(len(WORLD.mask))
    rows = torch.cartesian_prod(*[numbers] * size).reshape(-1, size)
    extra = (0, width - WORLD.mask.shape[1])
    mask = F.pad(WORLD.mask, extra)[rows]
    random = generator(0, "beyond the mask")

    def pad(values: Tensor, largest: float) -> Tensor:
        noise = largest * torch.rand(mask.shape, dtype=torch.float64, generator=random)
        return torch.where(mask, F.pad(values, extra)[rows], noise)

    policies = (setting.logits, setting.old, setting.ref)
    logprobs = [pad(token_logprobs(WORLD, logits), -3.0) for logits in policies]
    advantages = pad(setting.scores[:, None].expand(WORLD.mask.shape), 3.0)
    probability = probabilities(WORLD, setting.old)[rows].prod(1)
    return Batches(setting, rows, probability, (*logprobs, advantages, mask))


@functools.cache
def all_batches(shape: tuple[int, int], kl: float = 0.0) -> list[Batches]:
    """The batches of the K settings. kl: KL(old || policy) in nats; 0 means on-policy."""
    batches = []
    for seed in range(SETTINGS):
        logits = random_logits(WORLD, seed)
        old = move(WORLD, logits, seed, kl) if kl else logits
        ref = random_logits(WORLD, seed, "reference")
        batches.append(list_batches(Setting(logits, old, ref, random_scores(WORLD, seed)), shape))
    return batches


# ---- the user's function -------------------------------------------------------------------------


def call(function: Callable, form: str, shape: list[int], *arguments: Tensor) -> Tensor:
    """What the function returns, a tensor of this shape. form: of the call. Raises UserError."""
    value = call_users_function(form, function, *(x.clone() for x in arguments))
    if isinstance(value, Tensor) and list(value.shape) == shape:
        return value
    returned = f"{value!r:.60} ({type(value).__name__})"
    if isinstance(value, Tensor):
        returned = f"a tensor of shape {list(value.shape)}"
    raise UserError(f"the function returned {returned}, not a tensor of shape "
                    f"{shape or '[] (a scalar)'}")


def call_loss(loss: Callable, *arguments: Tensor) -> Tensor:
    """The loss of one batch, a finite scalar. Raises UserError."""
    form = "without --kl, function(logprobs, old_logprobs, ref_logprobs, advantages, mask)"
    value = call(loss, form, [], *arguments)
    if not value.isfinite():
        raise UserError(f"the function returned {value.item()} for a batch with the mask "
                        f"{arguments[-1].int().tolist()}")
    return value


def token_weights(loss: Callable, batches: Batches) -> Tensor:
    """[M, B, R] d loss / d logprobs of each batch. Raises UserError."""
    logprobs, *others = batches.arguments
    logprobs = logprobs.clone().requires_grad_()
    values = [call_loss(loss, *batch) for batch in zip(*(x.unbind() for x in (logprobs, *others)))]
    # the second term is 0; with it a loss that does not use logprobs has a gradient, 0
    total = torch.stack([value.double() for value in values]).sum() + 0.0 * logprobs.sum()
    (weights,) = torch.autograd.grad(total, logprobs)
    if not weights.isfinite().all():
        raise UserError("the gradient of the function is not finite")
    return weights


def kl_means(estimator: Callable) -> tuple[Tensor, Tensor]:
    """(mean over responses of the estimator's sum, KL(policy || reference)): [K] nats each.

    Raises UserError.
    """
    means, exact = [], []
    for batches in all_batches(SHAPES[1]):
        logprobs, _, ref_logprobs, _, mask = (x[:, 0] for x in batches.arguments)
        values = call(estimator, "with --kl, function(logprobs, ref_logprobs)", list(mask.shape),
                      logprobs, ref_logprobs)
        if not values[mask].isfinite().all():
            raise UserError("the function returned a value that is not finite")
        means.append((batches.probability * torch.where(mask, values, 0.0).sum(1)).sum())
        exact.append(response_kl(WORLD, batches.setting.logits, batches.setting.ref))
    return torch.stack(means), torch.stack(exact)


# ---- gradients with respect to the policy's logits -----------------------------------------------


def expected_gradient(batches: Batches, weights: Tensor) -> Tensor:
    """[D] the mean over batches of sum_t weight_t grad log pi(a_t | s_t)."""
    real = weights[..., :WORLD.mask.shape[1]].flatten(0, 1)
    rows = batch_gradients(WORLD, batches.setting.logits, batches.rows, lambda x: (real * x).sum())
    return batches.probability @ rows


def expected_gradients(batches: list[Batches], weights: Iterable[Tensor]) -> Tensor:
    """[K, D] one expected gradient for each setting."""
    return torch.stack([expected_gradient(b, w) for b, w in zip(batches, weights)])


def loss_gradients(loss: Callable, batches: list[Batches]) -> Tensor:
    """[K, D] the expected gradients of the loss. Raises UserError."""
    return expected_gradients(batches, [token_weights(loss, each) for each in batches])


def claimed_gradients(claim: str) -> Tensor:
    """[K, D], by differentiating the objective itself."""
    objective = {
        "policy-gradient": lambda x, each: -(probabilities(WORLD, x) * each.scores).sum(),
        "reverse-kl": lambda x, each: response_kl(WORLD, x, each.ref),
        "reverse-kl-per-state": lambda x, each: state_kl(WORLD, x, each.ref),
        "forward-kl-per-state": lambda x, each: state_kl(WORLD, x, each.ref, reverse=False),
    }[claim]
    settings = [each.setting for each in all_batches(SHAPES[0])]
    return torch.stack([gradient(functools.partial(objective, each=s), s.logits) for s in settings])


class Fit(NamedTuple):
    """How well c times the target gives the actual gradients of one shape."""

    c: float  # the same for all settings
    error: float  # relative, the largest of the settings
    own_c: Tensor  # [K] each setting's own c
    own_error: float
    cosine: float  # the one closest to 0

    @property
    def holds(self) -> bool:
        return self.c > 0 and self.error < TOLERANCE


def relative_error(actual: Tensor, target: Tensor) -> float:
    """The largest of the settings. actual, target: [K, D]."""
    return float(((actual - target).norm(dim=1) / target.norm(dim=1)).max())


def fit(actual: Tensor, target: Tensor) -> Fit:
    """actual, target: [K, D]."""
    products = (actual * target).sum(1)
    norm = target.norm(dim=1)
    c = products.sum() / (norm**2).sum()
    own_c = products / norm**2
    error = relative_error(actual, c * target)
    own_error = relative_error(actual, own_c[:, None] * target)
    cosine = (products / (norm * actual.norm(dim=1))).nan_to_num(0.0)
    return Fit(float(c), error, own_c, own_error, float(cosine[cosine.abs().argmin()]))


class Result(NamedTuple):
    """What a loss does on-policy, for each shape of a batch."""

    weights: list[Tensor]  # [K, M, B, R] of each shape
    expected: list[Tensor]  # [K, D] of each shape
    fits: dict[str, list[Fit]]  # of each claim, and shape
    leaks: bool  # a token beyond the mask has a gradient

    def holds(self, claim: str) -> bool:
        return not self.leaks and all(each.holds for each in self.fits[claim])


def examine(loss: Callable) -> Result:
    """Call the loss on all batches, on-policy. Raises UserError."""
    batches = [all_batches(shape) for shape in SHAPES]
    weights = [torch.stack([token_weights(loss, b) for b in each]) for each in batches]
    expected = [expected_gradients(b, w) for b, w in zip(batches, weights)]
    targets = {claim: claimed_gradients(claim) for claim in CLAIMS}
    fits = {claim: [fit(actual, targets[claim]) for actual in expected] for claim in CLAIMS}
    leaks = any(bool(w[:, ~b[0].mask].any()) for b, w in zip(batches, weights))
    return Result(weights, expected, fits, leaks)
