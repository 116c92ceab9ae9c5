"""From a conversation to one text: ChatML (SmolLM2, Qwen), Llama 3, and Human/Assistant.

A template puts special tokens around messages. In the text, each stands between two NUL
characters, "\\0<|im_end|>\\0", and no record may contain a NUL. So a user's "<|im_end|>" never
becomes a special token. prompts.py gives the marked ones their ids.
"""

import re
from pathlib import Path
from typing import NamedTuple

from minirlhf.data.pretrained_tokenizer import chat_template, read_json
from minirlhf.run.errors import UserError

Turn = tuple[str, str]  # role (system, user or assistant) and text
MARKED = re.compile("\0(<\\|\\w+\\|>)\0")  # a special token
ROLES = dict(system="System", user="Human", assistant="Assistant")
NO_THOUGHTS = "<think>\n\n</think>\n\n"


class ChatTemplate(NamedTuple):
    """The texts around the messages of a conversation."""

    opening: str = ""  # before a message; contains {role} or {Role}; "" if there is no template
    gap: str = ""  # between the opening and the text; belongs to a response
    closing: str = ""  # after a message
    start: str = ""  # before the first message
    system: str = ""  # the system message of a conversation without one
    dates: str = ""  # before the text of the system message
    thoughts: str = ""  # before the response: it starts without a chain of thought
    strips: bool = False  # blanks around a text are removed

    def message(self, role: str, text: str, before: str = "") -> str:
        """One message; `before` precedes its text."""
        if self.thoughts and role == "assistant":  # of an earlier turn
            text = text.split("</think>")[-1].lstrip("\n") if "</think>" in text else text
        text = text.strip() if self.strips else text
        return f"{self.opened(role)}{self.gap}{before}{text}{self.closing}"

    def opened(self, role: str) -> str:
        """The text before a message."""
        return self.opening.format(role=role, Role=ROLES[role])

    def prefix(self) -> str:
        """What every prompt starts with."""
        return (self.start + self.opening).partition("{")[0]

    def prompt(self, turns: list[Turn]) -> str:
        """The messages, and the opening of the response."""
        has_system = turns[:1] and turns[0][0] == "system"
        if not has_system and (self.system or self.dates):
            turns = [("system", self.system), *turns]
        texts = [self.message(*turn, "" if i else self.dates) for i, turn in enumerate(turns)]
        return "".join([self.start, *texts, self.opened("assistant"), self.thoughts])

    def response(self, turns: list[Turn]) -> str:
        """A response of one or more turns, without the closing: EOS stands in its place."""
        text = "".join(self.message(*turn) for turn in turns)
        return text.removeprefix(self.opened("assistant")).removesuffix(self.closing)


def _mark(text: str) -> str:
    return re.sub(r"(<\|\w+\|>)", "\0\\1\0", text)


DIALOGUE = ChatTemplate("\n\n{Role}:", " ")  # HH-RLHF's
CHATML = ChatTemplate(_mark("<|im_start|>{role}\n"), "", _mark("<|im_end|>\n"))
LLAMA3 = ChatTemplate(_mark("<|start_header_id|>{role}<|end_header_id|>\n\n"), "",
                      _mark("<|eot_id|>"), start=_mark("<|begin_of_text|>"), strips=True)
# Llama 3.2's template writes today's date, or this one if the date is unknown. Today's would make
# the same command give another result tomorrow.
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
CHATML_TOKENS = {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
LLAMA3_TOKENS = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                 "<|eom_id|>", "<|python_tag|>"}  # the last two only with tools
DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^'<]+)<\|im_end\|>")


def read_chat_template(tokenizer: str) -> ChatTemplate:
    """The template of a pretrained model, or DIALOGUE if --tokenizer does not name its folder.

    Recognized by its special tokens; the default system message is found in its text. A folder
    without a template is a base model's. Raises UserError for another template.
    """
    folder = Path(tokenizer)
    if not folder.is_dir():
        return DIALOGUE
    source = chat_template(folder)
    if not source:
        begin = read_json(folder / "tokenizer_config.json").get("bos_token")
        return ChatTemplate(start=LLAMA3.start if begin == "<|begin_of_text|>" else "")
    tokens = set(re.findall(r"<\|\w+\|>", source))
    thinks = "enable_thinking" in source
    is_chatml = tokens <= CHATML_TOKENS and re.search(r"<\|im_start\|>' \+ message", source)
    if is_chatml and (not thinks or repr(NO_THOUGHTS)[1:-1] in source):
        system = DEFAULT_SYSTEM.search(source)
        return CHATML._replace(system=system[1] if system else "",
                               thoughts=NO_THOUGHTS if thinks else "")
    if "<|start_header_id|>" in tokens <= LLAMA3_TOKENS:
        return LLAMA3._replace(dates=DATES if DATES[:22] in source else "")
    raise UserError(f"{folder}: its chat template is neither ChatML nor Llama 3's; "
                    "use another model, or its base model")
