"""``moe``: configuration and the class of expert-parallel layers."""
