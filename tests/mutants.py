"""Do the tests notice one wrong line? It goes into a copy of the source, and a test must fail.

    python -m tests.mutants [--only ID ...] [--list] [--jobs N]

Nearly every mutant is a bug that trains without any error. Each runs the one test named for it, in
its own process. The tests must also pass on the unchanged source, or their failure proves nothing;
that is the last row. The exit status is 1 if a mutant survives, if a test fails on the unchanged
source, or if a mutant's old text does not occur exactly once in its file (then update the mutant).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
POLICY = "train_policy.py"
ADVANTAGES = "minirlhf/rl/advantages.py"
ALGORITHMS = "minirlhf/rl/algorithms.py"
LOSSES = "minirlhf/rl/losses.py"
ROLLOUT = "minirlhf/rl/rollout.py"
DPO = "minirlhf/rl/dpo.py"
SCORE = "minirlhf/rl/reward.py"
TRANSFORMER = "minirlhf/model/transformer.py"
GENERATE = "minirlhf/model/generate.py"
PARALLEL = "minirlhf/run/parallel.py"

RESUMED = "resume::a_policy_run_stopped_after_any_step_resumes_exactly[2]"
ONE_PROCESS = "distributed::several_processes_train_the_policy_of_one[2-ppo]"
OWN_ACTION = "rollout::each_column_belongs_to_its_own_action"
STOPPING = "rollout::the_decision_to_stop_is_learned"
STEP = "exact::expected_optimizer_step_is_along_the_policy_gradient"


class Mutant(NamedTuple):
    id: str
    file: str
    old: str  # occurs exactly once in the file
    new: str
    test: str  # "file::name" means tests/test_file.py::test_name


MUTANTS = [
    # Measurements of a rollout, and per-token rewards.
    Mutant(
        'kl-sign',
        ROLLOUT,
        'torch.where(mask, -kl_coef * kl_k1',
        'torch.where(mask, kl_coef * kl_k1',
        "exact::kl_penalty_lowers_the_mean_reward_and_is_not_clamped",
    ),
    Mutant(
        'kl-unmasked',
        ROLLOUT,
        'torch.where(mask, -kl_coef * kl_k1(logprobs, ref_logprobs), 0.0)',
        '-kl_coef * kl_k1(logprobs, ref_logprobs)',
        "rollout::padding_affects_no_reward",
    ),
    Mutant(
        'score-late',
        ROLLOUT,
        'mask.sum(1, keepdim=True) - 1',
        'mask.sum(1, keepdim=True)',
        "rollout::rewards_by_hand",
    ),
    Mutant(
        'score-on-every-token',
        ROLLOUT,
        'where(is_last, scores[:, None]',
        'where(mask, scores[:, None]',
        "rollout::rewards_by_hand",
    ),
    Mutant(
        'logits-late',
        ROLLOUT,
        'return model(ids, mask)[predicts_action]',
        'return model(ids, mask).roll(1, 1)[predicts_action]',
        OWN_ACTION,
    ),
    Mutant(
        'value-of-next-state',
        ROLLOUT,
        '(model.value_head, states)',
        '(model.value_head, states.roll(-1, 0))',
        OWN_ACTION,
    ),
    Mutant(
        'padding-attended-to',
        ROLLOUT,
        'return model(ids, mask)[',
        'return model(ids, torch.ones_like(mask))[',
        OWN_ACTION,
    ),
    Mutant(
        'measured-at-temperature-1',
        ROLLOUT,
        '                               config.temperature)',
        '                               1.0)',
        "rollout::the_temperature_divides_the_logits_of_policy_and_reference",
    ),
    Mutant(
        'logprob-detached',
        ROLLOUT,
        'zeros.masked_scatter(mask, logprobs)',
        'zeros.masked_scatter(mask, logprobs.detach())',
        STOPPING,
    ),
    Mutant(
        'eos-not-trained',
        ROLLOUT,
        "    mask = samples.response_mask\n"
        "    states = action_states(model, samples)\n"
        "    # the whole",
        "    mask = samples.response_mask & (samples.response_ids < model.config.vocab_size - 1)\n"
        "    samples = samples._replace(response_mask=mask)\n"
        "    states = action_states(model, samples)\n"
        "    # the whole",
        STOPPING,
    ),
    # Advantages.
    Mutant(
        'full-return-undiscounted',
        ADVANTAGES,
        'discounted_returns(rewards, mask, gamma)[:, :1]',
        'discounted_returns(rewards, mask, 1.0)[:, :1]',
        "advantages::discount_counts_from_the_current_step",
    ),
    Mutant(
        'gae-value-late',
        ADVANTAGES,
        '    values = torch.where(mask, values, 0.0)',
        '    values = torch.where(mask, values.roll(1, 1), 0.0)',
        "advantages::gae_is_zero_if_rewards_are_fixed_and_values_are_true",
    ),
    Mutant(
        'gae-bootstraps-past-the-end',
        ADVANTAGES,
        '    values = torch.where(mask, values, 0.0)\n',
        '',
        "advantages::a_response_cut_by_length_is_terminal",
    ),
    Mutant(
        'gae-without-lambda',
        ADVANTAGES,
        'mask, gamma * lam)',
        'mask, gamma)',
        "advantages::gae_at_lam_one_and_zero",
    ),
    Mutant(
        'rloo-includes-itself',
        ADVANTAGES,
        '(groups.sum(1, keepdim=True) - groups) / (group_size - 1)',
        'groups.mean(1, keepdim=True)',
        "advantages::leave_one_out_by_hand",
    ),
    Mutant(
        'whitens-with-padding',
        ADVANTAGES,
        'kept = standardized(advantages[mask], correction=0)',
        'kept = standardized(advantages.flatten(), correction=0)[mask.flatten()]',
        "advantages::whitening_uses_all_real_tokens_of_the_batch",
    ),
    Mutant(
        'returns-whitened',
        ALGORITHMS,
        'torch.where(rollout.mask, advantages + rollout.values, 0.0)',
        "torch.where(\n            rollout.mask, "
        "whiten(advantages, rollout.mask) + rollout.values, 0.0)",
        "advantages::whitening_follows_the_setting_and_never_changes_returns[gae]",
    ),
    # Losses.
    Mutant(
        'policy-loss-nan-gradient',
        LOSSES,
        'torch.where(mask, logprobs, 0.0) * torch.where(mask, advantages, 0.0)',
        'torch.where(mask, logprobs * advantages, 0.0)',
        "losses::padding_affects_no_loss_and_no_gradient",
    ),
    Mutant(
        'ppo-optimistic',
        LOSSES,
        '-torch.minimum(ratio',
        '-torch.maximum(ratio',
        "losses::ppo_loss_by_hand",
    ),
    Mutant(
        'value-clip-optimistic',
        LOSSES,
        'torch.maximum(squared',
        'torch.minimum(squared',
        "losses::value_loss_by_hand",
    ),
    Mutant(
        'kl-clamped',
        LOSSES,
        '    return logprobs - ref_logprobs',
        '    return (logprobs - ref_logprobs).clamp(min=0.0)',
        "exact::sampled_kl_estimates_have_the_exact_kl_as_their_mean",
    ),
    Mutant(
        'preference-overflows',
        LOSSES,
        '-F.logsigmoid(difference)',
        '-torch.log(torch.sigmoid(difference))',
        "losses::preference_loss_is_finite_for_any_difference",
    ),
    Mutant(
        'grpo-kl-reversed',
        ALGORITHMS,
        'logprobs[rollout.mask], rollout.ref_logprobs[rollout.mask]',
        'rollout.ref_logprobs[rollout.mask], logprobs[rollout.mask]',
        "exact::grpo_equals_its_own_exact_value",
    ),
    Mutant(
        'entropy-sign',
        ALGORITHMS,
        '- config.ent_coef',
        '+ config.ent_coef',
        "losses::the_parts_of_the_loss_add_up",
    ),
    Mutant(
        'value-loss-mean-of-means',
        ALGORITHMS,
        'config.value_clip_range, tokens)',
        'config.value_clip_range, float(mask.sum()))',
        "losses::the_gradient_does_not_depend_on_the_micro_batch_size",
    ),
    Mutant(
        'policy-loss-per-sampled-token',
        ALGORITHMS,
        'loss = call_row(algorithm.loss, (), logprobs, rollout, config, denominator)',
        'loss = call_row(algorithm.loss, (), logprobs, rollout, config, tokens)',
        STEP,
    ),
    # The loop.
    Mutant(
        'denominator-of-longest-sample',
        POLICY,
        'len(minibatch) * max_response_length',
        'len(minibatch) * rollout.mask.shape[1]',
        STEP,
    ),
    Mutant(
        'step-per-micro-batch',
        POLICY,
        'loss.backward()',
        'loss.backward()\n            optimizer.step()\n            optimizer.zero_grad()',
        "losses::the_update_does_not_depend_on_the_micro_batch_size",
    ),
    Mutant(
        'advantages-not-estimated',
        POLICY,
        'rollout = estimate_advantages(algorithm, rollout, config)',
        'estimate_advantages(algorithm, rollout, config)',
        "scripts::each_stage_of_an_iteration_gets_the_result_of_the_one_before",
    ),
    Mutant(
        'longest-sample-as-maximum',
        POLICY,
        '                             task.sampling.max_response_length)',
        '                             samples.response_ids.shape[1])',
        "scripts::each_stage_of_an_iteration_gets_the_result_of_the_one_before",
    ),
    Mutant(
        'prompts-of-step-0',
        POLICY,
        'next_prompts(task.train, algorithm, config, step)',
        'next_prompts(task.train, algorithm, config, 0)',
        "scripts::each_stage_of_an_iteration_gets_the_result_of_the_one_before",
    ),
    Mutant(
        'resumes-without-moments',
        "minirlhf/run/checkpoint.py",
        'optimizer.load_state_dict(dict(optimizer.state_dict(), state=state))',
        'pass',
        RESUMED,
    ),
    Mutant(
        'resumes-without-kl',
        POLICY,
        'state.get("kl_coef", config.kl_coef)',
        'config.kl_coef',
        RESUMED,
    ),
    Mutant(
        'pair-weights-ignored',
        LOSSES,
        '(weight * loss).sum() / weight.sum()',
        'loss.mean()',
        "plain::reward_model_training_is_equal_after_each_step",
    ),
    # Direct preference optimization.
    Mutant(
        'dpo-without-beta',
        DPO,
        'config.dpo_beta * (logprobs - ref_logprobs)',
        '(logprobs - ref_logprobs)',
        "dpo::loss_and_gradient_of_a_padded_batch_equal_the_formula",
    ),
    Mutant(
        'dpo-without-reference',
        DPO,
        'config.dpo_beta * (logprobs - ref_logprobs)',
        'config.dpo_beta * logprobs',
        "dpo::the_optimum_of_the_penalized_objective_minimizes_the_loss",
    ),
    Mutant(
        'dpo-with-the-prompt',
        DPO,
        'batch.attention_mask[:, 1:] & in_response.to(hidden.device)',
        'batch.attention_mask[:, 1:]',
        "dpo::response_logprobs_leave_out_the_prompt",
    ),
    Mutant(
        'dpo-first-token-missing',
        DPO,
        '>= prompt_lengths[:, None]',
        '> prompt_lengths[:, None]',
        "dpo::response_logprobs_leave_out_the_prompt",
    ),
    Mutant(
        'dpo-at-temperature-1',
        DPO,
        '                              temperature, vocab_size',
        '                              1.0, vocab_size',
        "dpo::response_logprobs_leave_out_the_prompt",
    ),
    Mutant(
        'dpo-repeats-an-iteration',
        DPO,
        'batch_of(step)]',
        'batch_of(step % steps)]',
        "dpo::each_iteration_has_the_next_pairs",
    ),
    Mutant(
        'dpo-micro-batches-count-equally',
        "minirlhf/rl/preferences.py",
        'share = batch.weight.sum() / total_weight',
        'share = len(batch.weight) / total_weight',
        "dpo::micro_batches_add_up[2]",
    ),
    Mutant(
        'online-dpo-prefers-the-worse',
        ADVANTAGES,
        '(pairs - pairs.flip(1)).sign()',
        '(pairs.flip(1) - pairs).sign()',
        "advantages::preference_weights_by_hand",
    ),
    Mutant(
        'online-dpo-gap-unsigned',
        ADVANTAGES,
        'd = better * (sums - sums.flip(1))',
        'd = sums - sums.flip(1)',
        "exact::online_dpo_has_the_gradient_of_the_dpo_loss_of_its_pairs",
    ),
    Mutant(
        'explained-variance-of-targets',
        POLICY,
        'explained_variance(rollout.values, received, mask)',
        'explained_variance(rollout.values, rollout.returns, mask)',
        "rollout::a_useless_value_explains_nothing_although_it_predicts_its_own_targets",
    ),
    # Sampling and scoring.
    Mutant(
        'eos-outside-mask',
        GENERATE,
        "mask = is_eos.cumsum(1) - is_eos == 0",
        "mask = is_eos.cumsum(1) == 0",
        "rollout::eos_is_an_action_inside_the_mask",
    ),
    Mutant(
        'sampler-at-temperature-1',
        GENERATE,
        'filter_logits(logits.float() / temperature,',
        'filter_logits(logits.float(),',
        "generate::token_frequencies_agree_with_the_log_probs[0.7]",
    ),
    Mutant(
        'random-numbers-by-place-in-batch',
        "minirlhf/run/seeding.py",
        'for row in rows]',
        'for row in range(len(rows))]',
        "generate::samples_do_not_depend_on_the_batch_or_its_order",
    ),
    Mutant(
        'score-at-last-column',
        TRANSFORMER,
        'column == (attention_mask * column).argmax(dim=1, keepdim=True)',
        '(column == column[-1]).expand_as(attention_mask)',
        "model::the_score_is_that_of_the_last_real_token_under_any_padding",
    ),
    Mutant(
        'rope-backwards',
        TRANSFORMER,
        '[a * cos - b * sin, b * cos + a * sin]',
        '[a * cos + b * sin, b * cos - a * sin]',
        "model::hidden_states_equal_plain_attention_at_every_length",
    ),
    Mutant(
        'position-late-in-decoding',
        TRANSFORMER,
        'self.embed(token, cache.lengths)',
        'self.embed(token, cache.lengths + 1)',
        "model::decoding_with_the_cache_equals_one_forward_pass",
    ),
    Mutant(
        'heads-of-other-keys-in-decoding',
        TRANSFORMER,
        'queries = queries.reshape(batch * kv_heads, -1, size)',
        'queries = queries.view(batch, -1, kv_heads, size).transpose(1, 2)'
        '.reshape(batch * kv_heads, -1, size)',
        "generate::greedy_decoding_equals_the_argmax_loop_without_a_cache",
    ),
    Mutant(
        'unused-lm-head-not-frozen',
        "minirlhf/run/device.py",
        'name.endswith("_head")',
        'name in ("reward_head", "value_head")',
        "model::heads_that_the_loss_does_not_use_are_frozen",
    ),
    Mutant(
        'function-with-gradients',
        SCORE,
        '@torch.no_grad()\ndef score_responses',
        'def score_responses',
        "rollout::a_reward_function_is_called_once_without_gradients_or_autocast",
    ),
    # Several processes.
    Mutant(
        'gradients-averaged',
        PARALLEL,
        'done.value()[0])',
        'done.value()[0] / process_count())',
        ONE_PROCESS,
    ),
    Mutant(
        'gradients-summed-every-micro-batch',
        PARALLEL,
        'if isinstance(learner, Replica) and not is_last:',
        'if False:',
        ONE_PROCESS,
    ),
]


def run_tests(tree: Path, *tests: str) -> tuple[str, float]:
    """("", seconds) when all pass, else the first test that failed; "broken: ..." when pytest could
    not run them.
    """
    names = sorted("tests/test_{}.py::test_{}".format(*test.split("::")) for test in set(tests))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *names],
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    failed = re.search(r"^FAILED tests/(\w+\.py::\w+)", done.stdout, re.MULTILINE)
    outcome = failed[1] if failed else "broken: " + done.stdout[-200:].replace("\n", " ")
    return outcome if done.returncode else "", time.monotonic() - start


def run_mutant(mutant: Mutant, source: Path, scratch: Path) -> tuple[str, float]:
    """run_tests on a copy of the source in which the mutant's text is replaced."""
    text = (source / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        return f"broken: its old text is there {count} times", 0.0
    tree = scratch / mutant.id
    shutil.copytree(source, tree)
    (tree / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    return run_tests(tree, mutant.test)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="ID", choices=[mutant.id for mutant in MUTANTS]
    )
    parser.add_argument(
        "--list", action="store_true", help="say which mutants there are and run nothing"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.id in options.only]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.id} | {mutant.file} | {mutant.test}")
        return 0

    killed = 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        source = Path(scratch) / "source"  # one moment of the tree, whoever edits it meanwhile
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs"))
        unchanged = pool.submit(run_tests, source, *(mutant.test for mutant in chosen))
        results = pool.map(lambda mutant: run_mutant(mutant, source, Path(scratch)), chosen)
        print("id | file | killed by | seconds")
        for mutant, (outcome, seconds) in zip(chosen, results):
            killed += bool(outcome) and not outcome.startswith("broken")
            print(
                f"{mutant.id} | {mutant.file} | {outcome or 'SURVIVES'} | {seconds:.1f}", flush=True
            )
        outcome, seconds = unchanged.result()
        print(f"nothing changed | - | {outcome or 'all pass, as they must'} | {seconds:.1f}")
    print(f"{killed} of {len(chosen)} mutants killed")
    return 0 if killed == len(chosen) and not outcome else 1


if __name__ == "__main__":
    sys.exit(main())
