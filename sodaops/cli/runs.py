"""The commands that compare runs and choose one: runs, report, sweep, select."""

import argparse
import json
from pathlib import Path

from sodaops.errors import ConfigError
from sodaops.io import remote


def run_runs(rest: list[str]) -> None:
    """`sodaops runs` and `sodaops runs compare`."""
    from sodaops.io import runs

    if rest[:1] == ["compare"]:
        parser = argparse.ArgumentParser(prog="sodaops runs compare", description="Shows runs side by side.")
        parser.add_argument("folders", nargs="+", metavar="RUN", help="run folders")
        folders = parser.parse_args(rest[1:]).folders
        if len(folders) < 2:
            raise ConfigError("sodaops runs compare: expected at least two run folders.")
        print(runs.compare_runs([runs.read_run(folder) for folder in folders]))
        return
    parser = argparse.ArgumentParser(prog="sodaops runs", description="Shows a table of the runs in these folders.")
    parser.add_argument("folders", nargs="*", help=f"where to look (default: {', '.join(runs.ROOTS)})")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="also != < > <= >=; may be repeated")
    parser.add_argument("--sort", metavar="KEY", help="--sort=-val/macro_f1 puts the largest first")
    parser.add_argument("--json", action="store_true", help="all fields, for programs")
    args = parser.parse_args(rest)
    selected = runs.filter_runs(runs.find_runs(args.folders), args.where, args.sort)
    if args.json:
        print(json.dumps([{**run.fields, "run": str(run.folder), "status": run.status} for run in selected], indent=2))
    else:
        print(runs.format_runs(selected) if selected else "no runs here; `python train.py` creates one")


def run_report(rest: list[str]) -> None:
    """`sodaops report RUN`."""
    from sodaops.cli.registry import parse_with_overrides
    from sodaops.cli.training import shown_path
    from sodaops.reports import project as project_report

    parser = argparse.ArgumentParser(
        prog="sodaops report", description="Writes a report of a run on one page, for readers outside the team."
    )
    parser.add_argument("run", help="a run's folder, or a version or alias of the registry (champion) that a run here has made")
    parser.add_argument("--output", type=Path, help=f"the page (default: RUN/{project_report.PROJECT_REPORT})")
    args, config = parse_with_overrides(parser, rest)
    page = project_report.write_project_report(config, project_report.find_run(config, args.run), args.output)
    print(f"report: {shown_path(page)}")


def run_sweep(rest: list[str]) -> None:
    """`sodaops sweep report FOLDER` and `sodaops sweep wandb search=…`."""
    kind, *rest = rest or [""]
    if kind == "report":
        from sodaops.search import report, study as studies

        parser = argparse.ArgumentParser(prog="sodaops sweep report", description="Writes the page of a sweep.")
        parser.add_argument("folder", type=Path, help="of the sweep: multirun/STUDY")
        parser.add_argument("--copy-to", metavar="gs://BUCKET/FOLDER", help="also upload it there")
        args = parser.parse_args(rest)
        studies.silence_optuna_loggers()
        study, info = studies.load_study_of(args.folder)
        page = report.write_sweep_page(args.folder, study, info["metric"])
        print(f"report: {page}")
        if args.copy_to:
            copy = remote.join(args.copy_to, page.name)
            remote.upload(page, copy)
            print(f"report: {copy}")
        return
    if kind != "wandb":
        raise ConfigError(
            f"sodaops sweep {kind}: expected `sodaops sweep report FOLDER` or `sodaops sweep wandb search=NAME`; "
            "`python train.py -m search=NAME` runs a sweep."
        )
    from sodaops.cli.training import configured
    from sodaops.search import wandb_sweep

    parser = argparse.ArgumentParser(prog="sodaops sweep wandb", description="Runs the search as a sweep on W&B.")
    parser.add_argument("--agents", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    parser.add_argument("--write", action="store_true", help="only write the sweep's file")
    args, overrides = parser.parse_known_args(rest)
    config = configured(overrides)
    definition = wandb_sweep.sweep_definition(config, overrides)
    path = Path("multirun") / config.search.study / "wandb_sweep.yaml"
    wandb_sweep.write_sweep_file(path, definition)
    print(f"sweep: {path}")
    if not args.write:
        logger = configured([*overrides, "logger=wandb"]).logger.wandb
        address = wandb_sweep.run_wandb_sweep(config, path, definition, args.agents, logger.project, logger.entity)
        print(f"choose: sodaops select wandb:{address}")


def run_select(rest: list[str]) -> None:
    """`sodaops select SWEEP`."""
    from sodaops.search import selection

    parser = argparse.ArgumentParser(prog="sodaops select", description="The best run of a sweep, on validation.")
    parser.add_argument("sweep", help="a sweep's folder, any folder with runs, or wandb:ENTITY/PROJECT/SWEEP")
    parser.add_argument("--metric", default="val/macro_f1", help="on validation (default: val/macro_f1)")
    parser.add_argument("--direction", choices=["maximize", "minimize"], help="default: by the metric's name")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="a difference up to this counts as equal; the fastest run is chosen"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(rest)
    direction = args.direction or selection.direction_of(args.metric)
    choice = selection.choose_run(selection.read_candidates(args.sweep, args.metric), args.metric, direction, args.tolerance)
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
