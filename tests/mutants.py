"""Do the tests notice? One wrong line at a time goes into a copy of the source; the test that should notice must fail.

    python -m tests.mutants [--only ID ...] [--list] [--jobs N]

Nearly every mutant is a bug that trains without complaint. Each meets the one test named for it, in a process of its
own, up to the first failure. The tests must also pass on the source as it is, else their failing proves nothing: that
run is the last row. Exit status 1 if a mutant survives, if a test fails with nothing changed, or if a mutant's old text
is not in the source exactly once: bring the mutant up to date with the source then.
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
POLICY, RESUMED = "train_policy.py", "resume::a_policy_run_stopped_after_any_step_goes_on_bit_for_bit[2]"
ADVANTAGES, LADDER, LOSSES, ROLLOUT = (f"minirlhf/{name}.py" for name in ("advantages", "ladder", "losses", "rollout"))
PARALLEL, SIDE_BY_SIDE = "minirlhf/parallel.py", "distributed::the_policy_is_the_one_that_a_single_process_trains[2-ppo]"
OWN_ACTION, STOPPING = "rollout::each_column_belongs_to_its_own_action", "rollout::the_decision_to_stop_is_learned"
STEP = "exact::expected_optimiser_step_is_along_the_policy_gradient"


class Mutant(NamedTuple):
    id: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    test: str  # "file::name" stands for tests/test_file.py::test_name


MUTANTS = [Mutant(*fields) for fields in [
    # What is measured of a rollout, and what each token earns.
    ("kl-sign", ROLLOUT, "torch.where(mask, -kl_coef * kl_k1", "torch.where(mask, kl_coef * kl_k1",
     "exact::kl_penalty_lowers_the_reward_on_average_and_is_not_clamped"),
    ("kl-unmasked", ROLLOUT, "torch.where(mask, -kl_coef * kl_k1(logprobs, ref_logprobs), 0.0)",
     "-kl_coef * kl_k1(logprobs, ref_logprobs)", "rollout::rewards_read_nothing_beyond_the_mask"),
    ("score-late", ROLLOUT, "mask.sum(1, keepdim=True) - 1", "mask.sum(1, keepdim=True)", "rollout::rewards_by_hand"),
    ("score-on-every-token", ROLLOUT, "where(last, scores[:, None]", "where(mask, scores[:, None]",
     "rollout::rewards_by_hand"),
    ("logits-late", ROLLOUT, "return hidden[drawn_from]", "return hidden.roll(1, 1)[drawn_from]", OWN_ACTION),
    ("first-state-not-wanted", ROLLOUT, "wanted=drawn_from,", "wanted=F.pad(response_mask[:, 1:], (prompt_ids.shape[1], 0)),",
     OWN_ACTION),
    ("value-of-next-state", ROLLOUT, "(model.value_head, states)", "(model.value_head, states.roll(-1, 0))", OWN_ACTION),
    ("padding-attended-to", ROLLOUT, "model(ids, mask, ", "model(ids, torch.ones_like(mask), ", OWN_ACTION),
    ("reference-at-temperature-1", ROLLOUT, "(ref_model, *some, temperature)", "(ref_model, *some, 1.0)",
     "rollout::temperature_divides_the_logits_of_policy_and_reference_alike"),
    ("logprob-detached", ROLLOUT, "return tuple(blank.masked_scatter(response_mask, x)",
     "return tuple(blank.masked_scatter(response_mask, x.detach())", STOPPING),
    ("eos-not-trained", ROLLOUT, "    states, table = action_states(",
     "    response_mask = response_mask & (response_ids < model.config.vocab_size - 1)\n    states, table = action_states(",
     STOPPING),
    ("embedding-without-gradient", "minirlhf/model.py", "grad_table.index_add_(0, *ctx.saved_tensors, grad_rows)", "grad_table",
     "model::the_tied_table_has_the_gradient_of_both_its_ends"),
    # Advantages.
    ("full-return-undiscounted", ADVANTAGES, "discounted_returns(rewards, mask, gamma)[:, :1]",
     "discounted_returns(rewards, mask, 1.0)[:, :1]", "advantages::discount_counts_from_the_rewarded_step"),
    ("gae-value-late", ADVANTAGES, "    values = torch.where(mask, values, 0.0)",
     "    values = torch.where(mask, values.roll(1, 1), 0.0)",
     "advantages::gae_is_nothing_when_actions_do_not_matter_and_values_are_true"),
    ("gae-bootstraps-past-the-end", ADVANTAGES, "    values = torch.where(mask, values, 0.0)\n", "",
     "advantages::a_response_cut_by_length_is_terminal"),
    ("gae-without-lambda", ADVANTAGES, "mask, gamma * lam)", "mask, gamma)",
     "advantages::gae_runs_from_one_step_errors_to_reward_to_go_minus_value"),
    ("rloo-includes-itself", ADVANTAGES, "(groups.sum(1, keepdim=True) - groups) / (group_size - 1)",
     "groups.mean(1, keepdim=True)", "advantages::leave_one_out_by_hand"),
    ("whitens-with-padding", ADVANTAGES, "kept = advantages[mask]", "kept = advantages.flatten()",
     "advantages::whitening_uses_the_real_tokens_of_the_whole_batch"),
    ("returns-whitened", LADDER, "torch.where(rollout.response_mask, advantages + rollout.values, 0.0)",
     "torch.where(rollout.response_mask, whiten(advantages, rollout.response_mask) + rollout.values, 0.0)",
     "advantages::whitening_is_asked_for_or_the_rungs_own_and_never_touches_returns[gae]"),
    # Losses.
    ("policy-loss-nan-gradient", LOSSES, "(torch.where(mask, logprobs, 0.0) * torch.where(mask, advantages, 0.0))",
     "torch.where(mask, logprobs * advantages, 0.0)", "losses::nothing_beyond_the_mask_reaches_a_loss_or_its_gradient"),
    ("ppo-optimistic", LOSSES, "-torch.minimum(ratio", "-torch.maximum(ratio", "losses::ppo_loss_by_hand"),
    ("value-clip-optimistic", LOSSES, "torch.maximum(squared", "torch.minimum(squared", "losses::value_loss_by_hand"),
    ("kl-clamped", LOSSES, "    return logprobs - ref_logprobs", "    return (logprobs - ref_logprobs).clamp(min=0.0)",
     "exact::sampled_kl_estimates_have_the_exact_kl_as_their_mean"),
    ("preference-overflows", LOSSES, "-F.logsigmoid(difference)", "-torch.log(torch.sigmoid(difference))",
     "losses::preference_loss_is_finite_for_any_difference"),
    ("grpo-kl-reversed", LADDER, "logprobs[r.response_mask], r.ref_logprobs[r.response_mask]",
     "r.ref_logprobs[r.response_mask], logprobs[r.response_mask]", "exact::grpo_equals_its_own_exact_value"),
    ("entropy-sign", LADDER, "- config.ent_coef", "+ config.ent_coef", "losses::the_parts_of_the_loss_add_up"),
    ("value-loss-mean-of-means", LADDER, "config.value_clip_range, tokens)",
     "config.value_clip_range, float(mask.sum()))", "losses::the_gradient_does_not_depend_on_the_micro_batch_size"),
    ("policy-loss-per-sampled-token", LADDER, "loss = rung.loss(logprobs, rollout, advantages, config, kl_coef, denominator)",
     "loss = rung.loss(logprobs, rollout, advantages, config, kl_coef, tokens)", STEP),
    # The loop.
    ("denominator-of-longest-sample", POLICY, "len(minibatch) * max_response_length",
     "len(minibatch) * rollout.response_mask.shape[1]", STEP),
    ("step-per-micro-batch", POLICY, "loss.backward()", "loss.backward(); optimizer.step(); optimizer.zero_grad()",
     "losses::the_update_does_not_depend_on_the_micro_batch_size"),
    ("stale-pass-for-later-minibatches", POLICY, "== 1\n    return evaluate_actions", ">= 1\n    return evaluate_actions",
     "rollout::the_measuring_pass_is_the_learners_own_where_the_rollout_serves_once"),
    ("resumes-without-moments", "minirlhf/checkpoint.py", 'optimizer.load_state_dict(states["optimizer"])', "pass", RESUMED),
    ("resumes-without-kl", POLICY, 'meta.get("kl_coef", config.kl_coef)', "config.kl_coef", RESUMED),
    # Sampling and scoring.
    ("eos-outside-mask", "minirlhf/generate.py",
     "ends.cumsum(1) - ends == 0", "ends.cumsum(1) == 0",
     "rollout::eos_is_an_action_that_counts"),
    ("sampler-at-temperature-1", "minirlhf/generate.py", "else logits.float() / temperature", "else logits.float()",
     "generate::tokens_come_as_often_as_the_stored_log_probs_say[0.7]"),
    ("random-numbers-by-place-in-batch", "minirlhf/seeding.py", "for row in rows]", "for row in range(len(rows))]",
     "generate::the_same_seed_samples_the_same_whatever_the_batch_and_the_order"),
    ("score-at-last-column", "minirlhf/model.py", "order == (attention_mask * order).argmax(dim=1, keepdim=True)",
     "(order == order[-1]).expand_as(attention_mask)", "model::score_is_read_at_the_last_real_token_under_any_padding"),

    # Several processes.
    ("gradients-averaged", PARALLEL, "done.value()[0])", "done.value()[0] / processes())", SIDE_BY_SIDE),
    ("gradients-summed-every-micro-batch", PARALLEL, "isinstance(learner, Replica) and not last", "False", SIDE_BY_SIDE),
]]


def run_tests(tree: Path, *tests: str) -> tuple[str, float]:
    """("", seconds) when all pass, else the first test that failed; "broken: ..." when pytest could not run them."""
    names = sorted("tests/test_{}.py::test_{}".format(*test.split("::")) for test in set(tests))
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *names],
                          cwd=tree, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ID", choices=[mutant.id for mutant in MUTANTS])
    parser.add_argument("--list", action="store_true", help="say which mutants there are and run nothing")
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
            print(f"{mutant.id} | {mutant.file} | {outcome or 'SURVIVES'} | {seconds:.1f}", flush=True)
        outcome, seconds = unchanged.result()
        print(f"nothing changed | - | {outcome or 'all pass, as they must'} | {seconds:.1f}")
    print(f"{killed} of {len(chosen)} mutants killed")
    return 0 if killed == len(chosen) and not outcome else 1


if __name__ == "__main__":
    sys.exit(main())
