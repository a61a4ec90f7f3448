"""What a user chooses about the experts."""

import math
from dataclasses import dataclass

CHOICES: dict[str, tuple[object, ...]] = {
    "gradient": ("mean", "sum"),
    "recompute": ("none", "gate_up"),
    "transport": ("auto", "collective", "hierarchical", "peer"),
    "budget": ("exact", "bounded"),
    "received_rows": ("auto", "keep", "dispatch_again"),
    "dispatcher": ("all_to_all", "all_gather"),
    "global_token_shuffle": (True, False),
    "routing": ("huggingface", "none", "aux_loss", "sinkhorn", "balanced", "bias"),
    "router_dtype": (None, "float32"),
    "aux_scope": ("local", "global"),
}
FACTORS = ("budget_factor", "aux_loss_coeff", "z_loss_coeff", "capacity_factor", "bias_update_rate")


@dataclass(frozen=True)
class MoEConfig:
    """Options of the expert-parallel experts; the default is exact Hugging Face behaviour.

    Attributes:
        gradient: "mean": an expert gradient is the mean over all W ranks, as FSDP makes the dense
            ones. "sum": the plain sum over all W ranks, for training loops that run dense modules
            with a divide factor of 1 and normalise by token count themselves.
        recompute: "none": gate and up products ``[R, 2I]`` are kept for backward. "gate_up": only
            the received rows ``[R, H]`` are, for one more GEMM in backward.
        max_slots: rows that the experts compute at once; more received rows are computed in
            several passes, whose intermediates fit, and gate and up products are computed again
            in backward. 0: no bound. On CUDA rounded up to a multiple of 128.
        max_received_rows: rows that a rank may receive in one layer, padding included. Beyond it
            every rank of the EP group raises, with the number needed, before rows are allocated.
            0: no bound. With dispatcher="all_gather": copies of all the group's tokens, padding
            included.
        transport: what carries rows between ranks. "collective": the EP process group's
            all-to-all. "hierarchical": two all-to-alls, where a token crosses to each node once
            however many of its experts live there, and results are summed on a node before they
            cross; needs nodes with equally many consecutive ranks of the EP group. "peer": kernels
            write rows straight into the memory of the ranks' GPUs and read results there; needs
            GPUs of one host that can map each other. "auto": peer where the EP group's GPUs can,
            hierarchical where the group spans such nodes, else collective.
        budget: with the peer transport alone. "exact": the host waits for the counts, and buffers
            have the rows that come. "bounded": it waits for nothing, and buffers have a fixed
            number of rows; where more come, clipping or the optimizer's step raises on every rank,
            with the number needed, before any parameter changes.
        budget_factor: rows of budget="bounded": this many times T K, for the largest T of the EP
            group at the first training forward, and padding; at least 1. With `max_received_rows`
            that number of rows instead.
        received_rows: what backward has of the rows ``[R, H]`` that the experts got. "keep": the
            rows. "dispatch_again": with one rank (P = 1) the tokens ``[T, H]``, which are copied
            into rows once more; with the peer transport likewise, and they travel once more; the
            other transports keep rows. "auto": "dispatch_again" with one rank, else "keep".
        peer_sms: multiprocessors that move rows with the peer transport.
        dispatcher: "all_to_all": each copy goes to its expert's rank. "all_gather": every rank of
            the EP group gets all tokens of the group; for small groups and for comparison.
            `max_received_rows` bounds the first alone.
        num_chunks: a rank's tokens travel in so many chunks, each under the GEMMs of the one
            before, in forward and in backward; the same on every rank. Goes with the collective
            and the peer transport, of which "auto" then takes the one that it can, and not with
            received_rows="dispatch_again". 1: all tokens at once. With one rank (P = 1) nothing
            travels, and it changes nothing.
        global_token_shuffle: mix the tokens of the EP group's ranks before they are routed, and
            put them back after the experts: the same fixed permutation, drawn from `seed` and the
            layer's name, in every step. Batch statistics of the router (Sinkhorn, capacity,
            load-balancing loss) are then those of a sample of the group's tokens.
        seed: of the shuffle.
        routing: how experts are chosen and weighted. "huggingface": by the model's own router.
            "none": top-k, weighted by the softmax over the chosen (Mixtral's rule). "aux_loss":
            the same, and a load-balancing loss. "sinkhorn": in training top-k of the
            Sinkhorn-scaled probabilities, weights not normalised. "balanced": every expert in
            turn whatever the logits say, for benchmarks. "bias": top-k of probability plus a bias
            that moves after each optimizer step. `torch_moe_ep.routing` has formulas and sources.
        router_dtype: "float32": logits in fp32, from fp32 copies of tokens and router weight, also
            under autocast. None: the parameters' dtype.
        aux_loss_coeff: factor of the load-balancing loss, with routing="aux_loss" only.
        z_loss_coeff: factor of the z loss, with every routing. Both losses are added to the
            gradient and reported by `metrics.router_losses`, never added to the model's loss.
        aux_scope: "local": each rank's loss is of its own batch, as Hugging Face has it. "global":
            token shares are summed over all ranks (an all-reduce per layer).
        capacity_factor: in training an expert takes at most ``ceil(factor * T K / E)`` of a rank's
            copies, the rest is dropped; at least 1. 0: dropless.
        bias_update_rate: how far the bias of routing="bias" moves in a step.

    Raises:
        ValueError: a value that is none of these.
    """

    gradient: str = "mean"
    recompute: str = "none"
    max_slots: int = 0
    max_received_rows: int = 0
    transport: str = "auto"
    budget: str = "exact"
    budget_factor: float = 2.0
    received_rows: str = "auto"
    peer_sms: int = 16
    dispatcher: str = "all_to_all"
    num_chunks: int = 1
    global_token_shuffle: bool = False
    seed: int = 0
    routing: str = "huggingface"
    router_dtype: str | None = None
    aux_loss_coeff: float = 0.001
    z_loss_coeff: float = 0.0
    aux_scope: str = "local"
    capacity_factor: float = 0.0
    bias_update_rate: float = 0.001

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in ("max_slots", "max_received_rows"):
            _check_count(name, getattr(self, name))
        for name in FACTORS:
            _check_factor(name, getattr(self, name))
        if self.budget_factor < 1:
            raise ValueError(f"budget_factor must be at least 1, got {self.budget_factor}.")
        if 0 < self.capacity_factor < 1:
            raise ValueError(
                f"capacity_factor must be at least 1, or 0 for dropless, got "
                f"{self.capacity_factor}."
            )
        if not _is_whole(self.peer_sms) or self.peer_sms < 1:
            raise ValueError(
                f"peer_sms must be a number of multiprocessors, at least 1, got {self.peer_sms!r}."
            )
        if not _is_whole(self.seed):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}.")
        if self.transport in ("hierarchical", "peer") and self.dispatcher == "all_gather":
            raise ValueError(
                f'transport="{self.transport}" carries copies and dispatcher="all_gather" sends '
                f"none; choose one of them."
            )
        self._check_num_chunks()

    def _check_num_chunks(self) -> None:
        if not _is_whole(self.num_chunks):
            raise ValueError(f"num_chunks must be a whole number, got {self.num_chunks!r}.")
        if self.num_chunks < 1:
            raise ValueError(
                f"num_chunks must be at least 1 (all tokens at once), got {self.num_chunks}."
            )
        others = (
            ("transport", "hierarchical"),
            ("dispatcher", "all_gather"),
            ("received_rows", "dispatch_again"),
        )
        for name, value in others:
            if self.num_chunks > 1 and getattr(self, name) == value:
                raise ValueError(
                    f'num_chunks={self.num_chunks} does not go with {name}="{value}"; choose one '
                    f"of them."
                )

    @property
    def changes_router(self) -> bool:
        """Whether the model's router does anything that Hugging Face's own does not."""
        return (
            self.routing != "huggingface"
            or self.router_dtype is not None
            or self.z_loss_coeff > 0
            or self.capacity_factor > 0
        )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        allowed = " or ".join(f'"{c}"' if isinstance(c, str) else repr(c) for c in choices)
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def _check_count(name: str, value: object) -> None:
    if not _is_whole(value) or value < 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number of rows, or 0 for no bound, got {value!r}.")


def _check_factor(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} must be a finite number, at least 0, got {value!r}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
