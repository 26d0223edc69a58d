"""The report as one HTML page: sections and tables made here, curves as data that page/page.js draws with plotly.js."""

import base64
import html
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.report.data import RunRecord, split_config
from lab.report.parts import (
    Cell,
    Row,
    finite,
    folded,
    log_ticks,
    note,
    number,
    of_run,
    perplexity,
    scored,
    section,
    setting,
    styles,
    swatch,
    table,
)
from lab.report.samples import TEMPERATURE, TOKENS

PAGE = Path(__file__).parent / "page"
SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
Paper = Mapping[tuple[str, int], Mapping[str, float]]


class Page:
    """The sections for `records`; `paper` and `sizes` are the paper's perplexities and the configurations of its models."""

    def __init__(self, records: Sequence[RunRecord], paper: Paper, sizes: Mapping[str, Mapping[str, Any]]) -> None:
        self.records, self.paper, self.sizes = records, paper, sizes
        self.styles = styles(records)
        self.plots: dict[str, dict[str, Any]] = {}

    def name(self, i: int) -> Cell:
        """The run's line and name."""
        return Cell(self.records[i].name, kind="k", swatch=swatch(self.styles[i]))

    def plot(self, kind: str, series: list[dict[str, Any]], x_title: str, y_title: str, **axes: Any) -> str:
        """A place for a plot, whose data goes to the page's script."""
        self.plots[kind] = {"series": series, "x_title": x_title, "y_title": y_title, **axes}
        return f'<div class="plot" id="plot-{kind}"></div><noscript><p class="note">The plot needs JavaScript.</p></noscript>'

    def curves(self, *keys: str) -> list[dict[str, Any]]:
        """The series of the log's `keys`, of every run that has them."""
        return [
            {"run": i, "key": key, "label": r.name + (", validation" if key == "val_loss" else ""), "x": x, "y": y}
            for i, r in enumerate(self.records)
            for key in keys
            for x, y in [r.curves.get(key, ([], []))]
            if x
        ]

    def overview(self) -> str:
        """How far each run is, and what it lacks."""
        rows: list[Row] = []
        lacking = any(r.notes for r in self.records)
        for i, r in enumerate(self.records):
            steps = r.config.get("steps")
            step = Cell(number(r.last_step, ",d").text, f"of {steps:,}" if isinstance(steps, int) else "", kind="n")
            cells = [self.name(i), Cell(r.encoding, kind="k"), number(r.n_params, ",d"), step, number(r.trained_tokens, ",d")]
            rows.append((i, cells + [Cell("; ".join(r.notes), kind="long")] * lacking))
        return section(
            "Runs", table(["run", "encoding", "parameters", "step", "training tokens"] + ["missing"] * lacking, rows)
        )

    def size_of(self, record: RunRecord) -> str | None:
        """The paper's model that the run's shape, vocabulary and training length make it, if any."""
        return next((s for s, c in self.sizes.items() if all(record.config.get(k) == c[k] for k in SHAPE)), None)

    def beside_paper(self) -> list[Row]:
        """A row for each evaluation that the paper has a number for: ours, theirs, and on how much data ours stands."""
        rows: list[Row] = []
        for i, r in enumerate(self.records):
            size = self.size_of(r)
            for variant in r.variants:
                for length, result in sorted(variant.by_length.items()):
                    theirs = self.paper.get((size or "", length), {}).get(r.encoding)
                    ours = finite(result.get("perplexity"))
                    if theirs is None or ours is None or not variant.is_plain:
                        continue
                    names = [self.name(i), Cell(f"GPT-{str(size).capitalize()}", kind="k"), Cell(r.encoding, kind="k")]
                    both = [
                        number(length, "d"),
                        perplexity(result),
                        number(theirs),
                        number(100 * (ours / theirs - 1), "+.1f", " %"),
                    ]
                    data = [number(r.trained_tokens, ",d"), number(result.get("tokens"), ",d")]
                    rows.append((i, names + both + data))
        return rows

    def table1(self) -> str:
        """Ours beside the paper's, and the paper's table itself, folded away."""
        rows = self.beside_paper()
        full = next(iter(self.sizes.values()))
        budget = f"{full['steps'] * full['tokens_per_step']:,}"
        says = (
            f"Perplexity, lower is better. The paper trains on {budget} tokens and evaluates on 0.1B tokens of FineWeb-Edu."
            if rows
            else "None of these runs was evaluated as one of the paper's: its model, encoding, training length and length."
        )
        head = ["run", "model", "encoding", "length", "ours", "paper", "difference", "training tokens", "evaluated on"]
        encodings = list(dict.fromkeys(e for row in self.paper.values() for e in row))
        theirs: list[Row] = [
            (None, [Cell(f"GPT-{size.capitalize()}", kind="k"), number(length, "d"), *(number(row.get(e)) for e in encodings)])
            for (size, length), row in self.paper.items()
        ]
        paper = folded("The paper’s table (arXiv 2507.23083)", table(["model", "length", *encodings], theirs))
        return section("Table 1", note(says) + (table(head, rows) if rows else "") + paper)

    def perplexities(self) -> str:
        """Plot and table of all evaluations."""
        found = [(i, variant) for i, r in enumerate(self.records) for variant in r.variants]
        if not found:
            return section("Perplexity by length", note("No run has been evaluated."))
        lengths = sorted({length for _, variant in found for length in variant.by_length})
        series, rows = list[dict[str, Any]](), list[Row]()
        for i, variant in found:
            points = [(n, r) for n, r in sorted(variant.by_length.items()) if finite(r.get("perplexity"))]
            if points:
                label = ", ".join((self.records[i].name, *variant.special))
                x, y, error = zip(*((n, r["perplexity"], finite(r.get("stderr")) or 0) for n, r in points), strict=True)
                series.append({"run": i, "label": label, "x": x, "y": y, "error": error, "open": not variant.is_plain})
            cells = [perplexity(variant.by_length[n]) if n in variant.by_length else Cell("", kind="n") for n in lengths]
            about = Cell(self.records[i].encoding, ", ".join(variant.special), kind="k")
            rows.append((i, [self.name(i), about, number(variant.step, ",d"), number(variant.tokens, ",d"), *cells]))
        ticks = log_ticks([y for s in series for y in s["y"]] or [1.0])
        plot = self.plot(
            "length", series, "length, tokens", "perplexity",
            marks=sorted({n for r in self.records if isinstance(n := r.config.get("block_size"), int)}),
            x_axis={"type": "log", "tickvals": lengths, "ticktext": [f"{n:,}" for n in lengths]},
            y_axis={"type": "log", "tickvals": ticks, "ticktext": [f"{y:,.6g}" for y in ticks]},
        )  # fmt: skip
        says = (
            "Perplexity ± standard error over windows, or over documents where a row names them; every length predicts the "
            "same tokens. Dotted: the training length. –: the encoding has no positions there. "
            "Bold: the lowest of the rows shown."
        )
        head = ["run", "encoding", "step", "evaluated on", *(f"{n:,}" for n in lengths)]
        return section("Perplexity by length", note(says) + plot + table(head, rows, "contest"))

    def tasks(self) -> str:
        """What lab.eval_tasks found: a column for each task and metric."""
        found = [(i, one) for i, r in enumerate(self.records) for one in r.tasks]
        columns = sorted(
            {(t, m) for _, one in found for t, metrics in one["tasks"].items() for m in metrics if "_stderr" not in m}
        )
        rows: list[Row] = []
        for i, one in found:
            cells = [scored(one["tasks"].get(task, {}), metric) for task, metric in columns]
            few = f"first {one['limit']} of each" if one.get("limit") else "all"
            rows.append((i, [self.name(i), number(one.get("step"), ",d"), Cell(few, kind="k"), *cells]))
        says = "As the lm-evaluation-harness counts them, ± standard error. acc is the share of right answers."
        head = ["run", "step", "questions", *(f"{task}, {metric}" for task, metric in columns)]
        return section("Tasks", note(says) + table(head, rows)) if rows else ""

    def training(self) -> str:
        """Losses against tokens."""
        series = self.curves("loss", "val_loss")
        if not series:
            return section("Training", note("No run has a log."))
        later = sorted(y for s in series for y in (s["y"][len(s["y"]) // 20 + 1 :] or s["y"]))
        room = 0.05 * (later[-1] - later[0]) or 0.1
        frame = {"y_axis": {"range": [later[0] - room, later[-1] + room]}, "x_axis": {"rangemode": "tozero"}}
        width = 2 * (max(len(s["y"]) for s in series) // 80) + 1
        slider = (
            '<label class="control">points averaged <input id="smooth" type="range" min="1" max="101" step="2" '
            f'value="{width}"><span id="smooth-value">{width}</span></label>'
        )
        says = (
            "Lines: training loss, a mean over neighboring points. Open markers: validation loss. The first steps may lie "
            "above the frame; a double-click shows them."
        )
        plot = self.plot("loss", series, "training tokens", "loss, nats per token", **frame)
        return section("Training", note(says) + slider + plot)

    def throughput(self) -> str:
        """Speed as logged."""
        rows: list[Row] = []
        for i, r in enumerate(self.records):
            if r.rate is not None:
                mfu = number(None if r.mfu is None else 100 * r.mfu, ".1f", " %")
                memory = number(None if r.memory is None else r.memory / 2**30, ".2f", " GiB")
                rows.append((i, [self.name(i), number(r.rate, ",.0f"), mfu, memory, Cell(devices(r), kind="mid")]))
        if not rows:
            return section("Throughput", note("No run has logged its speed."))
        head = ["run", "tokens/s, median", "MFU, median", "peak memory", "devices"]
        frame = {"y_axis": {"rangemode": "tozero"}, "x_axis": {"rangemode": "tozero"}}
        plot = self.plot("speed", self.curves("tokens_per_second"), "training tokens", "tokens/s", **frame)
        says = "Over all devices, as logged. Runs that share a machine slow each other down; lab.bench compares speeds."
        return section("Throughput", note(says) + plot + table(head, rows))

    def images(self) -> str:
        """The figures that analyses left in the run folders."""
        figures = []
        for i, r in enumerate(self.records):
            for file, image in r.images:
                caption = html.escape(f"{r.name}: {file}")
                source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
                shown = f'<img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption>'
                figures.append(f"<figure{of_run(i)}>{shown}</figure>")
        return section("Analysis", "".join(figures)) if figures else ""

    def samples(self) -> str:
        """What the runs write."""
        articles = []
        for i, r in enumerate(self.records):
            for prompt, text, remark in r.samples:
                said = f'<span class="prompt">{html.escape(prompt)}</span>{html.escape(text)}'
                end = f'<p class="remark">{html.escape(remark)}</p>' if remark else ""
                articles.append(f"<article{of_run(i)}><h3>{html.escape(r.name)}</h3><pre>{said}</pre>{end}</article>")
        says = f"At most {TOKENS} tokens at temperature {TEMPERATURE}, after the prompt (bold); seeds from 1."
        return section("Samples", note(says) + "".join(articles)) if articles else ""

    def configuration(self) -> str:
        """What differs, and what does not."""
        differing, common = split_config(self.records)
        rows: list[Row] = [
            (i, [self.name(i), *(setting(r.config.get(k)) for k in differing)]) for i, r in enumerate(self.records)
        ]
        text = table(["run", *differing], rows) if differing else note("The runs have the same configuration.")
        same: list[Row] = [(None, [Cell(k, kind="k"), Cell(setting(v).text)]) for k, v in common.items()]
        return section("Configuration", text + folded(f"{len(common)} common options", table(["option", "value"], same)))

    def provenance(self) -> str:
        """Each start of each run."""
        rows: list[Row] = []
        for i, r in enumerate(self.records):
            for start in r.starts:
                has = {key: "–" if start.get(key) is None else str(start[key]) for key in start}
                commit, dirty, _ = has.get("git", "–").partition("-dirty")
                when = Cell(has.get("started", "–")[:16].replace("T", " "), kind="k")
                made_by = [f"{key} {has[key]}" for key in ("torch", "python") if key in has] + [has.get("dtype", "")]
                versions = Cell(", ".join(filter(None, made_by)) or "–", kind="mid")
                where = [Cell(commit[:10] + dirty, kind="k"), Cell(device(start), kind="mid"), versions]
                command = Cell(has.get("command", "–"), kind="long")
                rows.append((i, [self.name(i), number(start.get("from_step"), ",d"), when, *where, command]))
        head = ["run", "from step", "started", "commit", "devices", "versions", "command"]
        return section("Provenance", table(head, rows) if rows else note("No run says where it comes from."))

    def chips(self) -> str:
        """A button for each run, then all and none."""
        each = [
            f'<button type="button"{of_run(i)} aria-pressed="true" title="{html.escape(r.name)}">'
            f"{swatch(self.styles[i])}<span>{html.escape(r.name)}</span></button>"
            for i, r in enumerate(self.records)
        ]
        both = [
            f'<button type="button" class="all" data-all="{a}">{t}</button>' for a, t in (("true", "all"), ("false", "none"))
        ]
        return "\n".join(both + each)

    def render(self, title: str, about: str, command: str, plotly: str) -> str:
        """The whole page."""
        parts = (
            self.overview, self.table1, self.perplexities, self.tasks, self.training, self.throughput, self.images,
            self.samples, self.configuration, self.provenance,
        )  # fmt: skip
        sections = "\n".join(part() for part in parts)  # which fill self.plots
        data = json.dumps({"runs": self.styles, "plots": self.plots}, allow_nan=False, separators=(",", ":"))
        return string.Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
            title=html.escape(title),
            about=html.escape(about),
            command=html.escape(command),
            style=(PAGE / "style.css").read_text(encoding="utf-8"),
            chips=self.chips(),
            sections=sections,
            data=data.replace("<", "\\u003c"),  # so that no name ends the script
            plotly=plotly.replace("</script", "<\\/script"),
            script=(PAGE / "page.js").read_text(encoding="utf-8"),
        )


def device(start: Mapping[str, Any]) -> str:
    """What a start of a run computed on."""
    return f"{start.get('world_size', '?')} × {start.get('device', '?')}"


def devices(record: RunRecord) -> str:
    """The same over all its starts."""
    return ", ".join(dict.fromkeys(map(device, record.starts))) or "–"
