"""A training script in the style of SMP v2's, on `torch_moe_ep.integrations.smp`."""
