"""What a user chooses about the experts."""

from dataclasses import dataclass

GRADIENTS = ("mean", "sum")
RECOMPUTES = ("none", "gate_up")
TRANSPORTS = ("auto", "collective")


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
            0: no bound.
        transport: what carries rows between ranks. "collective": the EP process group's
            all-to-all. "auto": the best there is, which is the same.

    Raises:
        ValueError: a value that is none of these.
    """

    gradient: str = "mean"
    recompute: str = "none"
    max_slots: int = 0
    max_received_rows: int = 0
    transport: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("gradient", self.gradient, GRADIENTS)
        _check_choice("recompute", self.recompute, RECOMPUTES)
        _check_choice("transport", self.transport, TRANSPORTS)
        _check_count("max_slots", self.max_slots)
        _check_count("max_received_rows", self.max_received_rows)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        allowed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a number of rows, or 0 for no bound, got {value!r}.")
