"""Seeds of generators from texts, such as "12345/model.layers.0.mlp.experts/3/down_proj"."""

import hashlib


def seed_of(key: str) -> int:
    """A seed of 63 bits; the same on every rank and in every release."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
