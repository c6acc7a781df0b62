"""The plugin without vLLM: found, quick to import, quiet with nothing to plug into; fused layers; the hook."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from llmshrink.errors import CheckpointError
from llmshrink.formats.servable import plugin_kernel, sparse24_kernel
from llmshrink.serving.fused import one_scheme
from llmshrink.serving.vllm import compat
from llmshrink.serving.vllm.plugin import GROUP, NAME, kernels_place, register


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )


def test_the_entry_point_is_installed_and_is_the_plugin() -> None:
    (point,) = [point for point in entry_points(group=GROUP) if point.name == NAME]
    assert point.load() is register


def test_importing_the_plugin_takes_milliseconds_and_brings_nothing_heavy() -> None:
    done = python(
        """
        import json, sys, time
        start = time.process_time()
        import llmshrink.serving.vllm.plugin
        seconds = time.process_time() - start
        print(json.dumps([seconds, sorted({"torch", "transformers", "triton", "vllm"} & sys.modules.keys())]))
        """
    )
    seconds, heavy = json.loads(done.stdout)
    assert seconds < 0.1
    assert heavy == []


def test_a_vllm_whose_insides_have_moved_is_a_line_for_each_in_the_log() -> None:
    done = python(
        """
        import sys
        sys.modules["vllm"] = None
        from llmshrink.serving.vllm import compat, plugin
        plugin.register()
        sys.modules[compat.KERNELS] = None
        plugin.register()
        """
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["llmshrink's plugin"] * 4
    assert "its format can't be served: ModuleNotFoundError" in lines[0]
    assert "2, 3, 4 and 8 bits can't be used: ModuleNotFoundError" in lines[2]
    assert "without VNNI stay as vLLM has them: ModuleNotFoundError" in lines[3]


def test_where_our_kernel_stands_is_told_by_the_environment() -> None:
    assert [kernels_place(said) for said in (None, "", "last", "first", "off")] == [
        "last",
        "last",
        "last",
        "first",
        "off",
    ]
    with pytest.raises(ValueError, match=r"LLMSHRINK_VLLM_KERNELS=1: one of last, first, off"):
        kernels_place("1")


def test_an_environment_that_says_something_else_doesnt_stop_vllm() -> None:
    done = python("from llmshrink.serving.vllm.plugin import register; register()", LLMSHRINK_VLLM_KERNELS="maybe")
    assert done.returncode == 0, done.stderr
    assert "LLMSHRINK_VLLM_KERNELS=maybe: one of last, first, off is expected" in done.stderr


def test_an_internal_that_isnt_listed_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        compat.nothing_of_the_kind  # noqa: B018


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported, and hasn't been."""
    (tmp_path / "imported_late.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "imported_late", raising=False)
    return "imported_late"


def test_what_waits_for_a_module_happens_once_right_after_its_import(module: str) -> None:
    before, seen = list(sys.meta_path), []
    compat.once_imported(module, lambda: seen.append(sys.modules[module].VALUE))
    compat.once_imported(module, lambda: seen.append(-1))
    importlib.import_module("json.tool")
    assert seen == []
    imported = importlib.import_module(module)
    assert seen == [7]
    assert sys.meta_path == before
    importlib.reload(imported)
    assert seen == [7]
    compat.once_imported(module, lambda: seen.append(8))
    assert seen == [7, 8]


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def test_a_fused_layer_has_the_scheme_of_its_parts() -> None:
    schemes = {f"a.{part}": "int4" for part in FUSED["qkv_proj"]} | {"a.o_proj": "int8"}
    assert one_scheme(schemes, "a.qkv_proj", FUSED.get) == "int4"
    assert one_scheme(schemes, "a.o_proj", FUSED.get) == "int8"
    assert one_scheme(schemes, "a.down_proj", FUSED.get) is None
    assert one_scheme(schemes, "b.qkv_proj", FUSED.get) is None
    assert one_scheme({"a.qkv_proj": "int4"}, "a.qkv_proj", FUSED.get) == "int4"


@pytest.mark.parametrize("other", [{"a.v_proj": "int8"}, {}])
def test_parts_that_differ_are_named(other: dict[str, str]) -> None:
    schemes = {"a.q_proj": "int4", "a.k_proj": "int4", **other}
    with pytest.raises(CheckpointError, match=r"a\.qkv_proj .*v_proj: (int8|not compressed)"):
        one_scheme(schemes, "a.qkv_proj", FUSED.get)


@pytest.mark.parametrize(
    ("bits", "group_size", "shards", "tp", "why"),
    [
        (3, 64, [(256, 256)], 1, None),
        (8, -1, [(172, 64)], 1, None),
        (2, 128, [(256, 256)], 2, None),
        (5, 64, [(256, 256)], 1, "5"),
        (4, 16, [(256, 256)], 1, "not 16"),
        (3, 64, [(256, 96)], 1, "group 64 doesn't divide 96"),
        (4, 128, [(256, 256)], 4, "group 128 doesn't divide the 64 inputs"),
    ],
)
def test_the_plugins_kernel_takes_what_it_is_made_for(
    bits: int, group_size: int, shards: list[tuple[int, int]], tp: int, why: str | None
) -> None:
    said = plugin_kernel(bits, group_size, True, shards, tp)
    assert said is None if why is None else (said is not None and why in said)


@pytest.mark.parametrize(
    ("group_size", "shards", "tp", "parallel", "why"),
    [
        (None, [(33, 20)], 1, None, None),
        (-1, [(33, 20)], 1, None, None),
        (96, [(64, 192)], 2, "row", None),
        (None, [(64, 192), (64, 192)], 2, None, None),
        (None, [(33, 18)], 1, None, "18 inputs"),
        (None, [(64, 24)], 2, "row", "12 inputs of 24 aren't a multiple of 8"),
        (None, [(64, 24)], 2, None, "12 inputs"),
        (16, [(64, 64)], 1, None, "not 16"),
        (64, [(64, 192)], 2, "row", "group 64 doesn't divide the 96 inputs"),
        (64, [(33, 64)], 2, "column", "33 outputs"),
    ],
)
def test_the_2_of_4_kernel_takes_what_it_is_made_for(
    group_size: int | None, shards: list[tuple[int, int]], tp: int, parallel: str | None, why: str | None
) -> None:
    said = sparse24_kernel(group_size, shards, tp, parallel)  # type: ignore[arg-type]
    assert said is None if why is None else (said is not None and why in said)
