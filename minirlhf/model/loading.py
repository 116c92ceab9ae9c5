"""Model files: base.pt, reward.pt and policy.pt, and the weights that a reward run starts from."""

from pathlib import Path

from minirlhf.config import RewardConfig
from minirlhf.data.tokenizer import fingerprint, table_rows
from minirlhf.model.gpt2 import checkpoint_file, load_gpt2
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.run.checkpoint import load_checkpoint, save_checkpoint
from minirlhf.run.errors import UserError
from minirlhf.run.folder import with_tuples
from minirlhf.run.seeding import derive_seed

import tiktoken
import torch


def save_model(path: Path, kind: str, model: Transformer, meta: dict) -> None:
    """Save base.pt, reward.pt or policy.pt: weights, sizes, and meta.

    Raises OSError, or UserError if a weight is not finite.
    """
    meta = meta | dict(model=vars(model.config))
    save_checkpoint(path, kind, meta, dict(model=model.state_dict()))


def load_model(path: Path, kind: str, tokenizer: str) -> tuple[Transformer, dict]:
    """(model, meta) of a file of save_model. Raises UserError.

    tokenizer: the fingerprint of the tokenizer that it must have been trained with.
    """
    meta, states = load_checkpoint(path, kind)
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
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: its tensors do not fit the sizes it states ({reason}); "
                        "train again") from None
    return model, meta


def base_model_file(config: RewardConfig) -> Path | None:
    """The base model that --init or --init-reward names, or None. Raises UserError."""
    if config.init_reward:
        return Path(config.init_reward).with_name("base.pt")
    return checkpoint_file(Path(config.init)) if config.init else None


def initial_base_model(config: RewardConfig, encoding: tiktoken.Encoding) -> Transformer:
    """The base model before supervised fine-tuning: random weights, or those of a file.

    Raises UserError.
    """
    context = config.max_prompt_length + config.max_response_length
    path = base_model_file(config)
    if not path:
        sizes = ModelConfig(vocab_size=encoding.n_vocab, table_rows=table_rows(encoding),
                            n_layer=config.n_layer, n_head=config.n_head, d_model=config.d_model,
                            context=context)
        return Transformer(sizes, derive_seed(config.seed, "init"))
    if path.suffix in (".safetensors", ".bin"):
        base = load_gpt2(path, encoding.n_vocab, table_rows(encoding))
    else:
        base, _ = load_model(path, "base", fingerprint(encoding))
    sizes = base.config
    print(f"{path}: {sizes.n_layer} layers of {sizes.n_head} heads, width {sizes.d_model}, "
          f"context {sizes.context}; --n-layer, --n-head and --d-model are ignored")
    if sizes.context < context:
        raise UserError(f"{path}: its context of {sizes.context} tokens is shorter than "
                        "--max-prompt-length + --max-response-length; lower one of them")
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
