"""Identities of estimators, exact over all responses of a small world, in float64.

"On-policy": the responses come from the policy that is differentiated.
"""

import json
import math
import xml.dom.minidom

from minirlhf.lab import estimators, small_world
from minirlhf.lab.estimators import (
    FAMILIES,
    Problem,
    best_of_n_kl,
    compare,
    dpo_rows,
    expected_gradient,
    make_problem,
    rest_point,
    whitened,
)
from minirlhf.lab.small_world import (
    batch_gradients,
    gradient,
    list_batches,
    logits_of,
    make_world,
    move,
    probabilities,
    random_logits,
    random_scores,
    response_kl,
    state_kl,
    token_logprobs,
    visits,
)

import pytest
import tiny
import torch
from torch import Tensor

EXACT = 1e-9  # relative error

WORLD = make_world()
REF = random_logits(WORLD, 0, "reference")
PI = move(WORLD, REF, seed=0, kl=0.5)
OLD = move(WORLD, PI, seed=1, kl=0.05)
SCORES = random_scores(WORLD, 0)
ON_POLICY = Problem(WORLD, PI, PI, REF, SCORES)
OFF_POLICY = Problem(WORLD, PI, OLD, REF, SCORES)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# ---- the world -----------------------------------------------------------------------------------


def test_the_world_lists_every_response_once():
    rows = zip(WORLD.response_ids.tolist(), WORLD.mask.sum(1).tolist())
    responses = [tuple(ids[:length]) for ids, length in rows]
    assert len(set(responses)) == len(responses) == 1 + 3 + 9 + 27 + 81
    assert [3] in [list(response) for response in responses]  # EOS alone
    assert all(3 not in response[:-1] for response in responses)
    assert all(response[-1] == 3 or len(response) == 4 for response in responses)
    assert float(probabilities(WORLD, PI).sum()) == pytest.approx(1, rel=EXACT)


def test_a_state_is_the_response_so_far():
    prefixes: dict[int, set] = {}
    for ids, states, length in zip(WORLD.response_ids, WORLD.states, WORLD.mask.sum(1)):
        for t in range(int(length)):
            prefixes.setdefault(int(states[t]), set()).add(tuple(ids[:t].tolist()))
    assert len(prefixes) == WORLD.state_count == 40
    assert all(len(each) == 1 for each in prefixes.values())


def test_a_requested_kl_is_reached():
    assert float(response_kl(WORLD, PI, REF)) == pytest.approx(0.5, abs=1e-12)
    assert float(response_kl(WORLD, OLD, PI)) == pytest.approx(0.05, abs=1e-12)
    assert float(state_kl(WORLD, PI, REF)) == pytest.approx(0.5, abs=1e-12)  # the chain rule


def test_exact_gradients_agree_with_finite_differences():
    def function(logits: Tensor) -> Tensor:
        return response_kl(WORLD, logits, REF)

    exact = gradient(function, PI)
    for index in (0, 5, 77, 159):
        step = torch.zeros_like(PI)
        step.view(-1)[index] = 1e-5
        slope = (function(PI + step) - function(PI - step)) / 2e-5
        assert float(slope) == pytest.approx(float(exact[index]), rel=1e-6, abs=1e-9)


def test_batches_are_listed_with_their_number_of_orders():
    rows, orders = list_batches(5, 3)
    assert len(rows) == math.comb(7, 3) and float(orders.sum()) == 5**3


def test_gradients_of_batches_are_those_of_autograd():
    """A loss that is not linear in the log-probs, and groups of two."""
    rows = torch.tensor([[3, 90], [7, 7]])
    gradients = batch_gradients(WORLD, PI, rows, lambda x: (x.view(2, -1).sum(1) ** 2).sum())
    for row, actual in zip(rows, gradients):
        expected = gradient(lambda x, row=row: token_logprobs(WORLD, x)[row].sum() ** 2, PI)
        assert error(actual, expected) < EXACT
    assert small_world.make_rollout(WORLD, PI, REF, SCORES, rows.flatten()).mask.shape == (4, 4)


def test_a_policy_has_the_requested_response_probabilities():
    p = torch.rand(len(SCORES), dtype=torch.float64).softmax(0)
    assert torch.allclose(probabilities(WORLD, logits_of(WORLD, p)), p, rtol=1e-12)


# ---- the algorithms ------------------------------------------------------------------------------


def mean_gradient(name: str, problem: Problem) -> Tensor:
    """The expected gradient of a row."""
    (estimator,) = [rows[name] for rows in FAMILIES.values() if name in rows]
    return expected_gradient(estimator, problem)[0]


@pytest.mark.parametrize("name", ["reinforce", "reward-to-go", "baseline", "rloo"])
def test_unbiased_algorithms_have_the_exact_gradient(name):
    """On-policy, with a V that is half the true value."""
    result = compare(FAMILIES["Algorithms of this project"][name], 0, 0.0)
    assert result["error"] < EXACT and result["variance"] > 1


def test_the_other_algorithms_are_biased():
    """On-policy: gae and ppo by lam and a wrong V, grpo by the deviation and its KL term."""
    for name in ("gae", "ppo", "grpo"):
        assert compare(FAMILIES["Algorithms of this project"][name], 0, 0.0)["error"] > 0.01


# ---- KL placements -------------------------------------------------------------------------------


def kl_gradient() -> Tensor:
    return gradient(lambda x: response_kl(WORLD, x, REF), PI)


def per_state(function, weights: Tensor) -> Tensor:
    """The gradient of sum_s weights(s) function(log pi(. | s)), [S, V] to [S, V]."""
    return gradient(lambda x: (weights[:, None] * function(x.log_softmax(-1))).sum(), PI)


LOG_REF = REF.log_softmax(-1)


def kl_at_states(weights: Tensor) -> Tensor:
    return per_state(lambda log_pi: log_pi.exp() * (log_pi - LOG_REF), weights)


def reverse_kl_at_states(weights: Tensor) -> Tensor:
    """Of KL(ref || pi)."""
    return per_state(lambda log_pi: LOG_REF.exp() * (LOG_REF - log_pi), weights)


def test_k1_in_the_reward_is_exact_on_policy_only():
    assert error(mean_gradient("k1 in the reward", ON_POLICY), kl_gradient()) < EXACT
    assert error(mean_gradient("k1 in the reward", OFF_POLICY), kl_gradient()) > 0.05
    assert error(mean_gradient("-k1 in the reward", ON_POLICY), -kl_gradient()) < EXACT


def test_k1_in_the_loss_is_no_penalty():
    """On-policy its mean is 0. Off-policy it is minus the gradient of KL(old || pi).

    So it pushes the policy away from the one that sampled.
    """
    assert float(mean_gradient("k1 in the loss", ON_POLICY).norm()) < 1e-12
    away = -gradient(lambda x: response_kl(WORLD, OLD, x), PI)
    assert error(mean_gradient("k1 in the loss", OFF_POLICY), away) < EXACT


def test_k2_in_the_loss_is_the_kl_at_each_state():
    """On-policy. It ignores that the policy changes which states occur."""
    k2 = mean_gradient("k2 in the loss", ON_POLICY)
    at_states = kl_at_states(visits(WORLD, PI))
    assert error(k2, at_states) < EXACT
    assert error(k2, kl_gradient()) > 0.1
    assert error(gradient(lambda x: state_kl(WORLD, x, REF), PI), at_states) < EXACT


def test_token_ratio_times_k3_is_k2():
    """On-policy. Off-policy only if k2 has the detached ratio: the KL at states that old visits."""
    ratio_k3 = "token ratio x k3 in the loss"
    k2 = mean_gradient("k2 in the loss", ON_POLICY)
    assert error(mean_gradient(ratio_k3, ON_POLICY), k2) < EXACT
    off_policy = kl_at_states(visits(WORLD, OLD))
    assert error(mean_gradient(ratio_k3, OFF_POLICY), off_policy) < EXACT
    detached = mean_gradient("detached ratio x k2 in the loss", OFF_POLICY)
    assert error(detached, off_policy) < EXACT
    assert error(mean_gradient("k2 in the loss", OFF_POLICY), off_policy) > 0.05


def test_k3_in_the_loss_is_the_other_divergence():
    """On-policy: KL(ref || pi) at each state."""
    k3 = mean_gradient("k3 in the loss", ON_POLICY)
    assert error(k3, reverse_kl_at_states(visits(WORLD, PI))) < EXACT


def test_k3_in_the_reward_nearly_cancels():
    """On-policy: grad KL of responses - grad KL(ref || pi) at states. Both agree near ref."""
    expected = kl_gradient() - reverse_kl_at_states(visits(WORLD, PI))
    assert error(mean_gradient("k3 in the reward", ON_POLICY), expected) < EXACT


def test_k2_in_the_reward_nearly_cancels():
    """On-policy: grad E[k2] - grad KL at states."""

    def mean_k2(logits: Tensor) -> Tensor:
        log_ratio = token_logprobs(WORLD, logits) - token_logprobs(WORLD, REF)
        return (probabilities(WORLD, logits) * 0.5 * log_ratio.square().sum(1)).sum()

    expected = gradient(mean_k2, PI) - kl_at_states(visits(WORLD, PI))
    assert error(mean_gradient("k2 in the reward", ON_POLICY), expected) < EXACT


@pytest.mark.parametrize("problem", [ON_POLICY, OFF_POLICY], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("name", ["whole ratio x k1 in the loss", "whole ratio x k3 in the loss"])
def test_the_ratio_of_the_whole_response_is_exact(name, problem):
    assert error(mean_gradient(name, problem), kl_gradient()) < EXACT


def test_k3_of_the_inverse_ratio_is_half_the_chi_squared_divergence():
    """On-policy: exp(r) - 1 - r with r = log pi - log ref, at each state."""
    expected = per_state(lambda log_pi: 0.5 * (2 * log_pi - LOG_REF).exp(), visits(WORLD, PI))
    actual = mean_gradient("k3 of the inverse in the loss", ON_POLICY)
    assert error(actual, expected) < EXACT


# ---- denominators and group baselines, on-policy -------------------------------------------------

SMALL = make_problem(False, 0)


def score_gradient(problem: Problem, weights: Tensor | float = 1.0) -> Tensor:
    """Of the loss -E[score x weight], weights constant."""
    weighted = problem.scores * weights * probabilities(problem.world, problem.pi)
    return gradient(
        lambda x: -(weighted * token_logprobs(problem.world, x).sum(1)).sum(), problem.pi
    )


def test_a_constant_denominator_is_unbiased():
    assert error(mean_gradient("constant, B = 4", SMALL), score_gradient(SMALL)) < EXACT


def test_the_bias_of_the_own_length_does_not_depend_on_the_batch():
    """It is that of the score divided by the length, at any B."""
    expected = score_gradient(SMALL, 1 / SMALL.world.mask.sum(1).double())
    for batch in (1, 4):
        assert error(mean_gradient(f"own length, B = {batch}", SMALL), expected) < EXACT
    assert compare(FAMILIES["Denominators"]["own length, B = 4"], 0, 0.0)["error"] > 0.1


def test_the_bias_of_dividing_by_the_tokens_of_the_batch_is_of_order_1_over_b():
    rows = [FAMILIES["Denominators"][f"tokens of the batch, B = {n}"] for n in (1, 2, 3, 4)]
    scaled = [n * compare(each, 0, 0.0)["error"] for n, each in enumerate(rows, start=1)]
    assert scaled == pytest.approx([scaled[-1]] * 4, rel=0.1)
    assert scaled[0] > 0.1


def test_dividing_by_the_tokens_of_two_responses_equals_the_sum_over_pairs():
    lengths = SMALL.world.mask.sum(1)
    p = probabilities(SMALL.world, SMALL.pi)
    expected = 2 * score_gradient(SMALL, (p / (lengths[:, None] + lengths)).sum(1))
    assert error(mean_gradient("tokens of the batch, B = 2", SMALL), expected) < EXACT


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_mean_that_includes_the_response_scales_the_gradient(size):
    """By exactly (K - 1) / K. The mean of the others leaves it unchanged."""
    expected = score_gradient(SMALL) * (size - 1) / size
    assert error(mean_gradient(f"own mean, K = {size}", SMALL), expected) < EXACT
    if size == 4:
        others = mean_gradient("mean of the others, K = 4", SMALL)
        assert error(others, score_gradient(SMALL)) < EXACT


def test_grpo_in_pairs_keeps_only_the_sign():
    """With K = 2, (s_i - mean) / std is the sign of s_i - s_j over sqrt 2, up to the 1e-4."""
    p = probabilities(SMALL.world, SMALL.pi)
    difference = SMALL.scores[:, None] - SMALL.scores
    deviation = difference.abs() / math.sqrt(2)
    advantage = (difference / 2 / (deviation + 1e-4)) @ p
    expected = score_gradient(SMALL._replace(scores=advantage))
    assert error(mean_gradient("own mean / deviation, K = 2", SMALL), expected) < EXACT


def binary_factor(p: float, size: int) -> float:
    """c in E[A grad log pi] = c grad p: the mean over the other K - 1 scores, each 1 with p."""
    total = 0.0
    for ones in range(size):
        weight = math.comb(size - 1, ones) * p**ones * (1 - p) ** (size - 1 - ones)
        for own, sign in ((1, 1.0), (0, -1.0)):
            mean = (ones + own) / size
            std = math.sqrt(size / (size - 1) * mean * (1 - mean))
            total += sign * weight * (own - mean) / (std + 1e-4)
    return total


@pytest.mark.parametrize("size", [2, 3, 4])
def test_binary_scores_over_their_deviation(size):
    """K = 2 and 3 have the same factor for every prompt, so the direction of grad p is exact."""
    estimator = FAMILIES["Group baselines"][
        f"binary scores / deviation, K = {size}, two prompts"
    ]._replace(prompts=1)
    factors = []
    for seed in (0, 100):
        problem = make_problem(False, seed)
        p = estimators.success(problem, problem.pi)
        expected = -gradient(lambda x, q=problem: estimators.success(q, x), problem.pi)
        factors.append(binary_factor(float(p), size))
        actual, _ = expected_gradient(estimator, problem)
        assert error(actual, factors[-1] * expected) < EXACT
    same = factors[0] == pytest.approx(factors[1], rel=1e-9)
    assert same == (size < 4)


def test_large_groups_of_binary_scores_follow_the_arcsine():
    """The factor tends to 1 / sqrt(p (1 - p)): the gradient of 2 arcsin sqrt p."""
    for p in (0.1, 0.5, 0.8):
        limit = 1 / math.sqrt(p * (1 - p))
        errors = [abs(binary_factor(p, size) / limit - 1) for size in (16, 64, 256)]
        assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


# ---- importance ratios, off-policy ---------------------------------------------------------------


def test_only_the_ratio_of_the_whole_response_is_exact_off_policy():
    expected = score_gradient(OFF_POLICY)
    for name in FAMILIES["Importance ratios"]:
        if name == "geometric mean":
            continue  # has a factor 1 / length
        assert error(mean_gradient(name, ON_POLICY), expected) < EXACT, name
        off_policy = error(mean_gradient(name, OFF_POLICY), expected)
        exact = name == "whole response" or name == "whole response, truncated at 8"
        assert (off_policy < EXACT) == exact, name


def test_the_token_ratio_has_the_states_of_the_sampler():
    """sum_s d_old(s) sum_a pi(a | s) Q_old(s, a) grad log pi, with Q_old = E_old[score | s, a]."""
    p = probabilities(WORLD, OLD)
    sums = torch.zeros(WORLD.state_count, WORLD.vocab, dtype=torch.float64)
    for n, probability in enumerate(p):
        for t in range(int(WORLD.mask[n].sum())):
            sums[WORLD.states[n, t], WORLD.response_ids[n, t]] += probability * SCORES[n]
    weights = sums / OLD.softmax(-1)  # d_old(s) Q_old(s, a)
    expected = -gradient(lambda x: (weights * x.softmax(-1)).sum(), PI)
    assert error(mean_gradient("token", OFF_POLICY), expected) < EXACT


def test_truncation_at_1_takes_the_smaller_probability():
    p = torch.minimum(probabilities(WORLD, OLD), probabilities(WORLD, PI))
    expected = -gradient(lambda x: (p * SCORES * token_logprobs(WORLD, x).sum(1)).sum(), PI)
    actual = mean_gradient("whole response, truncated at 1", OFF_POLICY)
    assert error(actual, expected) < EXACT


def test_the_geometric_mean_divides_by_the_length():
    """GSPO: the gradient of E_old[(pi / old)^(1 / T) A]. Even on-policy it has the factor 1 / T."""
    lengths = WORLD.mask.sum(1).double()
    old = token_logprobs(WORLD, OLD).sum(1)

    def objective(logits: Tensor) -> Tensor:
        ratio = ((token_logprobs(WORLD, logits).sum(1) - old) / lengths).exp()
        return -(old.exp() * ratio * SCORES).sum()

    assert error(mean_gradient("geometric mean", OFF_POLICY), gradient(objective, PI)) < EXACT
    on_policy = score_gradient(ON_POLICY, 1 / lengths)
    assert error(mean_gradient("geometric mean", ON_POLICY), on_policy) < EXACT


# ---- samplers, whitening, best of n, DPO ---------------------------------------------------------


@pytest.mark.parametrize("name", ["temperature 0.6", "top-k 3 of 4", "top-p 0.9"])
def test_a_sampler_that_differs_from_the_loss_is_biased(name):
    """The mean is over the sampler's responses. With its own log-probs it would be exact."""
    sampler = FAMILIES["The sampler differs from the loss"][name].sampler
    p = probabilities(WORLD, sampler(PI))
    assert float(p.sum()) == pytest.approx(1, rel=EXACT)
    expected = -gradient(lambda x: (p * SCORES * token_logprobs(WORLD, x).sum(1)).sum(), PI)
    assert error(mean_gradient(name, ON_POLICY), expected) < EXACT
    assert error(expected, score_gradient(ON_POLICY)) > 0.01


def test_top_p_keeps_the_smallest_set_that_reaches_the_probability():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.91, 0.02, 0.02]]).log()
    kept = estimators.top_p(logits).isfinite().tolist()
    assert kept == [[True, True, True, False], [False, True, False, False]]
    assert estimators.top_k(logits[:1]).isfinite().tolist() == [[True, True, True, False]]


def test_the_bias_of_whitening_is_of_order_1_over_b():
    """On-policy, in a world of three responses. 1 / std has a bias of this order too."""
    world = make_world(vocab=2, limit=2)
    logits = torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64)
    scores = torch.tensor([1.0, -0.4, 0.7], dtype=torch.float64)
    problem = Problem(world, logits, logits, logits, scores)
    p = probabilities(world, logits)
    lengths = world.mask.sum(1)
    mean = (p * lengths * scores).sum() / (p * lengths).sum()  # over tokens
    std = ((p * lengths * (scores - mean) ** 2).sum() / (p * lengths).sum()).sqrt()
    limit = score_gradient(problem) / std
    scaled = []
    for batch in (16, 32, 64):
        estimator = estimators.row("", "", whitened, batch=batch)
        scaled.append(batch * error(expected_gradient(estimator, problem)[0], limit))
    assert scaled == pytest.approx([scaled[-1]] * 3, rel=0.15) and scaled[-1] > 0.1


def test_the_kl_of_best_of_n():
    """Below log n - (n - 1) / n, which it reaches if every response is unlikely."""
    p = probabilities(WORLD, REF)
    first = SCORES[:, None] >= SCORES
    best_of_two = (p[:, None] * p * first).sum(1) * 2 - p**2
    expected = float((best_of_two * (best_of_two / p).log()).sum())
    assert best_of_n_kl(p, SCORES, 2) == pytest.approx(expected, rel=EXACT)
    for n in (2, 4, 16, 64):
        assert 0 < best_of_n_kl(p, SCORES, n) < math.log(n) - (n - 1) / n
    many = torch.full((100_000,), 1e-5, dtype=torch.float64)
    order = torch.arange(100_000)
    assert best_of_n_kl(many, order, 4) == pytest.approx(math.log(4) - 3 / 4, abs=1e-4)
    limit = -math.log(float(p[SCORES.argmax()]))
    assert best_of_n_kl(p, SCORES, 10**7) == pytest.approx(limit, abs=1e-6)


def test_dpo_determines_the_policy_only_if_all_responses_are_seen():
    """Off-policy. At pi* the gradient is 0, and with half of the responses seen elsewhere too."""
    (_, at_best, best), (_, at_ref, _), *half = dpo_rows(ON_POLICY)
    assert float(at_best) < 1e-15 < 0.01 < float(at_ref)
    assert all(float(norm) < 1e-15 and float(value) < float(best) for _, norm, value in half)
    assert len({value for *_, value in half}) == 3


# ---- fixed points and the command ----------------------------------------------------------------


def test_where_training_comes_to_rest():
    """On-policy. k1 in the reward reaches pi*, k2 and k3 in the loss another policy.

    The numbers are those of the pages.
    """
    problem = make_problem(True, 0)
    expected = {
        "k1 in the reward": "0.000",
        "k2 in the loss": "0.668",
        "k3 in the loss": "0.854",
        "k1 in the loss": "",
        "k2 in the reward": "",
        "k3 in the reward": "",
        "-k1 in the reward": "",
    }
    for name, kl in expected.items():
        point = rest_point(name, problem, 0.5)
        assert point["converged"] == bool(kl), name
        if kl:
            assert f"{point['kl_from_optimum']:.3f}" == kl
            best = small_world.optimum(WORLD, problem.ref, problem.scores, 0.5)
            log_ref = token_logprobs(WORLD, problem.ref).sum(1)
            highest = float(best @ (problem.scores - 0.5 * (best.log() - log_ref)))
            assert (point["objective"] > highest - 1e-6) == (name == "k1 in the reward")
        else:
            assert point["kl_from_optimum"] > 20
    assert tuple(expected) == estimators.PLACEMENTS


def test_the_command_writes_a_page_its_data_and_a_picture(tmp_path, monkeypatch, capsys):
    """With two rows, one other world and one placement."""
    rows = {
        "KL penalty": {"k1 in the loss": FAMILIES["KL penalty"]["k1 in the loss"]},
        "Importance ratios": FAMILIES["Importance ratios"],
        "Samplers": {"top-p 0.9": FAMILIES["The sampler differs from the loss"]["top-p 0.9"]},
    }
    monkeypatch.setattr(estimators, "FAMILIES", rows)
    monkeypatch.setattr(estimators, "SEEDS", range(1, 2))
    monkeypatch.setattr(estimators, "PLACEMENTS", ("k1 in the loss",))
    flags = ["--out", str(tmp_path), "--fixed-points"]
    assert tiny.ending(estimators.main, estimators.EstimatorsConfig, flags) == 0
    page = (tmp_path / "estimators.md").read_text()
    assert page in capsys.readouterr().out
    assert "| k1 in the loss | `k1_t` | KL | 1 | - | 0 | 17.3 | 1.01 |" in page
    assert "| k1 in the loss | 0 | does not converge" in page
    data = json.loads((tmp_path / "estimators.json").read_text())
    off_policy = data["rows"]["Importance ratios"]["token"]["KL 0.1"]
    assert off_policy["error"] == pytest.approx(0.0694, abs=5e-5)
    # the stored world gives the stored number
    world = data["worlds"][2]
    problem = make_problem(True, 0)._replace(
        **{key: torch.tensor(world[key], dtype=torch.float64) for key in ("pi", "old", "scores")}
    )
    assert world["distance"] == 0.1
    expected = score_gradient(problem)
    assert error(mean_gradient("token", problem), expected) == pytest.approx(
        off_policy["error"], rel=1e-12
    )
    picture = xml.dom.minidom.parse(str(tmp_path / "estimators.svg"))
    assert len(picture.getElementsByTagName("polyline")) == 16  # 8 curves and 8 legends


def test_the_numbers_of_the_page():
    """The rows of the lab's table in the stated worlds, and all names exist."""
    page = (tiny.ROOT / "minirlhf" / "lab" / "README.md").read_text()
    section = page.partition("## Estimators against the exact gradient\n")[2].partition("\n## ")[0]
    rows = {name: each for family in FAMILIES.values() for name, each in family.items()}
    shown = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    shown = [cells for cells in shown if len(cells) == 6 and cells[1][:1].isdigit()]
    assert len(shown) > 25
    for name, on_policy, off_policy, variance, *_ in shown:
        estimator = rows[name.removeprefix("| ").removesuffix(" *")]
        assert name.endswith(" *") == estimator.rescaled
        here = compare(estimator, 0, 0.0)
        assert (on_policy, variance) == tuple(
            estimators.cell(here[key]) for key in ("error", "variance")
        ), name
        if off_policy != "-":
            assert off_policy == estimators.cell(compare(estimator, 0, 0.1)["error"]), name
    count = sum(map(len, FAMILIES.values()))
    assert f"The page that it writes has {count} rows" in " ".join(section.split())
