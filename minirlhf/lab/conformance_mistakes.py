"""What is wrong with a loss that does not have the claimed gradient.

Most mistakes multiply the weight of each token, d loss / d log pi, by a known factor. A mistake is
recognized if the standard weights times its factor give the loss's expected gradients.
"""

import itertools
from collections.abc import Callable, Iterator

from minirlhf.lab.conformance_gradients import (
    CLAIMS,
    SHAPES,
    TOLERANCE,
    Batches,
    Fit,
    Result,
    all_batches,
    claimed_gradients,
    expected_gradients,
    fit,
    token_weights,
)

import torch
from torch import Tensor

NEAR = 1e-4  # KL(old || policy), so small that the usual clipping changes no ratio


def standard_weights(claim: str, batches: Batches) -> Tensor:
    """[M, B, R] d loss / d logprobs of a loss that satisfies the claim."""
    logprobs, _, ref_logprobs, advantages, mask = batches.arguments
    log_ratio = torch.where(mask, logprobs - ref_logprobs, 0.0)
    return {
        "policy-gradient": -advantages,
        "reverse-kl": log_ratio.sum(-1, keepdim=True),
        "reverse-kl-per-state": log_ratio,
        "forward-kl-per-state": -torch.expm1(-log_ratio),
    }[claim]


def known_mistakes(batches: Batches) -> dict[str, Tensor]:
    """What each mistake multiplies the standard weights by."""
    *_, advantages, mask = batches.arguments
    length = mask.sum(-1, keepdim=True).double()
    position = mask.cumsum(-1)
    return {
        "each response is divided by its own length; divide by a constant": 1 / length,
        "the sum is divided by the number of tokens in the batch, which depends on the policy; "
        "divide by a constant": 1 / length.sum(-2, keepdim=True),
        "the last token of each response has no gradient: is a tensor shifted by one?":
            position < length,
        "the first token of each response has no gradient: is a tensor shifted by one?":
            position > 1,
        "the advantage is squared": advantages,
        "the absolute value of the advantage is used": advantages.sign(),
        "only the sign of the advantage is used": 1 / advantages.abs(),
        "responses with a negative advantage have no gradient": advantages > 0,
        "responses with a positive advantage have no gradient": advantages < 0,
    }


def importance_ratios(batches: Batches) -> dict[str, Tensor]:
    """What each off-policy correction multiplies the standard weights by."""
    logprobs, old_logprobs, *_, mask = batches.arguments
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    total = log_ratio.sum(-1, keepdim=True)
    return {
        "no importance ratio": torch.ones_like(log_ratio),
        "the ratio policy / old of each token": log_ratio.exp(),
        "the ratio policy / old of the whole response": total.exp(),
        "the geometric mean of the response's ratios": (total / mask.sum(-1, True)).exp(),
        "the ratio old / policy: the exponent has the wrong sign": (-log_ratio).exp(),
    }


def matching_factor(factors: Callable, claim: str, batches: list[list[Batches]],
                    expected: list[Tensor]) -> tuple[str, float]:
    """(the factor that gives these gradients, its c); "" if there is none."""
    def compare(name: str, index: int) -> Fit:
        weights = [standard_weights(claim, b) * factors(b)[name] for b in batches[index]]
        return fit(expected[index], expected_gradients(batches[index], weights))

    for name in factors(batches[0][0]):
        if all(compare(name, index).error < TOLERANCE for index in range(len(batches))):
            return name, compare(name, 0).c
    return "", 0.0


def mixture(result: Result) -> str:
    """The two claims whose weighted sum is the expected gradient, or ""."""
    batches = all_batches(SHAPES[0])
    targets = {claim: claimed_gradients(batches, claim).flatten() for claim in CLAIMS}
    for first, second in itertools.combinations(CLAIMS, 2):
        columns = torch.stack([targets[first], targets[second]], dim=1)
        actual = torch.stack([each.flatten() for each in result.expected], dim=1)
        weights = torch.linalg.lstsq(columns, actual).solution
        if (columns @ weights - actual).norm() < TOLERANCE * actual.norm():
            a, b = weights[:, 0].tolist()
            return f"{a:.3g} {first} + {b:.3g} {second} for {list(SHAPES[0])}"
    return ""


def importance_ratio(loss: Callable, claim: str) -> str:
    """The name of the ratio by which the loss corrects for the old policy, or ""."""
    batches = all_batches(SHAPES[0], NEAR)
    actual = expected_gradients(batches, [token_weights(loss, b) for b in batches])
    return matching_factor(importance_ratios, claim, [batches], [actual])[0]


def reacts(loss: Callable, batches: Batches, arguments: tuple[Tensor, ...]) -> bool:
    """Whether the gradient of a real token is different with these arguments."""
    changed = token_weights(loss, batches._replace(arguments=arguments))
    return bool((changed != token_weights(loss, batches))[batches.mask].any())


def wrong_mask(loss: Callable, result: Result) -> Iterator[str]:
    """How numbers beyond the mask get into the gradient."""
    if result.leaks:
        yield "tokens beyond the mask have a gradient: the mask is forgotten or shifted"
    batches = all_batches(SHAPES[1])[0]
    *numbers, mask = batches.arguments
    if reacts(loss, batches, (*(torch.where(mask, x, 0.7 * x) for x in numbers), mask)):
        yield "the gradient depends on the numbers beyond the mask: a sum or mean forgets the mask"


def wrong_inputs(loss: Callable, claim: str) -> Iterator[str]:
    """Which arguments the gradient depends on but should not, or should but does not."""
    batches = all_batches(SHAPES[1])[0]
    for index, name in ((2, "ref_logprobs"), (3, "advantages")):
        arguments = list(batches.arguments)
        arguments[index] = 2 * arguments[index]
        should = (name == "advantages") == (claim == "policy-gradient")
        does = reacts(loss, batches, tuple(arguments))
        if should and not does:
            yield f"the gradient does not depend on {name}"
        elif does and not should:
            swapped = ": are old_logprobs and ref_logprobs swapped?" * (name == "ref_logprobs")
            yield f"the gradient depends on {name}, the claimed one does not{swapped}"


def diagnose(loss: Callable, claim: str, result: Result) -> Iterator[str]:
    """What is wrong with a loss that does not satisfy the claim, the most certain first."""
    largest = max(float(weights.abs().max()) for weights in result.weights)
    zero = [float(each.abs().max()) <= TOLERANCE * largest for each in result.expected]
    if not largest and token_weights(loss, all_batches(SHAPES[0], NEAR)[0]).any():
        yield "it has a gradient only off-policy: are old_logprobs and ref_logprobs swapped?"
    elif not largest:
        yield "no gradient reaches logprobs: they are detached, not used, or always clipped"
    else:
        yield from wrong_mask(loss, result)
        if all(zero):
            yield ("the expected gradient is 0, as that of k1 in the loss, because "
                   "E[grad log pi] = 0: the loss adds only noise")
        elif any(zero):
            yield "the expected gradient of batches of one is 0: is the batch's mean subtracted?"
        elif not all(each.holds for each in result.fits[claim]):
            yield from gradient_mistakes(loss, claim, result)


def gradient_mistakes(loss: Callable, claim: str, result: Result) -> Iterator[str]:
    """Why the expected gradient is not the claimed one."""
    for other, fits in result.fits.items():
        if all(each.error < TOLERANCE for each in fits):
            ratio = importance_ratio(loss, other)
            flipped = "the sign is flipped" if fits[0].c < 0 else ""
            instead = f"it satisfies {other}" if other != claim else ""
            exponent = f"it uses {ratio}" if "wrong sign" in ratio else ""
            yield "; ".join(filter(None, [instead, flipped, exponent]))
            return
    if parts := mixture(result):
        yield f"it is a sum of two: {parts}"
        return
    fits = result.fits[claim]
    name, c = matching_factor(known_mistakes, claim, [all_batches(shape) for shape in SHAPES],
                              result.expected)
    if name:
        yield "the sign is flipped, and " * (c < 0) + name
    elif all(each.error < 1e-5 for each in fits):
        yield "it is right to the precision of float32 only: it converts the tensors"
    elif all(each.own_error < TOLERANCE for each in fits):
        own_c = fits[0].own_c
        yield (f"its direction is right, but c depends on the policy or the scores: "
               f"{own_c.min():.3g} to {own_c.max():.3g}")
    else:
        yield from wrong_inputs(loss, claim)
        yield "relative error " + ", ".join(
            f"{each.error:.2g} for {list(shape)}" for each, shape in zip(fits, SHAPES))
