"""Setting a Google Cloud project up and rolling a deployment back, with a recording `gcloud`."""

import contextlib
import json
import re
import subprocess

import pytest

from tests.conftest import REPO
from tests.gcloud import FakeGcloud, Predictor, serving, unknown

GIVEN = ("--project=acme-1", "--region=europe-west1", "--bucket=acme-data", "--email=ops@example.org")
GITHUB = "--github=acme/sodaops"
POLICIES = [{"displayName": "sodaops errors", "notificationChannels": ["${NOTIFICATION_CHANNEL}"]}]
LOOK = re.compile(r" (describe|list|list-configs|get-iam-policy)( |$)")
LOGGED_OUT = (1, "ERROR: (gcloud.projects.describe) You do not currently have an active account selected.")


def new_project(folder):
    """A project with only what its owner created by hand; resources with a value exist once they are created."""
    fake = FakeGcloud(folder / "bin")
    fake.answer("^projects describe", "4711")
    fake.answer("^billing projects describe", "billingAccounts/01-AB")
    fake.answer("service.*describe sodaops .*basename", "sodaops-4711.europe-west1.run.app")
    fake.answer("channels list", "", "projects/acme-1/notificationChannels/7")
    fake.answer("uptime list-configs", "", "check-8")
    fake.answer("installationState", "COMPLETE")
    return fake


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    path = tmp_path_factory.mktemp("policies") / "policies.json"
    path.write_text(json.dumps(POLICIES))
    return f"--policies={path}"


@pytest.fixture
def empty(tmp_path):
    return new_project(tmp_path)


@pytest.fixture(scope="module")
def plan(tmp_path_factory, policies):
    """The output of a plan, which changes nothing."""
    fake = new_project(tmp_path_factory.mktemp("plan"))
    done = fake.run("gcp.py", "plan", *GIVEN, policies, GITHUB)
    assert done.returncode == 0 and made(fake) == [], done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def applied(tmp_path_factory, policies):
    """A gcloud after an apply."""
    fake = new_project(tmp_path_factory.mktemp("apply"))
    done = fake.run("gcp.py", "apply", *GIVEN, policies, GITHUB)
    assert done.returncode == 0, done.stderr
    return fake


def made(gcloud):
    return [command for command in gcloud.commands if not LOOK.search(command)]


def planned(text):
    return [line for line in text.splitlines() if line.startswith("gcloud ")]


def test_missing_values_are_refused_together(empty):
    done = empty.run("gcp.py", "apply", "--region=Europe")
    assert done.returncode == 2 and empty.calls == []
    assert all(name in done.stderr for name in ("PROJECT", "BUCKET", "EMAIL", "REGION=Europe"))
    assert empty.run("gcp.py", "rollback").returncode == 2


@pytest.mark.parametrize("command", ["plan", "apply", "rollback"])
def test_make_passes_the_values_on(command):
    values = ("PROJECT=acme-1", "REGION=europe-west1", "BUCKET=acme-data", "EMAIL=ops@example.org")
    make = ["make", "--dry-run", "-o", ".venv/.installed", f"gcp-{command}", *values]
    output = subprocess.run(make, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert f"cloudbuild/gcp.py {command} --project='acme-1' --region='europe-west1'" in output
    flags = "--bucket='acme-data' --email='ops@example.org' --github='' --budget='50' --policies="
    assert command == "rollback" or flags in output


def test_a_plan_shows_every_command(plan):
    for begin in (
        "services enable aiplatform.googleapis.com", "storage buckets create gs://acme-data ",
        "storage buckets create gs://acme-data-requests ", "artifacts repositories create sodaops ",
        "iam service-accounts create sodaops-train ", "secrets create sodaops-wandb ", "run deploy sodaops ",
        "beta monitoring channels create ", "monitoring uptime create ", "monitoring policies create ",
        "billing budgets create ", "builds triggers create github --name=sodaops-ci ",
    ):  # fmt: skip
        assert any(command.startswith(f"gcloud {begin}") for command in planned(plan)), begin
    assert all(value in plan for value in ("4711", "01-AB", "host=sodaops-4711.europe-west1.run.app"))
    assert "displayName" in plan and "RunMonitoring" in plan  # standard input of some commands


def test_a_plan_needs_no_gcloud_and_no_account(empty, policies, monkeypatch):
    empty.answer("^projects describe", LOGGED_OUT)
    done = empty.run("gcp.py", "plan", *GIVEN, policies)
    assert done.returncode == 0 and empty.commands == ["projects describe acme-1 --format=value(projectNumber)"]
    assert "active account" in done.stdout and len(planned(done.stdout)) > 50 and "${PROJECT_NUMBER}" in done.stdout
    (empty.folder / "gcloud").unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    done = empty.run("gcp.py", "plan", *GIVEN, policies)
    assert done.returncode == 0 and len(planned(done.stdout)) > 50
    done = empty.run("gcp.py", "apply", *GIVEN, policies)
    assert done.returncode == 1 and "gcloud" in done.stderr


@pytest.mark.slow
def test_what_exists_is_not_created_again(empty, applied, policies):
    wanted = made(applied)
    assert len(wanted) > 50 and len(set(wanted)) == len(wanted) - 3  # the alert policies differ in their input
    stdins = [call["stdin"] for call in applied.calls if call["command"][:3] == ["monitoring", "policies", "create"]]
    names = [json.loads(text)["displayName"].removeprefix("sodaops ") for text in stdins]
    assert names == ["errors", "uptime", "drift", "drift unseen"]
    assert all(json.loads(text)["notificationChannels"] == ["projects/acme-1/notificationChannels/7"] for text in stdins)
    assert 'check_id=\\"check-8\\"' in stdins[1]
    _let_exist(empty, wanted, stdins)
    done = empty.run("gcp.py", "apply", *GIVEN, policies, GITHUB)
    assert done.returncode == 0 and made(empty) == [], done.stderr


def _let_exist(gcloud, commands, policies):
    gcloud.answer(" describe ", "name")
    gcloud.answer("versions list", "1")
    gcloud.answer("^projects describe", "4711")
    gcloud.answer("versioning_enabled", "True")
    gcloud.answer("installationState", "COMPLETE")
    gcloud.answer("^services list", "\n".join(re.findall(r"\w+\.googleapis\.com", commands[0])))
    form = r"--member=(\S+) --role=(\S+)(?: --condition=\S+,title=(\S+))?"
    roles = [re.search(form, command) for command in commands if "add-iam-policy-binding" in command]
    gcloud.answer("get-iam-policy", "\n".join(f"{found[2]},{found[1]},{found[3] or ''}" for found in roles))
    gcloud.answer("policies list", "\n".join(json.loads(text)["displayName"] for text in policies))
    gcloud.answer("budgets list", "sodaops acme-1")
    gcloud.answer("channels list", "projects/acme-1/notificationChannels/7")
    gcloud.answer("uptime list-configs", "check-8")


def test_resources_are_created_before_they_are_used(applied):
    wanted = made(applied)
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


@pytest.mark.parametrize(("failing", "error", "named"), [
    ("^artifacts repositories create", (1, "ERROR: quota"), "ERROR: quota"),
    ("^secrets create", (1, "PERMISSION_DENIED: 'secretmanager.secrets.create' denied"), "roles/secretmanager.admin"),
    ("^storage buckets describe", (1, "ERROR: 403 does not have storage.buckets.get access"), "roles/storage.admin"),
    ("^billing projects describe", "", "gcloud billing projects link acme-1"),
    ("^projects describe", LOGGED_OUT, "active account"),
    ("installationState", "PENDING_INSTALL_APP", "gcloud builds connections describe"),  # consent in a browser
])  # fmt: skip
def test_a_failing_step_stops_the_rest(empty, policies, failing, error, named):
    empty.answer(failing, error)
    done = empty.run("gcp.py", "apply", *GIVEN, policies, GITHUB)
    assert done.returncode == 1 and named in done.stderr and "Traceback" not in done.stderr
    assert re.search(failing, empty.commands[-1])
    assert "trigger sodaops-ci" in done.stderr  # among what is left


def test_an_api_that_is_off_counts_as_nothing_there(empty, policies):
    empty.answer("^secrets describe", (1, "PERMISSION_DENIED: the API has not been used in project 4711 before"))
    done = empty.run("gcp.py", "plan", *GIVEN, policies)
    assert done.returncode == 0 and "secret sodaops-wandb: missing" in done.stdout


def test_rights_are_few_and_no_secret_is_an_argument(plan):
    roles = set(re.findall(r"--role=roles/(\S+)", plan))
    assert len(roles) > 8 and not [role for role in roles if re.search(r"^owner|[eE]ditor$|^viewer", role)]
    assert {role for role in roles if "dmin" in role} == {"cloudscheduler.admin", "secretmanager.admin"}
    of_ci = re.findall(r"^gcloud .*--member=serviceAccount:sodaops-ci@\S+ --role=roles/(\S+)", plan, re.MULTILINE)
    assert of_ci == ["logging.logWriter"]  # it runs code of pull requests
    of_train = re.findall(r"^gcloud storage .*:sodaops-train@\S+ --role=roles/(\S+) (.*)", plan, re.MULTILINE)
    runs = 'expression=resource.name.startsWith("projects/_/buckets/acme-data/objects/runs/"),title=runs'
    assert of_train == [("storage.objectViewer", "--condition=None"), ("storage.objectUser", f"'--condition={runs}'")]
    on_bucket = re.findall(r"^gcloud storage buckets add-iam-policy-binding gs://acme-data .*", plan, re.MULTILINE)
    assert len(on_bucket) == 5 and all(
        "--condition=" in line for line in on_bucket
    )  # gcloud asks otherwise, once one has a condition
    assert "allUsers" not in plan and "--data-file=-" in plan and not re.search(r"--data-file=[^-]", plan)


def test_secretmanager_admin_is_granted_only_for_the_connection_to_github(empty, plan, policies):
    role = "secretmanager.admin"
    (at,) = [n for n, command in enumerate(planned(plan)) if role in command]
    assert planned(plan)[at + 1].startswith("gcloud builds connections create")
    empty.answer("connections describe sodaops .*value.name.", "name")
    with_connection = empty.run("gcp.py", "plan", *GIVEN, policies, GITHUB).stdout
    assert role in with_connection and not [command for command in planned(with_connection) if role in command]
    assert role not in empty.run("gcp.py", "plan", *GIVEN, policies).stdout


def test_a_right_without_its_condition_is_another_right(empty, policies):
    member = "serviceAccount:sodaops-train@acme-1.iam.gserviceaccount.com"
    empty.answer("storage buckets get-iam-policy", f"roles/storage.objectUser,{member},")
    assert "sodaops-train: storage.objectUser on acme-data: missing" in empty.run("gcp.py", "plan", *GIVEN, policies).stdout
    empty.answer("storage buckets get-iam-policy", f"roles/storage.objectUser,{member},runs")
    assert "sodaops-train: storage.objectUser on acme-data: exists" in empty.run("gcp.py", "plan", *GIVEN, policies).stdout


SERVICE = {"traffic": [{"revisionName": "sodaops-00003-c", "percent": 100}], "url": "https://u"}
ROLLBACK = ("rollback", "--project=acme-1", "--region=europe-west1", "--smoke-s=0.5")


@contextlib.contextmanager
def before(gcloud, tag="c-1", **behaviour):
    """A service and its previous revision, which behaves in some way; yields its request handler."""
    handler = type("Behaving", (Predictor,), {**behaviour, "seen": []})
    with serving(handler) as url:
        old = {"revisionName": "sodaops-00001-a", **({"tag": tag, "url": f"{url}/tag"} if tag else {})}
        gcloud.answer("services describe", {"status": {"url": f"{url}/all", "traffic": [*SERVICE["traffic"], old]}})
        gcloud.answer("revisions describe", "sodaops-00001-a", "sodaops-00000-placeholder")
        gcloud.answer("print-identity-token .*--audiences", (1, "ERROR: Invalid account type for `--audiences`. Requires …"))
        gcloud.answer("print-identity-token$", "id-token")
        gcloud.answer("versions access", "s-3cr3t,other")
        yield handler


@pytest.mark.parametrize("behaviour", [{}, {"private": True, "key": "s-3cr3t"}])
def test_a_deployment_is_rolled_back(empty, behaviour):
    with before(empty, **behaviour) as service:
        done = empty.run("gcp.py", *ROLLBACK, *(["--keys-secret=keys"] if behaviour else []))
    assert done.returncode == 0, done.stderr
    where = "--region=europe-west1 --project=acme-1"
    assert [command for command in empty.commands if "revisions describe" in command] == [
        f"run revisions describe sodaops-0000{n} {where} --format=value(metadata.labels.sodaops-previous)"
        for n in ("3-c", "1-a")
    ]
    assert empty.moves == ["sodaops-00001-a=100"]
    answered = [path for path, status in service.seen if status == 200]
    assert answered == ["/tag/info", "/tag/info", "/tag/predict", "/all/info", "/all/predict"]
    assert "sodaops rollback" in done.stdout
    assert "s-3cr3t" not in done.stdout + done.stderr + "".join(empty.commands)


@pytest.mark.parametrize(("behaviour", "named", "moved"), [
    ({"broken": "/tag/info"}, "/tag/info", []),
    ({"broken": "/tag/predict"}, "/tag/predict", []),
    ({"tag": ""}, "sodaops-00001-a", []),
    ({"broken": "/all"}, "sodaops-00003-c (100 %)", ["sodaops-00001-a=100", "sodaops-00003-c=100"]),
])  # fmt: skip
def test_a_revision_that_does_not_answer_is_not_rolled_back_to(empty, behaviour, named, moved):
    with before(empty, **behaviour):
        done = empty.run("gcp.py", *ROLLBACK)
    assert done.returncode == 1 and named in done.stderr and empty.moves == moved


@pytest.mark.parametrize(("traffic", "labels"), [
    (SERVICE["traffic"], [""]),  # no previous revision
    (SERVICE["traffic"], ["sodaops-00000-placeholder", ""]),
    ([{"revisionName": "a", "percent": 50}, {"revisionName": "b", "percent": 50}], ["x"]),
    ([], ["x"]),
])  # fmt: skip
def test_what_cannot_be_rolled_back_changes_nothing(empty, traffic, labels):
    empty.answer("services describe", {"status": {**SERVICE, "traffic": traffic}})
    empty.answer("revisions describe", *labels)
    done = empty.run("gcp.py", *ROLLBACK)
    assert done.returncode == 1 and "error: sodaops: " in done.stderr and empty.moves == []


def test_gcloud_knows_every_command_and_flag(applied):
    commands = [call["command"] for call in applied.calls]
    assert len(commands) > 90
    assert [fault for command in commands for fault in unknown(command)] == []
    assert unknown(["run", "deploy", "x", "--no-trafic", "--no-cpu-throttling"]) == ["gcloud run deploy: --no-trafic"]
    assert unknown(["run", "deplo", "x"]) == ["gcloud run deplo x"]
