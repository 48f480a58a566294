"""CpuDropout: the distribution of its masks, and that torch's random state makes them repeatable."""

import pytest

from tests.conftest import lazy

dropout = lazy("sodaops.modeling.dropout")
torch = lazy("torch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_share_scale_and_gradient(dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, dtype=getattr(torch, dtype), requires_grad=True)
    y = dropout.CpuDropout(0.1)(x)
    dropped = (y == 0).double().mean().item()
    assert dropped == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / x.numel()) ** 0.5)
    assert y[y != 0].double().unique().tolist() == [pytest.approx(1 / 0.9, rel=1e-2 if dtype == "bfloat16" else 1e-4)]
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_the_same_state_draws_the_same_and_neighbours_are_independent():
    x, layer = torch.ones(256, 384), dropout.CpuDropout(0.5)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append((layer(x), layer(x)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    for one, two in ((drawn[0][0], drawn[0][1]), (drawn[0][0], drawn[2][0]), (drawn[0][0], drawn[0][0].roll(1, 1))):
        agree = (one == two).double().mean().item()
        assert agree == pytest.approx(0.5, abs=5 * 0.5 / x.numel() ** 0.5)


def test_evaluation_and_probabilities_of_0_and_1():
    x = torch.randn(7, 5)
    assert torch.equal(dropout.CpuDropout(0.5).eval()(x), x)
    assert torch.equal(dropout.CpuDropout(0.0)(x), x) and not dropout.CpuDropout(1.0)(x).any()


def test_it_replaces_every_dropout_of_a_model():
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Dropout(0.3))]), torch.nn.Dropout(0.2)
    )
    dropout.use_cpu_dropout(model)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert [(type(layer), layer.p) for layer in layers] == [(dropout.CpuDropout, 0.3), (dropout.CpuDropout, 0.2)]
