"""The verbs that look at runs and choose: runs, report, sweep, select."""

import argparse
import json
from pathlib import Path

from sodaops.errors import ConfigError
from sodaops.io import remote


def run_runs(rest: list[str]) -> None:
    """`sodaops runs` and `sodaops runs compare`."""
    from sodaops.io import runs

    if rest[:1] == ["compare"]:
        parser = argparse.ArgumentParser(prog="sodaops runs compare", description="Runs beside each other.")
        parser.add_argument("folders", nargs="+", metavar="RUN", help="run folders")
        folders = parser.parse_args(rest[1:]).folders
        if len(folders) < 2:
            raise ConfigError("sodaops runs compare: give at least two run folders.")
        print(runs.compare_runs([runs.read_run(folder) for folder in folders]))
        return
    parser = argparse.ArgumentParser(prog="sodaops runs", description="A table of the runs in these folders.")
    parser.add_argument("folders", nargs="*", help=f"where to look (default: {', '.join(runs.ROOTS)})")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="also != < > <= >=; may be repeated")
    parser.add_argument("--sort", metavar="KEY", help="--sort=-val/macro_f1 puts the largest first")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    asked = parser.parse_args(rest)
    found = runs.filter_runs(runs.find_runs(asked.folders), asked.where, asked.sort)
    if asked.json:
        print(json.dumps([{**run.fields, "run": str(run.folder), "status": run.status} for run in found], indent=2))
    else:
        print(runs.format_runs(found) if found else "no runs here; `python train.py` makes one")


def run_report(rest: list[str]) -> None:
    """`sodaops report RUN`."""
    from sodaops.cli.registry import asked_and_configured
    from sodaops.cli.training import shown_path
    from sodaops.reports import project as project_report

    parser = argparse.ArgumentParser(prog="sodaops report", description="A run on one page, for people who were not there.")
    parser.add_argument("run", help="a run's folder, or a version or alias of the registry (champion) that a run here has made")
    parser.add_argument("--output", type=Path, help=f"the page (default: RUN/{project_report.FILE})")
    asked, config = asked_and_configured(parser, rest)
    page = project_report.write(config, project_report.find_run(config, asked.run), asked.output)
    print(f"report: {shown_path(page)}")


def run_sweep(rest: list[str]) -> None:
    """`sodaops sweep report FOLDER` and `sodaops sweep wandb search=…`."""
    kind, *rest = rest or [""]
    if kind == "report":
        from sodaops.search import report, study

        parser = argparse.ArgumentParser(prog="sodaops sweep report", description="Writes a sweep's page anew.")
        parser.add_argument("folder", type=Path, help="the sweep's: multirun/STUDY")
        parser.add_argument("--copy-to", metavar="gs://BUCKET/FOLDER", help="also there")
        asked = parser.parse_args(rest)
        study.quieten()
        found, about = study.recall(asked.folder)
        page = report.write(asked.folder, found, about["metric"])
        print(f"report: {page}")
        if asked.copy_to:
            copy = remote.below(asked.copy_to, page.name)
            remote.send_file(page, copy)
            print(f"report: {copy}")
        return
    if kind != "wandb":
        raise ConfigError(
            "give `sodaops sweep report FOLDER` or `sodaops sweep wandb search=…`; `python train.py -m search=…` runs one."
        )
    from sodaops.cli.training import configured
    from sodaops.search import wandb_sweep

    parser = argparse.ArgumentParser(prog="sodaops sweep wandb", description="Runs the search as a sweep on W&B.")
    parser.add_argument("--agents", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    parser.add_argument("--write", action="store_true", help="write the sweep's file, and stop")
    asked, overrides = parser.parse_known_args(rest)
    config = configured(overrides)
    sweep = wandb_sweep.definition(config, overrides)
    path = Path("multirun") / config.search.study / "wandb_sweep.yaml"
    wandb_sweep.write(path, sweep)
    print(f"sweep: {path}")
    if not asked.write:
        logger = configured([*overrides, "logger=wandb"]).logger.wandb
        address = wandb_sweep.run(config, path, sweep, asked.agents, logger.project, logger.entity)
        print(f"choose: sodaops select wandb:{address}")


def run_select(rest: list[str]) -> None:
    """`sodaops select SWEEP`."""
    from sodaops.search import selection

    parser = argparse.ArgumentParser(prog="sodaops select", description="The best run of a sweep, on validation.")
    parser.add_argument("sweep", help="a sweep's folder, any folder with runs, or wandb:ENTITY/PROJECT/SWEEP")
    parser.add_argument("--metric", default="val/macro_f1", help="on validation (default: val/macro_f1)")
    parser.add_argument("--direction", choices=["maximize", "minimize"], help="default: by the metric's name")
    parser.add_argument("--tolerance", type=float, default=0.0, help="so much worse counts as equal; the cheapest is taken")
    parser.add_argument("--json", action="store_true", help="for programs")
    asked = parser.parse_args(rest)
    direction = asked.direction or selection.direction_of(asked.metric)
    choice = selection.choose(selection.of_sweep(asked.sweep, asked.metric), asked.metric, direction, asked.tolerance)
    if asked.json:
        print(json.dumps(choice.as_dict(), indent=2))
        return
    best = choice.best
    spread = f" ± {best.spread:.4f}" if best.spread is not None else ""
    print(f"{best.name}: {choice.metric} {best.value:.4f}{spread}, {best.seconds or 0:.0f} s")
    left = ", ".join(f"{n} {reason}" for reason, n in choice.left_out.items())
    print(f"of {choice.n_eligible} that finished" + (f"; left out: {left}" if left else ""))
    if not asked.sweep.startswith(selection.WANDB):
        print(f"go on: sodaops export {best.folders[0]}/bundle && sodaops evaluate {best.folders[0]}/bundle")
