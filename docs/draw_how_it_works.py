"""
Draws docs/how_it_works.svg: `python docs/draw_how_it_works.py`.
"""

from __future__ import annotations

from html import escape
from pathlib import Path


OUTPUT = Path(__file__).with_name("how_it_works.svg")
WIDTH, HEIGHT = 860, 330
STEPS = [
    # x, fill, title, lines
    (20, "#eef2ff", "one correction", ["prompt, target", "tokens and labels"]),
    (235, "#e0f2fe", "gradient factors", ["x: a layer's input", "δ: its output's gradient", "a short backward pass"]),
    (450, "#fef3c7", "editor network", ["(x, δ) → (u, v)", "small, trained once", "for the model"]),
    (665, "#dcfce7", "edit", ["two thin matrices", "a layer; a few kB", "kept, undone, shared"]),
]
BOX_WIDTH, BOX_HEIGHT, TOP = 175, 112, 20


def text(x: float, y: float, words: str, size: int = 14, **attributes: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle"{extra}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{fill}" stroke="#475569"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#475569" stroke-width="2" marker-end="url(#head)"/>'


def draw() -> str:
    """The figure as SVG: how an edit is made, and how a layer carries it."""
    parts = []
    for number, (x, fill, title, lines) in enumerate(STEPS):
        middle = x + BOX_WIDTH / 2
        parts.append(box(x, TOP, BOX_WIDTH, BOX_HEIGHT, fill))
        parts.append(text(middle, TOP + 28, title, 16, font_weight="bold"))
        parts += [text(middle, TOP + 54 + 20 * i, line) for i, line in enumerate(lines)]
        if number:
            parts.append(arrow(x - 38, TOP + BOX_HEIGHT / 2, x - 5, TOP + BOX_HEIGHT / 2))
    y = 245
    parts.append(text(105, y + 5, "layer's input x", 15))
    parts.append(arrow(165, y - 12, 258, 208))
    parts.append(arrow(165, y + 12, 258, 282))
    parts.append(box(265, 185, 250, 46, "#f1f5f9"))
    parts.append(text(390, 214, "W x : weights, never written to", 15))
    parts.append(box(265, 259, 250, 46, "#dcfce7"))
    parts.append(text(390, 288, "v (uᵀ x) : all edits of this layer", 15))
    parts.append(arrow(520, 208, 598, y - 10))
    parts.append(arrow(520, 282, 598, y + 10))
    parts.append(f'<circle cx="618" cy="{y}" r="18" fill="white" stroke="#475569"/>')
    parts.append(text(618, y + 7, "+", 22))
    parts.append(arrow(638, y, 690, y))
    parts.append(text(765, y + 5, "layer's output y", 15))
    way = f"M {665 + BOX_WIDTH - 12} {TOP + BOX_HEIGHT + 2} C 860 250, 800 322, 650 318 C 590 316, 560 305, 523 292"
    style = 'fill="none" stroke="#475569" stroke-width="2" stroke-dasharray="6 5" marker-end="url(#head)"'
    parts.append(f'<path d="{way}" {style}/>')
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="#475569"/></marker></defs>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" fill="#0f172a">\n' + "\n".join([head, *parts]) + "\n</svg>\n"
    )


if __name__ == "__main__":
    OUTPUT.write_text(draw(), encoding="utf-8")
