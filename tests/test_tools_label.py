"""The labelling program, driven by keys in a real pseudo-terminal: no answer is lost, whatever ends it."""

import dataclasses
import fcntl
import json
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import termios
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from tiny import refused

import train_reward
from minirlhf.config import RewardConfig, UserError, run_script
from minirlhf.data import pad_right, read_preferences
from minirlhf.task import HELPDESK, load_splits
from minirlhf.tools import label, labels
from minirlhf.tools.label import LabelConfig
from minirlhf.tools.labels import LabelFile, Pair, wilson
from minirlhf.tools.terminal import cells, side_by_side, wrap
from minirlhf.tools.trained import load_trained

QUIT = "q\u00a0quit"  # the end of a screen
SOURCE = dict(tokenizer="t", reward="r")


@pytest.fixture
def open_label(open_terminal):
    return lambda *flags: open_terminal(run_script, label.main, LabelConfig, list(flags))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def made_up(number, probability=0.8):
    return Pair(number, f"p{number}:", [f" l{number}", f" r{number}"], probability)


# ---- a person at a terminal ------------------------------------------------------------------------------------------


def test_every_key_does_what_it_says_and_training_reads_it(policy_run, reward_run, inputs, tmp_path, open_label):
    """Left, right, tie, skip, arrows, undo, a key that means nothing, quit; then the reward model learns from the file."""
    out = tmp_path / "labels.jsonl"
    terminal = open_label("--run", str(policy_run), "--out", str(out))
    assert "0 answered (0 ties), 0 skipped" in terminal.read(QUIT)
    assert terminal.modes() == 0  # neither echo nor line by line
    assert "1 answered" in terminal.press("1", QUIT)
    assert "2 answered" in terminal.press("\x1b[C", QUIT)
    assert "3 answered (1 tie)" in terminal.press("t", QUIT)
    assert "3 answered (1 tie), 1 skipped; reward model" in terminal.press("s", QUIT)
    assert "that key means nothing here" in terminal.press("x", "nothing here")
    shown = terminal.press("u", "taken back")
    assert "3 answered (1 tie), 0 skipped" in shown and len(rows(out)) == 3
    assert "4 answered" in terminal.press("\x1bOD", QUIT)
    screen = terminal.read(QUIT)
    assert max(map(len, screen.split("\n"))) <= 80 and "1 left" in screen and "2 right" in screen
    os.write(terminal.fd, b"q")
    status, said, restored = terminal.end()
    assert status == 0 and restored and "train_reward.py --init-reward" in said
    found = rows(out)
    assert [row["answer"] for row in found] == ["left", "right", "tie", "left"]
    assert sorted({row["number"] for row in found}) == [row["number"] for row in found]
    assert all(row["responses"][0] != row["responses"][1] and 0 < row["reward_model"] < 1 for row in found)
    pairs = read_preferences(str(out))
    left, right = found[1]["responses"]
    assert (pairs[1].chosen, pairs[1].rejected, pairs[1].weight) == (right, left, 1.0)
    tie = pairs[2:4]
    assert (tie[0].chosen, tie[0].rejected) == (tie[1].rejected, tie[1].chosen) and [pair.weight for pair in tie] == [0.5, 0.5]
    earlier, data = str(reward_run / "reward.pt"), (str(out), str(inputs / "pairs.jsonl"))
    train_reward.main(tiny.reward_config(inputs, tmp_path / "second", data=data, init_reward=earlier))


def test_a_kill_at_any_time_loses_no_answer_and_the_next_start_goes_on(policy_run, tmp_path, open_label):
    """The pair on show when the process was killed comes again, the answers before it do not, and a torn line is mended."""
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
    assert terminal.read(QUIT).partition("─")[2] == shown and "cut short" in terminal.screen
    assert out.read_bytes() == whole
    assert "0 answered (0 ties), 0 skipped" in terminal.press("u", "taken back") + terminal.press("u", "0 answered")
    assert out.read_bytes() == b""
    terminal.press("2", "1 answered")
    os.kill(terminal.pid, signal.SIGTERM)
    status, _, restored = terminal.end()
    assert status == 128 + signal.SIGTERM and restored
    assert [(row["answer"], row["number"]) for row in rows(out)] == [("right", json.loads(whole.split(b"\n")[0])["number"])]


@pytest.mark.parametrize("ending, status", [("\x03", 0), ("\x04", 0)])
def test_the_terminal_is_restored_and_keys_pressed_too_early_are_no_answers(ending, status, policy_run, tmp_path, open_label,
                                                                            monkeypatch):
    """Three quick presses are one answer: the second pair was not yet on the screen. Ctrl-C and Ctrl-D are q."""
    fresh_pairs = label.fresh_pairs
    monkeypatch.setattr(label, "fresh_pairs", lambda *arguments: (time.sleep(0.3) or pair for pair in fresh_pairs(*arguments)))
    terminal = open_label("--run", str(policy_run), "--out", str(tmp_path / "l.jsonl"))
    terminal.read(QUIT)
    terminal.press("111", "1 answered")
    time.sleep(0.6)
    os.write(terminal.fd, ending.encode())
    found, said, restored = terminal.end()
    assert found == status and restored and "1 answered" in said.rpartition("l.jsonl: ")[2]
    assert len(rows(tmp_path / "l.jsonl")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_the_terminal_restored_and_ctrl_z_is_a_key(number, policy_run, tmp_path, open_label):
    """A window that closes sends SIGHUP; a program stopped by Ctrl-Z would leave the shell without echo."""
    terminal = open_label("--run", str(policy_run), "--out", str(tmp_path / "l.jsonl"))
    terminal.read(QUIT)
    terminal.press("1", QUIT)
    terminal.press("\x1a", "that key means nothing here")
    os.kill(terminal.pid, number)
    status, screen, restored = terminal.end()
    assert status == 128 + number and restored and "1 answered" in screen and len(rows(tmp_path / "l.jsonl")) == 1


def test_a_resized_terminal_is_redrawn_to_its_new_width(policy_run, tmp_path, open_label):
    terminal = open_label("--run", str(policy_run), "--out", str(tmp_path / "l.jsonl"))
    assert " │ " in terminal.read(QUIT)
    terminal.screen = ""
    terminal.resize(40)
    screen = terminal.read(QUIT)
    assert "1 LEFT" in screen and " │ " not in screen and max(map(len, screen.split("\n"))) <= 40


def test_a_resize_while_the_screen_is_written_is_not_missed(policy_run, tmp_path, open_label, monkeypatch):
    """Before the program waits for a key nothing redraws at once, so that it must look again when it does."""
    show, shown = label.show, []

    def show_and_shrink(*arguments):
        width = show(*arguments)
        if not shown:
            shown.append(width)
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        return width

    monkeypatch.setattr(label, "show", show_and_shrink)
    terminal = open_label("--run", str(policy_run), "--out", str(tmp_path / "l.jsonl"))
    assert "1 LEFT" in terminal.read("1 LEFT")


def test_run_as_a_command_it_refuses_what_is_no_terminal(policy_run):
    """A pipe has no keys."""
    done = subprocess.run(tiny.python("-m", "minirlhf.tools.label", "--run", str(policy_run)), input="1", text=True,
                          capture_output=True, env=tiny.environment(), cwd=tiny.ROOT, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: labelling takes a terminal.*ssh -t.*\n", done.stderr)


# ---- a program that judges, and which pairs it is asked about --------------------------------------------------------


def first_is_longer(prompt, a, b):
    return None if len(a) == len(b) else float(len(a) > len(b))


def nonsense(prompt, a, b):
    return 2


def test_a_program_may_judge_and_the_pairs_are_those_a_person_would_see(policy_run, tmp_path):
    """Its answers are drawn with the probability it states; stopped and gone on with gives the same file."""
    settings = dict(run=str(policy_run), judge="test_tools_label:first_is_longer", device="cpu")
    counts = label.main(LabelConfig(**settings, out=str(tmp_path / "whole.jsonl"), count=150))
    label.main(LabelConfig(**settings, out=str(tmp_path / "parts.jsonl"), count=70))
    label.main(LabelConfig(**settings, out=str(tmp_path / "parts.jsonl"), count=150))
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "parts.jsonl").read_bytes()
    found = rows(tmp_path / "whole.jsonl")
    for row in found:
        a, b = row.get("skipped") or row["responses"]
        assert row["answer"] == ("skip" if len(a) == len(b) else "left" if len(a) > len(b) else "right")
    assert counts["skip"] and counts["left"] and counts["right"] and sum(counts.values()) == 150
    halves = label.main(LabelConfig(run=str(policy_run), judge="tiny:preference_probability", count=300, device="cpu",
                                    out=str(tmp_path / "drawn.jsonl")))
    sure = [tiny.preference_probability(row["prompt"], *row["responses"]) for row in rows(tmp_path / "drawn.jsonl")]
    assert abs(halves["left"] - sum(sure)) < 4 * sum(p * (1 - p) for p in sure) ** 0.5


def test_uncertain_picks_the_pair_nearest_to_a_half(policy_run, tmp_path):
    """Of the same candidates: the probability shown is the reward model's on the raw scale, and the least sure is taken."""
    found = {}
    for candidates in (1, 8):
        out = tmp_path / f"{candidates}.jsonl"
        label.main(LabelConfig(run=str(policy_run), judge="tiny:preference_probability", count=60, pick="uncertain", device="cpu",
                               candidates=candidates, out=str(out)))
        found[candidates] = [abs(row["reward_model"] - 0.5) for row in rows(out)]


def test_nothing_is_asked_that_training_would_refuse_or_drop(policy_run, tmp_path, monkeypatch):
    """One NUL character in an answer, which a byte-level policy may say, and train_reward.py would not read the file."""
    real, said = label.sample_responses, []

    def spoiling(*arguments, **names):
        samples = real(*arguments, **names)
        spoilt = [["a\0b", " ", f"{text} ", text, "b"][i % 5] for i, text in enumerate(samples.responses)]
        said.extend(spoilt)
        return samples._replace(responses=spoilt)

    monkeypatch.setattr(label, "sample_responses", spoiling)
    label.main(LabelConfig(run=str(policy_run), judge="tiny:preference_probability", count=60, device="cpu",
                           out=str(tmp_path / "l.jsonl")))
    assert {"a\0b", " "} < set(said)
    for row in rows(tmp_path / "l.jsonl"):
        assert all(text.strip() and "\0" not in text for text in row["responses"])
        assert row["responses"][0].strip() != row["responses"][1].strip()
    assert len(read_preferences(str(tmp_path / "l.jsonl"))) == 60


def test_the_probability_is_the_reward_models_on_its_raw_scale(policy_run, tmp_path):
    """Normalised scores are another unit: their difference is no log-odds."""
    out = tmp_path / "l.jsonl"
    label.main(LabelConfig(run=str(policy_run), judge="tiny:preference_probability", count=60, device="cpu", out=str(out)))
    trained = load_trained(str(policy_run), torch.device("cpu"))
    encode, model, checked = trained.encoding.encode_ordinary, trained.reward_model, Counter()
    for row in rows(out):
        if "\ufffd" not in "".join(row["responses"]):
            said = [encode(text) for text in row["responses"]]  # ended by EOS, unless cut after the fifth token
            whole = [encode(row["prompt"]) + ids + [tiny.EOS] * (len(ids) < 5) for ids in said]
            raw = [float(model.reward_head(model(*pad_right([ids], tiny.PAD))[0, -1])) for ids in whole]
            assert row["reward_model"] == pytest.approx(1 / (1 + math.exp(raw[1] - raw[0])), abs=1e-4)
            checked.update(len(ids) < 5 for ids in said)
    assert checked[True] >= 10 and checked[False] >= 5  # no penalty is for a person to know of


def test_pairs_are_about_the_prompts_that_the_policy_was_trained_on(policy_run, tmp_path):
    """Those of its --prompts, where it had one, and else the reward run's."""
    trained = load_trained(str(policy_run), torch.device("cpu"))
    assert set(label.training_prompts(trained).texts) == {pair.prompt for pair in load_splits(trained.reward_config).train}
    (tmp_path / "p.jsonl").write_text('{"prompt": "a 77:"}\n{"prompt": "b 88:"}\n')
    trained = trained._replace(config=dataclasses.replace(trained.config, prompts=str(tmp_path / "p.jsonl")))
    assert label.training_prompts(trained).texts == ["a 77:", "b 88:"]


@pytest.mark.parametrize("settings, flags", [
    ({}, ["--heldout-data", HELPDESK["heldout"], "--test-data", HELPDESK["test"], "--task", "minirlhf.helpdesk"]),
    (dict(data=("d.jsonl",)), []),
    (dict(data=("d.jsonl",), heldout_data=("h 1.jsonl", "h2.jsonl"), task="tiny", max_response_length=9, max_prompt_length=7,
          tokenizer="gpt2"), ["--tokenizer", "gpt2", "--max-prompt-length", "7", "--max-response-length", "9", "--heldout-data",
                              "h 1.jsonl", "h2.jsonl", "--task", "tiny"]),
    (dict(data=("d.jsonl",), task="none", test_data=("t.jsonl",)), ["--test-data", "t.jsonl"]),
])
def test_the_next_command_is_about_the_same_task(settings, flags, policy_run):
    """Without them the labels would be read by another tokenizer, or judged on themselves."""
    trained = load_trained(str(policy_run), torch.device("cpu"))._replace(reward_config=RewardConfig(**settings))
    start = ["python", "train_reward.py", "--init-reward", str(Path(trained.config.reward_run) / "reward.pt"),
             "--data", "l.jsonl"]
    assert shlex.split(label.next_command(trained, Path("l.jsonl"))) == start + flags


# ---- the file --------------------------------------------------------------------------------------------------------


def test_undo_rewrites_the_file_in_one_step(tmp_path, monkeypatch):
    """A crash in the middle of an undo must leave every answer."""
    path = tmp_path / "l.jsonl"
    file = LabelFile(path, SOURCE, "run")
    for number in range(3):
        file.add(made_up(number), "left")
    before = path.read_bytes()

    def crash(*_):
        raise OSError(5, "gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):
        file.undo()
    monkeypatch.undo()
    assert path.read_bytes() == before and file.undo() == made_up(2) and len(rows(path)) == 2
    file.lock.close()


def test_each_answer_is_flushed_to_the_disk_before_the_next(tmp_path, monkeypatch):
    flushed, path = [], tmp_path / "l.jsonl"
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(path.read_bytes()))
    file = LabelFile(path, SOURCE, "run")
    file.add(made_up(0), "tie")
    assert flushed == [path.read_bytes()] and flushed[0].endswith(b"\n")
    file.lock.close()


def test_the_next_pair_is_the_one_after_the_last_even_if_some_were_passed_over(tmp_path):
    """A policy that says the same twice is not asked about; counting answers would show a pair again."""
    file = LabelFile(tmp_path / "l.jsonl", SOURCE, "run")
    assert file.next_number() == 0
    for number in (0, 5):
        file.add(made_up(number), "left")
    assert file.next_number() == 6 and file.undo() == made_up(5) and file.next_number() == 1
    file.lock.close()


@pytest.mark.parametrize("tail, answers, mended", [
    (b"", 2, False), (b'{"prompt": "x', 2, True), (b'{"pro', 2, True), (b'{"prompt": "\0\0\0', 2, True), (b"\0\0", 2, True)])
def test_what_a_crash_leaves_behind_is_mended(tail, answers, mended, tmp_path):
    path = tmp_path / "l.jsonl"
    file = LabelFile(path, SOURCE, "run")
    file.add(made_up(0), "left")
    file.add(made_up(1), "right")
    file.lock.close()
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    again = LabelFile(path, SOURCE, "run")
    assert (len(again.rows), again.mended, again.next_number()) == (answers, mended, 2) and path.read_bytes() == whole
    again.lock.close()
    path.write_bytes(whole[:-1])  # an editor that leaves out the last newline
    again = LabelFile(path, SOURCE, "run")
    assert len(again.rows) == 2 and not again.mended and path.read_bytes() == whole
    again.lock.close()


@pytest.mark.parametrize("content, words", [
    (b"my notes", "1: not an answer"), (b"my notes\n", "1: not an answer"), (b'{"prompt": "x"}\n', "1: not an answer"),
    (b'[1]\n', "1: not an answer"), (b"{" * 100_000 + b"\n", "1: not an answer"), (b"\xff\xfe\n", "1: not an answer"),
])
def test_a_file_that_is_no_label_file_is_refused_and_left_alone(content, words, tmp_path):
    """--out with a slip of the pen must not cost anybody a file."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        LabelFile(path, SOURCE, "run")
    assert "name another --out" in str(error.value) and path.read_bytes() == content


@pytest.mark.parametrize("other, words", [(dict(tokenizer="u", reward="r"), "another tokenizer, so another task"),
                                          (dict(tokenizer="t", reward="s"), "another reward run")])
def test_answers_about_another_policy_are_refused(other, words, tmp_path):
    """Mixed, the answers would teach one reward model about the other's mistakes."""
    file = LabelFile(tmp_path / "l.jsonl", other, "run")
    file.add(made_up(0), "left")
    with pytest.raises(UserError, match="another process is labelling there"):
        LabelFile(tmp_path / "l.jsonl", other, "run")
    file.lock.close()
    with pytest.raises(UserError, match=f"l.jsonl:1: .*{words}; name another --out"):
        LabelFile(tmp_path / "l.jsonl", SOURCE, "run")


def test_two_files_in_one_folder_do_not_wait_for_each_other(tmp_path):
    """Nor for a run of train_policy.py there, which holds .lock; but the same file twice is refused."""
    files = [LabelFile(tmp_path / name, SOURCE, "p") for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(UserError, match="another process is labelling there"):
        LabelFile(tmp_path / "a.jsonl", SOURCE, "p")
    assert not (tmp_path / ".lock").exists()
    for file in files:
        file.lock.close()


def test_the_summary_counts_agreement_by_hand(tmp_path):
    """Four decided: agreed, agreed, not, undecided; ties and skips take no part."""
    file = LabelFile(tmp_path / "l.jsonl", SOURCE, "run")
    for number, (answer, probability) in enumerate([("left", 0.9), ("right", 0.2), ("right", 0.7), ("left", 0.5), ("tie", 0.9),
                                                    ("skip", 0.9)]):
        file.add(made_up(number, probability), answer)
    low, high = wilson(2.5, 4)
    agreed = f"reward model agreed 2.5/4: 62% [{low:.0%}, {high:.0%}]"
    assert file.summary() == f"5 answered (1 tie), 1 skipped; {agreed}"
    file.lock.close()


@pytest.mark.parametrize("changes, words", [
    (["--run", "{tmp}/none"], "none/config.json: no such file"), ([], "--run is missing"),
    (["--run", "{reward_run}"], "not a configuration of this program"),
    (["--run", "{run}", "--count", "0"], "--judge needs --count"),
    (["--run", "{run}", "--judge", "tiny:none"], "no such function"),
    (["--run", "{run}", "--judge", "test_tools_label:nonsense"], "returned 2; it must be a probability"),
    (["--run", "{run}", "--judge", "test_tools_label:made_up"], "test_tools_label:made_up raised TypeError"),
    (["--run", "{run}", "--max-response-length", "99"], "--max-response-length 99"),
    (["--run", "{run}", "--out", "{tmp}/no/l.jsonl"], "No such file or directory"),
    (["--run", "{run}", "--picks", "next"], "did you mean --pick?"),
])
def test_bad_input_is_one_line(changes, words, policy_run, reward_run, tmp_path, capsys):
    fill = dict(tmp=tmp_path, run=policy_run, reward_run=reward_run)
    flags = ["--judge", "tiny:preference_probability", "--count", "3", "--out", str(tmp_path / "l.jsonl")]
    assert words in refused(capsys, label.main, LabelConfig, flags + [text.format(**fill) for text in changes])


def test_a_full_disk_is_one_line_and_costs_no_answer(policy_run, tmp_path, monkeypatch, capsys):
    """The third answer does not fit: it is refused aloud, and the first two are there."""
    out, real = tmp_path / "l.jsonl", labels.os.fsync
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(out))
        real(fd)

    monkeypatch.setattr(labels.os, "fsync", full)
    flags = ["--run", str(policy_run), "--judge", "tiny:preference_probability", "--count", "9", "--out", str(out)]
    assert "No space left on device" in refused(capsys, label.main, LabelConfig, flags) and len(rows(out)) == 3


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 59, 60, 80, 133])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(columns):
    """Wide and combining characters, a word longer than the line, control characters."""
    left, right = "日本語 " * 30 + "e\u0301" * 9, f"{'x' * 200} \x1b[31mred\u202e one two"
    lines = side_by_side(("a", left), ("b", right), columns)
    assert max(map(cells, lines)) <= columns and "\x1b" not in "".join(lines) and "\u202e" not in "".join(lines)
    assert "".join(wrap(left, 9)).replace(" ", "") == left.replace(" ", "")


def test_wrapping_terminates_where_not_even_one_character_fits():
    assert wrap("日本", 1) == ["日", "本"] and wrap("", 5) == [""]
