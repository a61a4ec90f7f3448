"""The pictures: curves over steps, and the experts' load over layers and over time."""

from dataclasses import dataclass
from pathlib import Path

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from torch_moe_ep.report.read import Run

DPI = 144
MAX_COLUMNS = 400  # of a heat map over time; more steps are averaged
MAX_ROWS = 256  # expert by expert over time up to here, above only the worst of each layer
CURVES = {
    "loss": ("Loss", "nats a token"),
    "lr": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm", "norm before clipping"),
    "tokens_per_second": ("Throughput", "tokens a second, all ranks"),
}
FILES = {"lr": "learning_rate.png"}


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    path: Path
    title: str
    caption: str


def draw(run: Run) -> list[Picture]:
    """Draw everything that a run has recorded, as PNG files in its folder."""
    pictures = []
    for name, (title, label) in CURVES.items():
        if name in run.curves:
            path = run.folder / FILES.get(name, f"{name}.png")
            caption = _draw_curve(run, name, label, path)
            pictures.append(Picture(path, title, caption))
    if run.load:
        layers, steps = run.folder / "expert_load_layers.png", run.folder / "expert_load.png"
        pictures.append(Picture(layers, "Expert load over layers", _draw_layers(run, layers)))
        pictures.append(Picture(steps, "Expert load over time", _draw_time(run, steps)))
    if run.entropy and any(value is not None for value in run.entropy[-1]):
        path = run.folder / "router_entropy.png"
        pictures.append(Picture(path, "Entropy of the routers", _draw_entropy(run, path)))
    return pictures


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_curve(run: Run, name: str, label: str, path: Path) -> str:
    figure, axes = _figure(7.0, 3.4)
    steps, values = run.curves[name]
    axes.plot(steps, values, linewidth=1.0, color="#7fa8d6", label="each step")
    width = max(1, len(values) // 40)
    if width > 1 and name != "lr":
        smooth = _running_mean(numpy.array(values), width)
        axes.plot(steps, smooth, linewidth=1.6, color="#1f4e8c", label=f"mean of {width} steps")
    caption = f"Last value {values[-1]:.4g}, at step {steps[-1]}."
    num_bad = int((~numpy.isfinite(values)).sum())
    if num_bad:
        caption += f" {num_bad} values are not finite."
    if name == "loss":
        caption += _draw_other_losses(run, axes)
    if name == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        caption = f"Median {numpy.median(values):,.0f} tokens a second."
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.grid(alpha=0.25)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=DPI)
    return caption


def _draw_other_losses(run: Run, axes: Axes) -> str:
    caption = ""
    if "validation_loss" in run.curves:
        steps, values = run.curves["validation_loss"]
        axes.plot(steps, values, "o-", color="#c2541b", markersize=4, label="held-out text")
        caption += f" On held-out text {values[-1]:.4g}."
    for name, value in run.reference_losses.items():
        axes.axhline(value, color="grey", linestyle="--", linewidth=1.0, label=name)
        caption += f" Dashed: {name}, {value:.4g}."
    return caption


def _running_mean(values: numpy.ndarray, width: int) -> numpy.ndarray:
    """Mean of the finite ones among each value and the `width` - 1 before it; NaN: there are none.

    A loss that was NaN once must not hide what came after it.
    """
    is_finite = numpy.isfinite(values)
    sums = numpy.concatenate([[0.0], numpy.cumsum(numpy.where(is_finite, values, 0.0))])
    counts = numpy.concatenate([[0], numpy.cumsum(is_finite)])
    ends = numpy.arange(1, len(values) + 1)
    starts = numpy.maximum(0, ends - width)
    num_finite = counts[ends] - counts[starts]
    mean = (sums[ends] - sums[starts]) / numpy.maximum(1, num_finite)
    return numpy.where(num_finite > 0, mean, numpy.nan)


def _draw_layers(run: Run, path: Path) -> str:
    """Layers by experts, averaged over the last fifth of the records."""
    load = numpy.array(run.load)
    num_records = max(1, len(load) // 5)
    mean = load[-num_records:].mean(axis=0)
    num_layers, num_experts = mean.shape
    figure, axes = _figure(
        min(9.0, max(7.0, 3.0 + 0.3 * num_experts)), max(2.6, 1.6 + 0.24 * num_layers)
    )
    _heat_map(figure, axes, mean, (-0.5, num_experts - 0.5, num_layers - 0.5, -0.5))
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.yaxis.set_major_locator(_whole_numbers())
    if num_layers * num_experts <= 128:
        for (layer, expert), value in numpy.ndenumerate(mean):
            colour = "white" if abs(value - 1.0) > 0.7 else "black"
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)  # fmt: skip  # noqa: E501
    figure.savefig(path, dpi=DPI)
    layer, expert = numpy.unravel_index(mean.argmax(), mean.shape)
    return (
        f"Mean of the last {num_records} records. Busiest: expert {expert} of layer {layer}, "
        f"{mean.max():.2f} times an even share; idlest {mean.min():.2f} times. "
        f"Darkest red: twice an even share and more."
    )


def _draw_time(run: Run, path: Path) -> str:
    """Every expert over steps, layer under layer; of a large model the worst of each layer."""
    load = numpy.array(run.load)  # [records, layers, experts]
    num_layers, num_experts = load.shape[1:]
    is_whole = num_layers * num_experts <= MAX_ROWS
    rows = load.reshape(len(load), -1) if is_whole else load.max(axis=2)
    rows, width = _binned(rows)
    height = 1.6 + (0.07 if is_whole else 0.24) * rows.shape[1]
    figure, axes = _figure(8.5, max(3.0, min(14.0, height)))
    first, last = run.load_steps[0] - 0.5, run.load_steps[-1] + 0.5
    per_layer = num_experts if is_whole else 1
    extent = (first, last, num_layers * per_layer, 0)
    _heat_map(figure, axes, rows.T, extent, is_busiest=not is_whole)
    if is_whole:
        for layer in range(1, num_layers):
            axes.axhline(layer * num_experts, color="black", linewidth=0.8)
    every = max(1, num_layers // 16)
    marks = range(0, num_layers, every)
    axes.set_yticks([per_layer * (layer + 0.5) for layer in marks], [f"layer {k}" for k in marks])
    axes.set(xlabel="step")
    axes.xaxis.set_major_locator(_whole_numbers())
    figure.savefig(path, dpi=DPI)
    what = f"{num_experts} experts a layer, from top to bottom" if is_whole else (
        f"the busiest of the {num_experts} experts of each layer"
    )  # fmt: skip
    binned = f", {width} records a column" if width > 1 else ""
    worst = float(load[-max(1, len(load) // 5) :].mean(axis=0).max())
    return f"{what[0].upper()}{what[1:]}{binned}. At the end the worst has {worst:.2f} times an even share."  # noqa: E501


def _binned(rows: numpy.ndarray) -> tuple[numpy.ndarray, int]:
    """At most MAX_COLUMNS records: means of `width` neighbours, the last bin of what is left."""
    width = -(-len(rows) // MAX_COLUMNS)
    starts = numpy.arange(0, len(rows), width)
    sums = numpy.add.reduceat(rows, starts, axis=0)
    lengths = numpy.minimum(starts + width, len(rows)) - starts
    return sums / lengths[:, None], width


def _heat_map(
    figure: Figure,
    axes: Axes,
    values: numpy.ndarray,
    extent: tuple[float, float, float, float],
    *,
    is_busiest: bool = False,
) -> None:
    """White is an even share, red more (darkest: twice and beyond), blue less.

    `is_busiest`: the busiest experts, of which none has less.
    """
    highest = max(2.0, float(values.max())) if is_busiest else 2.0
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap="Reds" if is_busiest else "RdBu_r",
        vmin=1.0 if is_busiest else 0.0,
        vmax=highest,
        extent=extent,
    )
    colours = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    colours.set_label("times an even share", fontsize="small")


def _draw_entropy(run: Run, path: Path) -> str:
    figure, axes = _figure(7.0, 3.4)
    num_experts = len(run.load[0][0])
    last = []
    colour = colormaps["viridis"]
    for layer, name in enumerate(run.layers):
        values = [row[layer] for row in run.entropy]
        known = [(s, v) for s, v in zip(run.load_steps, values, strict=True) if v is not None]
        if known:
            steps, numbers = zip(*known, strict=True)
            shade = colour(layer / max(1, len(run.layers) - 1))
            label = f"layer {layer}" if len(run.layers) <= 8 else None
            axes.plot(steps, numbers, linewidth=1.0, color=shade, label=label)
            last.append((numbers[-1], name))
    highest = float(numpy.log(num_experts))
    axes.axhline(highest, color="grey", linestyle="--", linewidth=1.0)
    axes.annotate(f"log {num_experts}", (run.load_steps[0], highest), va="bottom", fontsize="small")
    axes.set(xlabel="step", ylabel="nats a token", ylim=(0.0, 1.12 * highest))
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.grid(alpha=0.25)
    if len(run.layers) <= 8:
        axes.legend(frameon=False, fontsize="small", ncols=2, loc="lower left")
    figure.savefig(path, dpi=DPI)
    lowest = min(last)
    return (
        f"Mean over tokens; log {num_experts} = {highest:.2f} means that a router tells no expert "
        f"from another. Lowest at the end: {lowest[0]:.2f} in {lowest[1]}."
    )
