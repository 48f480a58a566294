"""The search space: its forms for Optuna, for W&B's agents and on Hydra's command line, and what it refuses."""

import json
import re

import pytest

from sodaops.errors import ConfigError
from tests.conftest import lazy

space_module = lazy("sodaops.search.space")

ODD = [
    None, True, False, 0, -3, 1e-7, 2.5, "plain", "with spaces", "None", "null", "true", "1e-4", "it's", 'say "so"', "a,b",
    "a=b", "[x]", "{y}", "back\\slash", "ends\\", "\\'both", "ünïcode", "colon: here", "$price", "", "hub/name-1.0",
    [1, "a b", None], [], {"k": [1, {"x y": None}]},
]  # fmt: skip


def read_back(text):
    """What Hydra makes of KEY=VALUE."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([text])
    return plain(override.value())


def plain(value):
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(plain(key)): plain(of) for key, of in value.items()}
    return getattr(value, "text", value)


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_hydra_reads_back_what_was_to_override(value):
    read = read_back(f"key={space_module.to_override(value)}")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_choice_survives_optuna(value):
    dimension = space_module.Dimension("key", "choice", values=(value, "another"))
    distribution = dimension.distribution()
    stored = distribution.to_external_repr(distribution.to_internal_repr(dimension.stored(value)))
    assert read_back(dimension.override(stored)) == value


@pytest.mark.slow
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_choice_survives_a_wandb_agent(value):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    chosen = space_module.Dimension("model.name", "choice", values=(value, "another")).parameter()["values"][0]
    chosen = json.loads(json.dumps(chosen))  # through the server
    flags = create_sweep_command_args({"args": {"model.name": {"value": chosen}}})["args_no_hyphens"]
    assert len(flags) == 1 and read_back(flags[0]) == value


def test_a_mapping_with_keys_that_hydra_cannot_read():
    with pytest.raises(ConfigError, match="'a:b'"):
        space_module.to_override({"a:b": 1})


def test_true_and_one_are_two_choices():
    dimension = space_module.Dimension("key", "choice", values=(True, 1, "1"))
    assert [dimension.override(value) for value in (True, 1, "1")] == ["key=true", "key=1", "key='1'"]


def test_numbers():
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space = {
        "optim": {
            "lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "warmup": {"type": "float", "low": 0, "high": 0.5},
        },
        "model": {"max_tokens": {"type": "int", "low": 16, "high": 128, "step": 16}},
        "seed": {"type": "int", "low": 0, "high": 9},
    }  # fmt: skip
    lr, warmup, tokens, seed = space_module.read_space(space)
    assert lr.distribution() == FloatDistribution(1e-4, 1e-2, log=True)
    assert lr.parameter() == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    assert warmup.distribution() == FloatDistribution(0, 0.5) and warmup.parameter()["distribution"] == "uniform"
    assert tokens.distribution() == IntDistribution(16, 128, step=16)
    assert tokens.parameter() == {"distribution": "q_uniform", "min": 16, "max": 128, "q": 16}
    assert seed.parameter() == {"distribution": "int_uniform", "min": 0, "max": 9}
    assert lr.override(0.00025) == "optim.lr=0.00025" and tokens.override(48) == "model.max_tokens=48"
    assert isinstance(space_module.Dimension("k", "choice", values=(1, 2)).distribution(), CategoricalDistribution)


@pytest.mark.parametrize(("entry", "names"), [
    (3, "3"),
    ({"type": "flaot", "low": 0, "high": 1}, "type='flaot'"),
    ({"type": "float", "low": 0, "hihg": 1}, "did you mean high?"),
    ({"type": "float", "low": 0}, "high=None"),
    ({"type": "int", "low": 0.5, "high": 2}, "low=0.5"),
    ({"type": "float", "low": True, "high": 2.0}, "low=True"),
    ({"type": "float", "low": 2, "high": 1}, "low < high"),
    ({"type": "float", "low": 0, "high": 1, "log": True}, "low > 0"),
    ({"type": "float", "low": 1, "high": 2, "log": "yes"}, "log='yes'"),
    ({"values": [1]}, "values=[1]"),
    ({"values": [1, 2, 1]}, "values=[1, 2, 1]"),
    ({"values": "abc"}, "values='abc'"),
    ({"values": [1, 2], "low": 0}, "values"),
])  # fmt: skip
def test_a_faulty_dimension(entry, names):
    with pytest.raises(ConfigError, match=rf"^search\.space\.optim\.lr: .*{re.escape(names)}"):
        space_module.read_space({"optim": {"lr": entry}})


def test_all_faults_at_once():
    with pytest.raises(ConfigError, match=r"(?s)search\.space\.a: .*search\.space\.b: "):
        space_module.read_space({"a": 1, "b": {"values": []}})
    with pytest.raises(ConfigError, match=r"search\.space"):
        space_module.read_space({})
    with pytest.raises(ConfigError, match=r"search\.space\.optim\.lrr .*did you mean optim\.lr\?"):
        space_module.check_keys([space_module.Dimension("optim.lrr", "float", 0, 1)], ["optim.lr", "seed"])
