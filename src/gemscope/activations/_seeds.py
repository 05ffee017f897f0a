"""Random numbers by name: what is drawn for one thing depends on nothing drawn before."""

import hashlib

import torch


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A generator for what `name` says, in a run of `seed`."""
    text = "/".join(map(str, (seed, *name)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # A generator takes any 64 bits; the sign is how Python's int becomes them.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
