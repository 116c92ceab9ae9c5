"""The lab that checks a loss against its claim: right losses pass, ten wrong ones are diagnosed."""

import re

from minirlhf.lab import conformance, conformance_gradients, conformance_mistakes
from minirlhf.rl.losses import kl_k2, kl_k3, policy_gradient_loss, ppo_loss

import pytest
import tiny
import torch

LIMIT = 3  # a constant denominator


# ---- losses that are right -----------------------------------------------------------------------


def masked_sum(values, mask):
    return torch.where(mask, values, 0.0).sum()


def project_policy_gradient(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return policy_gradient_loss(logprobs, advantages, mask, len(mask) * LIMIT)


def project_ppo(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return ppo_loss(logprobs, old_logprobs, advantages, mask, 0.2, len(mask) * LIMIT)


def whole_response_ratio(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).sum(1)
    return -(log_ratio.exp() * advantages[:, 0]).mean()


def k1_in_reward(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0).detach()
    to_go = kl.flip(1).cumsum(1).flip(1)
    return masked_sum(to_go * logprobs, mask) / len(mask)


def k2_in_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return masked_sum(kl_k2(logprobs, ref_logprobs), mask) / len(mask)


def k3_in_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return masked_sum(kl_k3(logprobs, ref_logprobs), mask) / len(mask)


def ratio_times_k1(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).sum(1).exp()
    return (ratio * torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1)).mean()


# ---- losses that are wrong -----------------------------------------------------------------------


def flipped_sign(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return -project_ppo(logprobs, old_logprobs, ref_logprobs, advantages, mask)


def forgotten_mask(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return -((logprobs - old_logprobs).exp() * advantages).mean()


def k1_in_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return masked_sum(logprobs - ref_logprobs, mask)


def wrong_exponent(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return -masked_sum((old_logprobs - logprobs).exp() * advantages, mask)


def mean_of_means(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    surrogate = torch.where(mask, (logprobs - old_logprobs).exp() * advantages, 0.0)
    return -(surrogate.sum(1) / mask.sum(1)).mean()


def token_mean(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return -masked_sum((logprobs - old_logprobs).exp() * advantages, mask) / mask.sum()


def lost_token(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    surrogate = (logprobs - old_logprobs).exp() * advantages
    return -masked_sum(surrogate[:, :-1], mask[:, 1:])


def detached(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return project_ppo(logprobs.detach(), old_logprobs, ref_logprobs, advantages, mask)


def swapped_policies(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return project_ppo(logprobs, ref_logprobs, old_logprobs, advantages, mask)


def ratio_with_gradient(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    """The ratio of a policy gradient must be detached; in ppo it replaces the log-prob."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    return -torch.where(mask, ratio * advantages * logprobs, 0.0).sum() / mask.shape[0]


def squared_advantage(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return project_ppo(logprobs, old_logprobs, ref_logprobs, advantages**2, mask)


# ---- more that are wrong -------------------------------------------------------------------------


def shifted_mask(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    surrogate = (logprobs - old_logprobs).exp() * advantages
    return -masked_sum(surrogate[:, 1:], mask[:, :-1])


def centered_advantage(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    centered = advantages - masked_sum(advantages, mask) / mask.sum()
    return project_ppo(logprobs, old_logprobs, ref_logprobs, centered, mask)


def whitened_with_padding(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    whitened = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
    return project_ppo(logprobs, old_logprobs, ref_logprobs, whitened, mask)


def clipped_on_policy(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).exp().clamp(max=0.8)
    return -masked_sum(ratio * advantages, mask)


def ratio_of_one_half(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    ratio = (0.5 * (logprobs - old_logprobs)).exp()
    return -masked_sum(ratio * advantages, mask)


def with_kl(*arguments):
    return LIMIT * project_ppo(*arguments) + 0.04 * k3_in_loss(*arguments)


def swapped_k2(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return k2_in_loss(logprobs, ref_logprobs, old_logprobs, advantages, mask)


def in_float32(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    arguments = [x.float() for x in (logprobs, old_logprobs, ref_logprobs, advantages)]
    return project_ppo(*arguments, mask)


def reversed_k3(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return masked_sum(kl_k3(ref_logprobs, logprobs), mask) / len(mask)


def positive_only(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return project_ppo(logprobs, old_logprobs, ref_logprobs, advantages.relu(), mask)


# ---- losses that are wrong off-policy only -------------------------------------------------------


def clipped_by(choose, logprobs, old_logprobs, advantages, mask):
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    return -masked_sum(choose(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages), mask)


def maximum(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return clipped_by(torch.maximum, logprobs, old_logprobs, advantages, mask)


def minimum_of_the_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    """The same mistake with the sign inside."""
    return -clipped_by(torch.minimum, logprobs, old_logprobs, -advantages, mask)


def always_clamped(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return clipped_by(lambda _, clipped: clipped, logprobs, old_logprobs, advantages, mask)


def dual_clip(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    """PPO that also stops at a ratio of 1.5 if the advantage is negative."""

    def choose(objective, clipped):
        smaller = torch.minimum(objective, clipped)
        return torch.where(advantages < 0, torch.maximum(smaller, 1.5 * advantages), smaller)

    return clipped_by(choose, logprobs, old_logprobs, advantages, mask)


# ---- functions that cannot be checked ------------------------------------------------------------


def raises(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    raise ValueError("no such option")


def exits(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    raise SystemExit(0)


def two_arguments(logprobs, advantages):
    return logprobs.sum()


def of_a_rollout(logprobs, rollout, config, denominator):
    return logprobs.sum() / denominator


def as_number(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return project_ppo(logprobs, old_logprobs, ref_logprobs, advantages, mask).item()


def one_loss_per_row(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return logprobs.sum(1)


def not_a_number(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return logprobs.sum() * float("nan")


def gradient_not_a_number(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    return torch.where(mask, logprobs, 0.0).sum() + ((logprobs - logprobs.detach()).sqrt()).sum()


def nothing(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    logprobs.sum()


# ---- estimators ----------------------------------------------------------------------------------


def minus_k1(logprobs, ref_logprobs):
    return ref_logprobs - logprobs


def minus_k3(logprobs, ref_logprobs):
    return -kl_k3(logprobs, ref_logprobs)


def swapped_k3(logprobs, ref_logprobs):
    return kl_k3(ref_logprobs, logprobs)


def mean_of_k1(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).mean(1)


def infinite(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs) / 0.0


def check(capsys, function, *flags):
    """Exit status and output of the command. A name without a colon is a function of this file."""
    name = function if ":" in function else f"{__name__}:{function}"
    capsys.readouterr()
    try:
        status = conformance.main([name, *flags])
    except SystemExit as ending:
        status = ending.code
    output = capsys.readouterr()
    return status, output.out + output.err


@pytest.mark.parametrize(
    "function, claim",
    [
        ("project_policy_gradient", "policy-gradient"),
        ("project_ppo", "policy-gradient"),
        ("whole_response_ratio", "policy-gradient"),
        ("k1_in_reward", "reverse-kl"),
        ("ratio_times_k1", "reverse-kl"),
        ("k2_in_loss", "reverse-kl-per-state"),
        ("k3_in_loss", "forward-kl-per-state"),
    ],
)
def test_a_right_loss_satisfies_its_claim_and_is_recognized_without_one(function, claim, capsys):
    status, output = check(capsys, function, "--claims", claim)
    assert (status, output.count("holds on-policy")) == (0, 1), output
    status, output = check(capsys, function)
    assert (status, f"the closest is {claim}" in output) == (0, True), output


@pytest.mark.parametrize(
    "function, claim, words",
    [
        ("flipped_sign", "policy-gradient", "the sign is flipped\n"),
        ("forgotten_mask", "policy-gradient", "the mask is forgotten"),
        ("k1_in_loss", "reverse-kl", "the expected gradient is 0, as that of k1 in the loss"),
        ("wrong_exponent", "policy-gradient", "flipped; it uses the ratio old / policy"),
        ("mean_of_means", "policy-gradient", "divided by its own length"),
        ("token_mean", "policy-gradient", "divided by the number of tokens in the batch"),
        ("lost_token", "policy-gradient", "the last token of each response has no gradient"),
        ("detached", "policy-gradient", "no gradient reaches logprobs"),
        ("swapped_policies", "policy-gradient", "or ref_logprobs in place of old_logprobs?"),
        ("ratio_with_gradient", "policy-gradient", "has a gradient too: detach it"),
        ("squared_advantage", "policy-gradient", "the advantage is squared"),
        # more
        ("shifted_mask", "policy-gradient", "the first token of each response has no gradient"),
        ("centered_advantage", "policy-gradient", "batches of one is 0: is the batch's mean"),
        ("whitened_with_padding", "policy-gradient", "depends on the numbers beyond the mask"),
        ("clipped_on_policy", "policy-gradient", "no gradient reaches logprobs"),
        ("swapped_k2", "reverse-kl-per-state", "a gradient only off-policy: are old_logprobs"),
        ("in_float32", "policy-gradient", "the precision of float32 only"),
        ("reversed_k3", "reverse-kl-per-state", "forward-kl-per-state, but the log-ratio of"),
        ("positive_only", "policy-gradient", "a negative advantage have no gradient"),
        ("with_kl", "policy-gradient", "1 policy-gradient + 0.04 forward-kl-per-state for [1, 3]"),
        ("k2_in_loss", "reverse-kl", "it satisfies reverse-kl-per-state"),
        ("k3_in_loss", "reverse-kl", "it satisfies forward-kl-per-state"),
        ("project_ppo", "reverse-kl", "it satisfies policy-gradient"),
    ],
)
def test_a_wrong_loss_is_diagnosed(function, claim, words, capsys):
    """In one or two lines below the first."""
    status, output = check(capsys, function, "--claims", claim)
    assert status == 1
    first_line, *reasons = output.splitlines()
    assert first_line.startswith(claim) and first_line.endswith("does not hold")
    assert words in output, output
    assert 1 <= len(reasons) <= 2


def test_the_constant_depends_on_the_shape_only_and_is_printed(capsys):
    """ppo_loss is divided by 3 times the number of responses, so c = 1/3 for all shapes."""
    assert (
        "c = 0.333 for [1, 3], 0.333 for [1, 5], 0.333 for [2, 4]"
        in check(capsys, "project_ppo")[1]
    )


def test_a_constant_that_depends_on_the_policy_is_not_accepted():
    result = conformance_gradients.examine(project_ppo)
    assert result.holds("policy-gradient")
    scale = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None]
    expected = [scale * each for each in result.expected]
    target = conformance_gradients.claimed_gradients("policy-gradient")
    fits = [conformance_gradients.fit(each, target) for each in expected]
    result = result._replace(expected=expected, fits={"policy-gradient": fits})
    assert not result.holds("policy-gradient")
    (reason,) = conformance_mistakes.diagnose(project_ppo, "policy-gradient", result)
    assert reason.endswith("c depends on the policy or the scores: 0.333 to 1")


@pytest.mark.parametrize(
    "function, status, words",
    [
        ("whole_response_ratio", 0, "the ratio policy / old of the whole response"),
        ("project_ppo", 1, "the ratio policy / old of each token"),
        ("project_policy_gradient", 1, "no importance ratio"),
        ("ratio_of_one_half", 1, "an unknown importance ratio"),
    ],
)
def test_off_policy_is_reported_and_counts_only_if_asked(function, status, words, capsys):
    claim = ("--claims", "policy-gradient")
    if function != "ratio_of_one_half":  # whose on-policy gradient is right too
        assert check(capsys, function, *claim)[0] == 0
    got, output = check(capsys, function, *claim, "--off-policy")
    assert got == status and f"off-policy it uses {words}\n" in output, output
    assert ("does not hold off-policy" in output) == (status == 1)
    for kl in ("0.01", "0.1"):
        assert f"off-policy, KL(old || policy) = {kl} nats: relative error up to " in output


@pytest.mark.parametrize(
    "function, swapped",
    [
        ("maximum", True),
        ("minimum_of_the_loss", True),
        ("project_ppo", False),
        ("project_policy_gradient", False),
        ("always_clamped", False),
        ("dual_clip", False),
        ("k2_in_loss", False),
    ],
)
def test_a_maximum_in_place_of_the_minimum_is_recognized_off_policy(function, swapped, capsys):
    """On-policy its gradient is right, so the claim holds. The exit status is 1 all the same."""
    status, output = check(capsys, function)
    assert ("are minimum and maximum swapped?" in output) == swapped, output
    assert status == (1 if swapped else 0)
    assert output.count("holds on-policy") == 1


@pytest.mark.parametrize(
    "function, flags, words",
    [
        ("raises", [], "raised ValueError: no such option"),
        ("exits", [], "raised SystemExit: 0"),
        ("two_arguments", [], "raised TypeError"),
        (
            "of_a_rollout",
            [],
            "(logprobs, old_logprobs, ref_logprobs, advantages, mask) raised Type",
        ),
        ("minus_k1", [], "without --kl, function(logprobs, old_logprobs, ref_"),
        (
            "one_loss_per_row",
            [],
            "returned a tensor of shape [1], not a tensor of shape [] (a scalar)",
        ),
        ("as_number", [], "(float), not a tensor of shape [] (a scalar)"),
        ("not_a_number", [], "returned nan for a batch with the mask [[1, 0, 0]]"),
        ("gradient_not_a_number", [], "the gradient of the function is not finite"),
        ("nothing", [], "returned None (NoneType), not a tensor"),
        ("absent", [], "no such function"),
        ("nowhere:loss", [], "its import raised ModuleNotFoundError"),
        ("nowhere.py:loss", [], "its import raised FileNotFoundError"),
        ("project_ppo", ["--claims", "ppo"], "invalid choice: 'ppo'"),
        ("project_ppo", ["--claim", "policy-gradient"], "unrecognized arguments"),
        ("minus_k1", ["--kl", "--claims", "reverse-kl"], "not allowed with argument"),
        ("mean_of_k1", ["--kl"], "returned a tensor of shape [15], not a tensor of shape [15, 5]"),
        ("infinite", ["--kl"], "returned a value that is not finite"),
        ("nothing", ["--kl"], "with --kl, function(logprobs, ref_logprobs) raised TypeError"),
    ],
)
def test_a_function_that_cannot_be_checked_is_one_line(function, flags, words, capsys):
    status, output = check(capsys, function, *flags)
    assert status == 2
    assert output.startswith("error: ") and output.count("\n") == 1 and words in output, output


@pytest.mark.parametrize(
    "function, status, last_line",
    [
        ("minirlhf.rl.losses:kl_k1", 0, "unbiased"),
        ("minirlhf.rl.losses:kl_k3", 0, "unbiased"),
        ("minirlhf.rl.losses:kl_k2", 1, "its mean is not the KL"),
        ("minus_k3", 1, "its mean is not the KL: the sign is flipped"),
        ("swapped_k3", 1, "its mean is not the KL: the log-ratio has the wrong sign"),
    ],
)
def test_an_estimator_is_compared_with_the_kl_of_whole_responses(
    function, status, last_line, capsys
):
    got, output = check(capsys, function, "--kl")
    lines = output.splitlines()
    assert (got, lines[-1]) == (status, last_line)
    assert [line.partition(":")[0] for line in lines[:-1]] == ["policy 1", "policy 2", "policy 3"]


def test_a_function_can_be_named_by_the_path_of_its_file(tmp_path, capsys):
    """Files with the same name do not replace each other, and may import their neighbors."""
    for folder, sign in (("a", "-"), ("b", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_loss.py").write_text(
            f"import neighbor_{folder}\n\n\ndef loss(logprobs, old, ref, advantages, mask):\n"
            f"    return {sign}(logprobs * advantages)[mask].sum()\n"
        )
        (tmp_path / folder / f"neighbor_{folder}.py").write_text("")
    claim = ("--claims", "policy-gradient")
    assert check(capsys, f"{tmp_path}/a/my_loss.py:loss", *claim)[0] == 0
    assert check(capsys, f"{tmp_path}/b/my_loss.py:loss", *claim)[0] == 1


def test_the_page_shows_what_the_program_prints(tmp_path, capsys):
    """The example of the lab's page, apart from the rounding error."""
    page = (tiny.ROOT / "minirlhf" / "lab" / "README.md").read_text()
    section = page.partition("## Your own loss against its claim\n")[2].partition("\n## ")[0]
    (tmp_path / "my_loss.py").write_text(
        re.search(r"```python\n(.*?)^```", section, re.M | re.S)[1]
    )
    shown = re.findall(r"```text\n(.*?)^```", section, re.M | re.S)
    assert len(shown) == 2
    for text, name in zip(shown, ("loss", "mean_loss")):
        function = f"{tmp_path}/my_loss.py:{name}"
        output = check(capsys, function, "--claims", "policy-gradient")[1]
        assert re.sub(r"\de-1\d", "0", output) == re.sub(r"\de-1\d", "0", text)
    claims = re.findall(r"^\| `([\w-]+)` \|", section, re.M)
    assert claims == list(conformance_gradients.CLAIMS)
