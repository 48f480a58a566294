"""The commands that compare runs and choose one: runs, report, sweep, select."""

import argparse
import json
from pathlib import Path

from sodaops.errors import ConfigError
from sodaops.io import remote


def run_runs_compare(args: argparse.Namespace) -> None:
    """`sodaops runs compare A B`."""
    from sodaops.io import runs

    if len(args.folders) < 2:
        raise ConfigError("sodaops runs compare: expected at least two run folders.")
    print(runs.compare_runs([runs.read_run(folder) for folder in args.folders]))


def run_runs(args: argparse.Namespace) -> None:
    """`sodaops runs`."""
    from sodaops.io import runs

    selected = runs.filter_runs(runs.find_runs(args.folders), args.where, args.sort)
    if args.json:
        print(json.dumps([{**run.fields, "run": str(run.folder), "status": run.status} for run in selected], indent=2))
    else:
        print(runs.format_runs(selected) if selected else "no runs here; `python train.py` creates one")


def run_report(args: argparse.Namespace) -> None:
    """`sodaops report RUN`."""
    from sodaops.cli.training import configured, shown_path
    from sodaops.reports import project as project_report

    config = configured(args)
    page = project_report.write_project_report(config, project_report.find_run(config, args.run), args.output)
    print(f"report: {shown_path(page)}")


def run_sweep_report(args: argparse.Namespace) -> None:
    """`sodaops sweep report FOLDER`."""
    from sodaops.search import report, study as studies

    studies.silence_optuna_loggers()
    study, info = studies.load_study_of(args.folder)
    page = report.write_sweep_page(args.folder, study, info["metric"])
    print(f"report: {page}")
    if args.copy_to:
        copy = remote.join(args.copy_to, page.name)
        remote.upload(page, copy)
        print(f"report: {copy}")


def run_sweep_wandb(args: argparse.Namespace) -> None:
    """`sodaops sweep wandb search=…`."""
    from sodaops.cli.training import configured
    from sodaops.search import wandb_sweep

    config = configured(args)
    own = [f"--config-dir={Path(args.config_dir).resolve()}"] if args.config_dir else []
    definition = wandb_sweep.sweep_definition(config, [*own, *args.overrides])
    path = Path("multirun") / config.search.study / "wandb_sweep.yaml"
    wandb_sweep.write_sweep_file(path, definition)
    print(f"sweep: {path}")
    if not args.write:
        logger = configured(args, "logger=wandb").logger.wandb
        address = wandb_sweep.run_wandb_sweep(config, path, definition, args.agents, logger.project, logger.entity)
        print(f"choose: sodaops select wandb:{address}")


def run_select(args: argparse.Namespace) -> None:
    """`sodaops select SWEEP`."""
    from sodaops.search import selection

    metric = args.metric or selection.monitored(args.sweep)
    candidates = selection.read_candidates(args.sweep, metric)
    direction = args.direction or selection.direction_of(metric, candidates)
    choice = selection.choose_run(candidates, metric, direction, args.tolerance)
    if args.json:
        print(json.dumps(choice.as_dict(), indent=2))
        return
    best = choice.best
    spread = f" ± {best.spread:.4f}" if best.spread is not None else ""
    print(f"{best.name}: {choice.metric} {best.value:.4f}{spread}, {best.seconds or 0:.0f} s")
    left = ", ".join(f"{n} {reason}" for reason, n in choice.left_out.items())
    print(f"of {choice.n_eligible} that finished" + (f"; left out: {left}" if left else ""))
    if not args.sweep.startswith(selection.WANDB):
        print(f"next: sodaops export {best.folders[0]}/bundle && sodaops evaluate {best.folders[0]}/bundle")
