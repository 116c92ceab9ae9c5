"""Chat: streamed responses equal sampled ones, and texts cannot control the terminal."""

import dataclasses
import hashlib
import io
import json
import os
import re

from minirlhf.data import helpdesk
from minirlhf.data.prompts import encode_prompts
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import sample_responses
from minirlhf.run.command_line import run_script
from minirlhf.run.folder import sealed
from minirlhf.run.seeding import row_uniforms
from minirlhf.tools import chat
from minirlhf.tools.chat import ChatConfig, apply_template, pick_template, stream
from minirlhf.tools.terminal import redraw
from minirlhf.tools.trained import identity, load_trained

import pytest
import tiny
import torch
from tiny import refused

CPU = torch.device("cpu")
PROMPT_SIGN = "\r\n> "


def chat_main(policy_run, **settings):
    return chat.main(ChatConfig(run=str(policy_run), task="tiny", device="cpu", **settings))


def printed_rows(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def set_stdin(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


# ---- responses and scores ------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [False, True])
def test_a_streamed_response_equals_a_sampled_one(greedy, policy_run, capsys):
    """There are two decoding loops. If they differ, chat shows another policy than training."""
    trained = load_trained(str(policy_run), CPU, "tiny")
    prompts = encode_prompts(["b 3:"], trained.encoding, 6)
    reward = Reward("reward model", trained.reward_model, trained.config.missing_eos_penalty)
    for seed in range(5):
        limit = 1 if seed == 4 else 0  # one response that is cut
        chat_main(
            policy_run,
            prompt="b 3:",
            json=True,
            seed=seed,
            greedy=greedy,
            max_response_length=limit,
        )
        (row,) = printed_rows(capsys)
        for name in ("base", "policy"):
            model = getattr(trained, name)
            sampling = trained.sampling(0.0, limit, seed)
            rows = None if greedy else [0]
            samples = sample_responses(model, prompts, sampling, "chat", rows=rows)
            answer = row[name]
            assert answer["response"] == samples.responses[0]
            assert answer["finished"] == samples.finished[0]
            assert answer["tokens"] == int(samples.response_mask.sum())
            score = float(score_responses(reward, samples)[0])
            assert answer["score"] == pytest.approx(score, abs=1e-5)
            gold = tiny.gold("b 3:", answer["response"], answer["finished"])
            assert answer["gold"] == pytest.approx(gold)


def test_stream_stops_at_eos_and_at_the_limit():
    model = tiny.random_model(seed=3)
    for row in range(20):
        uniforms = row_uniforms(0, "test", 0, [row], 9)[0]
        tokens = list(stream(model, (1, 2), uniforms, 9, 0, 1.0))
        assert 1 <= len(tokens) <= 9
        assert 0 not in tokens[:-1]
        assert tokens[-1] == 0 or len(tokens) == 9
    assert len({tuple(stream(model, (1, 2), None, 9, 0, 1.0)) for _ in range(3)}) == 1


def test_seed_temperature_length_and_turn_have_their_effect(policy_run, capsys, monkeypatch):
    """Equal seeds give equal responses; the next line of a pipe has other random numbers.

    Blank lines of a pipe are skipped.
    """
    settings = dict(json=True, temperature=1.5, max_response_length=3)
    set_stdin(monkeypatch, "b 3:\n\nb 3:\n")
    first = chat_main(policy_run, **settings)
    assert printed_rows(capsys) == first
    assert [row["turn"] for row in first] == [0, 1]
    assert first[0]["base"]["response"] != first[1]["base"]["response"]
    assert first[0]["base"]["tokens"] <= 3
    assert {row["temperature"] for row in first} == {1.5}
    assert chat_main(policy_run, prompt="b 3:", **settings)[0] == first[0]
    cold = chat_main(policy_run, prompt="b 3:", temperature=1e-3)
    greedy = chat_main(policy_run, prompt="b 3:", greedy=True)
    assert cold[0]["policy"] == greedy[0]["policy"]


def test_without_flags_sampling_is_as_in_training(policy_run):
    """The policy's temperature and length are used; the reward run may have another length."""
    trained = load_trained(str(policy_run), CPU, "tiny")
    config = dataclasses.replace(trained.config, temperature=0.7, max_response_length=3)
    changed = trained._replace(config=config)

    def settings(source, *arguments) -> tuple:
        sampling = source.sampling(*arguments)
        return sampling.max_response_length, sampling.temperature, sampling.seed

    assert settings(trained, 0.0, 0, 5) == (5, 1.0, 5)
    assert settings(changed, 0.0, 0, 5) == (3, 0.7, 5)
    assert settings(changed, 0.2, 4, 5) == (4, 0.2, 5)


def test_a_cut_response_is_marked(policy_run, capsys):
    """The model did not end it, and its score has a penalty."""
    (row,) = chat_main(policy_run, prompt="b 3:", max_response_length=1)
    cut = [not row[name]["finished"] for name in ("base", "policy")]
    assert any(cut)
    assert capsys.readouterr().out.count("  cut") == sum(cut)


def test_scores_are_those_of_the_training_reward(policy_run, monkeypatch):
    """A run with a reward function must not show the reward model's scores."""
    trained = load_trained(str(policy_run), CPU, "tiny")
    config = dataclasses.replace(
        trained.config, reward="tiny:letters_right", missing_eos_penalty=3.0
    )
    changed = trained._replace(config=config)
    monkeypatch.setattr(chat, "load_trained", lambda *arguments: changed)
    for length in (1, 5):
        reward = "tiny:letters_right"
        (row,) = chat_main("x", prompt="b 3:", reward=reward, max_response_length=length)
        for answer in (row["base"], row["policy"]):
            penalty = 3.0 * (not answer["finished"])
            assert answer["score"] == tiny.gold("b 3:", answer["response"]) - penalty


def test_answers_are_identified_by_the_reward_model(policy_run, reward_run):
    content = (reward_run / "reward.pt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    assert identity(load_trained(str(policy_run), CPU, "tiny"))["reward"] == digest


def test_ctrl_c_ends_a_pipe_with_status_130(policy_run, monkeypatch):
    """A script with a thousand prompts must stop at the first Ctrl-C, and see the status."""
    set_stdin(monkeypatch, "b 3:\nc 4:\n")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "answer", interrupted)
    assert tiny.ending(chat.main, ChatConfig, ["--run", str(policy_run), *tiny.MODULES]) == 130


def test_columns_show_both_responses_with_their_scores(policy_run, capsys):
    chat_main(policy_run, prompt="b 3:")
    out = capsys.readouterr().out
    assert out.startswith("b 3:\n\n")
    title = r"^base  score [+-]\d\.\d\d  gold [+-]\d\.\d\d.* │ policy  score "
    assert re.search(title, out, re.M)


# ---- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, template, prompt",
    [
        ("My red fan is late.", "helpdesk", "Customer: My red fan is late.\nAgent:"),
        ("Customer: Hello.\nAgent:", "helpdesk", "Customer: Hello.\nAgent:"),
        ("Hello?", "dialogue", "\n\nHuman: Hello?\n\nAssistant:"),
        ("Hello?", "raw", "Hello?"),
    ],
)
def test_a_message_gets_the_template_and_a_prompt_does_not_get_it_twice(text, template, prompt):
    assert apply_template(text, template) == prompt


def test_the_template_fits_the_task_or_the_data(policy_run, tmp_path):
    """A run on dialogues is recognized by its samples."""
    trained = load_trained(str(policy_run), CPU, "tiny")
    assert pick_template(trained) == "raw"
    assert pick_template(trained._replace(ground_truth=helpdesk)) == "helpdesk"
    (tmp_path / "samples.md").write_text("## 1\n\n```text\n\n\nHuman: Hi\n\nAssistant:\n```\n")
    assert pick_template(trained._replace(folder=tmp_path)) == "dialogue"


def test_a_raw_line_may_contain_line_breaks(policy_run, capsys, monkeypatch):
    set_stdin(monkeypatch, "x\n/raw a\\nb\n")
    chat_main(policy_run, json=True, template="helpdesk")
    assert [row["prompt"] for row in printed_rows(capsys)] == ["Customer: x\nAgent:", "a\nb"]


# ---- a terminal ----------------------------------------------------------------------------------


def test_a_terminal_shows_tokens_one_by_one_and_an_empty_line_repeats(policy_run, open_terminal):
    """Each token redraws the columns; score and gold are shown once, at the end."""
    flags = ["--run", str(policy_run), *tiny.MODULES, "--device", "cpu"]
    terminal = open_terminal(run_script, chat.main, ChatConfig, flags)
    assert "template raw" in terminal.read(PROMPT_SIGN)
    output = terminal.press("b 3:\n", PROMPT_SIGN)
    assert output.count("\x1b[J") >= 2
    assert output.count("gold") == 2
    assert terminal.press("\n", PROMPT_SIGN).count("gold") == 2
    os.write(terminal.fd, b"\x04")
    status, screen, restored = terminal.end()
    assert status == 0
    assert restored


def test_only_the_last_redraw_writes_lines_that_do_not_fit_the_screen(capsys):
    """A terminal cannot overwrite lines that have scrolled away; they would be there twice."""
    lines = [str(n) for n in range(100)]
    drawn = redraw(lines[:50], 0, 24, last=False)
    assert drawn == 22
    assert redraw(lines, drawn, 24, last=True) == 100
    first = "".join(f"{n}\n" for n in range(28, 50))
    last = "".join(f"{n}\n" for n in range(100))
    assert capsys.readouterr().out == first + "\x1b[22F\x1b[J" + last


def test_a_terminal_that_cannot_redraw_shows_each_answer_once(
    policy_run, open_terminal, monkeypatch
):
    monkeypatch.setattr(chat, "can_redraw", lambda: False)
    terminal = open_terminal(
        run_script, chat.main, ChatConfig, ["--run", str(policy_run), *tiny.MODULES]
    )
    terminal.read("> ")
    shown = terminal.press("b 3:\n", "> ")
    assert "\x1b" not in shown
    assert shown.count("policy") == 1
    terminal.press("\x04", "\n")
    assert terminal.end()[0] == 0


# ---- bad input -----------------------------------------------------------------------------------


def test_prompts_and_responses_cannot_control_the_terminal(policy_run, capsys, monkeypatch):
    """Escape sequences in them are printed as text."""
    monkeypatch.setattr(chat, "decode", lambda encoding, ids: "\x1b]0;owned\x07 \u202e")
    chat_main(policy_run, prompt="a\x1b[2J 1:")
    captured = capsys.readouterr()
    assert not re.search("[\x1b\x07\u202e]", captured.out + captured.err)
    assert r"\x1b]0;owned\x07" in captured.out


def test_a_cut_prompt_prints_a_warning(policy_run, capsys):
    chat_main(policy_run, prompt="a" * 99)
    assert "only its last 6 tokens are used" in capsys.readouterr().err


def test_invalid_utf8_does_not_end_the_program(policy_run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe:\n"), encoding="utf-8"))
    assert len(chat_main(policy_run)) == 1
    assert len(chat_main(policy_run, prompt="\udcff")) == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--run is missing"),
        (["--run", "{reward_run}"], "is a run of train_reward.py; name one of train_policy.py"),
        (["--run", "{tmp}"], "config.json: No such file"),
        (["--run", "{run}", "--template", "helpdesc"], "choose from auto, helpdesk, dialogue"),
        (["--run", "{run}", "--temperature", "-1"], "--temperature must be from 0"),
        (
            ["--run", "{run}", "--prompt", "x", "--max-response-length", "6"],
            "6 is too large; next to a prompt, the model's context holds at most 5 tokens",
        ),
        (["--run", "{run}", "--promt", "x"], "did you mean --prompt?"),
    ],
)
def test_bad_input_gives_one_error_line(flags, words, policy_run, reward_run, tmp_path, capsys):
    fill = dict(tmp=tmp_path, run=policy_run, reward_run=reward_run)
    arguments = [text.format(**fill) for text in flags] + tiny.MODULES
    assert words in refused(capsys, chat.main, ChatConfig, arguments)


@pytest.mark.parametrize("stdin", [io.StringIO("\n"), None])
def test_an_empty_or_closed_pipe_is_an_error(stdin, policy_run, monkeypatch, capsys):
    """Without output and with status 0 it would look like an empty response."""
    monkeypatch.setattr("sys.stdin", stdin)
    assert "there is no prompt" in refused(
        capsys, chat.main, ChatConfig, ["--run", str(policy_run), *tiny.MODULES]
    )


def test_a_missing_reward_run_is_named(policy_run, tmp_path, capsys):
    """config.json names it relative to the folder in which the script was started."""
    run = tmp_path / "run"
    run.mkdir()
    config = json.loads((policy_run / "config.json").read_text())
    settings = dict(config["settings"], reward_run="runs/gone")
    (run / "config.json").write_text(json.dumps(sealed(settings, config["facts"])))
    message = refused(capsys, chat.main, ChatConfig, ["--run", str(run), "--prompt", "x"])
    assert (
        "its reward run runs/gone does not exist here; start this program in the folder" in message
    )
