"""gate.py and settle.py with the real `sodaops` and a registry in an emulated bucket; test_cloudbuild.py has a short test."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sodaops.bundle import layout
from tests.conftest import REPO, TINY
from tests.integration.test_gate import EASY
from tests.serving import copy_bundle

pytestmark = pytest.mark.deep


def test_a_promotion_at_gs_is_undone_when_it_was_not_deployed(trained, small_tweets, bucket, cloud, tmp_path):
    first, second = trained / "run/bundle", copy_bundle(trained / "run/bundle", tmp_path / "second")
    versions = [layout.read_info(folder).bundle_id for folder in (first, second)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here, release, done = tmp_path / "app", tmp_path / "release.json", tmp_path / "done.txt"
    here.mkdir()

    def step(script, *arguments):
        command = [sys.executable, str(REPO / "cloudbuild" / script), *arguments]
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        run = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False, timeout=300)
        assert "Traceback" not in run.stderr, run.stderr
        return run

    cloud.put(f"{first}/", "bucket/runs/1/bundle/", recursive=True)
    cloud.put(f"{second}/", "bucket/runs/2/bundle/", recursive=True)
    data = shlex.join([*TINY, f"data.path={small_tweets}", "evaluate.splits_dir=splits"])

    def gate(number):
        return step(
            "gate.py", f"--bundle={bucket}/runs/{number}/bundle", f"--registry={bucket}/registry", f"--release={release}",
            f"--reports={bucket}/gate", f"--reason=commit {number}", f"--args={data}", f"--gate={shlex.join(EASY)}",
        )  # fmt: skip

    def settle():
        return step("settle.py", f"--release={release}", f"--done={done}", f"--registry={bucket}/registry")

    def champion():
        return json.loads(cloud.cat(max(cloud.ls("bucket/registry/history"))))["state"]["aliases"].get("champion")

    ended = gate(1)
    assert ended.returncode == 0, ended.stderr
    address = f"{bucket}/registry/versions/{versions[0]}"
    assert json.loads(release.read_text()) == {"version": versions[0], "bundle": address, "before": None}
    assert champion() == versions[0] and cloud.exists(f"bucket/gate/{versions[0]}/gate.html")
    ended = settle()
    assert ended.returncode == 1
    assert champion() == versions[0]

    ended = gate(2)
    assert ended.returncode == 0 and champion() == versions[1], ended.stderr
    assert settle().returncode == 1 and champion() == versions[0]
