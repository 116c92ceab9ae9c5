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
    loss_gradients,
    token_weights,
)

import torch
from torch import Tensor

# KL(old || policy), nats
NEAR = 1e-4  # so small that the usual clipping changes no ratio
FAR = 1.0  # so large that it clips many tokens


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
    """What each mistake multiplies the standard weights by; "" is none."""
    logprobs, _, ref_logprobs, advantages, mask = batches.arguments
    length = mask.sum(-1, keepdim=True).double()
    position = mask.cumsum(-1)
    return {
        "": torch.ones_like(logprobs),
        "each response is divided by its own length; divide by a constant": 1 / length,
        "the sum is divided by the number of tokens in the batch, which depends on the policy; "
        "divide by a constant": 1 / length.sum(-2, keepdim=True),
        "the last token of each response has no gradient: is a tensor shifted by one?":
            position < length,
        "the first token of each response has no gradient: is a tensor shifted by one?":
            position > 1,
        "the log-ratio of logprobs and ref_logprobs has the wrong sign":
            torch.where(mask, logprobs - ref_logprobs, 0.0).exp(),
        "the ratio multiplies the log-prob and has a gradient too: detach it": 1 + logprobs,
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
    """(the factor that gives these gradients, its c); ("", 0) if there is none."""
    def compare(name: str, index: int) -> Fit:
        weights = [standard_weights(claim, b) * factors(b)[name] for b in batches[index]]
        return fit(expected[index], expected_gradients(batches[index], weights))

    for name in factors(batches[0][0]):
        if all(compare(name, index).error < TOLERANCE for index in range(len(batches))):
            return name, compare(name, 0).c
    return "", 0.0


def mixture(result: Result) -> str:
    """The two claims whose weighted sum is the expected gradient, or ""."""
    targets = {claim: claimed_gradients(claim).flatten() for claim in CLAIMS}
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
    return matching_factor(importance_ratios, claim, [batches], [loss_gradients(loss, batches)])[0]


def swaps_minimum(loss: Callable) -> bool:
    """Whether clipping stops tokens that moved against their advantage, and no others."""
    batches = all_batches(SHAPES[0], FAR)[0]
    logprobs, old_logprobs, _, advantages, mask = batches.arguments
    stopped = mask & (token_weights(loss, batches) == 0)
    moved = ((logprobs - old_logprobs) * advantages)[stopped]
    return bool(len(moved) and (moved < 0).all())


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
        yield ("the gradient depends on the numbers beyond the mask: a sum or mean forgets the "
               "mask, or a tensor is shifted")


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
            swapped = (": a KL term, or ref_logprobs in place of old_logprobs?"
                       * (name == "ref_logprobs"))
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
    batches = [all_batches(shape) for shape in SHAPES]
    for other in (claim, *CLAIMS):
        name, c = matching_factor(known_mistakes, other, batches, result.expected)
        if c:
            ratio = importance_ratio(loss, other)
            mistakes = ["the sign is flipped" * (c < 0), name,
                        f"it uses {ratio}" * ("wrong sign" in ratio)]
            instead = f"it satisfies {other}" * (other != claim)
            yield ", but ".join(filter(None, [instead, "; ".join(filter(None, mistakes))]))
            return
    if parts := mixture(result):
        yield f"it is a sum of two: {parts}"
        return
    fits = result.fits[claim]
    if all(each.error < 1e-5 for each in fits):
        yield "it is right to the precision of float32 only: it converts the tensors"
    elif all(each.own_error < TOLERANCE for each in fits):
        own_c = fits[0].own_c
        yield (f"its direction is right, but c depends on the policy or the scores: "
               f"{own_c.min():.3g} to {own_c.max():.3g}")
    else:
        yield from wrong_inputs(loss, claim)
        yield "relative error " + ", ".join(
            f"{each.error:.2g} for {list(shape)}" for each, shape in zip(fits, SHAPES))
