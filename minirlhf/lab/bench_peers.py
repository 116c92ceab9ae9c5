"""The same work by transformers, TRL and torchrl, if they are installed. Nothing is downloaded.

Their models are transformers' GPT-2 or Llama with this project's weights, so that they sample
similar texts; everything else has their own defaults. Each function returns {library: run}, or
for a trainer (library, train). If a library is missing, it prints a hint on stderr and returns an
empty dictionary or None.
"""

import contextlib
import functools
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable

from minirlhf.lab import bench_naive as naive
from minirlhf.lab.bench_cases import distinct_share
from minirlhf.model import Transformer
from minirlhf.model.pretrained import GPT2_NAMES, GPT2_SIZES, LLAMA_NAMES, LLAMA_SIZES
from minirlhf.run.optimizer import make_optimizer
from minirlhf.run.terminal import echo

import torch
from torch import Tensor

# the libraries read these when they are imported
ENVIRONMENT = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                   TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


@functools.cache  # so that each hint is printed once
def find(module: str, attribute: str = ""):
    """The module, or its attribute; None and a hint if it is not installed."""
    try:
        result = importlib.import_module(module)
        return getattr(result, attribute) if attribute else result
    except (ImportError, AttributeError, RuntimeError):  # transformers raises RuntimeError too
        name = f"{module}.{attribute}" if attribute else module
        echo(f"--peers: {name} is not installed; `pip install {module.split('.')[0]}` adds its "
             "column", stream=sys.stderr)
        return None


def peer_model(model: Transformer, is_classifier: bool = False):
    """transformers' GPT-2 or Llama with the model's shape and weights."""
    transformers = find("transformers")
    c = model.config
    sizes = LLAMA_SIZES if c.rope_base else GPT2_SIZES
    settings = {key: getattr(c, name) for name, key in sizes.items() if getattr(c, name)}
    settings |= dict(vocab_size=c.vocab_size, num_labels=1, bos_token_id=0, eos_token_id=0,
                     pad_token_id=1, tie_word_embeddings=c.tied)
    if c.rope_base:
        config = transformers.LlamaConfig(rope_theta=c.rope_base, **settings)
        classes = "LlamaForCausalLM", "LlamaForSequenceClassification"
    else:
        config = transformers.GPT2Config(**settings)
        classes = "GPT2LMHeadModel", "GPT2ForSequenceClassification"
    result = getattr(transformers, classes[is_classifier])(config)
    assert not result.load_state_dict(peer_weights(model), strict=False).unexpected_keys
    return result.to(model.wte.weight.device).eval()


def peer_weights(model: Transformer) -> dict[str, Tensor]:
    """The trunk's weights with transformers' names: the opposite of pretrained.convert."""
    c = model.config
    names, prefix = (LLAMA_NAMES, "model.") if c.rope_base else (GPT2_NAMES, "transformer.")
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith(("reward_head", "value_head", "score_")):
            continue
        *parents, part, kind = name.split(".")
        if part == "wte":
            weight = weight[:c.vocab_size]
        if parents and not c.rope_base and weight.ndim == 2:
            weight = weight.t()
        theirs = names[part].split()
        rows = [len(weight) // len(theirs)] * len(theirs)
        if len(theirs) == 3:  # queries, keys and values
            rows = [heads * c.head_width for heads in (c.n_head, c.kv_heads, c.kv_heads)]
        block = f"{names['blocks']}.{parents[1]}." if parents else ""
        for their, piece in zip(theirs, weight.split(rows)):
            weights[f"{prefix}{block}{their}.{kind}"] = piece
    return weights


# ---- parts ---------------------------------------------------------------------------------------


def rollout(model: Transformer, ids: Tensor, mask: Tensor, length: int,
            lengths: Tensor | None) -> dict[str, Callable]:
    """generate() without top-k or top-p. lengths [B]: row b ends there; None: no row ends early."""
    if not find("transformers"):
        return {}
    from transformers import GenerationConfig

    peer = peer_model(model)
    eos = None if lengths is None else 0
    peer.generation_config.eos_token_id = eos
    config = GenerationConfig(max_new_tokens=length, do_sample=True, top_k=0, top_p=1.0,
                              eos_token_id=eos, pad_token_id=1)

    def force_ends(input_ids: Tensor, scores: Tensor) -> Tensor:
        is_end = lengths.to(scores.device) <= input_ids.shape[1] - ids.shape[1] + 1
        scores = scores.clone()
        scores[:, 0] = float("-inf")
        scores[is_end] = float("-inf")
        scores[is_end, 0] = 0.0
        return scores

    @torch.inference_mode()
    def run():
        with naive.autocast(ids.device):
            return peer.generate(ids, attention_mask=mask.long(), generation_config=config,
                                 logits_processor=None if lengths is None else [force_ends])

    return {"transformers": run}


def logprobs() -> dict[str, Callable]:
    """(hidden [N, D], weight [V, D], targets [N]) -> [N] by TRL's selective_log_softmax."""
    selective_log_softmax = find("trl.trainer.utils", "selective_log_softmax")
    if not selective_log_softmax:
        return {}
    return {"TRL": lambda h, w, y: selective_log_softmax((h @ w.T)[None], y[None])[0]}


def gae(rewards: Tensor, values: Tensor) -> dict[str, Callable]:
    vectorized = find("torchrl.objectives.value.functional", "vec_generalized_advantage_estimate")
    if not vectorized:
        return {}
    done = torch.zeros_like(rewards, dtype=torch.bool)[..., None]
    done[:, -1] = True
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)[..., None]
    return {"torchrl": lambda: vectorized(1.0, 0.95, values[..., None], next_values,
                                          rewards[..., None], done, done)}


def policy_update(model: Transformer, ids: Tensor, response: Tensor, old: Tensor,
                  advantages: Tensor) -> dict[str, Callable]:
    """The policy's part of a step of TRL's PPOTrainer: all logits, loss, step, then the entropy."""
    selective_log_softmax = find("trl.trainer.utils", "selective_log_softmax")
    if not selective_log_softmax:
        return {}
    peer = peer_model(model)
    optimizer = make_optimizer(peer, 3e-6)
    text = torch.cat([ids, response], dim=1)
    mask = torch.ones_like(text)

    def run():
        with naive.autocast(ids.device):
            logits = peer(text, attention_mask=mask, use_cache=False).logits
            logits = logits[:, ids.shape[1] - 1:-1]
            loss = naive.policy_loss(selective_log_softmax(logits, response), old, advantages)
        naive.step(peer, optimizer, loss)
        with torch.no_grad():
            entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
            return entropy.mean().item()

    return {"TRL": run}


# ---- trainers ------------------------------------------------------------------------------------


def word_tokenizer(vocab: int):
    """A tokenizer made in memory: <eos>, <pad>, then w2, w3 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>",
                                   pad_token="<pad>", unk_token="<pad>", padding_side="left")


def trainer_settings(folder: str, batch: int, device: torch.device) -> dict:
    """The same device and precision, and no files, reports or gradient checkpointing."""
    return dict(output_dir=folder, per_device_train_batch_size=batch,
                gradient_accumulation_steps=1, use_cpu=device.type == "cpu",
                bf16=naive.uses_bf16(device), gradient_checkpointing=False, save_strategy="no",
                report_to="none", disable_tqdm=True, logging_steps=10**6)


def timing_callback(device: torch.device, between: Callable[[float], None]):
    """A callback that times each step and then calls between(seconds)."""
    from transformers import TrainerCallback

    class TimingCallback(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            if device.type == "cuda":
                torch.cuda.synchronize()
            between(time.perf_counter() - self.start)
            self.start = time.perf_counter()

    return TimingCallback()


def reward_trainer(model: Transformer, texts: list[tuple[int, ...]],
                   device: torch.device) -> tuple[str, Callable] | None:
    """TRL's RewardTrainer on pairs (texts[i], texts[pairs + i]), the same ones in every step."""
    if not find("trl", "RewardTrainer"):
        return None
    pairs = len(texts) // 2

    def train(rounds: int, between: Callable[[float], None]) -> None:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from trl import RewardConfig, RewardTrainer

        data = [dict(chosen_ids=list(texts[i]), rejected_ids=list(texts[pairs + i]))
                for i in range(pairs)] * rounds
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            config = RewardConfig(max_steps=rounds, learning_rate=1e-4, max_length=None,
                                  **trainer_settings(folder, pairs, device))
            trainer = RewardTrainer(peer_model(model, True), args=config,
                                    callbacks=[timing_callback(device, between)],
                                    train_dataset=Dataset.from_list(data),
                                    processing_class=word_tokenizer(model.config.vocab_size))
            trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
            trainer.train()

    return "TRL", train


def rl_trainer(algorithm: str, model: Transformer, ids: Tensor, length: int,
               device: torch.device) -> tuple[str, Callable] | None:
    """TRL's PPOTrainer (in releases up to 1.12), RLOOTrainer or GRPOTrainer.

    The prompts are the same in every step.
    """
    if algorithm == "ppo":
        trainer_class = find("trl.experimental.ppo", "PPOTrainer")
    else:
        trainer_class = find("trl", algorithm.upper() + "Trainer")
    if not trainer_class:
        return None

    def train(rounds: int, between: Callable[[float], None]) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            settings = trainer_settings(folder, len(ids), device)
            callback = timing_callback(device, between)
            if algorithm == "ppo":
                trainer = ppo_trainer(trainer_class, model, ids, length, rounds, settings, callback)
            else:
                trainer = group_trainer(trainer_class, algorithm, model, ids, length, rounds,
                                        settings, callback)
            trainer.train()

    return "TRL", train


def ppo_trainer(trainer_class, model: Transformer, ids: Tensor, length: int, rounds: int,
                settings: dict, callback):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig

    data = Dataset.from_dict(dict(input_ids=ids.tolist() * rounds))
    config = PPOConfig(total_episodes=len(ids) * rounds, num_ppo_epochs=4, num_mini_batches=1,
                       response_length=length, local_rollout_forward_batch_size=len(ids),
                       temperature=1.0, num_sample_generations=0, **settings)
    return trainer_class(args=config, processing_class=word_tokenizer(model.config.vocab_size),
                         model=peer_model(model), ref_model=peer_model(model),
                         reward_model=peer_model(model, True), value_model=peer_model(model, True),
                         train_dataset=data, eval_dataset=data.select(range(len(ids))),
                         callbacks=[callback])


def group_trainer(trainer_class, algorithm: str, model: Transformer, ids: Tensor, length: int,
                  rounds: int, settings: dict, callback):
    import trl
    from datasets import Dataset

    tokenizer = word_tokenizer(model.config.vocab_size)
    folder = settings["output_dir"] + "/model"
    peer_model(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def reward(completion_ids=None, **_) -> list[float]:
        return distinct_share(completion_ids)

    config_class = getattr(trl, algorithm.upper() + "Config")
    config = config_class(num_generations=4, max_completion_length=length, temperature=1.0,
                          beta=0.05, max_steps=rounds, model_init_kwargs=dict(dtype="float32"),
                          **settings)
    prompts = [" ".join(f"w{i}" for i in row) for row in ids.unique(dim=0).tolist()] * rounds
    return trainer_class(model=folder, reward_funcs=reward, args=config,
                         train_dataset=Dataset.from_dict(dict(prompt=prompts)),
                         processing_class=tokenizer, callbacks=[callback])
