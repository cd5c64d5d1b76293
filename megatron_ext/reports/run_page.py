"""Report of a run as one HTML page that needs no other file."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from megatron_ext.inspection.routed_text import FAN_OUT_COLORS, RoutedText, shown_token
from megatron_ext.reports.comparison.text_bytes import bytes_per_token
from megatron_ext.reports.html import render
from megatron_ext.reports.run_metrics import RunMetrics

# Settings that describe the model and its training; the page hides the others in a fold.
_CHOSEN = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_experts",
    "moe_router_topk", "et_mean_experts", "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "moe_layer_freq", "seq_length", "global_batch_size",
    "train_iters", "optimizer", "lr",
    "router_type", "et_warmup_iters", "et_ema_decay", "et_capacity", "world_size",
    "expert_model_parallel_size", "use_distributed_optimizer", "seed",
)  # fmt: skip
# Settings that may change on resume, and the metric that records each.
_RECORDED = {"world_size": "world_size", "seq_length": "seq_length",
             "global_batch_size": "batch_size"}  # fmt: skip
_LAYER_COLUMNS = {
    "fan_out": ("experts per token", "{:.2f}"),
    "no_expert_share": ("tokens without an expert", "{:.1%}"),
    "load_max_over_mean": ("largest load / mean load", "{:.2f}"),
    "dead_experts": ("experts without tokens", "{:.1f}"),
    "raw_usage": ("raw usage", "{:.2%}"),
    "saturation": ("saturation", "{:.2%}"),
    "starvation": ("starvation", "{:.2%}"),
}
_TEMPLATE = Path(__file__).with_name("templates") / "run_page.html"


@dataclass(frozen=True)
class Page:
    """Content of the page of a run; empty parts are omitted.

    Attributes:
        run: Name of the run.
        summary: Sentence under the title.
        metrics: Metrics of the run.
        panels: Panels of curves, PNG with a description of each.
        configuration: Content of run.json.
        validation: Losses by name, nats per token.
        sample: `prompt` and `text` of a generated sample.
        text: Text whose tokens are colored by their number of experts.
    """

    run: str
    summary: str
    metrics: RunMetrics
    panels: list[tuple[bytes, str]]
    configuration: dict[str, Any]
    validation: dict[str, Any]
    sample: dict[str, Any]
    text: RoutedText | None

    @property
    def _settings(self) -> dict[str, Any]:
        settings = self.configuration.get("settings")
        return settings if isinstance(settings, dict) else {}

    @property
    def divergence(self) -> str:
        """Sentence on a run whose losses are not all finite; empty for others."""
        clause = self.metrics.divergence
        return f"{clause[0].upper()}{clause[1:]}." if clause else ""

    @property
    def unfinished(self) -> str:
        """Sentence on a run that has not made all of its steps; empty for others."""
        planned = self._settings.get("train_iters")
        if not isinstance(planned, int) or self.metrics.last_step >= planned:
            return ""
        return f"The run has made {self.metrics.last_step:,} of {planned:,} steps."

    def html(self) -> str:
        """Return the page."""
        tokens, scale = self._tokens()
        sample = {name: str(self.sample.get(name, "")) for name in ("prompt", "text")}
        chosen, rest = self._configuration()
        return render(
            _TEMPLATE,
            title=self.run,
            run=self.run,
            summary=self.summary,
            divergence=self.divergence,
            unfinished=self.unfinished,
            panels=self.panels,
            tokens=tokens,
            scale=scale,
            sample=sample if "text" in self.sample else None,
            metrics=self._final_metrics(),
            layers=self._layers(),
            chosen=chosen,
            rest=rest,
        )

    def _tokens(self) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
        """Return text, color and tooltip of each token, and label and color of the scale."""
        if self.text is None:
            return [], []
        fan_out = self.text.fan_out
        largest = max(1.0, float(fan_out.max()))

        def color(value: float) -> str:
            return to_hex(FAN_OUT_COLORS(value / largest))

        tokens = []
        for index, token in enumerate(self.text.tokens):
            routes = [
                f"layer {layer}: {', '.join(map(str, experts[index])) or 'none'}"
                for layer, experts in zip(self.text.layers, self.text.experts)
            ]
            tip = f"{shown_token(token)!r}\n" + "\n".join(routes)
            tokens.append((token, color(fan_out[index]), tip))
        steps = [largest * i / 4 for i in range(5)]
        return tokens, [(f"{step:.1f}", color(step)) for step in steps]

    def _final_metrics(self) -> list[tuple[str, str]]:
        metrics = self.metrics
        rows: list[tuple[str, str]] = [("optimizer steps", f"{metrics.last_step:,}")]
        work = metrics.work(self._settings)
        if np.isfinite(work.tokens[-1]):
            rows.append(("tokens trained on", f"{work.tokens[-1]:,.0f}"))
        if work.flops is not None:
            rows.append(("FLOPs, by Megatron's formula", f"{work.flops.sum():.3g}"))
        if work.device_seconds is not None:
            hours = work.device_seconds.sum() / 3600
            rows.append(("device-hours in training steps", f"{hours:.3g}"))
        of_bytes = bytes_per_token(self._settings, "valid")
        for name, value in self.validation.items():
            if isinstance(value, float):
                rows.append((f"{name} loss, nats per token", f"{value:.4f}"))
                if name == "validation" and of_bytes:
                    bits = value / math.log(2) / of_bytes
                    rows.append(("validation loss, bits per byte of text", f"{bits:.4f}"))
            elif name == "tokens":
                rows.append(("validation tokens", f"{value:,}"))
        rows.append(("training loss, last tenth of steps", f"{metrics.recent('loss'):.4f}"))
        if (tokens_per_s := metrics.recent("tokens_per_s")) is not None:
            rows.append(("tokens per second", f"{tokens_per_s:,.0f}"))
        if (mfu := metrics.recent("mfu")) is not None:
            rows.append(("model FLOP/s utilization", f"{mfu:.1%}"))
        return rows

    def _layers(self) -> list[list[str]]:
        """Return the table of the layers, header first, without metrics that no layer has."""
        columns = [["layer", *map(str, self.metrics.layers)]]
        for name, (label, form) in _LAYER_COLUMNS.items():
            values = [self.metrics.recent(name, layer) for layer in self.metrics.layers]
            cells = ["" if value is None else form.format(value) for value in values]
            if any(cells):
                columns.append([label, *cells])
        return [list(row) for row in zip(*columns)] if self.metrics.layers else []

    def _configuration(self) -> tuple[list[list[str]], list[list[str]]]:
        """Return name and value of the main settings, and of the others."""
        if not self.configuration:
            return [], []
        flat: dict[str, Any] = {}
        for key, value in self.configuration.items():
            flat.update(value if isinstance(value, dict) else {key: value})
        # run.json describes only the last start.
        flat.update(
            (setting, recorded)
            for setting, name in _RECORDED.items()
            if (recorded := self.metrics.recorded(name))
        )
        chosen = [[key.replace("_", " "), str(flat[key])] for key in _CHOSEN if key in flat]
        rest = [[key.replace("_", " "), str(flat[key])] for key in flat if key not in _CHOSEN]
        return chosen, rest
