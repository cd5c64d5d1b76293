"""The report as one HTML page that needs no other file."""

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from megatron_ext.inspection.routed_text import FAN_OUT_COLOURS, RoutedText, shown_token
from megatron_ext.reports.html import document, picture, table
from megatron_ext.reports.run_metrics import RunMetrics

# What of a run's arguments says what was trained; the rest is folded away.
_CHOSEN = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_experts",
    "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_layer_freq", "seq_length", "global_batch_size", "train_iters", "optimizer", "lr",
    "router_type", "et_warmup_iters", "et_ema_decay", "et_capacity", "world_size",
    "expert_model_parallel_size", "use_distributed_optimizer", "seed",
)  # fmt: skip
# Settings that may change from start to start, and the figure of a row that records them.
_RECORDED = {"world_size": "world_size", "seq_length": "seq_length",
             "global_batch_size": "batch_size"}  # fmt: skip
_LAYER_COLUMNS = {
    "fan_out": ("experts a token", "{:.2f}"),
    "no_expert_share": ("tokens without", "{:.1%}"),
    "load_max_over_mean": ("greatest load / mean", "{:.2f}"),
    "dead_experts": ("experts without a token", "{:.1f}"),
    "raw_usage": ("raw usage", "{:.2%}"),
    "saturation": ("saturation", "{:.2%}"),
    "starvation": ("starvation", "{:.2%}"),
}
_STYLE = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.8; }
.text span { border-radius: 2px; padding: 1px 0; color: #222; }
.scale span { padding: .1rem .6rem; border: 1px solid var(--line); color: #222; }
blockquote b { font-weight: 600; }
"""


@dataclass(frozen=True)
class Page:
    """What the page shows; parts that are empty are left out.

    Attributes:
        picture: PNG.
        configuration: of run.json.
        validation: losses in nats per token.
        sample: prompt and text of a continuation.
    """

    run: str
    summary: str
    metrics: RunMetrics
    picture: bytes
    configuration: dict[str, Any]
    validation: dict[str, Any]
    sample: dict[str, Any]
    text: RoutedText | None

    def html(self) -> str:
        """The page."""
        parts = [
            f"<h1>{html.escape(self.run)}</h1>",
            f'<p class="summary">{html.escape(self.summary)}</p>',
            picture(self.picture, "losses, thresholds, loads and fan-out of the run"),
            self._text(),
            self._sample(),
            self._figures(),
            self._layers(),
            self._configuration(),
        ]
        return document(self.run, parts, _STYLE)

    def _text(self) -> str:
        if self.text is None:
            return ""
        fan_out = self.text.fan_out
        greatest = max(1.0, float(fan_out.max()))

        def colour(value: float) -> str:
            return to_hex(FAN_OUT_COLOURS(value / greatest))

        spans = []
        for index, token in enumerate(self.text.tokens):
            routes = [
                f"layer {layer}: {', '.join(map(str, taken[index])) or 'none'}"
                for layer, taken in zip(self.text.layers, self.text.experts)
            ]
            tip = html.escape(f"{shown_token(token)!r}\n" + "\n".join(routes))
            spans.append(
                f'<span style="background:{colour(fan_out[index])}" title="{tip}">'
                f"{html.escape(token)}</span>"
            )
        steps = [greatest * i / 4 for i in range(5)]
        scale = "".join(f'<span style="background:{colour(s)}">{s:.1f}</span>' for s in steps)
        return (
            "<h2>Where experts go</h2>"
            '<p class="note">A text coloured by the number of routed experts a token gets, the '
            "mean over the MoE layers. Point at a token to see which.</p>"
            f'<p class="scale">{scale}</p><p class="text">{"".join(spans)}</p>'
        )

    def _sample(self) -> str:
        if "text" not in self.sample:
            return ""
        prompt, text = (html.escape(str(self.sample.get(name, ""))) for name in ("prompt", "text"))
        return (
            "<h2>A continued text</h2>"
            f"<blockquote><b>{prompt}</b>{text}</blockquote>"
            '<p class="note">The prompt is bold; the rest was sampled from the last checkpoint.</p>'
        )

    def _figures(self) -> str:
        metrics = self.metrics
        rows: list[tuple[str, str]] = [("optimizer steps", f"{metrics.last_step:,}")]
        work = metrics.work(self.configuration.get("settings") or {})
        if np.isfinite(work.tokens[-1]):
            rows.append(("tokens trained on", f"{work.tokens[-1]:,.0f}"))
        if work.flops is not None:
            rows.append(("FLOPs, by Megatron's formula", f"{work.flops.sum():.3g}"))
        if work.device_seconds is not None:
            hours = work.device_seconds.sum() / 3600
            rows.append(("device-hours in training steps", f"{hours:.3g}"))
        for name, value in self.validation.items():
            if isinstance(value, float):
                rows.append((f"{name} loss, nats per token", f"{value:.4f}"))
            elif name == "tokens":
                rows.append(("validation tokens", f"{value:,}"))
        rows.append(("training loss, last tenth of steps", f"{metrics.recent('loss'):.4f}"))
        if (tokens_per_s := metrics.recent("tokens_per_s")) is not None:
            rows.append(("tokens per second", f"{tokens_per_s:,.0f}"))
        if (mfu := metrics.recent("mfu")) is not None:
            rows.append(("model FLOP/s utilisation", f"{mfu:.1%}"))
        return "<h2>Final figures</h2>" + table([], [list(row) for row in rows])

    def _layers(self) -> str:
        rows = []
        for layer in self.metrics.layers:
            cells = [str(layer)]
            for name, (_, form) in _LAYER_COLUMNS.items():
                value = self.metrics.recent(name, layer)
                cells.append("" if value is None else form.format(value))
            rows.append(cells)
        if not rows:
            return ""
        header = ["layer", *(label for label, _ in _LAYER_COLUMNS.values())]
        return "<h2>Routing by layer, mean over the last tenth of steps</h2>" + table(header, rows)

    def _configuration(self) -> str:
        if not self.configuration:
            return ""
        flat: dict[str, Any] = {}
        for key, value in self.configuration.items():
            flat.update(value if isinstance(value, dict) else {key: value})
        # run.json describes the last start alone.
        flat.update(
            (setting, recorded)
            for setting, name in _RECORDED.items()
            if (recorded := self.metrics.recorded(name))
        )
        chosen = [[key.replace("_", " "), str(flat[key])] for key in _CHOSEN if key in flat]
        rest = [[key.replace("_", " "), str(flat[key])] for key in flat if key not in _CHOSEN]
        return (
            "<h2>Configuration</h2>"
            + (table([], chosen) if chosen else "")
            + (f"<details><summary>all of it</summary>{table([], rest)}</details>" if rest else "")
        )
