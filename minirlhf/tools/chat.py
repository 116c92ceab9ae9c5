"""Chat with a policy and its base model. `python -m minirlhf.tools.chat --run runs/NAME`

Each prompt is independent: the models were trained on single exchanges and have no memory.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator

from minirlhf.config import DEVICES, TASK_AGAIN
from minirlhf.data.chat_templates import DIALOGUE, read_chat_template
from minirlhf.data.preference_files import render_prompt
from minirlhf.data.prompts import encode_prompt, without_marks
from minirlhf.data.splits import load_function
from minirlhf.data.tokenizer import Ids, decode
from minirlhf.model import Transformer
from minirlhf.model.cache import KVCache
from minirlhf.model.generate import sample_tokens
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import Samples, gold_utility
from minirlhf.run.command_line import check_ranges, run_script, setting
from minirlhf.run.device import pick_device
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file
from minirlhf.run.folder import trusted_module
from minirlhf.run.metrics import rounded
from minirlhf.run.seeding import row_uniforms
from minirlhf.run.terminal import echo
from minirlhf.tools.terminal import can_redraw, is_interactive, redraw, side_by_side, wrap
from minirlhf.tools.trained import Trained, load_trained

import torch
from torch import Tensor

HUMAN = DIALOGUE.opened("user")
# name -> (text before the message, text after it)
TEMPLATES = {"helpdesk": ("Customer: ", "\nAgent:"),
             "dialogue": (f"{HUMAN} ", DIALOGUE.opened("assistant")), "raw": ("", "")}
HINT = ("Write a message. An empty line repeats the last prompt with other random numbers; "
        "/raw TEXT uses no template (\\n is a new line); Ctrl-D ends.")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Write to a trained policy. Shows its response and its base model's, with their scores."""

    run: str = setting("", "folder of a finished policy run")
    task: str = setting("", TASK_AGAIN)
    reward: str = setting("", "the policy run's --reward, if it has one")
    prompt: str = setting(
        "", "answer this prompt and stop; empty: read prompts from the terminal, or one per line "
            "from a pipe")
    json: bool = setting(False, "print one JSON object per prompt instead of columns")
    template: str = setting(
        "auto", "text around a message; auto: the template of the run's task or data, raw: none",
        choices=("auto", *TEMPLATES))
    greedy: bool = setting(False, "take the most likely token at each step instead of sampling")
    temperature: float = setting(0.0, "of sampling; 0: as in training", 0)
    max_response_length: int = setting(0, "tokens, EOS included; 0: as in training", 0)
    seed: int = setting(0, "every random choice is a function of it", 0)
    device: str = setting("auto", "auto: cuda if there is one, otherwise cpu", choices=DEVICES)


def main(config: ChatConfig) -> list[dict]:
    """Answer all prompts; returns what --json prints. Raises UserError."""
    check_ranges(config)
    trained = load_trained(config.run, pick_device(config.device), config.task)
    reward = training_reward(trained, config)
    template = pick_template(trained) if config.template == "auto" else config.template
    interactive = is_interactive() and not config.prompt and not config.json
    if interactive:
        text = f"{config.run}: template {template}. {HINT}"
        echo("\n".join(wrap(text, shutil.get_terminal_size().columns)))
    answers = []
    chat_template = read_chat_template(trained.reward_config.tokenizer)

    def as_prompt(message: str) -> str:
        return render_prompt(apply_template(message, template), chat_template)

    for turn, prompt in enumerate(read_prompts(config, as_prompt, interactive)):
        try:
            answers.append(answer(trained, reward, prompt, turn, config, interactive))
        except KeyboardInterrupt:  # on a terminal, Ctrl-C stops only this answer
            if not interactive:
                sys.exit(130)
            echo()
    if not answers and not interactive:
        raise UserError("there is no prompt; use --prompt, write one prompt per line into a pipe, "
                        "or start this program in a terminal")
    return answers


def training_reward(trained: Trained, config: ChatConfig) -> Reward:
    """The reward that the policy was trained with: its --reward function, or the reward model."""
    name = trusted_module(trained.config.reward, config.reward, "--reward",
                          trained.folder / "config.json")
    source = load_function(name, "--reward") if name else trained.reward_model
    return Reward(name or "reward model", source, trained.config.missing_eos_penalty)


# ---- prompts -------------------------------------------------------------------------------------


def pick_template(trained: Trained) -> str:
    """helpdesk for the embedded task, dialogue if the run's samples have that form, else raw."""
    if trained.ground_truth and trained.ground_truth.__name__ == "minirlhf.data.helpdesk":
        return "helpdesk"
    page = trained.folder / "samples.md"
    is_dialogue = page.exists() and HUMAN.strip().encode() in read_file(page)
    return "dialogue" if is_dialogue else "raw"


def apply_template(text: str, template: str) -> str:
    """The prompt for a message. Text that already contains the template is returned unchanged.

    >>> apply_template("My red fan is late.", "helpdesk")
    'Customer: My red fan is late.\\nAgent:'
    """
    before, after = TEMPLATES[template]
    is_prompt = before.strip() and before.strip() in text
    return text if is_prompt else f"{before}{text}{after}"


def read_prompts(config: ChatConfig, as_prompt: Callable[[str], str],
                 interactive: bool) -> Iterator[str]:
    """The prompt of --prompt, or the prompts typed in the terminal, or the lines of a pipe."""
    if config.prompt:
        yield as_prompt(config.prompt)
        return
    if sys.stdin is None:  # closed by the parent process
        return
    if not interactive and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 affects only its own line
    prompt = ""
    while True:
        try:
            line = input("\n> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            if interactive:
                echo()
            return
        if line.startswith("/raw "):
            prompt = line.removeprefix("/raw ").replace("\\n", "\n")
        elif line.strip():
            prompt = as_prompt(line.strip())
        elif not interactive:
            continue
        if prompt:
            yield prompt


# ---- responses -----------------------------------------------------------------------------------


@torch.no_grad()
def stream(model: Transformer, prompt_ids: Ids, uniforms: Tensor | None, max_response_length: int,
           eos: int, temperature: float) -> Iterator[int]:
    """Yield the tokens of one response one by one: those of generate() for a batch of one.

    uniforms: [max_response_length]; None decodes greedily.
    """
    ids = torch.tensor([prompt_ids], device=model.wte.weight.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    cache = KVCache(model.config, mask, max_response_length, model.wte.weight.dtype)
    hidden = model(ids, mask, cache)[:, -1]
    for t in range(max_response_length):
        logits = hidden @ model.lm_weight.T
        if uniforms is None:
            token = logits.argmax(-1)
        else:
            token = sample_tokens(logits.float() / temperature, uniforms[t:t + 1])
        yield int(token)
        if int(token) == eos or t + 1 == max_response_length:
            return
        hidden = model.decode(token, cache)


def answer(trained: Trained, reward: Reward, prompt: str, turn: int, config: ChatConfig,
           interactive: bool) -> dict:
    """Sample from both models with the same random numbers; print and return the responses."""
    sampling = trained.sampling(config.temperature, config.max_response_length, config.seed)
    length = sampling.max_response_length
    ids, was_cut = encode_prompt(trained.encoding, prompt, trained.reward_config.max_prompt_length)
    prompt = without_marks(prompt)
    if was_cut:
        echo(f"the prompt is too long; only its last {len(ids)} tokens are used", stream=sys.stderr)
    uniforms = None
    if not config.greedy:
        uniforms = row_uniforms(config.seed, "chat", turn, [0], length)[0].to(trained.device)
    models = {"base": trained.base, "policy": trained.policy}
    streams = {name: stream(model, ids, uniforms, length, trained.encoding.eot_token,
                            sampling.temperature)
               for name, model in models.items()}
    tokens: dict[str, list[int]] = {name: [] for name in models}
    size = shutil.get_terminal_size()
    drawn = 0
    while streams:  # one token of each response in turn
        for name in list(streams):
            token = next(streams[name], None)
            if token is None:
                del streams[name]
            else:
                tokens[name].append(token)
        if interactive and streams and can_redraw():
            lines = columns(trained, tokens, {}, size.columns)
            drawn = redraw(lines, drawn, size.lines, last=False)
    result = dict(prompt=prompt, seed=config.seed, turn=turn, greedy=config.greedy,
                  temperature=sampling.temperature)
    result |= {name: describe(trained, reward, prompt, ids, tokens[name]) for name in models}
    if config.json:
        echo(json.dumps(result))
        return result
    if not interactive:
        echo("\n".join(wrap(prompt.strip("\n"), size.columns)) + "\n")
    redraw(columns(trained, tokens, result, size.columns), drawn, size.lines, last=True)
    return result


def describe(trained: Trained, reward: Reward, prompt: str, ids: Ids, tokens: list[int]) -> dict:
    """One response: text, score, gold if the ground truth has it, length, and how it ended."""
    prompt_ids = torch.tensor([ids], device=trained.device)
    response_ids = torch.tensor([tokens], device=trained.device)
    finished = tokens[-1] == trained.encoding.eot_token
    samples = Samples([prompt], [decode(trained.encoding, tokens)], [finished],
                      prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool),
                      response_ids, torch.ones_like(response_ids, dtype=torch.bool))
    values = dict(score=float(score_responses(reward, samples)[0]))
    if gold := gold_utility(samples, trained.ground_truth):
        values["gold"] = float(gold[0])
    return dict(response=samples.responses[0], **rounded(values), finished=finished,
                tokens=len(tokens))


def columns(trained: Trained, tokens: dict[str, list[int]], result: dict, width: int) -> list[str]:
    """Lines with both responses side by side; with score and gold once the result has them."""
    halves = []
    for name in tokens:
        title = name
        if name in result:
            for key in ("score", "gold"):
                if key in result[name]:
                    title += f"  {key} {result[name][key]:+.2f}"
            if not result[name]["finished"]:
                title += "  cut"  # by length; a longer note would not fit
        halves.append((title, decode(trained.encoding, tokens[name]).strip()))
    return side_by_side(*halves, width)


if __name__ == "__main__":
    run_script(main, ChatConfig)
