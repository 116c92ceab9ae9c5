"""The labeling program, driven by keys in a pseudo-terminal: no answer is lost, however it ends."""

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import train_reward
from minirlhf.config import RewardConfig
from minirlhf.data.batches import pad_right
from minirlhf.data.preference_files import read_preferences
from minirlhf.data.prompts import encode_prompts
from minirlhf.data.splits import HELPDESK_FILES, load_splits
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import sample_responses
from minirlhf.run.command_line import run_script
from minirlhf.run.errors import UserError
from minirlhf.tools import label, labels
from minirlhf.tools.label import LabelConfig
from minirlhf.tools.labels import LabelFile, Pair, wilson_interval
from minirlhf.tools.terminal import cells, side_by_side, wrap
from minirlhf.tools.trained import load_trained

import pytest
import tiny
import torch
from tiny import refused

QUIT = "q\u00a0quit"  # the end of a screen
SOURCE = dict(tokenizer="t", reward="r")
ANNOTATOR = "tiny:preference_probability"


@pytest.fixture
def open_label(open_terminal):
    return lambda *flags: open_terminal(run_script, label.main, LabelConfig, list(flags))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_pair(number, probability=0.8):
    return Pair(number, f"p{number}:", [f" l{number}", f" r{number}"], probability)


def label_with_program(policy_run, out, **settings):
    return label.main(LabelConfig(run=str(policy_run), device="cpu", out=str(out), **settings))


# ---- a person at a terminal ----------------------------------------------------------------------


def test_every_key_works_and_the_reward_model_trains_on_the_file(
    policy_run, reward_run, inputs, tmp_path, open_label
):
    """Left, right, tie, skip, arrows, undo, an unknown key, quit."""
    out = tmp_path / "labels.jsonl"
    terminal = open_label("--run", str(policy_run), "--out", str(out))
    assert "0 answered (0 ties), 0 skipped" in terminal.read(QUIT)
    assert terminal.modes() == 0  # neither echo nor line by line
    assert "1 answered" in terminal.press("1", QUIT)
    assert "2 answered" in terminal.press("\x1b[C", QUIT)
    assert "3 answered (1 tie)" in terminal.press("t", QUIT)
    assert "3 answered (1 tie), 1 skipped; reward model" in terminal.press("s", QUIT)
    assert "unknown key" in terminal.press("x", "unknown key")
    shown = terminal.press("u", "undone")
    assert "3 answered (1 tie), 0 skipped" in shown
    assert len(rows(out)) == 3
    assert "4 answered" in terminal.press("\x1bOD", QUIT)
    screen = terminal.read(QUIT)
    assert max(map(len, screen.split("\n"))) <= 80
    assert "1 left" in screen
    assert "2 right" in screen
    os.write(terminal.fd, b"q")
    status, output, restored = terminal.end()
    assert status == 0
    assert restored
    assert "train_reward.py --init-reward" in output
    answers = rows(out)
    assert [row["answer"] for row in answers] == ["left", "right", "tie", "left"]
    numbers = [row["number"] for row in answers]
    assert sorted(set(numbers)) == numbers
    for row in answers:
        assert row["responses"][0] != row["responses"][1]
        assert 0 < row["reward_model"] < 1
    pairs = read_preferences(str(out))
    left, right = answers[1]["responses"]
    assert (pairs[1].chosen, pairs[1].rejected, pairs[1].weight) == (right, left, 1.0)
    one, other = pairs[2:4]  # the tie
    assert (one.chosen, one.rejected) == (other.rejected, other.chosen)
    assert one.weight == other.weight == 0.5
    earlier = str(reward_run / "reward.pt")
    data = (str(out), str(inputs / "pairs.jsonl"))
    train_reward.main(
        tiny.reward_config(inputs, tmp_path / "second", data=data, init_reward=earlier)
    )


def test_a_kill_loses_no_answer_and_the_next_start_continues(policy_run, tmp_path, open_label):
    """The next start shows the pair that was on the screen, and removes an incomplete line."""
    out = tmp_path / "labels.jsonl"
    terminal = open_label("--run", str(policy_run), "--out", str(out))
    terminal.read(QUIT)
    terminal.press("1", "1 answered")
    terminal.press("s", "1 skipped")
    shown = terminal.read(QUIT).partition("─")[2]
    os.kill(terminal.pid, signal.SIGKILL)
    assert terminal.end()[0] == -signal.SIGKILL
    assert [row["answer"] for row in rows(out)] == ["left", "skip"]
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"prompt": "a 1:", "resp')
    terminal = open_label("--run", str(policy_run), "--out", str(out))
    assert terminal.read(QUIT).partition("─")[2] == shown
    assert "was incomplete" in terminal.screen
    assert out.read_bytes() == whole
    screens = terminal.press("u", "undone") + terminal.press("u", "0 answered")
    assert "0 answered (0 ties), 0 skipped" in screens
    assert out.read_bytes() == b""
    terminal.press("2", "1 answered")
    os.kill(terminal.pid, signal.SIGTERM)
    status, _, restored = terminal.end()
    assert status == 128 + signal.SIGTERM
    assert restored
    first_number = json.loads(whole.split(b"\n")[0])["number"]
    assert [(row["answer"], row["number"]) for row in rows(out)] == [("right", first_number)]


@pytest.mark.parametrize("ending, status", [("\x03", 0), ("\x04", 0)])
def test_the_terminal_is_restored_and_keys_pressed_too_early_are_ignored(
    ending, status, policy_run, tmp_path, open_label, monkeypatch
):
    """Three quick presses give one answer, because the second pair was not yet on the screen.

    Ctrl-C and Ctrl-D work like q.
    """
    fresh_pairs = label.fresh_pairs

    def slow_pairs(*arguments):
        for pair in fresh_pairs(*arguments):
            time.sleep(0.3)
            yield pair

    monkeypatch.setattr(label, "fresh_pairs", slow_pairs)
    terminal = open_label("--run", str(policy_run), "--out", str(tmp_path / "l.jsonl"))
    terminal.read(QUIT)
    terminal.press("111", "1 answered")
    time.sleep(0.6)
    os.write(terminal.fd, ending.encode())
    actual_status, output, restored = terminal.end()
    assert actual_status == status
    assert restored
    assert "1 answered" in output.rpartition("l.jsonl: ")[2]
    assert len(rows(tmp_path / "l.jsonl")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_restores_the_terminal_and_ctrl_z_is_an_ordinary_key(
    number, policy_run, tmp_path, open_label
):
    """Closing a window sends SIGHUP. A program stopped by Ctrl-Z would leave no echo."""
    terminal = open_label("--run", str(policy_run), "--out", str(tmp_path / "l.jsonl"))
    terminal.read(QUIT)
    terminal.press("1", QUIT)
    terminal.press("\x1a", "unknown key")
    os.kill(terminal.pid, number)
    status, screen, restored = terminal.end()
    assert status == 128 + number
    assert restored
    assert "1 answered" in screen
    assert len(rows(tmp_path / "l.jsonl")) == 1


def test_the_command_needs_a_terminal(policy_run):
    """A pipe has no keys."""
    done = subprocess.run(
        tiny.python("-m", "minirlhf.tools.label", "--run", str(policy_run)),
        input="1",
        text=True,
        capture_output=True,
        env=tiny.environment(),
        cwd=tiny.ROOT,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: labeling needs a terminal.*ssh -t.*\n", done.stderr)


# ---- a program that answers, and the pairs it gets -----------------------------------------------


def first_is_longer(prompt, a, b):
    return None if len(a) == len(b) else float(len(a) > len(b))


def not_a_probability(prompt, a, b):
    return 2


def exiting(prompt, a, b):
    raise SystemExit(0)


def test_a_program_may_answer_and_continuing_gives_the_same_file(policy_run, tmp_path):
    """Its answers are drawn with the probability that it returns."""
    longer = "test_tools_label:first_is_longer"
    counts = label_with_program(policy_run, tmp_path / "whole.jsonl", judge=longer, count=150)
    label_with_program(policy_run, tmp_path / "parts.jsonl", judge=longer, count=70)
    label_with_program(policy_run, tmp_path / "parts.jsonl", judge=longer, count=150)
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "parts.jsonl").read_bytes()
    for row in rows(tmp_path / "whole.jsonl"):
        a, b = row.get("skipped") or row["responses"]
        expected = "left" if len(a) > len(b) else "right"
        assert row["answer"] == ("skip" if len(a) == len(b) else expected)
    assert counts["skip"] and counts["left"] and counts["right"]
    assert sum(counts.values()) == 150
    drawn = tmp_path / "drawn.jsonl"
    counts = label_with_program(policy_run, drawn, judge=ANNOTATOR, count=300)
    probabilities = [
        tiny.preference_probability(row["prompt"], *row["responses"]) for row in rows(drawn)
    ]
    deviation = sum(p * (1 - p) for p in probabilities) ** 0.5
    assert abs(counts["left"] - sum(probabilities)) < 4 * deviation


@pytest.mark.parametrize("candidates", [1, 8])
def test_uncertain_picks_the_pair_whose_probability_is_closest_to_a_half(
    candidates, policy_run, tmp_path
):
    """All candidates of a prompt are sampled again, and the least certain usable pair is chosen."""
    out = tmp_path / "l.jsonl"
    label_with_program(
        policy_run, out, judge=ANNOTATOR, count=20, pick="uncertain", candidates=candidates
    )
    trained = load_trained(str(policy_run), torch.device("cpu"), "none")
    reward = Reward("reward model", trained.reward_model, 0.0)
    scale = float(trained.reward_model.score_scale)
    for row in rows(out):
        prompts = encode_prompts([row["prompt"]] * 2 * candidates, trained.encoding, 6)
        first = row["number"] * 2 * candidates
        numbers = list(range(first, first + 2 * candidates))
        sampling = trained.sampling(0.0, 0, 0)
        samples = sample_responses(trained.policy, prompts, sampling, "label", rows=numbers)
        scores = (score_responses(reward, samples) * scale).tolist()
        margins = [
            (label.sigmoid(scores[i] - scores[i + 1]) - 0.5, samples.responses[i : i + 2])
            for i in range(0, 2 * candidates, 2)
            if label.is_usable(*samples.responses[i : i + 2])
        ]
        margin, responses = min(margins, key=lambda entry: abs(entry[0]))
        assert row["reward_model"] - 0.5 == pytest.approx(margin, abs=1e-5)
        assert sorted(row.get("skipped") or row["responses"]) == sorted(responses)


def test_pairs_that_training_would_refuse_or_drop_are_not_shown(policy_run, tmp_path, monkeypatch):
    """One NUL character, which a byte-level policy can sample, makes the file unreadable."""
    real = label.sample_responses
    sampled = []

    def damaged_samples(*arguments, **names):
        samples = real(*arguments, **names)
        texts = [
            ["a\0b", " ", f"{text} ", text, "b"][i % 5] for i, text in enumerate(samples.responses)
        ]
        sampled.extend(texts)
        return samples._replace(responses=texts)

    monkeypatch.setattr(label, "sample_responses", damaged_samples)
    out = tmp_path / "l.jsonl"
    label_with_program(policy_run, out, judge=ANNOTATOR, count=60)
    assert {"a\0b", " "} < set(sampled)
    for row in rows(out):
        assert all(text.strip() and "\0" not in text for text in row["responses"])
        assert row["responses"][0].strip() != row["responses"][1].strip()
    assert len(read_preferences(str(out))) == 60


def test_the_probability_uses_the_reward_models_raw_scores(policy_run, tmp_path):
    """A difference of normalized scores is not the log-odds of a preference."""
    out = tmp_path / "l.jsonl"
    label_with_program(policy_run, out, judge=ANNOTATOR, count=60)
    trained = load_trained(str(policy_run), torch.device("cpu"), "none")
    encode = trained.encoding.encode_ordinary
    model = trained.reward_model
    checked = Counter()
    for row in rows(out):
        if "\ufffd" in "".join(row["responses"]):  # the text is not enough to restore the ids
            continue
        responses = [encode(text) for text in row["responses"]]
        raw = []
        for ids in responses:
            is_short = len(ids) < 5  # otherwise cut by length, without EOS and without penalty
            sequence = encode(row["prompt"]) + ids + [tiny.EOS] * is_short
            hidden = model(*pad_right([sequence], tiny.PAD))
            raw.append(float(model.reward_head(hidden[0, -1])))
            checked[is_short] += 1
        probability = 1 / (1 + math.exp(raw[1] - raw[0]))
        assert row["reward_model"] == pytest.approx(probability, abs=1e-4)
    assert checked[True] >= 10
    assert checked[False] >= 5


def test_pairs_use_the_prompts_that_the_policy_was_trained_on(policy_run, tmp_path):
    """The prompts of its --prompts, or of the reward run's training pairs."""
    trained = load_trained(str(policy_run), torch.device("cpu"), "none")
    train_prompts = {pair.prompt for pair in load_splits(trained.reward_config).train}
    assert set(label.training_prompts(trained).texts) == train_prompts
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a 77:"}\n{"prompt": "b 88:"}\n')
    config = dataclasses.replace(trained.config, prompts=str(path))
    texts = label.training_prompts(trained._replace(config=config)).texts
    assert texts == ["a 77:", "b 88:"]


@pytest.mark.parametrize(
    "settings, flags",
    [
        (
            dict(task="minirlhf.data.helpdesk"),
            [
                "--heldout-data",
                *HELPDESK_FILES["heldout_data"],
                "--test-data",
                *HELPDESK_FILES["test_data"],
                "--task",
                "minirlhf.data.helpdesk",
            ],
        ),
        (dict(data=("d.jsonl",), task="none"), []),
        (
            dict(
                data=("d.jsonl",),
                heldout_data=("h 1.jsonl", "h2.jsonl"),
                task="tiny",
                max_response_length=9,
                max_prompt_length=7,
                tokenizer="gpt2",
            ),
            [
                "--tokenizer",
                "gpt2",
                "--max-prompt-length",
                "7",
                "--max-response-length",
                "9",
                "--heldout-data",
                "h 1.jsonl",
                "h2.jsonl",
                "--task",
                "tiny",
            ],
        ),
        (dict(data=("d.jsonl",), task="none", test_data=("t.jsonl",)), ["--test-data", "t.jsonl"]),
    ],
)
def test_the_next_command_repeats_the_settings_of_the_task(settings, flags, policy_run):
    """Without them, training uses another tokenizer, or tests on the labels themselves."""
    trained = load_trained(str(policy_run), torch.device("cpu"), "none")
    trained = trained._replace(reward_config=RewardConfig(**settings))
    start = [
        "python",
        "train_reward.py",
        "--init-reward",
        str(Path(trained.config.reward_run) / "reward.pt"),
        "--data",
        "l.jsonl",
    ]
    assert shlex.split(label.next_command(trained, Path("l.jsonl"))) == start + flags


# ---- the file ------------------------------------------------------------------------------------

NO_SOURCE = (
    b'{"prompt": "p", "responses": ["a", "b"], "answer": "left", "number": 0, '
    b'"reward_model": 0.5, "source": []}\n'
)


def test_a_crash_during_undo_loses_no_answer(tmp_path, monkeypatch):
    """The file is replaced in one step."""
    path = tmp_path / "l.jsonl"
    file = LabelFile(path, SOURCE, "run")
    for number in range(3):
        file.add(make_pair(number), "left")
    before = path.read_bytes()

    def crash(*_):
        raise OSError(5, "gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):
        file.undo()
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert file.undo() == make_pair(2)
    assert len(rows(path)) == 2
    file.lock.close()


def test_each_answer_is_flushed_to_the_disk_before_the_next(tmp_path, monkeypatch):
    path = tmp_path / "l.jsonl"
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(path.read_bytes()))
    file = LabelFile(path, SOURCE, "run")
    file.add(make_pair(0), "tie")
    assert flushed == [path.read_bytes()]
    assert flushed[0].endswith(b"\n")
    file.lock.close()


def test_the_next_pair_follows_the_last_number_even_if_pairs_were_left_out(tmp_path):
    """Pairs of equal samples are not shown, so the count of answers would repeat a pair."""
    file = LabelFile(tmp_path / "l.jsonl", SOURCE, "run")
    assert file.next_number() == 0
    for number in (0, 5):
        file.add(make_pair(number), "left")
    assert file.next_number() == 6
    assert file.undo() == make_pair(5)
    assert file.next_number() == 1
    file.lock.close()


@pytest.mark.parametrize(
    "tail, answers, repaired",
    [
        (b"", 2, False),
        (b'{"prompt": "x', 2, True),
        (b'{"pro', 2, True),
        (b'{"prompt": "\0\0\0', 2, True),
        (b"\0\0", 2, True),
    ],
)
def test_an_incomplete_last_line_is_removed(tail, answers, repaired, tmp_path):
    path = tmp_path / "l.jsonl"
    file = LabelFile(path, SOURCE, "run")
    file.add(make_pair(0), "left")
    file.add(make_pair(1), "right")
    file.lock.close()
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    again = LabelFile(path, SOURCE, "run")
    assert (len(again.rows), again.repaired, again.next_number()) == (answers, repaired, 2)
    assert path.read_bytes() == whole
    again.lock.close()
    path.write_bytes(whole[:-1])  # some editors leave out the last newline
    again = LabelFile(path, SOURCE, "run")
    assert len(again.rows) == 2
    assert not again.repaired
    assert path.read_bytes() == whole
    again.lock.close()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"my notes", "1: not an answer"),
        (b"my notes\n", "1: not an answer"),
        (b'{"prompt": "x"}\n', "1: not an answer"),
        (b'[1]\n', "1: not an answer"),
        (b"{" * 100_000 + b"\n", "1: not an answer"),
        (b"\xfa\xfe\n", "1: not an answer"),
        (NO_SOURCE, "1: not an answer"),
    ],
)
def test_another_kind_of_file_is_refused_and_not_changed(content, words, tmp_path):
    """A typing error in --out must not destroy a file."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        LabelFile(path, SOURCE, "run")
    assert "use another --out" in str(error.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        dict(answer=["left"]),
        dict(answer=None),
        dict(prompt=["p"]),
        dict(prompt=None),
        dict(responses=["a", 3]),
        dict(responses=["a"]),
        dict(responses=None),
        dict(number=-1),
        dict(number=1e300),
        dict(number=2**60),
        dict(reward_model="0.5"),
        dict(reward_model=float("nan")),
        dict(reward_model=2.0),
        dict(source=["t", "r"]),
    ],
)
def test_an_answer_with_a_value_of_another_type_is_refused(change, tmp_path):
    """It would fail later, in the summary or when the pair is shown again."""
    path = tmp_path / "l.jsonl"
    file = LabelFile(path, SOURCE, "run")
    file.add(make_pair(0), "left")
    file.lock.close()
    (row,) = rows(path)
    path.write_text(json.dumps({**row, **change}) + "\n")
    with pytest.raises(UserError, match="l.jsonl:1: not an answer"):
        LabelFile(path, SOURCE, "run")


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(tokenizer="u", reward="r"), "with another tokenizer"),
        (dict(tokenizer="t", reward="s"), "of another reward run"),
    ],
)
def test_answers_about_another_policy_are_refused(other, words, tmp_path):
    """In one file, a reward model would be trained on samples that another model selected."""
    file = LabelFile(tmp_path / "l.jsonl", other, "run")
    file.add(make_pair(0), "left")
    with pytest.raises(UserError, match="another process is labeling there"):
        LabelFile(tmp_path / "l.jsonl", other, "run")
    file.lock.close()
    with pytest.raises(UserError, match=f"l.jsonl:1: .*{words}; use another --out"):
        LabelFile(tmp_path / "l.jsonl", SOURCE, "run")


def test_each_file_has_its_own_lock(tmp_path):
    """Two files in one run folder can be written at once, and train_policy.py holds .lock there.

    The same file twice is refused.
    """
    files = [LabelFile(tmp_path / name, SOURCE, "p") for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(UserError, match="another process is labeling there"):
        LabelFile(tmp_path / "a.jsonl", SOURCE, "p")
    assert not (tmp_path / ".lock").exists()
    for file in files:
        file.lock.close()


def test_the_summary_equals_counts_by_hand(tmp_path):
    """Of four decided pairs the reward model agrees on two, disagrees on one, and is even on one.

    Ties and skipped pairs are not counted.
    """
    file = LabelFile(tmp_path / "l.jsonl", SOURCE, "run")
    for number, (answer, probability) in enumerate(
        [("left", 0.9), ("right", 0.2), ("right", 0.7), ("left", 0.5), ("tie", 0.9), ("skip", 0.9)]
    ):
        file.add(make_pair(number, probability), answer)
    low, high = wilson_interval(2.5, 4)
    agreed = f"reward model agreed 2.5/4: 62% [{low:.0%}, {high:.0%}]"
    assert file.summary() == f"5 answered (1 tie), 1 skipped; {agreed}"
    file.lock.close()


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--run", "{tmp}/none"], "none/config.json: No such file"),
        ([], "--run is missing"),
        (["--run", "{reward_run}"], "is a run of train_reward.py; name one of train_policy.py"),
        (["--run", "{run}", "--count", "0"], "--judge needs --count"),
        (["--run", "{run}", "--judge", "tiny:none"], "no such function"),
        (
            ["--run", "{run}", "--judge", "test_tools_label:not_a_probability"],
            "returned 2; it must be a probability",
        ),
        (
            ["--run", "{run}", "--judge", "test_tools_label:make_pair"],
            "test_tools_label:make_pair raised TypeError",
        ),
        (
            ["--run", "{run}", "--judge", "test_tools_label:exiting"],
            "test_tools_label:exiting raised SystemExit: 0",
        ),
        (["--run", "{run}", "--max-response-length", "99"], "--max-response-length 99"),
        (["--run", "{run}", "--out", "{tmp}/no/l.jsonl"], "No such file or directory"),
        (["--run", "{run}", "--picks", "next"], "did you mean --pick?"),
    ],
)
def test_bad_input_gives_one_error_line(changes, words, policy_run, reward_run, tmp_path, capsys):
    fill = dict(tmp=tmp_path, run=policy_run, reward_run=reward_run)
    flags = ["--judge", ANNOTATOR, "--count", "3", "--out", str(tmp_path / "l.jsonl")]
    flags += [text.format(**fill) for text in changes]
    assert words in refused(capsys, label.main, LabelConfig, flags)


def test_a_full_disk_gives_one_error_line_and_loses_no_answer(
    policy_run, tmp_path, monkeypatch, capsys
):
    """The flush of the third answer fails. The first two are on the disk."""
    out = tmp_path / "l.jsonl"
    real = labels.os.fsync
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(out))
        real(fd)

    monkeypatch.setattr(labels.os, "fsync", full)
    flags = ["--run", str(policy_run), "--judge", ANNOTATOR, "--count", "9", "--out", str(out)]
    message = refused(capsys, label.main, LabelConfig, flags)
    assert "No space left on device" in message
    assert len(rows(out)) == 3


# ---- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 59, 60, 80, 133])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(columns):
    """Wide and combining characters, a word longer than the line, control characters."""
    left = "日本語 " * 30 + "e\u0301" * 9
    right = f"{'x' * 200} \x1b[31mred\u202e one two"
    lines = side_by_side(("a", left), ("b", right), columns)
    assert max(map(cells, lines)) <= columns
    assert "\x1b" not in "".join(lines)
    assert "\u202e" not in "".join(lines)
    assert "".join(wrap(left, 9)).replace(" ", "") == left.replace(" ", "")


def test_wrapping_ends_even_if_no_character_fits():
    assert wrap("日本", 1) == ["日", "本"]
    assert wrap("", 5) == [""]


def test_a_long_word_is_wrapped_in_linear_time(monkeypatch):
    """A word of 4,000 characters took 47 seconds: every part was measured again and again."""
    measured = 0

    def counting_cells(text):
        nonlocal measured
        measured += len(text)
        return cells(text)

    monkeypatch.setattr("minirlhf.tools.terminal.cells", counting_cells)
    assert wrap("x" * 100_000, 30) == ["x" * 30] * 3333 + ["x" * 10]
    assert measured < 1_000_000
