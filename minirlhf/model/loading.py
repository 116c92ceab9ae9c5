"""Model files: base.pt, reward.pt and policy.pt, and the weights that a reward run starts from."""

from pathlib import Path

from minirlhf.config import RewardConfig
from minirlhf.data.tokenizer import fingerprint, table_rows
from minirlhf.model.pretrained import load_weights, weight_files
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.run.checkpoint import load_checkpoint, read_seal, save_checkpoint
from minirlhf.run.errors import UserError, raise_if_out_of_memory
from minirlhf.run.folder import read_config, with_tuples
from minirlhf.run.seeding import derive_seed
from minirlhf.run.terminal import echo

import tiktoken
import torch


def save_model(path: Path, kind: str, model: Transformer, meta: dict) -> None:
    """Save base.pt, reward.pt or policy.pt: weights, sizes, and meta.

    Raises OSError, or UserError if a weight is not finite.
    """
    meta = meta | dict(model=vars(model.config))
    save_checkpoint(path, kind, meta, dict(model=model.state_dict()))


def load_model(path: Path, kind: str, tokenizer: str, run: str = "") -> tuple[Transformer, dict]:
    """(model, meta) of a file of save_model. Raises UserError.

    tokenizer: the fingerprint of the tokenizer that it must have been trained with.
    run: the id of the run that must have written it, if given.
    A reward model must lie next to the base model that it was trained from.
    """
    meta, states = load_checkpoint(path, kind)
    if run and meta.get("run", run) != run:
        raise UserError(f"{path}: was not written by the run that its config.json describes; "
                        "restore the file, or train again")
    base = path.with_name("base.pt")
    if "base" in meta and meta["base"] != read_seal(base):
        raise UserError(f"{base}: not the base model from which {path} was trained, or one of them "
                        "was changed; restore both, or train again")
    if meta.get("tokenizer") != tokenizer:
        raise UserError(f"{path}: was trained with another tokenizer than its config.json names; "
                        "restore that tokenizer, or train again")
    try:
        sizes = ModelConfig(**with_tuples(meta["model"]))
        sizes.check()
        with torch.device("meta"):  # allocates nothing: the model gets the file's tensors
            model = Transformer(sizes)
        weights = {name: tensor.to(torch.get_default_dtype())
                   for name, tensor in states["model"].items()}
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise_if_out_of_memory(error)
        reason = str(error).splitlines()[-1].strip()[:200]
        raise UserError(f"{path}: its tensors do not fit the sizes it states ({reason}); "
                        "train again") from None
    return model, meta


def pretrained_folder(config: RewardConfig) -> Path | None:
    """The folder in Hugging Face's layout that --init names, by itself or by its weights."""
    path = Path(config.init)
    if path.suffix == ".safetensors":
        return path.parent
    is_folder = bool(config.init) and path.is_dir() and not (path / "base.pt").exists()
    return path if is_folder else None


def start_files(config: RewardConfig) -> list[Path]:
    """The files that --init or --init-reward names: the base model, then a reward model.

    Raises UserError.
    """
    if config.init_reward:
        return [Path(config.init_reward).with_name("base.pt"), Path(config.init_reward)]
    if folder := pretrained_folder(config):
        return [folder / "config.json", *weight_files(folder)]
    path = Path(config.init)
    if not path.exists():
        raise UserError(f"--init {path}: no such file or folder; download a model first, as in "
                        "minirlhf/model/README.md")
    return [path / "base.pt" if path.is_dir() else path] if config.init else []


def tokenizer_name(config: RewardConfig) -> str:
    """--tokenizer; auto: that of the model to start from, or the help desk's. Raises UserError."""
    if config.tokenizer != "auto":
        return config.tokenizer
    if folder := pretrained_folder(config):
        return str(folder.resolve())
    settings = [file.with_name("config.json") for file in start_files(config)[:1]]
    if settings and settings[0].is_file():
        return read_config(RewardConfig, settings[0]).tokenizer
    return "helpdesk"


def initial_base_model(config: RewardConfig, encoding: tiktoken.Encoding) -> Transformer:
    """The base model before supervised fine-tuning: random weights, or those of a file.

    Raises UserError.
    """
    context = config.max_prompt_length + config.max_response_length
    path, *_ = [*start_files(config), None]
    if not path:
        sizes = ModelConfig(vocab_size=encoding.n_vocab, table_rows=table_rows(encoding),
                            n_layer=config.n_layer, n_head=config.n_head, d_model=config.d_model,
                            context=context)
        return Transformer(sizes, derive_seed(config.seed, "init"))
    if folder := pretrained_folder(config):
        base = load_weights(folder, encoding.n_vocab, table_rows(encoding))
    else:
        base, _ = load_model(path, "base", fingerprint(encoding))
    sizes = base.config
    echo(f"{folder or path}: {sizes.n_layer} layers of {sizes.n_head} heads, width "
         f"{sizes.d_model}, context {sizes.context}")
    if sizes.context < context:
        raise UserError(f"{folder or path}: its context of {sizes.context} tokens is shorter than "
                        f"--max-prompt-length + --max-response-length = {context}; lower one")
    return base


def earlier_reward_model(config: RewardConfig, encoding: tiktoken.Encoding) -> Transformer | None:
    """The reward model of --init-reward on its raw scale, or None. Raises UserError.

    The preference loss needs the raw scale: there a difference of scores is a log-odds.
    """
    if not config.init_reward:
        return None
    reward_model, _ = load_model(Path(config.init_reward), "reward", fingerprint(encoding))
    reward_model.score_shift.zero_()
    reward_model.score_scale.fill_(1.0)
    return reward_model
