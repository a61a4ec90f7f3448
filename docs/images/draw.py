"""Draws the pictures of the grid of ranks: `python docs/images/draw.py`; a test keeps them current.

A panel is a replica, a row an expert-parallel group, a column the ranks that share experts.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
CELL_WIDTH, CELL_HEIGHT, GAP, MARGIN, HEAD = 118, 58, 12, 26, 62
COLOURS = ("#cfe3f7", "#fbe3c4", "#d3ecd0", "#ecd5ee", "#f6d4d4", "#d8e8e6", "#eee8c0", "#dddddd")
GRIDS = {  # file: (replicas R, shard degree S, expert-parallel degree P, experts E)
    "grid-8-ranks.svg": (1, 2, 4, 8),
    "grid-hybrid.svg": (2, 2, 2, 8),
}


def text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "middle") -> str:
    """One line of text, centred on x unless told."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def cell(x: float, y: float, rank: int, ep: int, part: str, experts: range) -> list[str]:
    """A rank: its number, its experts, and which part of their weights it holds."""
    box = f'<rect x="{x:g}" y="{y:g}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" rx="6" '
    names = ", ".join(map(str, experts))
    return [
        f'{box}fill="{COLOURS[ep % len(COLOURS)]}" stroke="#555"/>',
        text(x + CELL_WIDTH / 2, y + 18, f"rank {rank}"),
        text(x + CELL_WIDTH / 2, y + 35, f"experts {names}", size=12),
        text(x + CELL_WIDTH / 2, y + 50, part, size=11),
    ]


def draw(replicas: int, shards: int, ep_size: int, num_experts: int) -> str:
    """The picture of one grid, as SVG."""
    panel = ep_size * (CELL_WIDTH + GAP) - GAP
    width = replicas * (panel + 2 * MARGIN) + 2 * MARGIN
    height = HEAD + shards * (CELL_HEIGHT + 2 * GAP) + 2 * MARGIN
    num_local = num_experts // ep_size
    parts = [text(width / 2, 24, f"R = {replicas}, S = {shards}, P = {ep_size}", size=15)]
    for replica in range(replicas):
        left = 2 * MARGIN + replica * (panel + 2 * MARGIN)
        if replicas > 1:
            parts.append(text(left + panel / 2, HEAD - 14, f"replica {replica}"))
        for shard in range(shards):
            top = HEAD + GAP + shard * (CELL_HEIGHT + 2 * GAP)
            outline = f'width="{panel + 2 * GAP}" height="{CELL_HEIGHT + GAP}" rx="9" fill="none"'
            parts.append(
                f'<rect x="{left - GAP:g}" y="{top - GAP / 2:g}" {outline} stroke="#1f5fa8" '
                f'stroke-width="2" stroke-dasharray="6 3"/>'
            )
            for ep in range(ep_size):
                rank = (replica * shards + shard) * ep_size + ep
                experts = range(ep * num_local, (ep + 1) * num_local)
                part = "whole" if shards == 1 else f"part {shard + 1} of {shards}"
                parts += cell(left + ep * (CELL_WIDTH + GAP), top, rank, ep, part, experts)
    legend = "dashed: an EP group, tokens travel inside it; one colour: the same experts"
    parts.append(text(width / 2, height - 14, legend, size=12))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    style = f'width="{width}" font-family="sans-serif">'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head + style, background, *parts, "</svg>", ""])


def main() -> None:
    """Write every picture."""
    for name, grid in GRIDS.items():
        (FOLDER / name).write_text(draw(*grid))


if __name__ == "__main__":
    main()
