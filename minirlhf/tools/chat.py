"""Talk to a policy and to the base model it came from. `python -m minirlhf.tools.chat --run runs/NAME`

Each prompt stands alone: the models were trained on single exchanges, and remember nothing of the one before.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.config import DEVICES, UserError, run_script
from minirlhf.data import encode_prompts
from minirlhf.device import pick_device
from minirlhf.environment import Samples, Scorer, function_scorer, model_scorer
from minirlhf.flags import check_ranges, setting
from minirlhf.generate import sample_tokens
from minirlhf.log import rounded
from minirlhf.model import KVCache, Transformer, last_tokens
from minirlhf.records import ASSISTANT, HUMAN
from minirlhf.seeding import row_uniforms
from minirlhf.task import load_function
from minirlhf.tokenizer import decode
from minirlhf.tools.terminal import at_terminal, can_redraw, redraw, side_by_side, wrap
from minirlhf.tools.trained import Trained, load_trained

# name -> (what stands before the message, what stands after it)
TEMPLATES = {"helpdesk": ("Customer: ", "\nAgent:"), "dialogue": (f"{HUMAN} ", ASSISTANT), "raw": ("", "")}
HINT = ("Write a message; an empty line asks the same again with other random numbers; /raw TEXT leaves out the template (\\n "
        "is a new line); Ctrl-D ends.")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Write to a finished policy and see what it and its base model answer, with their scores."""

    run: str = setting("", "folder of a finished policy run")
    prompt: str = setting("", "answer this one and end; empty: read prompts from the terminal, or one a line from a pipe")
    json: bool = setting(False, "one JSON object per prompt instead of columns")
    template: str = setting("auto", "what is put around a message; auto: that of the run's task or data, raw: nothing",
                            choices=("auto", *TEMPLATES))
    greedy: bool = setting(False, "the likeliest token at each step, instead of sampling")
    temperature: float = setting(0.0, "of sampling; 0: the run's own", 0)
    max_response_length: int = setting(0, "tokens, EOS included; 0: the run's own", 0)
    seed: int = setting(0, "every random choice derives from it", 0)
    device: str = setting("auto", "auto takes cuda when there is one, else cpu", choices=DEVICES)


def main(config: ChatConfig) -> list[dict]:
    """Answer every prompt there is; returns what --json prints. Raises UserError."""
    check_ranges(config)
    trained = load_trained(config.run, pick_device(config.device))
    penalty = trained.config.missing_eos_penalty
    if trained.config.reward:
        function = load_function(trained.config.reward, "the run's --reward")
        scorer = function_scorer(function, trained.config.reward, penalty, trained.device)
    else:
        scorer = model_scorer(trained.reward_model, penalty)
    template = template_of(trained) if config.template == "auto" else config.template
    live = at_terminal() and not config.prompt and not config.json
    if live:
        print("\n".join(wrap(f"{config.run}: template {template}. {HINT}", shutil.get_terminal_size().columns)))
    said = []
    for turn, prompt in enumerate(prompts(config, template, live)):
        try:
            said.append(answer(trained, scorer, prompt, turn, config, live))
        except KeyboardInterrupt:  # enough of this answer
            if not live:
                sys.exit(130)
            print()
    if not said and not live:
        raise UserError("no prompt came; name one with --prompt, write one a line into a pipe, or start this in a terminal")
    return said


def template_of(trained: Trained) -> str:
    """The help desk's for its task; Human and Assistant where the run's own samples show them; else none."""
    if trained.task and trained.task.__name__ == "minirlhf.helpdesk":
        return "helpdesk"
    page = trained.folder / "samples.md"
    return "dialogue" if page.exists() and HUMAN.strip() in page.read_text(encoding="utf-8") else "raw"


def apply_template(text: str, template: str) -> str:
    """The prompt for a message; a message that holds the template already is a prompt.

    >>> apply_template("My red fan is late.", "helpdesk")
    'Customer: My red fan is late.\\nAgent:'
    """
    before, after = TEMPLATES[template]
    return text if before.strip() and before.strip() in text else f"{before}{text}{after}"


def prompts(config: ChatConfig, template: str, live: bool) -> Iterator[str]:
    """The prompt of --prompt, or those that somebody types, or the lines of a pipe."""
    if config.prompt:
        yield apply_template(config.prompt, template)
        return
    last = ""
    if sys.stdin is None:  # closed by whoever started this
        return
    if not live and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 spoils its line alone
    while True:
        try:
            line = input("\n> " if live else "")
        except (EOFError, KeyboardInterrupt):
            if live:
                print()
            return
        if line.startswith("/raw "):
            last = line.removeprefix("/raw ").replace("\\n", "\n")
        elif line.strip():
            last = apply_template(line.strip(), template)
        elif not live:
            continue
        if last:
            yield last


@torch.no_grad()
def stream(model: Transformer, prompt_ids: list[int], uniforms: Tensor | None, limit: int, eos: int,
           temperature: float) -> Iterator[int]:
    """The tokens of one response, each handed out as soon as it is chosen: what generate() returns for a batch of one.
    uniforms: [limit]; None decodes greedily."""
    ids = torch.tensor([prompt_ids], device=model.wte.weight.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    cache = KVCache(model, mask)
    hidden = model(ids, mask, cache, wanted=last_tokens(mask))[:, -1]
    for t in range(limit):
        logits = hidden @ model.lm_weight.T
        token = logits.argmax(-1) if uniforms is None else sample_tokens(logits, uniforms[t:t + 1], temperature)
        yield int(token)
        if int(token) == eos or t + 1 == limit:
            return
        hidden = model.decode(token, cache)


def answer(trained: Trained, scorer: Scorer, prompt: str, turn: int, config: ChatConfig, live: bool) -> dict:
    """Ask both models, with the same random numbers; print, and return, what they say and what it is worth."""
    encoding, limit, temperature, seed = trained.sampling(config.temperature, config.max_response_length, config.seed)
    (ids,), was_cut = encode_prompts([prompt], encoding, trained.reward_config.max_prompt_length)
    if was_cut:
        print(f"the prompt is cut to its last {len(ids)} tokens, all that the model was trained to read", file=sys.stderr)
    uniforms = None if config.greedy else row_uniforms(seed, "chat", turn, [0], limit)[0].to(trained.device)
    tokens: dict[str, list[int]] = {"base": [], "policy": []}
    sources = {name: stream(getattr(trained, name), ids, uniforms, limit, encoding.eot_token, temperature) for name in tokens}
    size, drawn = shutil.get_terminal_size(), 0
    while sources:  # a token of each in turn
        for name in list(sources):
            token = next(sources[name], None)
            if token is None:
                del sources[name]
            else:
                tokens[name].append(token)
        if live and sources and can_redraw():
            drawn = redraw(columns(trained, tokens, {}, size.columns), drawn, size.lines, last=False)
    found = dict(prompt=prompt, seed=seed, turn=turn, greedy=config.greedy, temperature=temperature,
                 **{name: measured(trained, scorer, prompt, ids, some) for name, some in tokens.items()})
    if config.json:
        print(json.dumps(found), flush=True)
        return found
    if not live:
        print("\n".join(wrap(prompt.strip("\n"), size.columns)) + "\n")
    redraw(columns(trained, tokens, found, size.columns), drawn, size.lines, last=True)
    return found


def measured(trained: Trained, scorer: Scorer, prompt: str, ids: list[int], tokens: list[int]) -> dict:
    """One response as text and in figures: score, gold where the task knows it, tokens, and whether it ended by itself."""
    row, response = (torch.tensor([x], device=trained.device) for x in (ids, tokens))
    finished = tokens[-1] == trained.encoding.eot_token
    samples = Samples([prompt], [decode(trained.encoding, tokens)], [finished], row, torch.ones_like(row, dtype=torch.bool),
                      response, torch.ones_like(response, dtype=torch.bool))
    gold = samples.gold(trained.task)
    worth = dict(score=float(scorer(samples)[0])) | (dict(gold=float(gold[0])) if gold else {})
    return dict(response=samples.responses[0], **rounded(worth), finished=finished, tokens=len(tokens))


def columns(trained: Trained, tokens: dict[str, list[int]], found: dict, width: int) -> list[str]:
    """Both responses so far, and their figures once they are known."""
    halves = []
    for name, some in tokens.items():
        title = [name]
        if name in found:
            title += [f"{key} {found[name][key]:+.2f}" for key in ("score", "gold") if key in found[name]]
            title += [] if found[name]["finished"] else ["cut"]  # by length; more words would not fit beside the figures
        halves.append(("  ".join(title), decode(trained.encoding, some).strip()))
    return side_by_side(*halves, width)


if __name__ == "__main__":
    run_script(main, ChatConfig)
