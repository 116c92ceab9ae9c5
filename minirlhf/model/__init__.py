"""The language model: transformer, sampling, and files of weights."""

from minirlhf.model.pretrained import load_pretrained
from minirlhf.model.transformer import ModelConfig, Transformer

__all__ = ["ModelConfig", "Transformer", "load_pretrained"]
