"""The two pictures of a run: the loss curve and the expert-load heat map."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot

from examples.run_log import History


def plot_loss(history: History, unigram: float, path: Path) -> None:
    """Draw training and validation loss over steps, and the unigram's cross-entropy as a line."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(history.steps, history.losses, linewidth=1, label="training")
    axes.plot(history.validation_steps, history.validation_losses, "o-", label="held-out text")
    axes.axhline(unigram, color="grey", linestyle="--", label="unigram of the training text")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_expert_load(history: History, path: Path) -> None:
    """Draw the load of every expert of every layer over steps; 1 is an even share."""
    load = torch.stack(history.expert_load)  # [records, layers, experts]
    records, layers, experts = load.shape
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.16 * layers * experts), layout="constrained")
    image = axes.imshow(
        load.reshape(records, layers * experts).T,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=0.0,
        vmax=2.0,
        extent=(history.load_steps[0] - 0.5, history.load_steps[-1] + 0.5, layers * experts, 0),
    )
    for layer in range(1, layers):
        axes.axhline(layer * experts, color="black", linewidth=1)
    axes.set_yticks([experts * (layer + 0.5) for layer in range(layers)])
    axes.set_yticklabels([f"layer {layer}" for layer in range(layers)])
    axes.set(xlabel="step", ylabel=f"{experts} experts a layer", title="Expert load")
    figure.colorbar(image, label="tokens over an even share", extend="max")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
