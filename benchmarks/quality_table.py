"""What `python -m benchmarks quality` shows: a rich table, and a plot as an SVG document."""

from __future__ import annotations

from html import escape

from rich.table import Table

from benchmarks.quality import Measured, Quality

WIDTH = 720
LEFT, RIGHT, TOP, ROW, BAR = 190, 130, 44, 30, 16


def cost_table(found: Quality) -> Table:
    """Every variant beside the source; standard errors over windows behind each mean."""
    title = f"held-out text, {found.scored} scored tokens in {found.windows} windows"
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    columns = ("perplexity", "loss over the source's", "KL(source || it)", "top-1", "routing")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in found.lines:
        table.add_row(
            line.variant,
            _figure(line.perplexity, 4),
            _figure(line.excess, 5),
            _figure(line.kl, 5),
            f"{line.top1.mean:.2%}",
            f"{line.routing.mean:.2%}",
        )
    return table


def cost_plot(found: Quality) -> str:
    """Bars of KL(source || variant) with their standard errors, an SVG document."""
    lines = found.lines[1:]
    top = max((line.kl.mean + (line.kl.error or 0.0) for line in lines), default=0.0) or 1.0
    height = TOP + ROW * len(lines) + 8
    scale = (WIDTH - LEFT - RIGHT) / top
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13" fill="#1f2328">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="24" font-weight="bold">KL(source || variant), nats a token, '
        f"{found.scored} held-out tokens</text>",
    ]
    for index, line in enumerate(lines):
        y = TOP + ROW * index
        middle, width = y + BAR / 2, max(line.kl.mean, 0.0) * scale
        error = (line.kl.error or 0.0) * scale
        parts += [
            f'<text x="{LEFT - 8}" y="{middle + 4.5}" text-anchor="end">'
            f"{escape(line.variant)}</text>",
            f'<rect x="{LEFT}" y="{y}" width="{width:.2f}" height="{BAR}" fill="#3b6fb6"/>',
            f'<path d="M{LEFT + width - error:.2f} {middle}H{LEFT + width + error:.2f}" '
            'stroke="#1f2328" stroke-width="1.5"/>',
            f'<text x="{LEFT + width + error + 6:.2f}" y="{middle + 4.5}">'
            f"{_figure(line.kl, 5)}</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])


def _figure(value: Measured, digits: int) -> str:
    mean = f"{value.mean:.{digits}f}"
    if float(mean) == 0.0:
        mean = mean.removeprefix("-")
    return mean if value.error is None else f"{mean} ± {value.error:.{digits}f}"
