"""Check a loss against the gradient that it claims to have.

    python -m minirlhf.lab.conformance my_loss.py:loss --claims policy-gradient
    python -m minirlhf.lab.conformance my_loss.py:k3 --kl

loss(logprobs, old_logprobs, ref_logprobs, advantages, mask) returns a scalar. `mask` is bool, the
others are float64, all [B, R]. The advantage of a token is the score of its whole response. Beyond
the mask are random numbers as large as the real ones.

The loss is called on every batch of one and of two responses of a small world, with three policies,
each with its own reference and score function. A claim holds if on-policy (old_logprobs ==
logprobs) the expected gradient is c times the claimed gradient to 1e-9, where c > 0 may depend on
the shape [B, R] only, and if no token beyond the mask has a gradient.

--kl: estimator(logprobs, ref_logprobs) returns [B, R]; the mean of its sum over a response must be
KL(policy || reference) of whole responses.

Exit status: 0 the claim holds, 1 it does not or the loss makes a known mistake off-policy, 2 the
function cannot be called.
"""

import functools
import sys
from collections.abc import Callable

from minirlhf.data.splits import load_function
from minirlhf.lab.conformance_gradients import (
    CLAIMS,
    SHAPES,
    TOLERANCE,
    all_batches,
    claimed_gradients,
    examine,
    kl_means,
    loss_gradients,
    relative_error,
)
from minirlhf.lab.conformance_mistakes import diagnose, importance_ratio, swaps_minimum
from minirlhf.run.command_line import Parser, fail
from minirlhf.run.errors import UserError
from minirlhf.run.terminal import echo

import torch

DISTANCES = (0.01, 0.1)  # KL(old || policy) of whole responses, nats


def check_loss(loss: Callable, claim: str | None, needs_off_policy: bool) -> bool:
    """Print the report. Returns whether the claim holds, on-policy or at all distances.

    False too if the loss makes a known mistake off-policy.
    """
    result = examine(loss)
    if claim is None:
        cosines = {name: min((each.cosine for each in fits), key=abs)
                   for name, fits in result.fits.items()}
        claim = max(cosines, key=lambda name: abs(cosines[name]))
        echo(f"no claim given; the closest is {claim}, cosine {cosines[claim]:.3f}")
    fits = result.fits[claim]
    if not result.holds(claim):
        echo(f"{claim} ({CLAIMS[claim]}): does not hold")
        echo("  " + "\n  ".join(list(diagnose(loss, claim, result))[:2]))
        return False
    echo(f"{claim} ({CLAIMS[claim]}): holds on-policy")
    factors = ", ".join(f"{each.c:.3g} for {list(shape)}" for each, shape in zip(fits, SHAPES))
    echo(f"  relative error {max(each.error for each in fits):.0e}; c = {factors}")
    holds = True
    for kl in DISTANCES:
        actual = loss_gradients(loss, all_batches(SHAPES[0], kl))
        error = relative_error(actual, fits[0].c * claimed_gradients(claim))
        holds = holds and error < TOLERANCE
        echo(f"  off-policy, KL(old || policy) = {kl} nats: relative error up to {error:.1g}")
    ratio = importance_ratio(loss, claim) or "an unknown importance ratio"
    echo(f"  off-policy it uses {ratio}")
    is_swapped = claim == "policy-gradient" and swaps_minimum(loss)
    if is_swapped:
        echo("  off-policy it clips tokens that moved against their advantage, not the others: "
             "are minimum and maximum swapped?")
    if needs_off_policy and not holds:
        echo("  does not hold off-policy")
    return (holds or not needs_off_policy) and not is_swapped and "wrong sign" not in ratio


def check_estimator(estimator: Callable) -> bool:
    """Print the report of --kl. Returns whether the estimator is unbiased."""
    means, exact = kl_means(estimator)
    for number, (mean, kl) in enumerate(zip(means, exact), start=1):
        echo(f"policy {number}: mean over responses {mean:.6f} nats, "
             f"KL(policy || reference) {kl:.6f} nats")
    is_kl = functools.partial(torch.allclose, exact, rtol=TOLERANCE, atol=0.0)
    holds = is_kl(means)
    reason = ""
    if is_kl(-means):
        reason = ": the sign is flipped"
    elif not holds and is_kl(kl_means(lambda logprobs, ref: estimator(ref, logprobs))[0]):
        reason = ": the log-ratio has the wrong sign"
    echo("unbiased" if holds else "its mean is not the KL" + reason)
    return holds


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(prog="python -m minirlhf.lab.conformance", allow_abbrev=False,
                    description="Check a loss against the gradient that it claims to have.")
    parser.add_argument("function", help="MODULE:FUNCTION or path/to/file.py:FUNCTION")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--claims", choices=CLAIMS, metavar="CLAIM",
                      help=f"one of {', '.join(CLAIMS)}; default: the closest one")
    kind.add_argument("--kl", action="store_true",
                      help="the function is an estimator of the KL, not a loss")
    parser.add_argument("--off-policy", action="store_true",
                        help="the claim must also hold if another policy sampled the responses")
    try:
        options = parser.parse_args(arguments)
        function = load_function(options.function, "function")
        holds = (check_estimator(function) if options.kl else
                 check_loss(function, options.claims, options.off_policy))
        return 0 if holds else 1
    except UserError as error:
        fail(str(error), 2)


if __name__ == "__main__":
    sys.exit(main())
