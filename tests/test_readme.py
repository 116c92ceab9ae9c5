"""Every command of every page runs, with flags appended that make it small.

A command that is not in COMMANDS fails the test, and so does an entry of COMMANDS that is in no
page. The walkthrough has only commands of other pages; test_docs.py checks this.
"""

import gzip
import http.server
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.run.command_line import run_script
from minirlhf.tools import label

import pytest
import tiny
from test_pretrained import pretrained_folder

WALKS = ("minirlhf/rl/README.md", "minirlhf/rl/README.zh.md")
# relative to ROOT: every file of Markdown in the project
PAGES = (
    "README.md",
    *sorted(
        path.relative_to(tiny.ROOT).as_posix()
        for folder in ("data", "minirlhf", "tests")
        for path in (tiny.ROOT / folder).rglob("*.md")
        if "studies" not in path.parts  # written by the labs
    ),
)
TEXTS = {page: (tiny.ROOT / page).read_text(encoding="utf-8") for page in PAGES}
PROGRAMS = re.compile(
    r"(?:(?:python3?|pip|pytest|curl|torchrun|less|git|ruff) |train_\w+\.py |(?:pytest|mypy)$)"
)


class Run(NamedTuple):
    """How to run a command, in a folder with the files that earlier commands of the pages make."""

    flags: str  # appended
    product: str  # a pattern of a file that it makes, or "says: " and a part of its output
    slow: bool = False
    after: tuple[str, ...] = ()  # commands to run first, in the same folder


class Elsewhere(NamedTuple):
    """Run by another test: this test file, or the step of .ci/run with this command."""

    test: str = ""
    step: str = ""


class Fetched(NamedTuple):
    """A download, run against a server on this machine."""


SHORT = " --sft-sequences 64 --normalize-prompts 8 --device cpu"
SHAPE = " --n-layer 1 --n-head 2 --d-model 16" + SHORT
EMBEDDED = (
    SHAPE
    + " --data desk.jsonl --heldout-data desk.jsonl --test-data desk.jsonl"
    + " --task minirlhf.data.helpdesk"
)
OWN = SHAPE + " --tokenizer bytes.tiktoken"  # tiktoken would download its gpt2
HH = SHORT + " --sft-sequences 8 --max-prompt-length 8 --max-response-length 8"
LABELLED = SHORT + " --heldout-data desk.jsonl --test-data desk.jsonl --task minirlhf.data.helpdesk"
POLICY = (
    " --iterations 2 --batch-size 8 --minibatch-size 4 --eval-every 1 --eval-prompts 4"
    " --test-prompts 4 --best-of-n 2 --device cpu"
)
VARIANCE = " --batches 3 --reference-batches 3 --value-batches 1 --batch-size 4"
BENCH = " --quick --device cpu --no-growth"
POLICY_MADE = "runs/{}-helpdesk-seed{}-1/result.json"
REWARD_MADE = "runs/reward-{}-seed{}-1/reward.pt"

COMMANDS = {
    "pip install -r requirements.txt": Elsewhere(step="pip install -q -r requirements.txt"),
    "pytest": Elsewhere(step="pytest -q"),
    "pytest tests/test_parity.py": Elsewhere(step="pytest -q tests/test_parity.py"),
    "ruff check .": Elsewhere(step="ruff check ."),
    "mypy": Elsewhere(step="mypy"),
    "python -m tests.mutants": Elsewhere(step="python -m tests.mutants"),
    "python -m tests.mutate --sample 500": Elsewhere(
        step="python -m tests.mutate --sample 100 --minutes 7 --at-least 80 "
        '--out "$work/mutate.jsonl"'
    ),
    "python -m tests.reliability": Elsewhere(step="python -m tests.reliability brief"),
    "python -m minirlhf.plain": Elsewhere(step="python -m minirlhf.plain"),
    "python steps.py --algorithm steps": Elsewhere(test="test_tools_own_algorithm.py"),
    "python steps.py --algorithm steps --reward steps:short_and_sorry": Elsewhere(
        test="test_tools_own_algorithm.py"
    ),
    "python steps.py --out runs/NAME --resume": Elsewhere(test="test_tools_own_algorithm.py"),
    "python -m minirlhf.lab.conformance steps.py:checked_loss --claims policy-gradient": Elsewhere(
        test="test_tools_own_algorithm.py"
    ),
    "python -m minirlhf.lab.sweep --script steps.py --algorithms steps,ppo,dpo --seeds 5": Run(
        " --seeds 1 --quick", "runs/sweep/table.md", slow=True
    ),
    "curl -L --create-dirs --output-dir smollm2 --remote-name-all "
    "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/resolve/main/"
    "{config,tokenizer,tokenizer_config}.json "
    "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/resolve/main/"
    "model.safetensors": Fetched(),
    # training
    "python train_reward.py": Run(EMBEDDED, REWARD_MADE.format("helpdesk", 0)),
    "train_reward.py --seed 2": Run(EMBEDDED, REWARD_MADE.format("helpdesk", 2)),
    "python train_policy.py": Run(POLICY, POLICY_MADE.format("ppo", 0)),
    "python train_policy.py --algorithm reinforce": Run(POLICY, POLICY_MADE.format("reinforce", 0)),
    "python train_policy.py --algorithm dpo": Run(POLICY, POLICY_MADE.format("dpo", 0)),
    "python train_policy.py --algorithm rloo": Run(POLICY, POLICY_MADE.format("rloo", 0)),
    "python train_policy.py --algorithm grpo --seed 2": Run(POLICY, POLICY_MADE.format("grpo", 2)),
    "python train_policy.py --kl-target 6": Run(POLICY, POLICY_MADE.format("ppo", 0)),
    "python train_policy.py --kl-coef 0 --iterations 150 --max-kl 1e5 --eval-every 10": Run(
        POLICY, POLICY_MADE.format("ppo", 0)
    ),
    "python train_policy.py --reward my_rewards:brevity": Run(POLICY, "says: reward: brevity"),
    "python train_policy.py --out runs/NAME --resume": Run("", "runs/NAME/result.json"),
    "python train_reward.py --data mine.jsonl.gz more.json --tokenizer gpt2 "
    "--max-prompt-length 256 --max-response-length 128": Run(
        OWN + " --max-prompt-length 8 --max-response-length 8", REWARD_MADE.format("data", 0)
    ),
    "python train_reward.py --preset hh --init smollm2 --data harmless-base/train.jsonl.gz "
    "--test-data harmless-base/test.jsonl.gz": Run(HH, REWARD_MADE.format("data", 0)),
    "python train_policy.py --preset hh": Run(POLICY, POLICY_MADE.format("ppo", 0)),
    # several processes: two instead of eight, and two launchers on this machine instead of two
    # machines
    "torchrun --standalone --nproc-per-node 8 train_reward.py --preset hh --init smollm2 "
    "--data harmless-base/train.jsonl.gz --test-data harmless-base/test.jsonl.gz": Run(
        HH, REWARD_MADE.format("data", 0), slow=True
    ),
    "torchrun --standalone --nproc-per-node 8 train_policy.py --preset hh": Run(
        POLICY, POLICY_MADE.format("ppo", 0), slow=True
    ),
    "torchrun --standalone --nproc-per-node 8 train_policy.py --preset hh --shard": Run(
        POLICY, POLICY_MADE.format("ppo", 0), slow=True
    ),
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 1 "
    "--rdzv-endpoint FIRST-MACHINE:29400 train_policy.py --preset hh --out runs/HH": Run(
        POLICY, "runs/HH/result.json", slow=True
    ),
    "python train_reward.py --init-reward runs/REWARD/reward.pt "
    "--data runs/POLICY/labels.jsonl": Run(LABELLED, REWARD_MADE.format("helpdesk", 0)),
    # tools
    "python -m minirlhf.tools.chat --run runs/ppo-helpdesk-seed0-1": Run(
        " --prompt Hello", "says: gold", after=("python train_reward.py", "python train_policy.py")
    ),
    "python -m minirlhf.tools.chat --run runs/POLICY": Run(" --prompt Hello", "says: gold"),
    "python -m minirlhf.tools.label --run runs/POLICY": Run(
        " --count 12 --judge minirlhf.data.helpdesk:preference_probability",
        "says: train_reward.py --init-reward",
    ),
    "python -m minirlhf.tools.report runs/A runs/B": Run("", "runs/A/report.html"),
    "python -m minirlhf.tools.bpe OUT.tiktoken --size 1022 FILE...": Run("", "OUT.tiktoken"),
    "python -m minirlhf.tools.helpdesk_data data --force": Run(
        "", "data/helpdesk-train.jsonl.gz", slow=True
    ),
    "less runs/*/samples.md": Run("", "says: **before**"),
    # labs
    **{
        command: Elsewhere(test="test_lab.py")
        for page in ("COMPARISON", "SENSITIVITY")
        for command in re.findall(r"^python .*", TEXTS[f"minirlhf/lab/{page}.md"], re.M)
    },
    "python -m minirlhf.lab.sweep --algorithms ppo,rloo --seeds 5 "
    "--set kl_coef=0.01,0.025,0.05": Run(" --seeds 1 --quick", "runs/sweep/table.md", slow=True),
    "python -m minirlhf.lab.sweep --algorithms "
    "reinforce,reward-to-go,baseline,gae,ppo,rloo,grpo,online-dpo,dpo --seeds 3": Run(
        " --seeds 1 --quick", "runs/sweep/table.md", slow=True
    ),
    "python -m minirlhf.lab.variance --reward-run runs/REWARD --policy-run runs/HALF": Run(
        VARIANCE, "runs/variance/variance.md"
    ),
    "python -m minirlhf.lab.variance --reward-run runs/REWARD --policy-run runs/POLICY": Run(
        VARIANCE, "runs/variance/variance.md"
    ),
    "python -m minirlhf.lab.overoptimization --out data/studies/overoptimization": Elsewhere(
        test="test_lab.py"
    ),
    "python -m minirlhf.lab.overoptimization": Run(
        " --scale tiny --seeds 1", "runs/overoptimization/overoptimization.md", slow=True
    ),
    "python -m minirlhf.lab.estimators": Elsewhere(test="test_estimators.py"),
    "python -m minirlhf.lab.estimators --fixed-points": Run(
        "", "runs/estimators/estimators.svg", slow=True
    ),
    "python -m minirlhf.lab.conformance my_loss.py:loss --claims policy-gradient": Run(
        "", "says: holds on-policy"
    ),
    "python -m minirlhf.lab.conformance FILE.py:FUNCTION --claims CLAIM": Elsewhere(
        test="test_conformance.py"
    ),
    "python -m minirlhf.lab.conformance my_loss.py:k3 --kl": Run("", "says: unbiased"),
    "python -m minirlhf.lab.memory": Run("", "says: of it sending"),
    "python -m minirlhf.lab.gpu --out DIR": Elsewhere(
        step="python -m minirlhf.lab.gpu --dry-run --out \"$work/gpu\""
    ),
    "python -m minirlhf.lab.sentiment --init smollm2 --out data/studies/sentiment": Elsewhere(
        test="test_lab_sentiment.py"
    ),
    "python -m minirlhf.lab.sentiment --init smollm2": Run(
        " --quick --seeds 1", "runs/sentiment/sentiment.md", slow=True
    ),
    "python -m minirlhf.lab.bench": Run(BENCH, "says: not yet measured on a GPU", slow=True),
    "python -m minirlhf.lab.bench --peers": Run(
        BENCH + " --only gae", "says: not yet measured on a GPU", slow=True
    ),
    "python -m minirlhf.lab.bench --peers --shape M --only rollout": Run(
        BENCH, "says: rollout", slow=True
    ),
    'python -m minirlhf.lab.bench --peers --only "ppo iteration"': Run(
        BENCH, "says: ppo iteration", slow=True
    ),
}


def commands_of(text: str) -> list[str]:
    """Every command: in code blocks without a language, and in code spans of prose and tables."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    blocks = [block for language, block in fence.findall(text) if not language]
    code = [line for block in blocks for line in block.splitlines()]
    code += re.findall(r"`([^`]+)`", fence.sub("", text))
    parts = []
    for line in code:
        parts += [part.strip() for part in re.split(r" && | # ", line.replace("\n", " "))]
    return list(dict.fromkeys(part for part in parts if PROGRAMS.match(part)))


def write_desk(folder: Path) -> None:
    """Every input that the pages name, as small as possible."""
    tiny.write_inputs(folder)
    records = (tiny.ROOT / "data" / "helpdesk-test.jsonl").read_text().splitlines(keepends=True)
    (folder / "desk.jsonl").write_text("".join(records[:12]))
    (folder / "more.json").write_text('[{"prompt": "x", "chosen": "yes", "rejected": "no"}]')
    (folder / "mine.jsonl.gz").write_bytes(gzip.compress((folder / "pairs.jsonl").read_bytes()))
    (folder / "my_rewards.py").write_text(
        re.search(r"`(def brevity.*?)`", TEXTS["README.md"])[1] + "\n"
    )
    (folder / "my_loss.py").write_text(
        re.search(
            r"`my_loss.py`:\n\n```python\n(.*?)^```", TEXTS["minirlhf/lab/README.md"], re.M | re.S
        )[1]
    )
    (folder / "steps.py").write_text(
        re.search(r"^```python\n(.*?)^```", TEXTS["minirlhf/rl/EXTENDING.md"], re.M | re.S)[1]
    )
    (folder / "FILE...").write_text("a short text of a few words\n" * 3)
    pretrained_folder(folder / "smollm2", max_position_embeddings=64)
    (folder / "harmless-base").mkdir()
    pair = (
        '{{"chosen": "\\n\\nHuman: {0}\\n\\nAssistant: Yes, {0}", '
        '"rejected": "\\n\\nHuman: {0}\\n\\nAssistant: No"}}\n'
    )
    content = gzip.compress("".join(map(pair.format, "abcdefgh")).encode())
    for name in ("train", "test"):
        (folder / "harmless-base" / f"{name}.jsonl.gz").write_bytes(content)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the inputs and runs that the pages name; runs/NAME was stopped."""
    folder = tmp_path_factory.mktemp("readme")
    write_desk(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_script(train_reward.main, RewardConfig, [*EMBEDDED.split(), "--out", "runs/REWARD"])
        small = [*POLICY.split(), "--reward-run", "runs/REWARD", "--save-every", "1", "--out"]
        run_script(train_policy.main, PolicyConfig, [*small, "runs/POLICY"])
        for name in ("HALF", "A", "B"):
            shutil.copytree("runs/POLICY", f"runs/{name}")
        tiny.after_row(patch, 2, tiny.write_and_signal(signal.SIGTERM))
        assert (
            tiny.ending(train_policy.main, PolicyConfig, [*small, "runs/NAME"])
            == 128 + signal.SIGTERM
        )
        run_script(
            label.main,
            label.LabelConfig,
            shlex.split(
                "--run runs/POLICY --count 12 --out runs/POLICY/labels.jsonl "
                "--judge minirlhf.data.helpdesk:preference_probability"
            ),
        )
    return folder


def test_commands_lists_every_command_of_the_pages_and_no_other():
    """Finds a command that no test runs."""
    pages = [commands_of(text) for page, text in TEXTS.items() if page not in WALKS]
    listed = [command for commands in pages for command in commands]
    assert len(listed) > 30
    assert [command for command in listed if command not in COMMANDS] == []
    assert [command for command in COMMANDS if command not in listed] == []


def test_commands_of_finds_commands_in_blocks_prose_and_tables():
    text = (
        "`pip` and `python a.py`, `pytest`;\n"
        "```\npip x && pytest\ncd y\n```\n"
        "| `torchrun z` | `less w` |\n"
        "```python\npython no\n```\n"
        "`train_policy.py`, `python\nb.py` after `train_reward.py --c`\n"
        "```\npython d.py\n```\n"
    )
    assert commands_of(text) == [
        "pip x",
        "pytest",
        "python d.py",
        "python a.py",
        "torchrun z",
        "less w",
        "python b.py",
        "train_reward.py --c",
    ]


@pytest.mark.parametrize(
    "command", [command for command, how in COMMANDS.items() if isinstance(how, Elsewhere)]
)
def test_commands_of_other_tests_are_there(command):
    """The test file names the command's script, or a step of .ci/run is the command."""
    how = COMMANDS[command]
    if how.test:
        assert shlex.split(command)[1] in (tiny.ROOT / "tests" / how.test).read_text()
    else:
        ci = (tiny.ROOT / ".ci" / "run").read_text().replace("\\\n", "")  # joins continued lines
        steps = [line for line in ci.splitlines() if re.search(r"^[\w=]* ?step \"", line)]
        assert any(re.search(rf"\" \d+\s+{re.escape(how.step)}$", line) for line in steps)


class Hub(http.server.BaseHTTPRequestHandler):
    """Redirects each request to another address, as the real server does, and answers there."""

    def do_GET(self):
        if self.path.startswith("/store"):
            self.send_response(200)
            self.send_header("Content-Length", "7")
            self.end_headers()
            self.wfile.write(b"weights")
        else:
            self.send_response(302)
            self.send_header("Location", "/store" + self.path)
            self.end_headers()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_download_is_saved_where_the_next_command_reads_it(tmp_path):
    """The path of curl's output is the one that --init names."""
    (command,) = [command for command, how in COMMANDS.items() if isinstance(how, Fetched)]
    assert shlex.split(command)[-1].startswith("https://huggingface.co/HuggingFaceTB/")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local = command.replace("https://huggingface.co", f"http://127.0.0.1:{server.server_port}")
        subprocess.run(
            [*shlex.split(local), "--noproxy", "*", "--silent", "--fail"],
            cwd=tmp_path,
            check=True,
            timeout=60,
        )
        server.shutdown()
    (init,) = {re.search(r"--init (\S+)", other)[1] for other in COMMANDS if "--init " in other}
    files = sorted(path.name for path in (tmp_path / init).iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / init / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] if how.slow else [])
        for command, how in COMMANDS.items()
        if isinstance(how, Run)
    ],
)
def test_every_command_runs(command, desk, tmp_path, monkeypatch, capsys):
    """The command succeeds, and makes its file or prints its text."""
    how = COMMANDS[command]
    folder = tmp_path / "desk"
    shutil.copytree(desk, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(tiny.ROOT))
    if command.startswith("python -m minirlhf.tools.label"):
        (folder / "runs" / "POLICY" / "labels.jsonl").unlink()
    for earlier in how.after:
        assert execute(earlier + COMMANDS[earlier].flags, folder, monkeypatch, capsys)[0] == 0
    says = how.product.startswith("says: ")
    assert says or not list(folder.glob(how.product))
    status, output = execute(command + how.flags, folder, monkeypatch, capsys)
    assert status == 0, output[-2000:]
    if says:
        assert how.product.removeprefix("says: ") in output, output[-2000:]
    else:
        assert list(folder.glob(how.product)), output[-2000:]


def execute(line: str, folder: Path, monkeypatch, capsys) -> tuple[int, str]:
    """Exit status and output of a command. Python scripts run in this process."""
    program, *words = shlex.split(line)
    if program.endswith(".py"):
        program, words = "python", [program, *words]
    if program == "less":
        return 0, "".join(path.read_text() for word in words for path in sorted(folder.glob(word)))
    if program == "torchrun":
        return launch(words, folder)
    assert program == "python", f"no way to run {program}"
    module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[1:] if module else words)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    capsys.readouterr()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'minirlhf.* found in sys.modules", RuntimeWarning)
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(tiny.ROOT / words[0]), run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code or 0
    output = capsys.readouterr()
    return status, output.out + output.err


def launch(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of torchrun with two processes in all; one launcher per machine."""
    machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    with socket.socket() as free:
        free.bind(("localhost", 0))
        here = f"localhost:{free.getsockname()[1]}"
    words = [
        str(tiny.ROOT / word) if word.endswith(".py") else word.replace("FIRST-MACHINE:29400", here)
        for word in words
    ]
    words[words.index("--nproc-per-node") + 1] = str(2 // machines)
    files = [folder / f"launcher-{number}.txt" for number in range(machines)]
    launchers = [
        subprocess.Popen(
            tiny.python("-m", "torch.distributed.run", *words),
            env=tiny.environment(),
            cwd=folder,
            stdout=file.open("w"),
            stderr=subprocess.STDOUT,
        )
        for file in files
    ]
    deadline = time.monotonic() + 120
    while all(launcher.poll() is None for launcher in launchers) and time.monotonic() < deadline:
        time.sleep(0.1)
    statuses = []
    for launcher in launchers:
        # At the end torch's launchers wait for each other, but the one that hosts their store may
        # already have exited.
        try:
            statuses.append(abs(launcher.wait(20)))
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()
    return max(statuses, default=1), "".join(file.read_text() for file in files)
