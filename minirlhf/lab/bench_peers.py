"""The same work by other people's libraries, where they are installed: transformers, TRL, torchrl. Nothing is downloaded.

Their models are transformers' GPT-2 with this project's weights, so that they sample texts of the same kind, and everything
else as it is delivered. Each function returns {library: run}, or for a trainer a function that trains on its own
and lets others take their turn between its steps; empty or None, with a hint on stderr, where something is missing.
"""

import contextlib
import functools
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf.lab import bench_naive as naive
from minirlhf.lab.bench_naive import half
from minirlhf.model import Transformer
from minirlhf.optim import make_optimizer

for name, value in dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                        TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1").items():  # read when they are imported
    os.environ.setdefault(name, value)


@functools.cache  # one hint each
def find(module: str, attribute: str = ""):
    """The module, or what it calls so; None and a hint where it is not installed."""
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except (ImportError, AttributeError, RuntimeError):  # transformers raises RuntimeError for a part that cannot be loaded
        what = f"{module}.{attribute}" if attribute else module
        print(f"--peers: no {what} here; `pip install {module.split('.')[0]}` adds its column", file=sys.stderr)
        return None


def gpt2(model: Transformer, kind: str = "GPT2LMHeadModel"):
    """transformers' GPT-2 of the same shape and weights; kind GPT2ForSequenceClassification has a score in place of words."""
    transformers, c = find("transformers"), model.config
    theirs = getattr(transformers, kind)(transformers.GPT2Config(
        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.d_model, vocab_size=c.vocab_size, n_positions=c.context, num_labels=1,
        bos_token_id=0, eos_token_id=0, pad_token_id=1))
    with torch.no_grad():
        body = theirs.transformer
        body.wte.weight.copy_(model.lm_weight)
        body.wpe.weight.copy_(model.wpe.weight)
        body.ln_f.load_state_dict(model.ln_f.state_dict())
        for block, ours in zip(body.h, model.blocks):
            block.ln_1.load_state_dict(ours.ln_1.state_dict())
            block.ln_2.load_state_dict(ours.ln_2.state_dict())
            for layer, one in ((block.attn.c_attn, ours.attention_in), (block.attn.c_proj, ours.attention_out),
                               (block.mlp.c_fc, ours.mlp_in), (block.mlp.c_proj, ours.mlp_out)):
                layer.weight.copy_(one.weight.T)
                layer.bias.copy_(one.bias)
    return theirs.to(model.wte.weight.device).eval()


# ---- parts ----------------------------------------------------------------------------------------------------------


def rollout(model: Transformer, ids: Tensor, mask: Tensor, length: int, lengths: Tensor | None) -> dict[str, Callable]:
    """generate() of the whole distribution; lengths [B]: row b may end there and nowhere else."""
    if not find("transformers"):
        return {}
    from transformers import GenerationConfig

    theirs, eos, start = gpt2(model), None if lengths is None else 0, ids.shape[1]
    theirs.generation_config.eos_token_id = eos
    how = GenerationConfig(max_new_tokens=length, do_sample=True, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=1)

    def end_there(input_ids, scores):
        ends = lengths.to(scores.device) <= input_ids.shape[1] - start + 1
        scores = scores.clone()
        scores[:, 0] = float("-inf")
        scores[ends] = float("-inf")
        scores[ends, 0] = 0.0
        return scores

    @torch.inference_mode()
    def run():
        with half(ids.device):
            return theirs.generate(ids, attention_mask=mask.long(), generation_config=how,
                                   logits_processor=None if lengths is None else [end_there])

    return {"transformers": run}


def logprobs() -> dict[str, Callable]:
    """(hidden [N, D], weight [V, D], targets [N]) -> [N] by TRL's selective log-softmax on all logits."""
    selective_log_softmax = find("trl.trainer.utils", "selective_log_softmax")
    return {"TRL": lambda h, w, y: selective_log_softmax((h @ w.T)[None], y[None])[0]} if selective_log_softmax else {}


def gae(rewards: Tensor, values: Tensor) -> dict[str, Callable]:
    vectorised = find("torchrl.objectives.value.functional", "vec_generalized_advantage_estimate")
    if not vectorised:
        return {}
    done = torch.zeros_like(rewards, dtype=torch.bool)[..., None]
    done[:, -1] = True
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)[..., None]
    return {"torchrl": lambda: vectorised(1.0, 0.95, values[..., None], after, rewards[..., None], done, done)}


def policy_update(model: Transformer, ids: Tensor, response: Tensor, old: Tensor, advantages: Tensor) -> dict[str, Callable]:
    """The policy's part of a step of TRL's PPOTrainer on transformers' model: all logits, loss, step, then the entropy."""
    selective_log_softmax = find("trl.trainer.utils", "selective_log_softmax")
    if not selective_log_softmax:
        return {}
    theirs, whole = gpt2(model), torch.cat([ids, response], dim=1)
    optimizer = make_optimizer(theirs, 3e-6)

    def run():
        with half(ids.device):
            logits = theirs(whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[:, ids.shape[1] - 1:-1]
            loss = naive.policy_loss(selective_log_softmax(logits, response), old, advantages)
        naive.step(theirs, optimizer, loss)
        with torch.no_grad():
            return (logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)).mean().item()

    return {"TRL": run}


# ---- trainers -------------------------------------------------------------------------------------------------------


def words(vocab: int):
    """A tokenizer made in memory: <eos>, <pad>, then w2, w3 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>",
                                   padding_side="left")


def settings(folder: str, batch: int, device: torch.device) -> dict:
    """Its own defaults but for: the device, no files, no reports, no gradient checkpointing, and float32 off a GPU."""
    return dict(output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=1, use_cpu=device.type == "cpu",
                bf16=device.type == "cuda", gradient_checkpointing=False, save_strategy="no", report_to="none",
                disable_tqdm=True, logging_steps=10**6)


def turns(device: torch.device, between: Callable[[float], None]):
    """A callback that times each step and then lets others take their turn."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            if device.type == "cuda":
                torch.cuda.synchronize()
            between(time.perf_counter() - self.start)
            self.start = time.perf_counter()

    return Turns()


def reward_trainer(model: Transformer, texts: list[tuple[int, ...]], device: torch.device) -> tuple[str, Callable] | None:
    """TRL's RewardTrainer on pairs (texts[i], texts[pairs + i]), the same ones in every step."""
    if not find("trl", "RewardTrainer"):
        return None
    pairs = len(texts) // 2

    def train(rounds: int, between: Callable[[float], None]) -> None:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from trl import RewardConfig, RewardTrainer

        rows = [dict(chosen_ids=list(texts[i]), rejected_ids=list(texts[pairs + i])) for i in range(pairs)] * rounds
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            config = RewardConfig(max_steps=rounds, learning_rate=1e-4, max_length=None, **settings(folder, pairs, device))
            trainer = RewardTrainer(gpt2(model, "GPT2ForSequenceClassification"), args=config, callbacks=[turns(device, between)],
                                    train_dataset=Dataset.from_list(rows), processing_class=words(model.config.vocab_size))
            trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
            trainer.train()

    return "TRL", train


def rl_trainer(algorithm: str, model: Transformer, ids: Tensor, length: int, device: torch.device) -> tuple[str, Callable] | None:
    """TRL's PPOTrainer (its releases up to 1.12 have one), RLOOTrainer or GRPOTrainer on the same prompts in every step."""
    if algorithm == "ppo":
        there = find("trl.experimental.ppo", "PPOTrainer")
    else:
        there = find("trl", algorithm.upper() + "Trainer")
    if not there:
        return None

    def train(rounds: int, between: Callable[[float], None]) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            make = ppo_trainer if algorithm == "ppo" else group_trainer
            make(there, algorithm, model, ids, length, rounds, settings(folder, len(ids), device), turns(device, between)).train()

    return "TRL", train


def ppo_trainer(trainer, algorithm, model, ids, length, rounds, shared, callback):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig

    data = Dataset.from_dict(dict(input_ids=ids.tolist() * rounds))
    config = PPOConfig(total_episodes=len(ids) * rounds, num_ppo_epochs=4, num_mini_batches=1, response_length=length,
                       local_rollout_forward_batch_size=len(ids), temperature=1.0, num_sample_generations=0, **shared)
    score = "GPT2ForSequenceClassification"
    return trainer(args=config, processing_class=words(model.config.vocab_size), model=gpt2(model), ref_model=gpt2(model),
                   reward_model=gpt2(model, score), value_model=gpt2(model, score), train_dataset=data,
                   eval_dataset=data.select(range(len(ids))), callbacks=[callback])


def group_trainer(trainer, algorithm, model, ids, length, rounds, shared, callback):
    import trl
    from datasets import Dataset

    tokenizer, folder = words(model.config.vocab_size), shared["output_dir"] + "/model"
    gpt2(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def distinct(completion_ids=None, **_):
        return [len(set(tokens)) / len(tokens) for tokens in completion_ids]

    config = getattr(trl, algorithm.upper() + "Config")(
        num_generations=4, max_completion_length=length, temperature=1.0, beta=0.05, max_steps=rounds,
        model_init_kwargs=dict(dtype="float32"), **shared)
    texts = [" ".join(f"w{i}" for i in row) for row in ids.unique(dim=0).tolist()] * rounds
    return trainer(model=folder, reward_funcs=distinct, args=config, train_dataset=Dataset.from_dict(dict(prompt=texts)),
                   processing_class=tokenizer, callbacks=[callback])
