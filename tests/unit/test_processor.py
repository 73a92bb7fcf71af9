"""What the figures of a machine are told by."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssd_ray.bench.cli import _report
from ssd_ray.models import processor as module
from ssd_ray.models.processor import processor

INTEL = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) @ 2.50GHz\nflags\t\t: fpu avx2 avx512f amx_tile amx_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU part\t: 0xd40\n"


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch):
    def say(text: str | None) -> None:
        def read(path: Path) -> str:
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(Path, "read_text", read)

    processor.cache_clear()
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    yield say
    processor.cache_clear()


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (INTEL, ("Intel(R) Xeon(R) @ 2.50GHz", ("avx2", "avx512f", "amx_bf16"))),
        (ARM, ("aarch64", ("asimd", "bf16", "sve"))),
        ("", ("aarch64", ())),
        (None, ("aarch64", ())),
    ],
)
def test_a_processor_and_its_instructions(system, said: str | None, want: tuple[str, tuple[str, ...]]) -> None:
    system(said)
    assert processor() == want


def test_figures_say_what_they_were_measured_on(
    system, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    system(INTEL)
    processor()
    monkeypatch.undo()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    _report("methods", [])
    line, document = capsys.readouterr().out.splitlines()
    assert line.startswith("Measured on Intel(R) Xeon(R) @ 2.50GHz, ")
    assert line.endswith(" (avx2, avx512f, amx_bf16, limited to AVX2).")
    assert '"processor": "Intel(R) Xeon(R) @ 2.50GHz"' in document
