"""All randomness of a run is a function of (seed, purpose, step, row): no generator has a state."""

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *path: object) -> int:
    """A 63-bit seed for one purpose, for example derive_seed(config.seed, "rollout", step, row).

    >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3) != derive_seed(0, "order", 4)
    True
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *path: object) -> torch.Generator:
    """A new torch CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


def row_uniforms(seed: int, purpose: str, step: int, rows: list[int], length: int) -> torch.Tensor:
    """[len(rows), length] float32 uniforms in [0, 1), a function of (seed, purpose, step, row).

    A row therefore samples the same tokens in any batch and on any device.
    """
    sources = [np.random.Philox(derive_seed(seed, purpose, step, row)) for row in rows]
    draws = [np.random.Generator(source).random(length, np.float32) for source in sources]
    return torch.from_numpy(np.stack(draws))
