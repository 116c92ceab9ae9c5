"""Talking to a policy: what is streamed is what sampling gives, and nothing that a model says commands the terminal."""

import dataclasses
import hashlib
import io
import json
import os
import re

import pytest
import tiny
import torch
from tiny import refused

from minirlhf.config import run_script
from minirlhf.environment import model_scorer, sample_responses
from minirlhf.flags import sealed
from minirlhf.seeding import row_uniforms
from minirlhf.tools import chat
from minirlhf.tools.chat import ChatConfig, apply_template, stream, template_of
from minirlhf.tools.terminal import redraw
from minirlhf.tools.trained import identity, load_trained

CPU = torch.device("cpu")


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def pipe(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.mark.parametrize("greedy", [False, True])
def test_a_streamed_response_is_the_one_that_sampling_gives(greedy, policy_run, capsys):
    """Two ways to decode that drift apart would show a policy that nobody trained."""
    trained = load_trained(str(policy_run), CPU)
    for seed in range(5):
        limit = 1 if seed == 4 else 0  # one that is cut
        chat.main(ChatConfig(run=str(policy_run), prompt="b 3:", json=True, seed=seed, greedy=greedy, device="cpu",
                             max_response_length=limit))
        (found,) = lines_of(capsys)
        ids = trained.encoding.encode_ordinary("b 3:")
        for name in ("base", "policy"):
            samples = sample_responses(getattr(trained, name), ["b 3:"], [ids], trained.sampling(0.0, limit, seed), "chat",
                                       rows=None if greedy else [0])
            score = model_scorer(trained.reward_model, trained.config.missing_eos_penalty)(samples)
            said = found[name]
            assert (said["response"], said["finished"]) == (samples.responses[0], samples.finished[0])
            assert said["score"] == pytest.approx(float(score[0]), abs=1e-5)
            assert said["tokens"] == int(samples.response_mask.sum())
            assert said["gold"] == pytest.approx(tiny.gold("b 3:", said["response"], said["finished"]))


def test_stream_stops_at_eos_and_at_the_limit():
    model = tiny.random_model(seed=3)
    for row in range(20):
        uniforms = row_uniforms(0, "test", 0, [row], 9)[0]
        tokens = list(stream(model, [1, 2], uniforms, 9, 0, 1.0))
        assert 1 <= len(tokens) <= 9 and 0 not in tokens[:-1] and (tokens[-1] == 0 or len(tokens) == 9)
    assert len({tuple(stream(model, [1, 2], None, 9, 0, 1.0)) for _ in range(3)}) == 1


def test_seed_temperature_length_and_turn_are_as_asked(policy_run, capsys, monkeypatch):
    """The same seed says the same; the next line of a pipe has other random numbers, and blank lines are passed over."""
    pipe(monkeypatch, "b 3:\n\nb 3:\n")
    first = chat.main(ChatConfig(run=str(policy_run), json=True, device="cpu", temperature=1.5, max_response_length=3))
    assert lines_of(capsys) == first and [row["turn"] for row in first] == [0, 1]
    assert first[0]["base"]["response"] != first[1]["base"]["response"] and first[0]["base"]["tokens"] <= 3
    assert {row["temperature"] for row in first} == {1.5}
    again = chat.main(ChatConfig(run=str(policy_run), json=True, prompt="b 3:", device="cpu", temperature=1.5,
                                 max_response_length=3))
    assert again[0] == first[0]
    cold = chat.main(ChatConfig(run=str(policy_run), prompt="b 3:", device="cpu", temperature=1e-3))
    greedy = chat.main(ChatConfig(run=str(policy_run), prompt="b 3:", device="cpu", greedy=True))
    assert cold[0]["policy"] == greedy[0]["policy"]


def test_without_flags_sampling_is_the_runs_own(policy_run):
    """Its temperature and its length, which may be shorter than the reward run's."""
    trained = load_trained(str(policy_run), CPU)
    changed = trained._replace(config=dataclasses.replace(trained.config, temperature=0.7, max_response_length=3))
    assert trained.sampling(0.0, 0, 5)[1:] == (5, 1.0, 5) and changed.sampling(0.0, 0, 5)[1:] == (3, 0.7, 5)
    assert changed.sampling(0.2, 4, 5)[1:] == (4, 0.2, 5)


def test_a_response_that_was_cut_is_said_to_be(policy_run, capsys):
    """Its score lacks what a run takes for it, and its end is not the model's."""
    (found,) = chat.main(ChatConfig(run=str(policy_run), prompt="b 3:", max_response_length=1, device="cpu"))
    cut = [not found[name]["finished"] for name in ("base", "policy")]
    assert any(cut) and capsys.readouterr().out.count("  cut") == sum(cut)


def test_scores_are_those_of_the_runs_own_reward(policy_run, monkeypatch):
    """A run that was paid by a function has no use for the reward model's opinion."""
    trained = load_trained(str(policy_run), CPU)
    changed = trained._replace(config=dataclasses.replace(trained.config, reward="tiny:letters_right", missing_eos_penalty=3.0))
    monkeypatch.setattr(chat, "load_trained", lambda *arguments: changed)
    for length in (1, 5):
        (found,) = chat.main(ChatConfig(run="x", prompt="b 3:", max_response_length=length, device="cpu"))
        for one in (found["base"], found["policy"]):
            assert one["score"] == tiny.gold("b 3:", one["response"]) - 3.0 * (not one["finished"])


def test_answers_know_their_policy_by_its_reward_model(policy_run, reward_run):
    content = (reward_run / "reward.pt").read_bytes()
    assert identity(load_trained(str(policy_run), CPU))["reward"] == hashlib.sha256(content).hexdigest()[:16]


def test_ctrl_c_ends_a_pipe_with_status_130(policy_run, monkeypatch):
    """A script that asks a thousand prompts must stop at the first Ctrl-C, and know that it was stopped."""
    pipe(monkeypatch, "b 3:\nc 4:\n")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "answer", interrupted)
    assert tiny.ending(chat.main, ChatConfig, ["--run", str(policy_run)]) == 130


def test_columns_show_both_with_their_figures(policy_run, capsys):
    chat.main(ChatConfig(run=str(policy_run), prompt="b 3:", device="cpu"))
    out = capsys.readouterr().out
    assert out.startswith("b 3:\n\n") and re.search(r"^base  score [+-]\d\.\d\d  gold [+-]\d\.\d\d.* │ policy  score ", out, re.M)


# ---- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, template, prompt", [
    ("My red fan is late.", "helpdesk", "Customer: My red fan is late.\nAgent:"),
    ("Customer: Hello.\nAgent:", "helpdesk", "Customer: Hello.\nAgent:"),
    ("Hello?", "dialogue", "\n\nHuman: Hello?\n\nAssistant:"), ("Hello?", "raw", "Hello?"),
])
def test_a_plain_message_gets_the_template_and_a_prompt_does_not_get_it_twice(text, template, prompt):
    assert apply_template(text, template) == prompt


def test_the_template_is_that_of_the_runs_task_or_data(policy_run, tmp_path):
    """A run on dialogues shows them in its samples."""
    from minirlhf import helpdesk
    trained = load_trained(str(policy_run), CPU)
    assert template_of(trained) == "raw" and template_of(trained._replace(task=helpdesk)) == "helpdesk"
    (tmp_path / "samples.md").write_text("## 1\n\n```text\n\n\nHuman: Hi\n\nAssistant:\n```\n")
    assert template_of(trained._replace(folder=tmp_path)) == "dialogue"


def test_a_raw_line_may_hold_line_breaks(policy_run, capsys, monkeypatch):
    pipe(monkeypatch, "x\n/raw a\\nb\n")
    chat.main(ChatConfig(run=str(policy_run), json=True, template="helpdesk", device="cpu"))
    assert [row["prompt"] for row in lines_of(capsys)] == ["Customer: x\nAgent:", "a\nb"]


# ---- a terminal ------------------------------------------------------------------------------------------------------


def test_at_a_terminal_tokens_stream_and_an_empty_line_asks_again(policy_run, open_terminal):
    """Every step redraws the columns; the last state of the screen is what --json says."""
    terminal = open_terminal(run_script, chat.main, ChatConfig, ["--run", str(policy_run), "--device", "cpu"])
    ready = "\r\n> "
    assert "template raw" in terminal.read(ready)
    said = terminal.press("b 3:\n", ready)
    assert said.count("\x1b[J") >= 2 and said.count("gold") == 2  # redrawn, token by token; figures at the end
    assert terminal.press("\n", ready).count("gold") == 2
    os.write(terminal.fd, b"\x04")
    status, screen, restored = terminal.end()
    assert status == 0 and restored


def test_what_does_not_fit_the_screen_is_written_once_and_whole(capsys):
    """A terminal cannot overwrite what has scrolled away: before the end only the tail is redrawn."""
    lines = [str(n) for n in range(100)]
    drawn = redraw(lines[:50], 0, 24, last=False)
    assert drawn == 22
    assert redraw(lines, drawn, 24, last=True) == 100
    first, whole = ("".join(f"{n}\n" for n in some) for some in (range(28, 50), range(100)))
    assert capsys.readouterr().out == first + "\x1b[22F\x1b[J" + whole


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_nothing_that_is_said_commands_the_terminal(policy_run, capsys, monkeypatch):
    """Escapes in prompt and response are shown, not obeyed."""
    monkeypatch.setattr(chat, "decode", lambda encoding, ids: "\x1b]0;owned\x07 \u202e")
    chat.main(ChatConfig(run=str(policy_run), prompt="a\x1b[2J 1:", device="cpu"))
    captured = capsys.readouterr()
    assert not re.search("[\x1b\x07\u202e]", captured.out + captured.err) and r"\x1b]0;owned\x07" in captured.out


def test_a_prompt_that_is_cut_is_said_to_be(policy_run, capsys):
    chat.main(ChatConfig(run=str(policy_run), prompt="a" * 99, device="cpu"))
    assert "cut to its last 6 tokens" in capsys.readouterr().err


def test_bytes_that_are_no_text_do_not_end_it(policy_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe:\n"), encoding="utf-8"))
    assert len(chat.main(ChatConfig(run=str(policy_run), device="cpu"))) == 1
    assert len(chat.main(ChatConfig(run=str(policy_run), device="cpu", prompt="\udcff"))) == 1


@pytest.mark.parametrize("flags, words", [
    ([], "--run is missing"), (["--run", "{reward_run}"], "not a configuration of this program"),
    (["--run", "{tmp}"], "config.json: no such file"), (["--run", "{run}", "--template", "helpdesc"], "did you mean helpdesk?"),
    (["--run", "{run}", "--temperature", "-1"], "--temperature -1.0 is below 0"),
    (["--run", "{run}", "--prompt", "x", "--max-response-length", "6"], "6: beside a prompt the model's context holds at most 5"),
    (["--run", "{run}", "--promt", "x"], "did you mean --prompt?"),
])
def test_bad_input_is_one_line(flags, words, policy_run, reward_run, tmp_path, capsys):
    fill = dict(tmp=tmp_path, run=policy_run, reward_run=reward_run)
    assert words in refused(capsys, chat.main, ChatConfig, [text.format(**fill) for text in flags] + ["--seed", "0"])


@pytest.mark.parametrize("stdin", [io.StringIO("\n"), None])
def test_an_empty_pipe_is_said_to_be_empty(stdin, policy_run, monkeypatch, capsys):
    """No terminal and nothing to answer; silence and status 0 would look like an answer of nothing. None: closed."""
    monkeypatch.setattr("sys.stdin", stdin)
    assert "no prompt came" in refused(capsys, chat.main, ChatConfig, ["--run", str(policy_run)])


def test_a_terminal_that_cannot_redraw_gets_each_answer_once(policy_run, open_terminal, monkeypatch):
    monkeypatch.setattr(chat, "can_redraw", lambda: False)
    terminal = open_terminal(run_script, chat.main, ChatConfig, ["--run", str(policy_run)])
    terminal.read("> ")
    shown = terminal.press("b 3:\n", "> ")
    assert "\x1b" not in shown and shown.count("policy") == 1
    terminal.press("\x04", "\n")
    assert terminal.end()[0] == 0


def test_a_reward_run_that_has_moved_is_named(policy_run, tmp_path, capsys):
    """The run's own config.json names a folder relative to where it was started."""
    run = tmp_path / "run"
    run.mkdir()
    config = json.loads((policy_run / "config.json").read_text())
    settings = dict(config["settings"], reward_run="runs/gone")
    (run / "config.json").write_text(json.dumps(sealed(settings, config["facts"])))
    message = refused(capsys, chat.main, ChatConfig, ["--run", str(run), "--prompt", "x"])
    assert "its reward run runs/gone is not there; start this in the folder" in message
