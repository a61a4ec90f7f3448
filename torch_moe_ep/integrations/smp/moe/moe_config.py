"""SMP's ``MoEConfig``: its fields and its defaults."""

from dataclasses import dataclass

from torch_moe_ep import config as native

LOAD_BALANCINGS = ("none", "aux_loss", "sinkhorn", "balanced")


@dataclass
class MoEConfig:
    """What SMP lets a script choose; `convert` gives torch_moe_ep's own.

    The defaults are SMP's and do not reproduce Hugging Face's logits: Sinkhorn routing, weights
    that do not sum to 1, and a z loss in the gradient in every mode.
    ``moe_load_balancing="none", moe_z_loss_coeff=0.0`` does.

    Attributes:
        smp_moe: False leaves routing to the model and adds no loss.
        random_seed: of the token shuffle.
        moe_load_balancing: "none", "aux_loss", "sinkhorn" or "balanced".
        global_token_shuffle: mix the tokens of the EP group's ranks before routing.
        moe_all_to_all_dispatcher: False takes the all-gather dispatcher.
        moe_aux_loss_coeff: with "aux_loss".
        moe_z_loss_coeff: in every mode.
        use_cpu_initialization: accepted; weights are always drawn on the CPU.

    Raises:
        ValueError: a value that is none of these.
    """

    smp_moe: bool = True
    random_seed: int = 12345
    moe_load_balancing: str = "sinkhorn"
    global_token_shuffle: bool = False
    moe_all_to_all_dispatcher: bool = True
    moe_aux_loss_coeff: float = 0.001
    moe_z_loss_coeff: float = 0.001
    use_cpu_initialization: bool = False

    def __post_init__(self) -> None:
        if self.moe_load_balancing not in LOAD_BALANCINGS:
            allowed = " or ".join(f'"{name}"' for name in LOAD_BALANCINGS)
            raise ValueError(
                f"moe_load_balancing must be {allowed}, got {self.moe_load_balancing!r}."
            )
        for name in ("smp_moe", "moe_all_to_all_dispatcher", "use_cpu_initialization"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self.convert()  # refuses the other fields by name

    def convert(self) -> native.MoEConfig:
        """The same choices as a `torch_moe_ep.MoEConfig`; the router computes in fp32."""
        dispatcher = "all_to_all" if self.moe_all_to_all_dispatcher else "all_gather"
        if not self.smp_moe:
            return native.MoEConfig(dispatcher=dispatcher)
        return native.MoEConfig(
            routing=self.moe_load_balancing,
            router_dtype="float32",
            aux_loss_coeff=self.moe_aux_loss_coeff,
            z_loss_coeff=self.moe_z_loss_coeff,
            global_token_shuffle=self.global_token_shuffle,
            seed=self.random_seed,
            dispatcher=dispatcher,
        )
