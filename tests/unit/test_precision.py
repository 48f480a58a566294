"""What trainer.precision=auto means."""

import pytest
import torch

from sodaops.training.precision import bfloat16_on, device_of, with_precision
from tests.conftest import configured

CPU = "trainer.accelerator=cpu"


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        ({"avx512_f": True, "avx512_bf16": False}, "32-true"),
        ({"architecture": "aarch64"}, "32-true"),
    ],
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch, capsys, has, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has)
    found = with_precision(configured(CPU))
    assert found.trainer["precision"] == expected
    assert capsys.readouterr().out.startswith(f"precision: {expected}, as fits this CPU; trainer.precision=")
    assert with_precision(found) is found and not capsys.readouterr().out


def test_auto_is_float32_with_fsdp_and_what_a_checkpoint_was_begun_with(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    assert with_precision(configured(CPU, "trainer=fsdp")).trainer["precision"] == "32-true"
    assert "as trainer=fsdp takes it" in capsys.readouterr().out
    for begun, expected in (({"trainer.precision": "16-mixed"}, "16-mixed"), ({}, "32-true")):
        torch.save({"begun_with": begun}, tmp_path / "last.ckpt")
        found = with_precision(configured(CPU, f"ckpt_path={tmp_path / 'last.ckpt'}"))
        assert found.trainer["precision"] == expected and "last.ckpt was begun" in capsys.readouterr().out
    for content in (b"", b"no checkpoint"):  # told of by fit
        (tmp_path / "last.ckpt").write_bytes(content)
        assert with_precision(configured(CPU, f"ckpt_path={tmp_path / 'last.ckpt'}")).trainer["precision"] == "bf16-mixed"


@pytest.mark.parametrize("asked", ["32-true", "bf16-mixed", "null"])
def test_what_was_asked_for_stands(asked, capsys):
    config = configured(CPU, f"trainer.precision={asked}")
    assert with_precision(config) is config and not capsys.readouterr().out


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_asked_of_the_device_that_trains(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    assert device_of("auto") == expected and device_of("cpu") == "cpu" and device_of("gpu") == "cuda"
    assert bfloat16_on(device_of("auto")) is cuda
