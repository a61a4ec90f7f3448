"""``distributed``: checkpoints of sharded state dicts."""
