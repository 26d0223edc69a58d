"""What `lab.analyze freq` shows: f by class and head, its distribution, phase distances; a sentence colored by f."""

import html
from pathlib import Path
from typing import Any

from core.figures import BASELINE, COLORS, MARKERS, line, log_ticks, panels, plain_log_y, save
from lab.analyze.token_classes import CLASSES

ABOVE, BELOW = (232, 119, 34), (58, 122, 200)  # RGB of an f above or below its head's mean
FULL = 2.5  # standard deviations from the mean at which a color is full
COLUMNS, SHOWN = 96, 768  # characters of a line of freq_text.png, and in all


def draw_summary(found: dict[str, Any], path: Path) -> None:
    """freq.png: (a) f by class, (b) its distribution, both per head, (c) phase distance, (d) over RoPE's."""
    few = len(found["heads"]) <= 16
    figure, axes = panels(2, 2, width=6.2, height=4.2) if few else panels(4, 1, width=13.0, height=3.8)
    draw_classes(axes.flat[0], found)
    draw_distribution(axes.flat[1], found)
    draw_phase(axes.flat[2], found, relative=False)
    draw_phase(axes.flat[3], found, relative=True)
    tokens = f"{found['tokens']:,} tokens of the validation set"
    figure.suptitle(f"{found['run']} ({found['encoding']}, step {found['step']}): f over {tokens}")
    save(figure, path)


def draw_classes(axis: Any, found: dict[str, Any]) -> None:
    """A dot for the mean f of each class in each head, with 10 to 90 %."""
    for k, name in enumerate(CLASSES):
        shown = [(x, head["classes"][name]) for x, head in enumerate(found["heads"]) if name in head["classes"]]
        at = [x + 0.13 * (k - (len(CLASSES) - 1) / 2) for x, _ in shown]
        if shown:
            color = COLORS[k % len(COLORS)]
            axis.vlines(at, [c["p10"] for _, c in shown], [c["p90"] for _, c in shown], color=color, linewidth=1, alpha=0.6)
            axis.plot(at, [c["mean"] for _, c in shown], MARKERS[k], color=color, markersize=4, label=name)
    axis.set_title("(a) mean f by class (line: 10–90 % of tokens)", fontsize=10)
    per_head(axis, found)


def draw_distribution(axis: Any, found: dict[str, Any]) -> None:
    """Quantiles of f in each head: 1–99 %, 25–75 %, median."""
    quantiles = [head["quantiles"] for head in found["heads"]]
    at = range(len(quantiles))
    for low, high, width in (("0.01", "0.99", 1), ("0.1", "0.9", 3), ("0.25", "0.75", 7)):
        label = f"{float(low):.0%}–{float(high):.0%}".replace("%–", "–").replace("%", " %")
        axis.vlines(
            at, [q[low] for q in quantiles], [q[high] for q in quantiles], color=COLORS[0], linewidth=width, label=label
        )
    axis.plot(at, [q["0.5"] for q in quantiles], "o", color="white", markeredgecolor="black", markersize=4, label="median")
    if collapsed := [x for x, head in enumerate(found["heads"]) if head["collapsed"]]:
        axis.plot(collapsed, [quantiles[x]["0.5"] for x in collapsed], "x", color=COLORS[1], markersize=8, label="collapsed")
    axis.set_title("(b) distribution of f over tokens", fontsize=10)
    per_head(axis, found)


def per_head(axis: Any, found: dict[str, Any]) -> None:
    """The x axis of (a) and (b), a place per layer and head, and RoPE's f."""
    heads, n = found["heads"], 1 + max(head["head"] for head in found["heads"])
    axis.axhline(found["theta_1"], **BASELINE, label="RoPE's $\\theta_1$")
    for x in range(n, len(heads), n):
        axis.axvline(x - 0.5, color="gray", linewidth=0.6)
    few = len(heads) <= 32
    names = [str(head["head"]) for head in heads] if few else [f"layer {head['layer']}" for head in heads[::n]]
    axis.set_xticks(range(len(heads)) if few else [x + (n - 1) / 2 for x in range(0, len(heads), n)], names)
    layered = few and heads[0]["layer"] is not None
    axis.set(xlim=(-0.6, len(heads) - 0.4), ylabel="f, radians a token")
    axis.set_xlabel(
        "head" + (", layers from left to right" if layered else ", from left to right in each layer" if not few else "")
    )
    axis.grid(axis="x", visible=False)
    below(axis)


def draw_phase(axis: Any, found: dict[str, Any], relative: bool) -> None:
    """φ_1 of a token to the one n before it against n, or over RoPE's: each head and its spread, or all together."""
    rope = [point["rope"] for point in found["phase_distance"]]
    lags = [point["n"] for point in found["phase_distance"]]
    per = rope if relative else [1.0] * len(rope)

    def curve(points: list[dict[str, float]], key: str) -> list[float]:
        return [point[key] / unit for point, unit in zip(points, per, strict=True)]

    def draw(points: list[dict[str, float]], i: int, label: str) -> None:
        axis.plot(lags, curve(points, "mean"), label=label, **line(i))
        axis.fill_between(lags, curve(points, "p10"), curve(points, "p90"), alpha=0.15, color=line(i)["color"], linewidth=0)

    heads = found["heads"]
    if len(heads) <= 6:
        for i, head in enumerate(heads):
            draw(head["phase_distance"], i, name_of(head))
    else:
        for i, head in enumerate(heads if len(heads) <= 32 else []):
            own = curve(head["phase_distance"], "mean")
            axis.plot(lags, own, color="gray", linewidth=0.6, alpha=0.7, label=None if i else "each head")
        draw(found["phase_distance"], 0, "all heads together")
    axis.plot(lags, curve(found["phase_distance"], "rope"), **BASELINE, label="RoPE" if relative else "RoPE: n$\\theta_1$")
    log_ticks(axis, lags)
    if not relative:
        plain_log_y(axis)
    axis.set(xlabel="n, tokens apart", ylabel="$\\varphi_1 / n\\theta_1$" if relative else "$\\varphi_1$, radians")
    axis.set_title(
        f"({'d' if relative else 'c'}) phase distance{' over RoPE’s' if relative else ''} (band: 10–90 %)", fontsize=10
    )
    below(axis)


def below(axis: Any) -> None:
    """The legend below the axis, where it hides nothing."""
    axis.legend(fontsize=7.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)


def name_of(head: dict[str, Any]) -> str:
    """Layer and head in words."""
    return f"head {head['head']}" if head["layer"] is None else f"layer {head['layer']}, head {head['head']}"


def rows(found: dict[str, Any]) -> list[list[tuple[str, list[float], list[float]]]]:
    """For each layer its rows, first the mean of the heads: name, f of each token, and its distance from the mean of f over
    the validation set in standard deviations."""
    groups, n = [], len(found["text"]["f"][0])
    for site, f_HT in enumerate(found["text"]["f"]):
        total, heads = found["mean_of_heads"][site], found["heads"][site * n : (site + 1) * n]
        layer = "all layers" if total["layer"] is None else f"layer {total['layer']}"
        mean_T = [sum(column) / n for column in zip(*f_HT, strict=True)]
        named = [(f"{layer}, mean of heads", mean_T, total)]
        named += [(f"head {head['head']}", f_T, head) for head, f_T in zip(heads, f_HT, strict=True)]
        groups.append([(f"{name}: f = {of['mean']:.3f} ± {of['std']:.2g}", f_T, scaled(f_T, of)) for name, f_T, of in named])
    return groups


def scaled(f_T: list[float], of: dict[str, Any]) -> list[float]:
    """Distance of each f from the mean in standard deviations; 0 where f hardly differs at all."""
    return [(f - of["mean"]) / of["std"] if of["std"] > 1e-3 * of["mean"] else 0.0 for f in f_T]


def color(z: float) -> str:
    """White at the mean, orange above, blue below."""
    share = min(1.0, abs(z) / FULL)
    return "#" + "".join(f"{round(255 + share * (full - 255)):02x}" for full in (ABOVE if z > 0 else BELOW))


def draw_text(found: dict[str, Any], path: Path) -> None:
    """freq_text.png: the sentence once for each layer, colored by the mean of its heads; for each head where there is one f."""
    from matplotlib.patches import Rectangle

    groups = rows(found)
    shown = [row for group in groups for row in (group[:9] if len(groups) == 1 else group[:1])]
    places, lines = layout(found["text"]["tokens"])
    figure, axes = panels(len(shown), 1, width=COLUMNS * 0.0875, height=0.34 + 0.2 * lines)
    for axis, (name, _, z_T) in zip(axes[:, 0], shown, strict=True):
        for (column, row, piece), z in zip(places, z_T, strict=False):
            axis.add_patch(Rectangle((column, row + 0.04), len(piece), 0.92, facecolor=color(z), edgecolor="none"))
            axis.text(column, row + 0.5, piece, family="monospace", fontsize=9.5, va="center", parse_math=False)
        axis.set(xlim=(0, COLUMNS), ylim=(lines, 0))
        axis.set_title(name, fontsize=8.5, loc="left", pad=2)
        axis.axis("off")
    cut = "" if len(places) == len(found["text"]["tokens"]) else f"; the first {len(places)} tokens"
    figure.suptitle(
        f"{found['run']}: blue, f below its mean over the validation set; orange, above ({FULL:g} σ: full){cut}", fontsize=9
    )
    save(figure, path)


def layout(tokens: list[str]) -> tuple[list[tuple[int, int, str]], int]:
    """Column, line and text of each token that fits into the figure, and the number of lines."""
    places: list[tuple[int, int, str]] = []
    column = row = 0
    for token in tokens:
        piece = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in token)[:COLUMNS]
        if column + len(piece) > COLUMNS:
            column, row = 0, row + 1
        if row * COLUMNS >= SHOWN:
            return places, row
        places.append((column, row, piece))
        column += len(piece)
    return places, row + 1


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>f of {title}</title><style>
body {{ font: 15px/1.5 sans-serif; color: #111; background: #fff; max-width: 72em; margin: 2em auto; padding: 0 1em }}
p.row, summary {{ margin: .4em 0 }} small {{ color: #555 }} details > div {{ margin-left: 1.5em }}
code {{ display: block; font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere }}
</style></head><body><h1>f of {title}</h1>
<p>{about}</p>
{groups}
</body></html>
"""


def render_html(found: dict[str, Any]) -> str:
    """freq.html: a row per layer, which unfolds to its heads; f and class of a token under the pointer."""
    about = (
        f"Encoding {found['encoding']}, step {found['step']}; RoPE's f is {found['theta_1']:.4f}. Beside each name: mean and "
        f"standard deviation of f over {found['tokens']:,} tokens of the validation set. A token is "
        f'<span style="background:{color(FULL)}">orange</span> where its f is above that mean and '
        f'<span style="background:{color(-FULL)}">blue</span> where it is below, full at {FULL:g} standard deviations; '
        "point at it for the value. ¶ is the start of a document. Click on a row for its heads."
    )
    groups, folded = rows(found), len(found["text"]["f"]) > 1
    parts = []
    for first, *others in groups:
        inner = "\n".join(f'<p class="row">{_row(found["text"], *row)}</p>' for row in others)
        parts.append(
            f"<details{'' if folded else ' open'}><summary>{_row(found['text'], *first)}</summary><div>{inner}</div></details>"
        )
    return PAGE.format(title=html.escape(found["run"]), about=about, groups="\n".join(parts))


def _row(text: dict[str, Any], name: str, f_T: list[float], z_T: list[float]) -> str:
    spans = [
        f'<span style="background:{color(z)}" title="f = {f:.4f} ({z:+.1f} σ), {kind}">{html.escape(token)}</span>'
        for token, kind, f, z in zip(text["tokens"], text["classes"], f_T, z_T, strict=True)
    ]
    return f"<small>{html.escape(name)}</small><code>{''.join(spans)}</code>"
