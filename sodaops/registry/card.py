"""The card of a version: what it is and where it comes from, as Markdown."""

from collections.abc import Mapping
from typing import Any

from sodaops.bundle.layout import BundleInfo

_SHOWN = {"macro_f1": "macro-F1", "accuracy": "accuracy", "weighted_f1": "weighted F1", "loss": "loss", "ece": "ECE"}
LIMITS = (
    "It knows texts like those it was trained on; elsewhere its confidence says little. It has no label for a text that is "
    "none of these, and names one all the same."
)


def card(info: BundleInfo, config: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The card as Markdown.

    Args:
        info: the bundle's.
        config: that it was trained with.
        metrics: split -> metric -> value.
    """
    model, optim = config["model"], config["optim"]
    lines = [
        f"# {info.data['name']} {info.bundle_id}",
        "",
        f"Sorts a text into {', '.join(f'`{label}`' for label in info.labels)}. Trained {info.created} from "
        f"`{model['name_or_path'].partition('#')[0]}` on the data set `{info.data['name']}` (fingerprint "
        f"`{info.data['fingerprint'][:12]}`).",
        "",
        "## Measured",
        "",
        "| split | " + " | ".join(_SHOWN.values()) + " |",
        "| --- |" + " --- |" * len(_SHOWN),
    ]
    for split, values in metrics.items():
        cells = [f"{values[key]:.4f}" if isinstance(values.get(key), int | float) else "–" for key in _SHOWN]
        lines.append(f"| {split} | " + " | ".join(cells) + " |")
    lines += ["", "val chose the epoch, so it flatters; test, where it stands, took no part.", "", "## Answers", ""]
    lines += [f"- cleaning `{info.cleaning}`, at most {info.max_tokens} tokens, {info.pooling} pooling"]
    for variant, gate in info.onnx.items():
        serves = ", which serves" if variant == info.default_variant else ""
        lines.append(
            f"- ONNX {variant}{serves}: opset {gate['opset']}, {gate['agreement']:.1%} of labels on val as before it, "
            f"macro-F1 {gate['macro_f1_change']:+.4f}"
        )
    lines += [
        "",
        "## Where it comes from",
        "",
        f"- commit `{info.git_commit or 'not in a git repository'}`, seed {config['seed']}",
        f"- {config['trainer'].get('max_epochs')} epochs at most, lr {optim['lr']:g}, head {optim['head_lr']:g}, layer decay "
        f"{optim['layer_decay']:g}, vote weight {optim['vote_weight']:g}, dropout {model['dropout']:g}",
        f"- {', '.join(f'{name} {version}' for name, version in info.versions.items())}",
        "",
        "The whole configuration is config.yaml beside this card, the data's manifest data_manifest.json.",
        "",
        "## Limits",
        "",
        LIMITS,
    ]
    return "\n".join(lines) + "\n"
