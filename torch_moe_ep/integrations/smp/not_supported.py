"""What SMP has and this module does not."""


class NotSupportedError(NotImplementedError, AttributeError):
    """A name of SMP that is known and left out; also an AttributeError, so `hasattr` says no."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is not supported by torch_moe_ep.integrations.smp: {reason}")
