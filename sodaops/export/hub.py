"""The Hugging Face hub: the card of an export, and its upload."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HTTPError

from sodaops.bundle.card import render_card
from sodaops.bundle.layout import BundleInfo, task_of
from sodaops.errors import StorageError, reason_of

PLOTS = "plots"
_METRICS = {"macro_f1": "f1", "weighted_f1": "f1", "accuracy": "accuracy"}  # our names -> the hub's


def hub_card(
    info: BundleInfo, config: Mapping[str, Any], metrics: Mapping[str, Any], tokenizer: Mapping[str, Any], plots: Sequence[Path]
) -> str:
    """The model card of an export with the hub's metadata; ``tokenizer`` is its tokenizer_config.json."""
    name, task = info.data["name"], "text-classification"
    titles = {metric.name: metric.title for metric in task_of(info.bundle_id, info).metrics}
    results = [
        EvalResult(task, name, name, _METRICS[key], value, dataset_split=split, metric_name=titles[key])
        for split, values in metrics.items()
        for key, value in values.items()
        if key in _METRICS.keys() & titles.keys()
    ]
    data = ModelCardData(
        library_name="transformers", pipeline_tag=task, tags=["sodaops"], model_name=name, eval_results=results or None
    )
    argument = "trust_remote_code=True" if "auto_map" in tokenizer else "truncation=True"
    who = "The tokenizer cleans texts" if tokenizer.get("cleaning") else "Texts have to be cleaned before,"
    use = f'```python\npipeline("{task}", model="…", {argument})\n```\n\n{who} as in training: `{info.cleaning}`.'
    pictures = "".join(f"\n![{plot.stem}]({PLOTS}/{plot.name})\n" for plot in plots)
    return f"---\n{data.to_yaml()}\n---\n\n{render_card(info, config, metrics)}\n## Use\n\n{use}\n{pictures}"


def upload(folder: Path, repo: str, public: bool, message: str) -> str:
    """Uploads a folder in one commit, to a repository that is made if it is missing; returns the commit's address.

    Earlier files of its folders bundle and plots are deleted.

    Raises:
        StorageError: no rights, no connection, or a name that the hub does not allow.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))  # huggingface_hub reads it only once
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        old = {name for name in api.list_repo_files(repo) if name.startswith(("bundle/", f"{PLOTS}/"))} - files.keys()
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        return api.create_commit(repo, [*operations, *map(CommitOperationDelete, old)], commit_message=message).commit_url
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = reason_of(error).replace(get_token() or "\0", "…")
        raise StorageError(
            f"{repo}: the upload to {api.endpoint} failed ({reason}). Check the name (OWNER/NAME) and the network, and log in "
            "with `hf auth login`, or set HF_TOKEN, with a token that may write to this repository."
        ) from error
