"""What a project needs: planned, made once, stopped at a failure; and a deployment taken back. `gcloud` is a fake."""

import json
import re
import subprocess

import pytest

from tests.conftest import REPO
from tests.gcloud import FakeGcloud, unknown

GIVEN = ("--project=acme-1", "--region=europe-west1", "--bucket=acme-data", "--email=ops@example.org")
POLICIES = [{"displayName": "sodaops errors", "notificationChannels": ["${NOTIFICATION_CHANNEL}"]}]
LOOK = re.compile(r" (describe|list|list-configs|get-iam-policy)( |$)")
LOGGED_OUT = (1, "ERROR: (gcloud.projects.describe) You do not currently have an active account selected.")


@pytest.fixture
def policies(tmp_path):
    path = tmp_path / "policies.json"
    path.write_text(json.dumps(POLICIES))
    return f"--policies={path}"


@pytest.fixture
def empty(tmp_path):
    """A project with nothing in it but what its owner made by hand; asked again, what gives a value is there."""
    fake = FakeGcloud(tmp_path / "bin")
    fake.answer("^projects describe", "4711")
    fake.answer("^billing projects describe", "billingAccounts/01-AB")
    fake.answer("service.*describe sodaops .*basename", "sodaops-4711.europe-west1.run.app")
    fake.answer("channels list", "", "projects/acme-1/notificationChannels/7")
    fake.answer("uptime list-configs", "", "check-8")
    fake.answer("installationState", "COMPLETE")
    return fake


def made(gcloud):
    return [command for command in gcloud.commands if not LOOK.search(command)]


def planned(text):
    return [line for line in text.splitlines() if line.startswith("gcloud ")]


def test_what_is_missing_is_refused_together(empty):
    done = empty.run("gcp.py", "apply", "--region=Europe")
    assert done.returncode == 2 and empty.calls == []
    for said in ("PROJECT is missing", "BUCKET is missing", "EMAIL is missing", "REGION=Europe: expected a region"):
        assert said in done.stderr
    assert "make gcp-apply PROJECT=… REGION=… BUCKET=… EMAIL=…" in done.stderr
    assert empty.run("gcp.py", "rollback").returncode == 2


@pytest.mark.parametrize("verb", ["plan", "apply", "rollback"])
def test_make_hands_the_values_on(verb):
    values = ("PROJECT=acme-1", "REGION=europe-west1", "BUCKET=acme-data", "EMAIL=ops@example.org")
    make = ["make", "--dry-run", "-o", ".venv/.installed", f"gcp-{verb}", *values]
    said = subprocess.run(make, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert f"cloudbuild/gcp.py {verb} --project='acme-1' --region='europe-west1'" in said
    assert verb == "rollback" or "--bucket='acme-data' --email='ops@example.org' --github='' --budget='50' --policies=" in said


def test_a_plan_shows_every_command_and_changes_nothing(empty, policies):
    done = empty.run("gcp.py", "plan", *GIVEN, policies, "--github=acme/sodaops")
    assert done.returncode == 0, done.stderr
    assert made(empty) == []
    commands = planned(done.stdout)
    for begin in (
        "services enable aiplatform.googleapis.com", "storage buckets create gs://acme-data ",
        "storage buckets create gs://acme-data-requests ", "artifacts repositories create sodaops ",
        "iam service-accounts create sodaops-train ", "secrets create sodaops-wandb ", "run deploy sodaops ",
        "beta monitoring channels create ", "monitoring uptime create ", "monitoring policies create ",
        "billing budgets create ", "builds triggers create github --name=sodaops-ci ",
    ):  # fmt: skip
        assert any(command.startswith(f"gcloud {begin}") for command in commands), begin
    assert "4711" in done.stdout and "01-AB" in done.stdout and "host=sodaops-4711.europe-west1.run.app" in done.stdout
    assert "displayName" in done.stdout and "RunMonitoring" in done.stdout  # what goes to standard input
    assert "Nothing was changed" in done.stdout


def test_a_plan_needs_no_gcloud(empty, policies, monkeypatch):
    (empty.folder / "gcloud").unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    done = empty.run("gcp.py", "plan", *GIVEN, policies)
    assert done.returncode == 0 and "gcloud is not installed" in done.stdout and len(planned(done.stdout)) > 50
    done = empty.run("gcp.py", "apply", *GIVEN, policies)
    assert done.returncode == 1 and "gcloud is not installed" in done.stderr


def test_a_plan_needs_no_account(empty, policies):
    empty.answer("^projects describe", LOGGED_OUT)
    done = empty.run("gcp.py", "plan", *GIVEN, policies)
    assert done.returncode == 0 and empty.commands == ["projects describe acme-1 --format=value(projectNumber)"]
    assert "active account" in done.stdout and "shows what an empty one needs" in done.stdout
    assert len(planned(done.stdout)) > 50 and "${PROJECT_NUMBER}" in done.stdout


def test_what_is_there_is_not_made_again(empty, policies):
    """After a first apply, whose own commands tell what is there, a second one makes nothing."""
    first = empty.run("gcp.py", "apply", *GIVEN, policies, "--github=acme/sodaops")
    assert first.returncode == 0, first.stderr
    wanted = made(empty)
    assert len(wanted) > 50 and len(set(wanted)) == len(wanted) - 3  # the alerts are told apart by what they read
    stdins = [call["stdin"] for call in empty.calls if call["command"][:3] == ["monitoring", "policies", "create"]]
    names = [json.loads(text)["displayName"].removeprefix("sodaops ") for text in stdins]
    assert names == ["errors", "uptime", "drift", "drift unseen"]
    assert all(json.loads(text)["notificationChannels"] == ["projects/acme-1/notificationChannels/7"] for text in stdins)
    assert 'check_id=\\"check-8\\"' in stdins[1]
    _now_it_is_there(empty, wanted, stdins)
    empty.forget()
    second = empty.run("gcp.py", "apply", *GIVEN, policies, "--github=acme/sodaops")
    assert second.returncode == 0, second.stderr
    assert made(empty) == [] and "done: 0 made" in second.stdout


def _now_it_is_there(gcloud, commands, policies):
    gcloud.answer(" describe ", "there")
    gcloud.answer("versions list", "1")
    gcloud.answer("^projects describe", "4711")
    gcloud.answer("versioning_enabled", "True")
    gcloud.answer("installationState", "COMPLETE")
    gcloud.answer("^services list", "\n".join(re.findall(r"\w+\.googleapis\.com", commands[0])))
    roles = [re.search(r"--member=(\S+) --role=(\S+)", command) for command in commands if "add-iam-policy-binding" in command]
    gcloud.answer("get-iam-policy", "\n".join(f"{found[2]},{found[1]}" for found in roles))
    gcloud.answer("policies list", "\n".join(json.loads(text)["displayName"] for text in policies))
    gcloud.answer("budgets list", "sodaops acme-1")
    gcloud.answer("channels list", "projects/acme-1/notificationChannels/7")
    gcloud.answer("uptime list-configs", "check-8")


def test_the_order_is_one_in_which_each_can_be_made(empty, policies):
    assert empty.run("gcp.py", "apply", *GIVEN, policies).returncode == 0
    wanted = made(empty)
    assert wanted[0].startswith("services enable")
    first, bound = {}, []
    for n, command in enumerate(wanted):
        for begin in ("iam service-accounts create ", "storage buckets create ", "secrets create ", "run deploy "):
            if command.startswith(begin):
                first[begin.partition(" ")[0], command.removeprefix(begin).split()[0].removeprefix("gs://")] = n
    for n, command in enumerate(wanted):
        if "add-iam-policy-binding" in command:
            kind, _, rest = command.partition(" add-iam-policy-binding ")
            on = rest.split()[0].removeprefix("gs://").partition("@")[0]
            account = re.search("serviceAccount:([^@]+)", command)[1]
            assert first.get(("iam", account), -1) < n
            assert kind in ("projects", "artifacts repositories") or first[kind.partition(" ")[0], on] < n, command
            bound.append(kind)
    assert {"projects", "artifacts repositories", "storage buckets", "secrets", "run services"} < set(bound)


@pytest.mark.parametrize(
    ("failing", "error", "said"),
    [
        ("^artifacts repositories create", (1, "ERROR: quota"), "failed (1): ERROR: quota"),
        ("^secrets create", (1, "PERMISSION_DENIED: 'secretmanager.secrets.create' denied"), "roles/secretmanager.admin"),
        ("^storage buckets describe", (1, "ERROR: 403 does not have storage.buckets.get access"), "roles/storage.admin"),
        ("^billing projects describe", "", "gcloud billing projects link acme-1"),
        ("^projects describe", LOGGED_OUT, "active account"),
    ],
)
def test_a_failing_step_stops_the_rest(empty, policies, failing, error, said):
    empty.answer(failing, error)
    done = empty.run("gcp.py", "apply", *GIVEN, policies)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert re.search(failing, empty.commands[-1])
    left = done.stderr.partition("Not done")[2]
    assert "the budget" in left and "Run it again when that is mended" in left


def test_an_api_that_is_off_counts_as_nothing_there(empty, policies):
    empty.answer("^secrets describe", (1, "PERMISSION_DENIED: the API has not been used in project 4711 before"))
    done = empty.run("gcp.py", "plan", *GIVEN, policies)
    assert done.returncode == 0 and "secret sodaops-wandb: missing" in done.stdout


def test_github_must_consent_in_a_browser(empty, policies):
    empty.answer("installationState", "PENDING_INSTALL_APP")
    done = empty.run("gcp.py", "apply", *GIVEN, policies, "--github=acme/sodaops")
    assert done.returncode == 1 and "in a browser, then run this again" in done.stderr
    assert not any("triggers create" in command for command in empty.commands)


def test_rights_are_few_and_no_secret_is_an_argument(empty, policies):
    text = empty.run("gcp.py", "plan", *GIVEN, policies, "--github=acme/sodaops").stdout
    roles = set(re.findall(r"--role=roles/(\S+)", text))
    assert len(roles) > 8 and not [
        role for role in roles if re.search(r"^owner|[eE]ditor$|^viewer|(run|storage|iam).*[aA]dmin", role)
    ]
    of_ci = re.findall(r"^gcloud .*--member=serviceAccount:sodaops-ci@\S+ --role=roles/(\S+)", text, re.MULTILINE)
    assert of_ci == ["logging.logWriter"]  # it runs the code of pull requests
    assert "allUsers" not in text and "--data-file=-" in text and not re.search(r"--data-file=[^-]", text)


SERVICE = {"traffic": [{"revisionName": "sodaops-00003-c", "percent": 100}], "url": "https://u"}


def test_a_deployment_is_taken_back(empty):
    empty.answer("services describe", {"status": SERVICE})
    empty.answer("revisions describe", "sodaops-00001-a", "sodaops-00000-placeholder")
    done = empty.run("gcp.py", "rollback", "--project=acme-1", "--region=europe-west1")
    assert done.returncode == 0, done.stderr
    where = "--region=europe-west1 --project=acme-1"
    assert empty.commands[1:] == [
        f"run revisions describe sodaops-00003-c {where} --format=value(metadata.labels.sodaops-previous)",
        f"run revisions describe sodaops-00001-a {where} --format=value(metadata.labels.sodaops-previous)",
        f"run services update-traffic sodaops {where} --to-revisions=sodaops-00001-a=100",
    ]
    assert "sodaops-00001-a has the traffic again" in done.stdout and "sodaops rollback" in done.stdout


@pytest.mark.parametrize(
    ("traffic", "labels", "said"),
    [
        (SERVICE["traffic"], [""], "there is none before it"),
        (SERVICE["traffic"], ["sodaops-00000-placeholder", ""], "there is none before it"),
        ([{"revisionName": "a", "percent": 50}, {"revisionName": "b", "percent": 50}], ["x"], "traffic is split"),
        ([], ["x"], "no revision has traffic"),
    ],
)
def test_what_cannot_be_taken_back_is_told(empty, traffic, labels, said):
    empty.answer("services describe", {"status": {**SERVICE, "traffic": traffic}})
    empty.answer("revisions describe", *labels)
    done = empty.run("gcp.py", "rollback", "--project=acme-1", "--region=europe-west1")
    assert done.returncode == 1 and said in done.stderr
    assert not any("update-traffic" in command for command in empty.commands)


def test_gcloud_knows_every_command_and_flag(empty, policies):
    assert empty.run("gcp.py", "apply", *GIVEN, policies, "--github=acme/sodaops").returncode == 0
    commands = [call["command"] for call in empty.calls]
    assert len(commands) > 90
    assert [fault for command in commands for fault in unknown(command)] == []
    assert unknown(["run", "deploy", "x", "--no-trafic", "--no-cpu-throttling"]) == ["gcloud run deploy: --no-trafic"]
    assert unknown(["run", "deplo", "x"]) == ["gcloud run deplo x"]
