"""Which weights a reward run starts from: fresh ones, a base model brought along, or an earlier reward model."""

from pathlib import Path

import tiktoken

from minirlhf.checkpoint import load_model
from minirlhf.config import RewardConfig, UserError
from minirlhf.gpt2 import checkpoint_file, load_gpt2
from minirlhf.model import ModelConfig, Transformer
from minirlhf.seeding import derive_seed
from minirlhf.tokenizer import fingerprint, table_rows


def base_file(config: RewardConfig) -> Path | None:
    """The file of the base model that --init or --init-reward brings along; None: none. Raises UserError."""
    if config.init_reward:
        return Path(config.init_reward).with_name("base.pt")
    return checkpoint_file(Path(config.init)) if config.init else None


def starting_model(config: RewardConfig, encoding: tiktoken.Encoding) -> Transformer:
    """The base language model before its warm-up, or the one brought along. Raises UserError."""
    context = config.max_prompt_length + config.max_response_length
    path = base_file(config)
    if not path:
        sizes = ModelConfig(encoding.n_vocab, table_rows(encoding), config.n_layer, config.n_head, config.d_model, context)
        return Transformer(sizes, derive_seed(config.seed, "init"))
    if path.suffix in (".safetensors", ".bin"):
        base = load_gpt2(path, encoding.n_vocab, table_rows(encoding))
    else:
        base, _ = load_model(path, "base", fingerprint(encoding))
    sizes = base.config
    print(f"{path}: {sizes.n_layer} layers of {sizes.n_head} heads, width {sizes.d_model}, context {sizes.context}; "
          "the file decides, not --n-layer, --n-head and --d-model")
    if sizes.context < context:
        raise UserError(f"{path}: its context of {sizes.context} tokens is shorter than --max-prompt-length + "
                        "--max-response-length; lower one of them")
    return base


def earlier_reward_model(config: RewardConfig, encoding: tiktoken.Encoding) -> Transformer | None:
    """The reward model of --init-reward, or None. It goes back to its raw scale, on which alone a difference of scores is the
    log-odds that the preference loss takes it for. Raises UserError."""
    if not config.init_reward:
        return None
    reward_model, _ = load_model(Path(config.init_reward), "reward", fingerprint(encoding))
    reward_model.score_shift.zero_()
    reward_model.score_scale.fill_(1.0)
    return reward_model
