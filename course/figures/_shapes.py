"""Pieces of SVG for the figures of lessons 5 to 8. Coordinates are pixels."""

import base64
import html
import io

GREY, PALE, GREEN, BLUE, ORANGE = "#666", "#eee", "#2a9d4e", "#2f6fb5", "#e8590c"


def svg(width, height, parts):
    """A whole drawing on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    head += f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, rect(0, 0, width, height, "white"), *parts, "</svg>"])


def rect(x, y, width, height, fill, title=""):
    """A filled rectangle; `title` shows when the mouse is over it."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"'
    return f"{shape}><title>{html.escape(title)}</title></rect>" if title else f"{shape}/>"


def text(x, y, words, fill="black", anchor="start", turn=0):
    """A line of text. anchor: start, middle or end. turn: degrees."""
    turned = f' transform="rotate({turn} {x:g} {y:g})"' if turn else ""
    words = html.escape(str(words))
    place = f'x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}"{turned}'
    return f'<text {place} xml:space="preserve">{words}</text>'


def line(points, colour, width=1.5):
    """A line through points [(x, y), …]."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def picture(x, y, image):
    """A PIL image inside the drawing."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    content = base64.b64encode(file.getvalue()).decode()
    place = f'x="{x:g}" y="{y:g}" width="{image.width}" height="{image.height}"'
    return f'<image {place} href="data:image/png;base64,{content}"/>'
