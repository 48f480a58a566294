"""The precision that trainer.precision=auto stands for."""

import logging

import pytest

from tests.conftest import configured, lazy

precision_module = lazy("sodaops.training.precision")
torch = lazy("torch")

CPU = "trainer.accelerator=cpu"


@pytest.mark.parametrize(("capabilities", "expected"), [
    ({"avx512_bf16": True, "amx_bf16": False}, "bf16-mixed"),
    ({"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
    ({"avx512_f": True, "avx512_bf16": False}, "32-true"),
    ({"architecture": "aarch64"}, "32-true"),
])  # fmt: skip
def test_auto_is_bf16_on_a_cpu_with_bfloat16(monkeypatch, caplog, capabilities, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    caplog.set_level(logging.INFO, "sodaops")
    config = precision_module.with_precision(configured(CPU))
    assert config.trainer["precision"] == expected and expected in caplog.text
    assert precision_module.with_precision(config) is config and len(caplog.records) == 1


def test_auto_is_float32_with_fsdp_and_that_of_the_checkpoint_in_a_resumed_run(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    assert precision_module.with_precision(configured(CPU, "trainer=fsdp")).trainer["precision"] == "32-true"
    last = tmp_path / "last.ckpt"
    for signature, expected in (({"trainer.precision": "16-mixed"}, "16-mixed"), ({}, "32-true")):
        torch.save({"begun_with": signature}, last)
        assert precision_module.with_precision(configured(CPU, f"ckpt_path={last}")).trainer["precision"] == expected
    for content in (b"", b"no checkpoint"):  # fit refuses it
        last.write_bytes(content)
        assert precision_module.with_precision(configured(CPU, f"ckpt_path={last}")).trainer["precision"] == "bf16-mixed"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "null"])
def test_a_configured_precision_is_kept(precision):
    config = configured(CPU, f"trainer.precision={precision}")
    assert precision_module.with_precision(config) is config


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_depends_on_the_device_that_trains(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    assert (
        precision_module.device_of("auto") == expected
        and precision_module.device_of("cpu") == "cpu"
        and precision_module.device_of("gpu") == "cuda"
    )
    assert precision_module.has_bfloat16(precision_module.device_of("auto")) is cuda
