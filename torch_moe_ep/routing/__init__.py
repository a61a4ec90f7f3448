"""Routing other than Hugging Face's own, behind the router that a model has.

File by file::

choose.py    which experts a token takes and with what weights, for each routing mode
capacity.py  a bound on each expert's copies
losses.py    z loss and load-balancing loss: added to the gradient, never to the printed loss
router.py    the router's subclass that puts these together
shuffle.py   global_token_shuffle: tokens of an EP group mixed before they are routed
bias.py      the bias of routing="bias", moved after the optimizer step
"""

from torch_moe_ep.routing.losses import set_aux_loss_scale

__all__ = ["set_aux_loss_scale"]
