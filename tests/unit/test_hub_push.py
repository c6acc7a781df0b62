"""`llmshrink push`: all of it or nothing on the Hub, and nothing that mustn't leave; against a server on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from eval_example import example
from hub_server import READER, TOKEN, HubServer, use
from huggingface_hub import ModelCard
from llmshrink_eval.fingerprint import fingerprint_folder
from llmshrink_eval.results import Results

import llmshrink
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.cli import run
from llmshrink.errors import LlmshrinkError
from llmshrink.hub.guard import leaks, paths_here
from llmshrink.hub.push import Asked, push
from llmshrink.hub.upload import Target, upload
from llmshrink.run.card import card
from llmshrink.run.progress import Silent, size
from llmshrink.run.report import Pushed

PART = 1 << 14
WEIGHTS = "model-block-00001.safetensors"
GENERATION = "generation_config.json"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(part=PART) as server:
        use(server, monkeypatch, tmp_path / "home")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


@pytest.fixture(scope="module")
def made(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of a tiny model whose card names a licence."""
    place = tmp_path_factory.mktemp("push")
    shutil.copytree(model_of("llama"), place / "model")
    (place / "model" / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    llmshrink.quantize(place / "model", output=place / "out", calibration=story, samples=8, seq_len=32, group_size=32)
    return place / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def pushed(*arguments: str | Path) -> int:
    return run(["push", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert pushed(*arguments) == 2
    found, err = capsys.readouterr()
    error = err.splitlines()[-1]
    assert not found and error.startswith("llmshrink: error: ")
    assert TOKEN not in err and READER not in err
    return error.removeprefix("llmshrink: error: ")


# What would go.


def test_a_dry_run_lists_what_then_goes_and_asks_nobody(
    hub: HubServer, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pushed(made, "user/name", "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert hub.log == [] and planned["commit"] is None and planned["licence"] == "mit" and planned["ask"] == []
    assert pushed(made, "user/name", "--json") == 0
    sent = json.loads(capsys.readouterr().out)
    there = {path: len(data) for path, data in hub.files("user/name").items() if path != ".gitattributes"}
    assert there == planned["files"] == sent["files"] and sum(there.values()) == planned["bytes"]
    assert there.keys() == {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
    assert sent["commit"] in sent["url"]
    assert not any(request.authorized for request in hub.asked("PUT", "/lfs/"))  # the storage is another party
    text = hub.files("user/name")["README.md"].decode()
    assert 'from_pretrained("user/name"' in text and "vllm serve user/name" in text
    assert ModelCard(text).data.license == "mit"


def test_what_was_put_beside_the_checkpoint_stays_here(
    hub: HubServer, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "notes.txt").write_text("mine")
    (out / ".env").write_text(f"HF_TOKEN={TOKEN}")
    assert pushed(out, "user/name") == 0
    assert "notes.txt stays here" in capsys.readouterr().out
    assert not {"notes.txt", ".env"} & hub.files("user/name").keys()


def test_a_second_push_sends_nothing_and_a_changed_file_goes_alone(hub: HubServer, out: Path) -> None:
    assert pushed(out, "user/name", "--private") == 0
    assert hub.repos["user/name"].private
    commits, sent = len(hub.repos["user/name"].branches["main"]), len(hub.asked("PUT", "/lfs/"))
    assert pushed(out, "user/name") == 0
    assert len(hub.repos["user/name"].branches["main"]) == commits
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMy own words.\n")
    assert pushed(out, "user/name") == 0
    assert hub.files("user/name")["README.md"].endswith(b"My own words.\n")
    assert len(hub.asked("PUT", "/lfs/")) == sent


def test_another_branch_is_made_and_main_stays(hub: HubServer, made: Path) -> None:
    assert pushed(made, "user/name", "--revision", "w4") == 0
    assert WEIGHTS in hub.files("user/name", "w4") and WEIGHTS not in hub.files("user/name")


def test_weights_of_another_model_are_not_mixed_with_these(
    hub: HubServer, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model-00001-of-00001.safetensors").write_bytes(b"another's")
    hub.publish("user/name", tmp_path / "old")
    line = refused(capsys, made, "user/name")
    assert "model-00001-of-00001.safetensors" in line and "--yes" in line and line.endswith("nothing was published")
    assert pushed(made, "user/name", "--yes") == 0
    assert "removed     model-00001-of-00001.safetensors" in capsys.readouterr().out
    assert "model-00001-of-00001.safetensors" not in hub.files("user/name")


# What must not leave.


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        (GENERATION, '{\n "note": "hf_' + "a" * 34 + '"}', "generation_config.json, line 2: a token of the Hub"),
        (GENERATION, '{"note": "my secret token"}', "generation_config.json, line 1: your token of the Hub"),
        (GENERATION, '{"_name_or_path": "/home/ann/models/x"}', "line 1: a path of this machine (/home/ann)"),
        ("tokenizer_config.json", "-----BEGIN RSA PRIVATE KEY-----", "tokenizer_config.json, line 1: a private key"),
    ],
)  # fmt: skip
def test_tokens_keys_and_paths_are_found_by_file_and_line(
    hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    file: str, text: str, says: str,
) -> None:  # fmt: skip
    (out / file).write_text(text)
    if "secret" in text:
        monkeypatch.setenv("HF_TOKEN", "my secret token")
    line = refused(capsys, out, "user/name", "--yes")
    assert says in line and "nothing was sent" in line and hub.log == []
    assert "a" * 34 not in line and "my secret token" not in line


def test_a_path_of_this_machine_is_found_in_any_text_and_what_anybody_may_write_is_not(
    hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/root")
    text = "---\nlicense: mit\n---\nrun it as /root/x, /home/you/y, in /tmp/z\n"
    (out / "SOURCE_README.md").write_text(text)
    assert pushed(out, "user/name", "--yes", "--dry-run") == 0
    capsys.readouterr()
    (out / "SOURCE_README.md").write_text(f"{text}from {out.resolve()}\n")
    place = out.resolve().parent
    assert f"SOURCE_README.md, line 5: a path of this machine ({place}/)" in refused(capsys, out, "user/name", "--yes")


def _leak(name: str, line: str, *known: str) -> str | None:
    return next(leaks(name, line.encode(), paths_here(Path("/"), known), None), None)


def test_tokens_of_others_and_paths_that_are_here_are_known(tmp_path: Path) -> None:
    """Tokens are put together here, so that nothing that looks like one stands in this file."""
    tokens = ["glpat-" + "a" * 20, "AIza" + "b" * 35, "xoxb-" + "1" * 12, "AKIA" + "C" * 16, "ASIA" + "D" * 16]
    tokens += [".".join(("eyJ" + "h" * 12, "eyJ" + "p" * 12, "s" * 20))]
    for token in tokens:
        found = _leak("SOURCE_README.md", f"key = {token}")
        assert found is not None and token not in found
    text = tmp_path / "mine.txt"
    text.touch()
    first = "/".join(str(tmp_path).split("/")[:3])
    for line in (f'"{text}"', f"file://{text}", f"from:{text}.", json.dumps(str(tmp_path)).replace("/", "\\/")):
        assert f"({first})" in str(_leak("tokenizer_config.json", line)), line
    for line in ("/usr/bin/python", "/not/here/at/all", f"https://a.b{text}", "a/tmp/b", "/tmp", "</s>/tmp"):
        assert _leak("tokenizer_config.json", line) is None, line
    assert "(/corpus.txt)" in str(_leak("config.json", "of /corpus.txt", "/corpus.txt"))
    assert _leak("config.json", "text/corpus.txt of /corpus.txts", "/corpus.txt") is None


def test_damaged_weights_do_not_leave(hub: HubServer, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((out / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (out / WEIGHTS).write_bytes(data)
    assert f"{WEIGHTS}: isn't what its run wrote" in refused(capsys, out, "user/name", "--yes")
    assert hub.log == []


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_what_was_changed_since_is_asked_about_each_time_and_nothing_is_written_meanwhile(
    hub: HubServer, out: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    (out / GENERATION).write_text("{}\n")
    (out / "notes.txt").write_text("mine")
    before = listing(out)
    for _ in range(2):
        if options:
            assert pushed(out, "user/name", *options) == 0
            said = capsys.readouterr().out
            assert "needs --yes generation_config.json changed since" in said and "  notes.txt\n" not in said
        else:
            assert "generation_config.json changed since it was made" in refused(capsys, out, "user/name")
        assert hub.log == [] and listing(out) == before
    assert pushed(out, "user/name", "--yes") == 0
    assert "verified anew" in capsys.readouterr().out and "notes.txt" not in hub.files("user/name")
    sealed = json.loads((out / "verify" / "verified.json").read_text())["files"]
    assert "notes.txt" not in sealed and sealed[GENERATION] == hashlib.sha256(b"{}\n").hexdigest()
    assert hub.files("user/name")["verify/verified.json"] == (out / "verify" / "verified.json").read_bytes()
    assert pushed(out, "user/name") == 0
    assert "verified anew" not in capsys.readouterr().out


def test_what_was_never_verified_is_verified_first(
    hub: HubServer, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "verify" / "verified.json").unlink()
    (out / "notes.txt").write_text("mine")
    before = listing(out)
    assert pushed(out, "user/name", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "note        verified anew" in said and "  verify/verified.json\n" in said and "notes.txt stays here" in said
    assert listing(out) == before
    assert pushed(out, "user/name") == 0
    assert (out / "verify" / "verified.json").is_file() and "notes.txt" not in hub.files("user/name")


@pytest.mark.parametrize(
    ("head", "licence", "says"),
    [
        ("license: llama3.1", "LICENSE", "licence is llama3.1: it has terms on passing copies on"),
        ("license: cc-by-nc-4.0", "", "licence is cc-by-nc-4.0: it forbids commercial use"),
        ("license: other\nlicense_name: their-own", "", "licence is their-own (other): it is the authors' own"),
        ("license: mit\nextra_gated_prompt: agree", "", "licence is mit: the original is gated"),
    ],
)
def test_a_licence_that_binds_is_named_and_needs_yes(
    hub: HubServer, out: Path, capsys: pytest.CaptureFixture[str], head: str, licence: str, says: str
) -> None:
    (out / "SOURCE_README.md").write_text(f"---\n{head}\n---\n# theirs\n")
    line = refused(capsys, out, "user/name")
    assert says in line and "--yes" in line and hub.log == []


@pytest.mark.parametrize(("text", "found"), [("# theirs\n", "unknown"), ("---\nlicense: xyz-1.0\n---\n", "xyz-1.0")])
def test_a_licence_that_nothing_is_known_of_is_a_warning(
    hub: HubServer, out: Path, capsys: pytest.CaptureFixture[str], text: str, found: str
) -> None:
    (out / "SOURCE_README.md").write_text(text)
    assert pushed(out, "user/name", "--yes") == 0
    said = capsys.readouterr().out
    assert f"licence     {found}" in said and ("names no licence" in said or "isn't known to llmshrink" in said)


# What goes wrong on the way.


def test_a_connection_cut_in_the_middle_of_a_file_goes_on_from_the_part(hub: HubServer, made: Path) -> None:
    hub.fail("PUT", "/part/2", cut=1000)
    assert pushed(made, "user/name") == 0
    # Several files have a second part, sent side by side: whose was cut differs from run to run.
    (cut,) = (request for request in hub.asked("PUT", "/part/2") if request.status != 200)
    again = [request for request in hub.asked("PUT", "/part/2") if request.path == cut.path]
    assert cut.received == 1000 and again[0] is cut and again[1].status == 200
    first = [request.path for request in hub.asked("PUT", "/part/1")]
    assert len(first) == len(set(first)) > 1


def test_a_push_that_was_broken_off_goes_on_with_the_files_that_are_missing(
    hub: HubServer, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("PUT", "/part/3", cut=0, times=1000)
    line = refused(capsys, made, "user/name")
    assert "the connection to the Hub broke" in line and "nothing was published" in line
    assert "the repository user/name was made, and is empty" in line and "goes on from it" in line
    assert hub.files("user/name").keys() == {".gitattributes"}
    hub.faults.clear()
    stored, before = len(hub.blobs), len(hub.asked("PUT", "/lfs/"))
    assert stored
    assert pushed(made, "user/name") == 0
    oids = {request.path.split("/")[2] for request in hub.asked("PUT", "/lfs/")[before:]}
    assert len(hub.blobs) - stored == len(oids) and WEIGHTS in hub.files("user/name")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"method": "GET", "path": "whoami", "status": 401}, "the Hub doesn't know the token"),
        ({"method": "POST", "path": "repos/create", "status": 403}, "refuses to let this token write as user"),
        ({"method": "POST", "path": "/batch", "status": 403}, "refuses to let this token write as user"),
        ({"method": "POST", "path": "/commit/", "status": 409}, "was changed by somebody else meanwhile"),
        ({"method": "POST", "path": "/commit/", "status": 412}, "was changed by somebody else meanwhile"),
        ({"method": "POST", "path": "/commit/", "status": 503, "times": 9}, "the Hub answered with HTTP 503"),
        ({"method": "POST", "path": "/preupload/", "status": 500, "times": 9}, "the Hub answered with HTTP 500"),
        ({"method": "POST", "path": "/commit/", "cut": 100, "times": 9}, "the connection to the Hub broke"),
        ({"method": "POST", "path": "/commit/", "status": 400, "body": {"error": TOKEN}}, "(HTTP 400: hf_...)"),
    ],
)  # fmt: skip
def test_a_push_that_the_hub_does_not_take_says_why_and_that_nothing_is_there(
    hub: HubServer, made: Path, capsys: pytest.CaptureFixture[str], fault: dict[str, object], says: str
) -> None:
    hub.fail(**fault)  # type: ignore[arg-type]
    line = refused(capsys, made, "user/name")
    assert says in line and "nothing was published" in line
    assert hub.files("user/name").keys() <= {".gitattributes"}


@pytest.mark.parametrize(
    "path", ["whoami", "repos/create", "/tree/", "/revision/", "/preupload/", "/batch", "/commit/"]
)
@pytest.mark.parametrize("how", [{"status": 503}, {"status": 429, "headers": {"Retry-After": "0"}}, {"cut": 0}])
def test_a_passing_fault_anywhere_is_waited_out(hub: HubServer, made: Path, path: str, how: dict[str, object]) -> None:
    method = "GET" if path in ("whoami", "/tree/", "/revision/") else "POST"
    if method == "GET" and "cut" in how:
        how = {"deaf": True}
    hub.fail(method, path, times=2, **how)
    assert pushed(made, "user/name") == 0
    assert WEIGHTS in hub.files("user/name")


def test_a_commit_whose_answer_got_lost_is_found_not_made_twice(hub: HubServer, made: Path) -> None:
    hub.fail("POST", "/commit/", deaf=True)
    assert pushed(made, "user/name") == 0
    assert len(hub.repos["user/name"].branches["main"]) == 2


def test_a_commit_that_comes_between_is_not_overwritten(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("# theirs")
    hub.publish("user/name", tmp_path / "theirs")
    send = HfApi.preupload_lfs_files

    def meanwhile(*arguments: object, **options: object) -> None:
        send(*arguments, **options)  # type: ignore[arg-type]
        (tmp_path / "theirs" / "README.md").write_text("# theirs, again")
        hub.publish("user/name", tmp_path / "theirs")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    assert "was changed by somebody else meanwhile" in refused(capsys, made, "user/name")
    assert hub.files("user/name") == {"README.md": b"# theirs, again"}


def test_ctrl_c_says_what_is_there(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", interrupted)
    assert pushed(made, "user/name") == 130
    assert "nothing was published; the repository user/name was made, and is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "no token for the Hub is at hand: log in with `hf auth login`"),
        (READER, "refuses to let this token write"),
    ],
)
def test_whose_token_it_is_matters(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    token: str | None, says: str,
) -> None:  # fmt: skip
    use(hub, monkeypatch, tmp_path / "home", token=token)
    assert says in refused(capsys, made, "user/name")
    assert not hub.files("user/name")


@pytest.mark.parametrize("name", ["name", "a/b/c", "user/two words", "user/a--b", ""])
def test_a_name_that_cannot_be_is_refused_before_anything(
    hub: HubServer, made: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert "not a repository's name" in refused(capsys, made, name)
    assert hub.log == []


def test_a_public_repository_does_not_become_private(
    hub: HubServer, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pushed(made, "user/name") == 0
    capsys.readouterr()
    assert "is there already, and is public" in refused(capsys, made, "user/name", "--private")


def test_a_file_that_changes_under_the_push_is_told(hub: HubServer, out: Path) -> None:
    from llmshrink.hub.upload import Item

    text = out / "recipe.yaml"
    item = Item("recipe.yaml", text, text.stat().st_size, hashlib.sha256(b"as it was").hexdigest())
    item_data = Item.data
    try:
        Item.data = lambda self: b"as it was"  # type: ignore[method-assign]
        with pytest.raises(
            LlmshrinkError, match=r"recipe\.yaml on the Hub isn't what is here .* is published, as commit"
        ):
            upload(Target("user/name"), [item], "a push", replace=False, progress=Silent())
    finally:
        Item.data = item_data  # type: ignore[method-assign]


# At the end of a run.


def test_a_run_pushes_its_result_when_it_is_done(
    hub: HubServer, model_of: Callable[..., Path], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(model_of("llama")), "--calibration", str(story), "--samples", "8", "--seq-len", "32"]
    command += ["--group-size", "32", "-o", str(tmp_path / "out")]
    assert run([*command, "--push", "name"]) == 2 and not (tmp_path / "out").exists()
    assert run([*command, "--push", "user/name", "--private"]) == 0
    assert f"pushed      {hub.url}/user/name/tree/" in capsys.readouterr().out
    assert hub.repos["user/name"].private and WEIGHTS in hub.files("user/name")
    hub.fail("POST", "/commit/", status=403)
    assert run([*command, "--overwrite", "--push", "user/other"]) == 1
    said = capsys.readouterr().out
    assert "not pushed  user/other: the Hub refuses" in said and f"llmshrink push {tmp_path / 'out'} user/other" in said
    assert llmshrink.verify(tmp_path / "out").ok


@pytest.mark.parametrize("head", ["license: llama3.1", "license: mit\nextra_gated_prompt: agree"])
def test_a_licence_that_binds_is_asked_about_before_the_work(
    hub: HubServer, model_of: Callable[..., Path], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    head: str,
) -> None:  # fmt: skip
    shutil.copytree(model_of("llama"), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(f"---\n{head}\n---\n# theirs\n")
    command = ["quantize", str(tmp_path / "model"), "--calibration", str(story), "--samples", "8", "--seq-len", "32"]
    command += ["--recipe", "rtn-w4a16", "--group-size", "32", "-o", str(tmp_path / "out"), "--push", "user/name"]
    assert run(command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "nothing was begun: the original's licence is " in line and "give --yes" in line
    assert not list(tmp_path.glob("out*")) and hub.log == []
    if "gated" not in head:
        assert run([*command, "--yes"]) == 0
        assert WEIGHTS in hub.files("user/name")


@pytest.mark.parametrize("verb", ["quantize demo", "prune demo", "compress demo --recipe rtn-w4a16", "distill demo w4"])
@pytest.mark.parametrize("option", ["--private", "--yes", "--private --dry-run"])
def test_what_is_of_publishing_alone_goes_with_push(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, option: str
) -> None:
    assert run([*verb.split(), "-o", str(tmp_path / "out"), *option.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"error: {option.split()[0]}: is of publishing" in err and "--push" in err
    assert not list(tmp_path.iterdir())


# The card's evaluation.


def test_an_evaluation_of_these_weights_goes_into_the_card(hub: HubServer, made: Path, tmp_path: Path) -> None:
    found = example(models=2)
    ours = found.models[1].model_copy(update={"fingerprint": fingerprint_folder(made, tmp_path / "cache")})
    results = found.model_copy(update={"models": (found.models[0], ours, found.models[2])})
    assert "has nothing of these weights" in refused_report(made, found, tmp_path / "theirs")
    results.write(tmp_path / "results.json")
    push(made, Asked("user/name", report=tmp_path), Silent())
    text = hub.files("user/name")["README.md"].decode()
    rows = [line for line in text.splitlines() if line.startswith(("| model |", "| this checkpoint |"))]
    assert len(rows) == 2 and "±" in rows[1] and "wiki7m" not in text and "No tasks were run" not in text
    assert "KL, nats/token" in text and "Intervals are 95 %." in text
    figures = {(one.dataset_name, one.metric_type): one.metric_value for one in ModelCard(text).data.eval_results}
    assert ours.perplexity is not None and results.text is not None
    assert figures[results.text.name, "perplexity"] == ours.perplexity.token
    assert all(figures[name, task.metric.partition(",")[0]] == task.score for name, task in ours.tasks.items())


def refused_report(folder: Path, results: Results, place: Path) -> str:
    place.mkdir()
    results.write(place / "results.json")
    with pytest.raises(LlmshrinkError) as caught:
        push(folder, Asked("user/name", report=place, dry_run=True), Silent())
    return str(caught.value)


def test_a_report_that_is_none_is_refused(
    hub: HubServer, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no results.json that can be read" in refused(capsys, made, "user/name", "--report", tmp_path)


def test_an_edited_card_is_not_written_over(hub: HubServer, out: Path, tmp_path: Path) -> None:
    (out / "README.md").write_text("---\nlicense: mit\n---\n# My own\n")
    report = push(out, Asked("user/name"), Silent())
    assert hub.files("user/name")["README.md"].endswith(b"# My own\n")
    assert "README.md was edited, and goes as it is" in report.notes
    (out / "README.md").write_text("---\nlicense: [mit\n---\n# My own\n")
    with pytest.raises(LlmshrinkError, match="its metadata can't be read"):
        push(out, Asked("user/name"), Silent())


def test_the_card_is_a_function_of_the_folder_and_says_what_matters(made: Path) -> None:
    text = (made / "README.md").read_text()
    assert text == card(made) == card(made) and str(made.parent) not in text
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "mit" and data["library_name"] == "transformers" and "base_model" not in data
    assert {"llmshrink", "quantized", "compressed-tensors"} == set(data["tags"])
    (figures,) = data["model-index"][0]["results"]
    assert [metric["type"] for metric in figures["metrics"]] == ["perplexity", "kl_divergence"]
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["What it costs", "Recipe", "How to use it", "Made and verified with", "Known limits"]
    assert (made / "recipe.yaml").read_text().strip() in text
    stored = size(sum(path.stat().st_size for path in made.glob("*.safetensors")))  # as the run's summary has it
    assert re.search(rf"\| weights on disk \| [^|]+ \| {re.escape(stored)} \|", text)
    assert text.count("| model.layers.") == 14 and "<details>" in text
    assert "Licence: mit (says the original's README.md)" in text


def test_the_record_has_the_sums_of_all_weights(made: Path) -> None:
    record = json.loads((made / "llmshrink.json").read_text())
    with CheckpointIndex.open(made) as index:
        assert record["shards"].keys() == {file.name for file in index.files()}
    for name, sha in record["shards"].items():
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == sha


def test_the_command_that_publishes_later_quotes_its_folder() -> None:
    said = Pushed("u/n", None, "no network").lines(Path("a folder"))
    assert said[1].endswith("a folder is complete: llmshrink push 'a folder' u/n")
