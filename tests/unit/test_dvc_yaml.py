"""dvc.yaml names the code that each stage depends on: a change of it makes DVC run the stage again."""

import grimp
import yaml

from tests.conftest import REPO

STAGES = {
    "preprocess": ["sodaops.data.preprocess"],
    "train": ["sodaops.training.fit", "sodaops.export.onnx_export"],
    "evaluate": ["sodaops.evaluation.evaluate"],
}
# Imported, but without influence on what a stage writes: the configuration (DVC compares its values), errors, how files are
# written, and where and beside whom a stage runs.
WITHOUT_INFLUENCE = (
    "sodaops.config", "sodaops.errors", "sodaops.io", "sodaops.text.redaction", "sodaops.data.workers",
    "sodaops.data.ray_cluster", "sodaops.data.work_folder", "sodaops.evaluation.result",
)  # fmt: skip


def test_each_stage_depends_on_the_code_that_it_imports():
    graph = grimp.build_graph("sodaops", cache_dir=None)
    imported = {
        stage: {name for entry in entries for name in {entry, *graph.find_upstream_modules(entry)}}
        for stage, entries in STAGES.items()
    }
    faults = []
    for stage, definition in yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"].items():
        needed = {name for name in imported[stage] if not name.startswith(WITHOUT_INFLUENCE)}
        if stage != "preprocess":  # what it writes is a dependency itself; tasks take part in every stage
            needed -= {name for name in imported["preprocess"] if not name.startswith("sodaops.tasks")}
        listed = [path for path in definition["deps"] if path.startswith("sodaops/")]
        covered = {name: [path for path in listed if _covers(path, name)] for name in needed}
        faults += [f"{stage}: {name} is missing" for name, paths in covered.items() if not paths]
        faults += [f"{stage}: {path} is not needed" for path in listed if not any(path in paths for paths in covered.values())]
    assert not faults


def _covers(path, module):
    name = path.removesuffix(".py").replace("/", ".")
    return module == name or (not path.endswith(".py") and module.startswith(f"{name}."))
