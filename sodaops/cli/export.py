"""The commands export and push."""

import argparse
import shutil
import tempfile
from pathlib import Path

from sodaops.bundle.layout import INFO, read_info
from sodaops.cli.training import configured, show_export, shown_path
from sodaops.errors import ConfigError
from sodaops.registry.bundles import bundle_at
from sodaops.registry.registry import entry_of, run_metrics


def run_export(options: argparse.Namespace) -> None:
    """Runs `sodaops export BUNDLE`, which changes the bundle, or with ``--format=transformers`` writes a folder."""
    if (options.format == "transformers") != bool(options.output):
        raise ConfigError("sodaops export: --format=transformers needs --output FOLDER, and only this format takes it.")
    if options.output:
        with bundle_at(options.bundle) as bundle:
            needs_code = _export(options.bundle, bundle, Path(options.output))
        print(f"{shown_path(options.output)}: written" + (", to be loaded with trust_remote_code=True" if needs_code else ""))
        return
    from sodaops import pipeline

    exported = pipeline.export_bundle(configured(options), options.bundle)
    show_export(exported)
    print(f"bundle: {options.bundle} ({exported.info.bundle_id})")


def run_push(options: argparse.Namespace) -> None:
    """Runs `sodaops push BUNDLE REPO`."""
    with bundle_at(options.bundle) as bundle, tempfile.TemporaryDirectory(prefix="sodaops.") as temporary:
        folder, info = Path(temporary) / "export", read_info(bundle)
        _export(options.bundle, bundle, folder)
        (folder / "bundle").mkdir()
        for name in (*info.files, INFO):
            shutil.copyfile(bundle / name, folder / "bundle" / name)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:>13,}  {file.relative_to(folder).as_posix()}")
        if not options.dry_run:
            from sodaops.export.hub import upload

            print(upload(folder, options.repo, options.public, f"SoDaOps bundle {info.bundle_id}"))


def _export(source: str, bundle: Path, output: Path) -> bool:
    from transformers.utils.logging import disable_progress_bar

    from sodaops.export.transformers_export import export_transformers

    disable_progress_bar()
    if (entry := entry_of(source)) is None:
        metrics = run_metrics(bundle, read_info(bundle))
    else:
        metrics = entry[0].state().versions[entry[0].version(entry[1])]["metrics"]
    plots = sorted((bundle.parent / "evaluation/plots").glob("*.png")) if metrics else []
    return export_transformers(bundle, output, metrics, plots)
