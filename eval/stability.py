"""Where a solver is stable, and a picture of it.

Test problem: with y = x / alpha and k = sigma / alpha the probability-flow ODE is dy/dk = epsilon(y, k) = (y -
denoised) / k, or, in lambda = -log k, ``dy/dlambda = denoised - y``. Let the network answer ``denoised = c y``
with a constant complex c (a local eigenvalue of its Jacobian). Then ``dy/dlambda = mu y`` with mu = c - 1, and
a step of length h multiplies y by exp(z), z = h mu.

Plotted: the factor g(z) by which the *compiled program* multiplies y per step on a grid uniform in lambda with
step h, in the long run, and the region |g| <= 1. The real interval [-h, 0] is what data do: c = 0 where the
answer does not depend on the state (pure noise), c = 1 where it is the state (clean). Guidance reaches beyond
it on both sides: with scale w, c becomes c_u + w (c_c - c_u). Noise that a stochastic solver adds is left out:
its mean is plotted.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from ..samplers import compile
from ..schedules import EDM, TimeGrid
from .mixture import run

WARM_UP, COUNTED, WINDOW = 48, 48, 6
"""Steps before the growth is measured, steps over which it is, and iterates in each norm (so that a rotating pair of
eigenvalues does not disturb the magnitude)."""


@dataclass(frozen=True)
class Region:
    """Magnitude of the growth factor on a rectangle of z; rows from the top (largest imaginary part)."""

    solver: str
    step: float
    real: NDArray[np.float64]
    imag: NDArray[np.float64]
    growth: NDArray[np.float64]

    @property
    def real_interval(self) -> tuple[float, float]:
        """The stable real interval [a, b] that contains z = -0.05 (NaN, NaN where that is unstable)."""
        axis = np.linspace(self.real[0], self.real[-1], 1601)
        stable = growth(self.solver, self.step, axis.astype(complex)) <= 1.0 + 1e-6
        at = int(np.argmin(np.abs(axis + 0.05)))
        if not stable[at]:
            return float("nan"), float("nan")
        low, high = at, at
        while low > 0 and stable[low - 1]:
            low -= 1
        while high < len(axis) - 1 and stable[high + 1]:
            high += 1
        return float(axis[low]), float(axis[high])

    @property
    def area(self) -> float:
        """Area of the stable region within the rectangle."""
        cell = (self.real[-1] - self.real[0]) * (self.imag[0] - self.imag[-1]) / self.growth.size
        return float(np.sum(self.growth <= 1.0 + 1e-6) * cell)

    @property
    def words(self) -> str:
        """The real interval as a phrase."""
        low, high = self.real_interval
        if np.isnan(low):
            return "unstable on the real axis"
        start = f"below {self.real[0]:g}" if low <= self.real[0] + 1e-9 else f"{low:.2f}"
        return f"stable on the real axis from {start} to {abs(high) if abs(high) < 0.005 else high:.2f}"


def growth(solver: str, step: float, z: NDArray[np.complex128]) -> NDArray[np.float64]:
    """|g(z)|: the long-run factor per step, any shape of z; infinite where it overflows."""
    steps = WARM_UP + COUNTED + WINDOW
    levels = np.exp(-step * (np.arange(steps + 1) - steps / 2))
    grid = TimeGrid.from_levels(EDM(sigma_min=float(levels[-1]) / 2, sigma_max=float(levels[0]) * 2), levels)
    program = compile(solver, grid, prediction="denoised")
    c = 1.0 + z / step
    # The state at every node, as the network is given it; alpha = 1 on this schedule, so it is y. A method that
    # evaluates a node twice is recorded at the first.
    seen: dict[float, NDArray[np.complex128]] = {}

    def predict(x: np.ndarray, node) -> np.ndarray:
        seen.setdefault(node.sigma, x)
        return c * x

    with np.errstate(all="ignore"):
        run(program, np.ones_like(z), predict)
        states = [seen[node.sigma] for node in list(grid)[:-1] if node.sigma in seen]
        late = _norm(states[-WINDOW:])
        early = _norm(states[-WINDOW - COUNTED : -COUNTED])
        factor = (late / early) ** (1.0 / COUNTED)
    factor = np.where(early == 0.0, 0.0, factor)  # decayed to nothing in one step
    return np.where(np.isnan(factor), np.inf, factor)


def _norm(states: list[NDArray[np.complex128]]) -> NDArray[np.float64]:
    return np.sqrt(sum(np.square(np.abs(s)) for s in states))


def region(
    solver: str,
    step: float = 1.0,
    real: tuple[float, float] = (-3.5, 0.75),
    imag: float = 2.0,
    size: tuple[int, int] = (425, 400),
) -> Region:
    """The growth on a rectangle; ``size`` is (columns, rows)."""
    x = np.linspace(*real, size[0])
    y = np.linspace(imag, -imag, size[1])
    half = (size[1] + 1) // 2  # real coefficients: the lower half mirrors the upper
    upper = growth(solver, step, x[None, :] + 1j * y[:half, None])
    full = np.concatenate([upper, upper[: size[1] - half][::-1]])
    return Region(solver, step, x, y, full)


# terminal ---------------------------------------------------------------------------------------------------------


def braille(area: Region, columns: int = 60) -> str:
    """The stable region in braille dots (2 x 4 a character), with both axes."""
    rows = max(4, round(columns * 0.5 * (area.imag[0] - area.imag[-1]) / (area.real[-1] - area.real[0])))
    width, height = 2 * columns, 4 * rows
    at_x = np.round(np.linspace(0, len(area.real) - 1, width)).astype(int)
    at_y = np.round(np.linspace(0, len(area.imag) - 1, height)).astype(int)
    dots = area.growth[np.ix_(at_y, at_x)] <= 1.0 + 1e-6
    x0 = int(np.argmin(np.abs(area.real[at_x])))
    y0 = int(np.argmin(np.abs(area.imag[at_y])))
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    lines = []
    for row in range(rows):
        line = ""
        for column in range(columns):
            code = sum(bits[j][i] for j in range(4) for i in range(2) if dots[4 * row + j, 2 * column + i])
            on_x, on_y = y0 // 4 == row, x0 // 2 == column
            line += (
                chr(0x2800 + code)
                if code
                else ("┼" if on_x and on_y else "─" if on_x else "│" if on_y else " ")
            )
        label = {0: f"{area.imag[0]:+.1f}i", y0 // 4: "0", rows - 1: f"{area.imag[-1]:+.1f}i"}.get(row, "")
        lines.append(f"{label:>6} {line}")
    low, high = f"{area.real[0]:g}", f"{area.real[-1]:g}"
    scale = [" "] * columns
    for text, at in ((low, 0), ("0", x0 // 2), (high, columns - len(high))):
        scale[at : at + len(text)] = text
    return "\n".join([*lines, " " * 7 + "".join(scale) + "  Re z"])


# files ------------------------------------------------------------------------------------------------------------

LEVELS = ((0.25, (11, 110, 105)), (0.5, (88, 157, 153)), (0.75, (157, 197, 194)), (1.0, (214, 230, 228)))
EDGE = (22, 25, 29)


def raster(area: Region) -> bytes:
    """PNG of the region alone: shaded by |g|, a dark line at |g| = 1."""
    from PIL import Image

    pixels = np.full((*area.growth.shape, 3), 255, np.uint8)
    for level, colour in reversed(LEVELS):
        pixels[area.growth <= level + 1e-6] = colour
    inside = area.growth <= 1.0 + 1e-6
    edge = np.zeros_like(inside)
    edge[1:-1, 1:-1] = inside[1:-1, 1:-1] & ~(
        inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    )
    edge |= np.roll(edge, 1, axis=1)
    pixels[edge] = EDGE
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def svg(area: Region, side: int = 460) -> str:
    """A labelled picture: the region, both axes with ticks, and the interval [-h, 0] where data live."""
    left, top, gap = 64, 74, 22
    span_x, span_y = area.real[-1] - area.real[0], area.imag[0] - area.imag[-1]
    height = round(side * span_y / span_x)
    total_w, total_h = left + side + gap, top + height + 92

    def px(x: float) -> float:
        return left + (x - area.real[0]) / span_x * side

    def py(y: float) -> float:
        return top + (area.imag[0] - y) / span_y * height

    ticks = []
    for x in np.arange(np.ceil(area.real[0]), area.real[-1] + 1e-9):
        ticks.append(f'<path d="M{px(x):.1f} {top + height}v5" stroke="#8b94a0"/>')
        ticks.append(f'<text x="{px(x):.1f}" y="{top + height + 19}" text-anchor="middle">{x:g}</text>')
    for y in np.arange(np.ceil(area.imag[-1]), area.imag[0] + 1e-9):
        ticks.append(f'<path d="M{left} {py(y):.1f}h-5" stroke="#8b94a0"/>')
        ticks.append(f'<text x="{left - 9}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    key = "".join(
        f'<rect x="{left + 82 * i}" y="{top + height + 58}" width="13" height="13" fill="rgb{colour}"/>'
        f'<text x="{left + 82 * i + 19}" y="{top + height + 69}">|g| ≤ {level:g}</text>'
        for i, (level, colour) in enumerate(LEVELS)
    )
    image = base64.b64encode(raster(area)).decode("ascii")
    return f"""<svg xmlns="http://www.w3.org/2000/svg"
 viewBox="0 0 {total_w} {total_h}" width="{total_w}" height="{total_h}" role="img"
 font-family="Inter, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif" font-size="12" fill="#3b434c">
<title>Stability region of {escape(area.solver)}</title>
<rect width="100%" height="100%" fill="#fff"/>
<text x="{left}" y="24" font-size="16" font-weight="600" fill="#16191d">{escape(area.solver)}</text>
<text x="{left}" y="43">growth |g| per step on y' = (z/h) y; step h = {area.step:g} in log-SNR</text>
<text x="{left}" y="60">{area.words}</text>
<image x="{left}" y="{top}" width="{side}" height="{height}" preserveAspectRatio="none"
 href="data:image/png;base64,{image}"/>
<path d="M{px(0):.1f} {top}v{height}M{left} {py(0):.1f}h{side}" stroke="#16191d" stroke-opacity=".35" fill="none"/>
<path d="M{px(max(-area.step, area.real[0])):.1f} {py(0):.1f}H{px(0):.1f}"
 stroke="#c2571a" stroke-width="3" fill="none"/>
<text x="{px(-area.step / 2):.1f}" y="{py(0) - 8:.1f}" text-anchor="middle" fill="#c2571a">data: -h to 0</text>
<rect x="{left}" y="{top}" width="{side}" height="{height}" fill="none" stroke="#bfc6ce"/>
{"".join(ticks)}
<text x="{left + side / 2}" y="{top + height + 40}" text-anchor="middle">Re z</text>
<text transform="translate(18 {top + height / 2}) rotate(-90)" text-anchor="middle">Im z</text>
{key}
</svg>
"""


def png(area: Region, side: int = 720) -> bytes:
    """The picture of :func:`svg` as PNG."""
    from PIL import Image, ImageDraw, ImageFont

    left, top, right, bottom = 78, 84, 30, 104
    span_x, span_y = area.real[-1] - area.real[0], area.imag[0] - area.imag[-1]
    height = round(side * span_y / span_x)
    canvas = Image.new("RGB", (left + side + right, top + height + bottom), "white")
    draw = ImageDraw.Draw(canvas)
    small, large = ImageFont.load_default(15), ImageFont.load_default(21)
    ink, soft, line, warm = (22, 25, 29), (59, 67, 76), (191, 198, 206), (194, 87, 26)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - area.real[0]) / span_x * side, top + (area.imag[0] - y) / span_y * height

    canvas.paste(
        Image.open(io.BytesIO(raster(area))).resize((side, height), Image.Resampling.NEAREST), (left, top)
    )
    draw.text((left, 16), area.solver, ink, large)
    draw.text(
        (left, 48), f"|g| per step on y' = (z/h) y, h = {area.step:g} in log-SNR; {area.words}", soft, small
    )
    draw.line([at(0, area.imag[0]), at(0, area.imag[-1])], line, 1)
    draw.line([at(area.real[0], 0), at(area.real[-1], 0)], line, 1)
    draw.line([at(max(-area.step, area.real[0]), 0), at(0, 0)], warm, 4)
    x, y = at(-area.step / 2, 0)
    draw.text((x, y - 8), "data: -h to 0", warm, small, anchor="mb")
    draw.rectangle([left, top, left + side, top + height], outline=line)
    for x in np.arange(np.ceil(area.real[0]), area.real[-1] + 1e-9):
        draw.text((at(x, 0)[0], top + height + 8), f"{x:g}", soft, small, anchor="ma")
    for y in np.arange(np.ceil(area.imag[-1]), area.imag[0] + 1e-9):
        draw.text((left - 10, at(0, y)[1]), f"{y:g}", soft, small, anchor="rm")
    draw.text((left + side / 2, top + height + 34), "Re z", soft, small, anchor="ma")
    draw.text((14, top + height / 2), "Im z", soft, small, anchor="lm")
    for i, (level, colour) in enumerate(LEVELS):
        x, y = left + 130 * i, top + height + 70
        draw.rectangle([x, y, x + 18, y + 18], fill=colour)
        draw.text((x + 26, y + 9), f"|g| <= {level:g}", soft, small, anchor="lm")
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
