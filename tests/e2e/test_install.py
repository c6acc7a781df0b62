"""What is installed: the wheel's content, the wheel in an environment of its own, its start, the shell's completion.

The wheel is built from an sdist, and that from a copy of the files that git would commit: what a clean clone has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
IMPORTED = {"recipes": "llmshrink/recipes", "eval/llmshrink_eval": "llmshrink_eval",
            "kernels/llmshrink_kernels": "llmshrink_kernels", "llmshrink": "llmshrink"}  # fmt: skip
"""Folder of the checkout -> what it is called once installed."""
BUILD = (
    "import sys\nfrom setuptools import build_meta\n"
    "print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]), file=sys.stderr)"
)
LARGEST = 3_000_000
"""Bytes of the wheel; two of them are the demo model."""


def tracked() -> list[str]:
    """The files of the checkout that git knows, or would if they were added."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the checkout's .git to know what a clean clone has")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [name for name in names.split("\0") if name and (ROOT / name).is_file()]


def built(kind: str, source: Path, target: Path) -> Path:
    """The one file that setuptools makes of `source`; kind: sdist or wheel."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(target)], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return target / done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    for name in tracked():
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "clone" / name)
    sdist = built("sdist", folder / "clone", folder)
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return built("wheel", source, folder)


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that holds the wheel, and what it requires from this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
         "--disable-pip-version-check", str(wheel)],
        check=True,
    )  # fmt: skip
    there = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
    (Path(there) / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def clean() -> dict[str, str]:
    """An environment in which nothing leads back to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "_LLMSHRINK"))}


def installed(scripts: Path, folder: Path, *words: str, program: str = "llmshrink") -> str:
    done = subprocess.run(
        [str(scripts / program), *words], cwd=folder, env=clean(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_packages_the_recipes_and_the_demo_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for name in tracked():
        folder = next((folder for folder in IMPORTED if PurePosixPath(name).is_relative_to(folder)), None)
        if folder is not None:
            expected.add(IMPORTED[folder] + name.removeprefix(folder))
    assert names == expected
    assert any(name.startswith("llmshrink/recipes/") and name.endswith(".yaml") for name in names)
    assert wheel.stat().st_size < LARGEST


def test_the_installed_wheel_runs_the_demo_from_another_folder(scripts: Path, tmp_path: Path) -> None:
    where = installed(scripts, tmp_path, "-c", "import llmshrink; print(llmshrink.__file__)", program="python")
    assert Path(where.strip()).is_relative_to(scripts.parent)
    said = installed(scripts, tmp_path, "quantize", "demo", "-o", "w4", "--samples", "8", "--seq-len", "64")
    assert "verified" in said and (tmp_path / "w4" / "config.json").is_file()
    assert "bits/weight" in installed(scripts, tmp_path, "inspect", "w4")
    assert "gptq-w4a16" in installed(scripts, tmp_path, "recipes")
    version = installed(scripts, tmp_path, "--version")
    assert installed(scripts, tmp_path, "-m", "llmshrink", "--version", program="python") == version


def test_vllm_would_find_the_plugin_of_the_installed_wheel(scripts: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "(ours,) = {e.value for e in entry_points(group='vllm.general_plugins') if e.name == 'llmshrink'}\n"
        "print(ours)"
    )
    assert "serving.vllm.plugin:register" in installed(scripts, tmp_path, "-c", code, program="python")


def test_importing_llmshrink_imports_nothing_from_elsewhere() -> None:
    """That keeps it under 0.15 s on any machine, which a clock couldn't tell on a busy one."""
    code = (
        "import sys\nbefore = set(sys.modules)\nimport llmshrink\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "sys.exit(f'{sorted(names)}' if names != {'llmshrink'} else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Completion, as the shells ask for it.


def test_a_real_bash_completes_verbs_options_and_choices(scripts: Path, tmp_path: Path) -> None:
    script = (
        'eval "$(llmshrink --show-completion)"\n'
        "complete -p llmshrink\n"
        'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _llmshrink_completion llmshrink; echo ${COMPREPLY[@]}; }\n'
        "ask llmshrink qu\nask llmshrink quantize --calib\nask llmshrink prune --format l\n"
        "ask llmshrink quantize --recipe rtn-\n"
    )
    environment = {**clean(), "PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    declared, *answers = done.stdout.splitlines()
    assert "-F _llmshrink_completion llmshrink" in declared
    assert answers == ["quantize", "--calibration", "llmshrink", "rtn-w4a16"]


@pytest.mark.parametrize(("shell", "arguments"), [("zsh", {}), ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"})])
def test_zsh_and_fish_are_answered(shell: str, arguments: dict[str, str], scripts: Path, tmp_path: Path) -> None:
    """Neither is on every machine: what their scripts would ask is asked."""
    environment = {**clean(), "_TYPER_COMPLETE_ARGS": "llmshrink rec", **arguments}
    for instruction, answer in ((f"complete_{shell}", "recipes"), (f"source_{shell}", "_LLMSHRINK_COMPLETE")):
        done = subprocess.run(
            [str(scripts / "llmshrink")], env={**environment, "_LLMSHRINK_COMPLETE": instruction},
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0 and answer in done.stdout, done.stderr
