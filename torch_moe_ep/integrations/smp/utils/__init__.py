"""``utils``: timing and groups."""
