"""Fixtures and habits of all tests: golden files, markers, seeds, one kernel cache per run."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from difflib import unified_diff
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Golden = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code prints now")
    parser.addoption("--slow", action="store_true", help="run tests marked slow, and more Hypothesis examples")


def pytest_configure(config: pytest.Config) -> None:
    _share_cache(config)
    _share_cores()
    # A shared CI core stalls at random: a deadline or a slow draw there says nothing about the code.
    common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ)
    settings.register_profile("ci", common, max_examples=25)
    settings.register_profile("full", common, max_examples=200)
    settings.load_profile("full" if config.getoption("--slow") else "ci")


def pytest_unconfigure(config: pytest.Config) -> None:
    if (made := getattr(config, "_stoicc_cache", None)) is not None:
        shutil.rmtree(made, ignore_errors=True)


def _share_cache(config: pytest.Config) -> None:
    """One fresh kernel cache per run; xdist workers inherit it, so nothing compiles twice."""
    if not hasattr(config, "workerinput"):
        config._stoicc_cache = tempfile.mkdtemp(prefix="stoicc-test-cache-")  # type: ignore[attr-defined]
        os.environ["STOICC_CACHE_DIR"] = config._stoicc_cache  # type: ignore[attr-defined]
    os.environ["STOICC_CALIBRATION"] = "off"  # schedules must not depend on what this machine measured


def _share_cores() -> None:
    """Divide the cores among xdist workers: OpenMP pools of several processes spin against each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        # The interpreter is chosen when triton is imported and changes what @triton.jit means.
        _deselect(config, items, lambda item: item.get_closest_marker("interpreter") is None)
    reasons = {
        "interpreter": None if INTERPRETED else "needs TRITON_INTERPRET=1",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "slow": None if config.getoption("--slow") else "needs --slow",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def _deselect(config: pytest.Config, items: list[pytest.Item], unwanted: Callable[[pytest.Item], bool]) -> None:
    dropped = [item for item in items if unwanted(item)]
    items[:] = [item for item in items if not unwanted(item)]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws from torch's default generator are the same in every run, whatever ran before."""
    torch.manual_seed(20240229)


@pytest.fixture
def rng() -> torch.Generator:
    """A CPU generator that starts every test from the same seed."""
    return torch.Generator().manual_seed(20240229)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(text, name=None)`: text equals tests/golden/<folder of the test>/<test or name>.txt.

    `--update-golden` (make golden) writes the file instead; read the diff before you commit it.
    """
    folder = GOLDEN / request.path.parent.relative_to(TESTS)

    def check(text: str, name: str | None = None) -> None:
        file = folder / (re.sub(r"[^\w.=-]+", "_", name or request.node.name).strip("_") + ".txt")
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        shown = file.relative_to(TESTS.parent)
        if not file.exists():
            pytest.fail(f"no golden file {shown}; run `make golden`, read the file and commit it", pytrace=False)
        held = file.read_text(encoding="utf-8")
        if text != held:
            diff = "\n".join(unified_diff(held.splitlines(), text.splitlines(), str(shown), "now", lineterm=""))
            pytest.fail(f"{diff}\nif the change is wanted, run `make golden` and commit the file", pytrace=False)

    return check
