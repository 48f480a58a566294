"""Writes a bundle as a folder that transformers loads as a text-classification model, without SoDaOps."""

import inspect
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from sodaops.bundle import layout
from sodaops.bundle.save import Loaded, load_bundle, tokenizer_settings
from sodaops.errors import ConfigError
from sodaops.export import modeling_sodaops
from sodaops.export.hub import PLOTS, hub_card
from sodaops.io import storage
from sodaops.modeling import heads
from sodaops.modeling.encoder import LINEAR, settings_of
from sodaops.text import policies

_CARD = "README.md"
_CODE = {"modeling_sodaops.py": modeling_sodaops, "heads.py": heads, "policies.py": policies}
_FILES = {layout.ENCODER, layout.WEIGHTS, layout.TOKENIZER, layout.TOKENIZER_SETTINGS, _CARD, PLOTS, *_CODE}
# Architectures whose own head takes the first token's vector and has an activation f with f(a) - f(-a) = a, as ReLU and GELU,
# between these two layers. It computes a linear head exactly, if its first layer has that head's rows and their negatives, and
# its second one takes the differences. With tanh, as in BERT and RoBERTa, this is not possible.
_OWN_HEADS = {
    "distilbert": ("pre_classifier", "classifier"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "deberta-v2": ("pooler.dense", "classifier"),
}


def export_transformers(
    path: str | Path, output: str | Path, metrics: Mapping[str, Any] | None = None, plots: Sequence[Path] = ()
) -> bool:
    """Writes model, tokenizer and model card.

    Args:
        path: the bundle.
        output: the folder; an earlier export in it is replaced.
        metrics: split -> metrics that are not in the bundle, for the card.
        plots: files that the card shows.

    Returns:
        Whether loading it needs ``trust_remote_code=True``.

    Raises:
        BundleError: missing or damaged.
        ConfigError: an encoder or a head of the user's own, whose code an export cannot contain, windows of long texts, more
            than two text columns, or a task that transformers does not have.
        StorageError: the folder holds other files, or cannot be written to.
    """
    bundle = load_bundle(path)
    if bundle.task.problem_type is None:
        raise ConfigError(f"{path}: transformers has no pipeline for task={bundle.task.name}; share the bundle.")
    if bundle.info.max_windows is not None:
        raise ConfigError(
            f"{path}: reads long texts in windows, which a model of transformers does not. Share the ONNX model, or train with "
            "model.long_texts=truncate."
        )
    info, own = bundle.info, _with_own_head(bundle)
    model = _with_code(path, bundle) if own is None else own
    if len(info.text_columns) > 2:
        raise ConfigError(
            f"{path}: texts of {len(info.text_columns)} columns; tokenizers of transformers take a text or a pair."
        )
    n_columns, separator = len(info.text_columns), bundle.model.separator
    settings = tokenizer_settings(bundle.tokenizer, info.pad_token_id, info.max_tokens, n_columns, separator)
    if own is None:
        auto_map = {"AutoTokenizer": [None, "modeling_sodaops.SodaOpsTokenizer"]}
        settings |= {"tokenizer_class": "SodaOpsTokenizer", "auto_map": auto_map}
        settings["cleaning"] = info.cleaning if info.cleaning in policies.POLICIES else None
    card = hub_card(info, layout.read_config(path, info), {**info.metrics, **(metrics or {})}, settings, plots)
    with storage.atomic_folder(output, _FILES) as folder:
        model.save_pretrained(folder)
        (folder / layout.TOKENIZER).write_text(bundle.tokenizer.to_str(), encoding="utf-8")
        storage.write_json(folder / layout.TOKENIZER_SETTINGS, settings)
        (folder / _CARD).write_text(card, encoding="utf-8")
        for name, module in _CODE.items() if own is None else ():
            code = re.sub(r"^from sodaops\.\w+\.", "from .", inspect.getsource(module), flags=re.MULTILINE)
            (folder / name).write_text(code, encoding="utf-8")
        for plot in plots:
            (folder / PLOTS).mkdir(exist_ok=True)
            shutil.copyfile(plot, folder / PLOTS / plot.name)
    return own is None


def _with_own_head(bundle: Loaded) -> PreTrainedModel | None:
    """The architecture's own model for classification, if its head can compute exactly what the bundle's does."""
    transformer, head, n = bundle.model.transformer, bundle.model.head, bundle.model.n_labels
    encoder = settings_of(transformer)
    layers = _OWN_HEADS.get(encoder.get("model_type", ""))
    is_linear = bundle.model.head_section["_target_"] == LINEAR["_target_"]
    if layers is None or bundle.info.pooling != "cls" or not is_linear or 2 * n > head.in_features:
        return None
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**{**encoder, **_settings(bundle)}))
    getattr(model, model.base_model_prefix).load_state_dict(transformer.state_dict())
    first, last = map(model.get_submodule, layers)
    with torch.no_grad():
        for parameter in (first.weight, first.bias, last.weight, last.bias):
            parameter.zero_()
        for sign, start in ((1, 0), (-1, n)):
            first.weight[start : start + n] = sign * head.weight
            first.bias[start : start + n] = sign * head.bias
            last.weight[:, start : start + n] = sign * torch.eye(n)
    return model


def _with_code(path: str | Path, bundle: Loaded) -> PreTrainedModel:
    """The model of the code that an export contains."""
    section, encoder = dict(bundle.model.head_section), settings_of(bundle.model.transformer)
    target = section.pop("_target_").removeprefix(f"{heads.__name__}.")
    if target not in modeling_sodaops.HEADS or "_target_" in encoder:
        raise ConfigError(
            f"{path}: its head ({target}) or its encoder ({encoder.get('_target_', encoder.get('model_type'))}) is a class of "
            "your own, which an export for transformers cannot contain. Share the ONNX model, or train with a built-in class."
        )
    head = {"class": target, "arguments": section}
    settings = modeling_sodaops.SodaOpsConfig(
        encoder=encoder, head=head, pooling=bundle.info.pooling, dtype="float32", **_settings(bundle)
    )
    classes = {"AutoConfig": "SodaOpsConfig", "AutoModelForSequenceClassification": "SodaOpsClassifier"}
    settings.auto_map = {auto: f"modeling_sodaops.{name}" for auto, name in classes.items()}
    model = modeling_sodaops.SodaOpsClassifier(settings)
    model.encoder.load_state_dict(bundle.model.transformer.state_dict())
    model.head.load_state_dict(bundle.model.head.state_dict())
    return model


def _settings(bundle: Loaded) -> dict[str, Any]:
    labels = dict(enumerate(bundle.info.labels))
    return {"problem_type": bundle.task.problem_type, "id2label": labels, "label2id": {v: k for k, v in labels.items()}}
