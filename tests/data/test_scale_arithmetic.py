import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale_arithmetic.py"


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("scale_arithmetic", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["scale_arithmetic"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


scale = load()


def test_a_stock_that_is_reckoned_by_hand() -> None:
    answer = scale.compute(
        scale.Assumptions(
            bytes=8.64e13,
            bytes_per_frame=1000.0,
            days=10.0,
            cpu_frames_per_second=1e4,
            cpu_gflops=100.0,
            gpu_peak_tflops=100.0,
            utilisation=0.5,
            machine_gbit=8.0,
            bucket_gbit=80.0,
        )
    )
    assert answer.frames == pytest.approx(8.64e10)
    assert answer.gflop_per_frame == pytest.approx(0.01)
    assert answer.total_flop == pytest.approx(8.64e17)
    assert answer.cpu_pair_days == pytest.approx(100)
    assert answer.cpu_pairs == pytest.approx(10)
    assert answer.gpu_frames_per_second == pytest.approx(5e6)
    assert answer.gpu_days == pytest.approx(0.2)
    assert answer.bytes_per_second == pytest.approx(1e8)
    assert answer.readers_for_network == pytest.approx(0.1)
    assert answer.days_for_bucket == pytest.approx(0.1)
    # The network, not the arithmetic, decides: 0.02 GPUs could compute it.
    assert answer.machines == pytest.approx(0.1)


@given(factor=st.floats(1.5, 100))
def test_what_grows_with_what(factor: float) -> None:
    base = scale.compute(scale.Assumptions(encoder_gflop=105.0))
    larger = scale.compute(scale.Assumptions(encoder_gflop=105.0 * factor))
    twice = scale.compute(scale.Assumptions(encoder_gflop=105.0, passes=factor))
    assert larger.gpus == pytest.approx(base.gpus * factor)
    assert larger.bytes_per_second == pytest.approx(base.bytes_per_second)
    assert twice.gpus == pytest.approx(base.gpus * factor)
    assert twice.bytes_per_second == pytest.approx(base.bytes_per_second * factor)


def test_the_documented_rows_are_those_of_the_script() -> None:
    text = (SCRIPT.parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    printed = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        assert line in text, line
