"""What every test may ask for: tiny models of each family, and the real ones where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import make_model

# The tests' matrices are tiny: a second thread only waits for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Where tests run in several processes, a file's are in one, which makes its models once; so are the engine's."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "engine" if file.startswith("tests/engine/") else file

    return ByFile(config, log)


def shared(*parts: str) -> Path:
    """A file of the shared material beside the checkout, or a skip that says so."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(('shared', *parts))} beside the checkout")
    return path


@pytest.fixture(scope="session")
def wiki7m() -> Path:
    return shared("models", "wiki7m")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    return shared("models", "stories260k")


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    return shared("data", "calibration.txt")


@pytest.fixture(scope="session")
def wikitext2_test() -> Path:
    return shared("data", "wikitext2-test.txt")


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """family, changes of its config -> a folder with such a tiny model, made once."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **changes: Any) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp("model") / "model", family, **changes)
        return made[key]

    return make


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """Flags as /proc/cpuinfo has them -> from now on `auto` decides as on such a CPU; torch goes on as it is."""
    from llmshrink.run import arithmetic

    for name in (arithmetic.ATEN, *arithmetic.ONEDNN):
        monkeypatch.delenv(name, raising=False)

    def pretend(flags: str) -> None:
        file = tmp_path_factory.mktemp("cpu") / "cpuinfo"
        file.write_text(f"flags\t\t: fpu {flags}\n")
        monkeypatch.setattr(arithmetic, "CPUINFO", file)

    return pretend


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in the demo language, long enough for any tiny run."""
    from itertools import islice

    from llmshrink.demo import language

    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(islice(language.stories(7), 40)))
    return path
