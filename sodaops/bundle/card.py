"""The model card of a version, as Markdown."""

from collections.abc import Mapping
from typing import Any

from sodaops.bundle.layout import BundleInfo, task_of
from sodaops.tasks.base import Task

LIMITS = "It is meant for texts like those that it was trained on; on others its confidence is not reliable."


def render_card(info: BundleInfo, config: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The model card of a bundle.

    Args:
        info: the bundle's.
        config: the configuration of its training.
        metrics: split -> metric -> value.
    """
    model, optim, task = config["model"], config["optim"], task_of(info.bundle_id, info)
    metric, purpose = task.metrics[0], task.purpose(", ".join(f"`{label}`" for label in info.labels))
    lines = [
        f"# {info.data['name']} {info.bundle_id}",
        "",
        f"{purpose[0].upper()}{purpose[1:]}. Trained {info.created} from "
        f"`{model['name_or_path'].partition('#')[0]}` on the data set `{info.data['name']}` (fingerprint "
        f"`{info.data['fingerprint'][:12]}`).",
        "",
        "## Metrics",
        "",
        *_metrics_table(task, metrics),
        "",
        "The epoch was chosen on val, so its metrics are optimistic; test, if listed, was not used in training.",
        "",
        "## Inference",
        "",
        f"- cleaning `{info.cleaning}`, at most {info.limit}, {info.pooling} pooling",
    ]
    for variant, gate in info.onnx.items():
        serves = " (default)" if variant == info.default_variant else ""
        lines.append(
            f"- ONNX {variant}{serves}: opset {gate['opset']}, {gate['agreement']:.1%} of {task.answers} on val equal to "
            f"torch, {metric.title} {gate[f'{metric.name}_change']:+.4f}"
        )
    lines += [
        "",
        "## Training",
        "",
        f"- commit `{info.git_commit or 'not in a git repository'}`, seed {config['seed']}",
        f"- at most {config['trainer'].get('max_epochs')} epochs, lr {optim['lr']:g}, head {optim['head_lr']:g}, layer decay "
        f"{optim['layer_decay']:g}, vote weight {optim['vote_weight']:g}, dropout {model['dropout']:g}",
        f"- {', '.join(f'{name} {version}' for name, version in info.versions.items())}",
        "",
        "The bundle has the whole configuration (config.yaml) and numbers about the data (data_manifest.json).",
        "",
        "## Limits",
        "",
        f"{LIMITS} {task.limits}".strip(),
    ]
    return "\n".join(lines) + "\n"


def _metrics_table(task: Task, metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    titles = {**{metric.name: metric.title for metric in task.metrics}, "loss": "loss"}
    lines = ["| split | " + " | ".join(titles.values()) + " |", "| --- |" + " --- |" * len(titles)]
    for split, values in metrics.items():
        cells = [f"{values[key]:.4f}" if isinstance(values.get(key), int | float) else "–" for key in titles]
        lines.append(f"| {split} | " + " | ".join(cells) + " |")
    return lines
