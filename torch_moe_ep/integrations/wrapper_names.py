"""Names without what FSDP1, checkpoint wrappers and torch.compile put into them."""

WRAPPER_NAMES = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def plain_name(name: str) -> str:
    """A dotted name without the names that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)
