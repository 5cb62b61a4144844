"""The bench of adapters: what is compared, and that the record is that of one size alone."""

import torch

from bench import adapter


def test_kernels_differ_by_their_adapter_alone(monkeypatch, tmp_path, capsys):
    kernels = adapter.kernels_of(256)
    bare, floats, codes = (kernel.stats() for kernel in kernels.values())
    assert bare.payload_bytes == floats.payload_bytes == codes.payload_bytes
    assert floats.beside_bytes - bare.beside_bytes == 2 * 25 * 256 * 2
    assert codes.beside_bytes < floats.beside_bytes / 3
    x = torch.randn(2, 256).bfloat16()
    y, z = kernels["bf16 factors"](x).float(), kernels["4-bit factors"](x).float()
    assert (y - z).norm() < 0.3 * y.norm()
    monkeypatch.setattr(adapter, "PATH", tmp_path / "adapter.json")
    adapter.main(["--size", "256", "--batch", "1"])
    assert "4-bit / without" in capsys.readouterr().out
    assert not (tmp_path / "adapter.json").exists()


def test_the_page_is_the_record():
    seconds = {"without": 1e-4, "bf16 factors": 2e-4, "4-bit factors": 1.5e-4, "F.linear": 1e-3}
    data = {"machine": {"threads": 2, "cpu": "one"}, "rows": [{"batch": 1, "seconds": seconds}]}
    assert adapter.page(data).splitlines()[-1] == "| 1 | 100 | 200 | 150 | 1,000 | 2.00 | 1.50 |"
