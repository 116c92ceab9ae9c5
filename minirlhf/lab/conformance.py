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

Exit status: 0 the claim holds, 1 it does not, 2 the function cannot be called.
"""

import sys
from collections.abc import Callable, Iterator

from minirlhf.data.splits import load_function
from minirlhf.lab.conformance_gradients import (
    CLAIMS,
    SHAPES,
    TOLERANCE,
    WORLD,
    all_batches,
    call,
    claimed_gradients,
    examine,
    expected_gradients,
    token_weights,
)
from minirlhf.lab.conformance_mistakes import diagnose, importance_ratio
from minirlhf.lab.small_world import probabilities, response_kl
from minirlhf.run.command_line import Parser, fail
from minirlhf.run.errors import UserError
from minirlhf.run.terminal import echo

import torch
from torch import Tensor

DISTANCES = (0.01, 0.1)  # KL(old || policy) of whole responses, nats


def off_policy(loss: Callable, claim: str, c: float) -> Iterator[tuple[float, float]]:
    """(KL(old || policy), largest relative error) of batches of one."""
    for kl in DISTANCES:
        batches = all_batches(SHAPES[0], kl)
        actual = expected_gradients(batches, [token_weights(loss, b) for b in batches])
        target = claimed_gradients(batches, claim)
        yield kl, float(((actual / c - target).norm(dim=1) / target.norm(dim=1)).max())


def check_loss(loss: Callable, claim: str | None, needs_off_policy: bool) -> bool:
    """Print the report. Returns whether the claim holds, on-policy or at all distances."""
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
    for kl, error in off_policy(loss, claim, fits[0].c):
        holds = holds and error < TOLERANCE
        echo(f"  off-policy, KL(old || policy) = {kl} nats: relative error up to {error:.1g}")
    ratio = importance_ratio(loss, claim) or "an unknown importance ratio"
    echo(f"  off-policy it uses {ratio}")
    if needs_off_policy and not holds:
        echo("  does not hold off-policy")
    return holds or not needs_off_policy


def check_estimator(estimator: Callable) -> bool:
    """Print the report of --kl. Returns whether the estimator is unbiased."""
    means = []
    for batches in all_batches(SHAPES[1]):
        logprobs, _, ref_logprobs, _, mask = (x[:, 0] for x in batches.arguments)
        values = call(estimator, logprobs, ref_logprobs)
        if not isinstance(values, Tensor) or values.shape != mask.shape:
            shape = list(values.shape) if isinstance(values, Tensor) else repr(values)
            raise UserError(f"the function returned {shape}; the log-probs had the shape "
                            f"{list(mask.shape)}")
        if not values[mask].isfinite().all():
            raise UserError("the function returned a value that is not finite")
        setting = batches.setting
        total = torch.where(mask, values, 0.0).sum(1)
        mean = float((probabilities(WORLD, setting.logits) * total).sum())
        exact = float(response_kl(WORLD, setting.logits, setting.ref))
        echo(f"mean over responses {mean:.6f} nats, KL(policy || reference) {exact:.6f} nats")
        means.append((mean, exact))
    holds = all(abs(mean - exact) < TOLERANCE * exact for mean, exact in means)
    flipped = all(abs(mean + exact) < TOLERANCE * exact for mean, exact in means)
    echo("unbiased" if holds else "its mean is not the KL" + ": the sign is flipped" * flipped)
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
        if options.kl:
            return 0 if check_estimator(function) else 1
        return 0 if check_loss(function, options.claims, options.off_policy) else 1
    except UserError as error:
        fail(str(error), 2)


if __name__ == "__main__":
    sys.exit(main())
