"""Rules of this code that ruff has no word for: what runs code that isn't ours is asked for in one way alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("llmshrink", "eval/llmshrink_eval", "kernels/llmshrink_kernels")
NAMING_PYTHON = {
    "eval/llmshrink_eval/engines/child.py": "starts it, always with -P",
    "llmshrink/cli/surroundings.py": "becomes it, with -P",
    "llmshrink/serving/launch.py": "prints it",
    "llmshrink/doctoring/packages.py": "prints it",
}
READS_JSON = "eval/llmshrink_eval/bounded.py"
READS_CONFIGS = "eval/llmshrink_eval/configured.py"


def trees() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str, str]]:
    """Calls of methods: the call, what it is called on, the method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, ast.unparse(node.func.value), node.func.attr


def test_whether_a_repositorys_code_runs_is_always_said() -> None:
    seen, silent = 0, []
    for file, tree in trees():
        for call, owner, method in calls(tree):
            if method not in ("from_pretrained", "from_config") or not owner.rpartition(".")[2].startswith("Auto"):
                continue
            seen += 1
            said = {each.arg: each.value for each in call.keywords}
            value = said.get("trust_remote_code")
            none = isinstance(value, ast.Constant) and value.value is None
            # By name: what else a dictionary of keywords (`**given`) holds, nobody sees here.
            if none or "trust_remote_code" not in said:
                silent.append(f"{file}:{call.lineno}")
    assert seen > 4 and silent == []


def test_json_of_a_file_is_parsed_in_one_place() -> None:
    """There it has limits, and one error. Elsewhere json.loads turns our own objects round."""
    own = ("json.dumps(", ".to_json()", "_canonical(")
    elsewhere = [
        f"{file}:{call.lineno}"
        for file, tree in trees()
        for call, owner, method in calls(tree)
        if owner == "json" and method in ("load", "loads")
        if not any(word in ast.unparse(call) for word in own)
    ]
    places = {place.partition(":")[0] for place in elsewhere}
    assert places == {
        READS_JSON,
        "llmshrink/demo/records.py",  # shipped
        "kernels/llmshrink_kernels/tune.py",  # knows nothing of llmshrink_eval
        *(
            f"eval/llmshrink_eval/engines/{name}.py"
            for name in ("child", "cost_process", "cost_worker", "vllm_process")
        ),  # pipes
        "eval/llmshrink_eval/engines/vllm_worker.py",
    }


def test_yaml_is_parsed_in_one_place() -> None:
    """There it has limits: nine lines of aliases can stand for a billion values."""
    loading = ("load", "safe_load", "load_all", "safe_load_all", "full_load", "unsafe_load")
    found = [
        f"{file}:{call.lineno}"
        for file, tree in trees()
        for call, owner, method in calls(tree)
        if owner == "yaml" and method in loading
    ]
    assert not found


def test_a_config_is_read_in_one_place() -> None:
    """There attention is set to ours: one that config.json names may be a kernel on the Hub."""
    places = {file for file, tree in trees() for _, owner, _ in calls(tree) if owner.endswith("AutoConfig")}
    assert places == {READS_CONFIGS}


def test_a_model_is_loaded_whole_in_one_place() -> None:
    """There its config is ours, and tensors that aren't there are refused."""
    places = {
        file
        for file, tree in trees()
        for _, owner, method in calls(tree)
        if method == "from_pretrained" and owner.endswith("AutoModelForCausalLM")
    }
    assert places == {"eval/llmshrink_eval/whole.py", "llmshrink/demo/say.py"}


def test_python_is_started_in_one_place() -> None:
    naming = {
        file
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable"
    }
    assert naming == NAMING_PYTHON.keys()


def test_children_are_started_in_one_place() -> None:
    """There they are watched. Elsewhere programs of the system are asked something, and waited for."""
    starting = {
        file: method
        for file, tree in trees()
        for _, owner, method in calls(tree)
        if owner == "subprocess" or (owner == "os" and method.startswith(("spawn", "posix_spawn", "popen", "system")))
    }
    assert starting == {
        "eval/llmshrink_eval/engines/child.py": "Popen",
        "kernels/llmshrink_kernels/static.py": "run",  # the compiler's disassembler
        "llmshrink/api/bench.py": "run",  # git
        "llmshrink/doctoring/machine.py": "run",  # nvidia-smi
    }


def test_no_folder_is_listed_in_a_way_that_passes_over_what_cannot_be_read() -> None:
    found = {
        f"{file}: {method}"
        for file, tree in trees()
        for _, owner, method in calls(tree)
        if method in ("glob", "rglob", "iglob") or (owner == "os" and method == "walk")
    }
    assert found == {
        "llmshrink/recipe/read.py: glob",  # shipped
        "kernels/llmshrink_kernels/tune.py: glob",  # its own cache, which may miss a plan
        "llmshrink/doctoring/places.py: walk",  # counts what it can
    }


NAMING_CODE = {
    "llmshrink/checkpoint/beside.py": "whether a model's code goes on: only where it is trusted",
    "llmshrink/checkpoint/source.py": "what is fetched from the Hub: code only where it is trusted",
    "llmshrink/run/finish.py": "what of an output is published: code that `beside` let into it",
    "llmshrink/run/convert.py": "what of an output goes on: code that its record names",
    "llmshrink/run/output.py": "what may be overwritten: what Python has compiled",
    "llmshrink/run/seal.py": "names code that was added since",
    "eval/llmshrink_eval/fingerprint.py": "digests it",
    "eval/llmshrink_eval/taskset.py": "digests it",
    "llmshrink/evaluation/known.py": "digests it",
    "llmshrink/demo/tasks.py": "writes our own",
    "llmshrink/checkpoint/index.py": "refuses pickles",
    "llmshrink/checkpoint/recognise.py": "refuses pickles",
    "eval/llmshrink_eval/baseline.py": "writes its own rows.bin, numbers alone",
}
CODE = (".py", ".pyc", ".pkl", ".pickle", ".bin", ".pt", ".pth", ".joblib")


def test_code_and_pickles_of_a_source_are_named_where_trust_is_looked_at() -> None:
    naming = {
        file
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if not any(blank in node.value for blank in " \n") and node.value.endswith(CODE)
    }
    assert naming == NAMING_CODE.keys()


def test_nothing_unpickles() -> None:
    banned = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "_pickle"}
    found = []
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            else:
                continue
            found += [f"{file}:{node.lineno}"] * bool(names & banned)
        for call, owner, method in calls(tree):
            only_weights = {each.arg: ast.unparse(each.value) for each in call.keywords}.get("weights_only") == "True"
            if (owner, method) == ("torch", "load") and not only_weights:
                found.append(f"{file}:{call.lineno}")
    assert found == []
