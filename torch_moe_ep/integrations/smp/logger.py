"""``logger.get_logger``."""

import logging


def get_logger(name: str = "torch_moe_ep.smp") -> logging.Logger:
    """The logger of this module; set its level and handlers as for any logger."""
    return logging.getLogger(name)
