"""Downloading, with the hub's real client, from a hub on this machine that can fail."""

import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from loopback import Fault, Hub
from repositories import ADDRESS, BARE, CONFIG, LARGE, MODEL, OTHER, PARAMS, REPO, SMALL, write

from gemscope import hub, miniature
from gemscope.errors import InputError

pytestmark = pytest.mark.slow  # every case is a process of its own


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """Folders of repositories: artefacts, and a model beside what nobody needs."""
    root = tmp_path_factory.mktemp("repos")
    for folder in (SMALL, BARE):
        write(root / "scope" / folder)
    # So large that half of it is more than the client reads at a time.
    write(root / "scope" / LARGE, d_in=128, width=24_576)
    (root / "scope" / BARE / "config.json").unlink()
    write(root / "other" / "a" / "b")
    # A layout that keeps its weights in a folder of the folder.
    for name in ("hyperparams.json", "checkpoints/final.safetensors", "checkpoints/step-1.bin"):
        (root / "other" / "a" / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "other" / "a" / "c" / name).write_bytes(b"{}")
    shutil.copytree(miniature.MODEL, root / "model")
    for extra in ("pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx"):
        (root / "model" / extra).parent.mkdir(exist_ok=True)
        (root / "model" / extra).write_bytes(b"not needed")
    return {REPO: root / "scope", MODEL: root / "model", OTHER: root / "other"}


@pytest.fixture
def server(repos):
    with Hub(repos) as server:
        yield server


@pytest.fixture
def gemscope(server, tmp_path):
    """Run the command in a process of its own, with this hub and a cache of its own."""

    def run(*arguments, **environment):
        server.log.clear()
        return subprocess.run(
            [sys.executable, "-m", "gemscope", *map(str, arguments)],
            env=server.environment(tmp_path / "home", **environment),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def download(gemscope):
    """Download what must come."""

    def run(*arguments, **environment):
        done = gemscope("download", *arguments, **environment)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    return run


@pytest.fixture
def refused(gemscope):
    """Run a command that must be refused in one sentence that matches, and within seconds."""

    def run(*arguments, match, verb="download", **environment):
        began = time.monotonic()
        done = gemscope(verb, *arguments, **environment)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert re.fullmatch(rf"gemscope: .*(?:{match}).*\n", done.stderr), done.stderr
        assert time.monotonic() - began < 40
        return done.stderr

    return run


def python(server, tmp_path, code, *arguments):
    """Code of ours in a process that uses this hub."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    where = server.environment(tmp_path / "home")
    return subprocess.run(command, env=where, capture_output=True, text=True)


def found(folder, name="params.safetensors"):
    """Files that would be loaded."""
    return sorted(f for f in folder.rglob(name) if f.is_file())


def test_only_the_needed_files_come_and_only_once(server, gemscope, download, tmp_path):
    out = download(ADDRESS)
    assert set(server.asked()) == {PARAMS, CONFIG}
    (here,) = found(tmp_path / "home")
    size = sum(f.stat().st_size for f in here.parent.iterdir()) / 1e6
    assert f"{here.parent} ({size:,.1f} MB)" in out
    assert f"gemscope eval {ADDRESS}\n" in out
    assert not list((tmp_path / "home").rglob("*examples*"))
    assert download(ADDRESS) == out
    assert server.log == []
    done = gemscope("info", ADDRESS, "--json", HF_HUB_OFFLINE="1")
    assert json.loads(done.stdout)["path"] == str(here.parent)
    assert server.log == []


def test_what_was_downloaded_loads_without_a_request(server, download, tmp_path):
    download(ADDRESS)
    server.log.clear()
    done = python(server, tmp_path, f"from gemscope import *; print(load_sae({ADDRESS!r}).d_sae)")
    assert (done.stdout, server.log) == ("8\n", []), done.stderr


def test_a_folder_without_a_config_is_whole(server, download, tmp_path):
    address = f"gemma-scope-2-1b-pt/{BARE}"
    out = download(address)
    (here,) = found(tmp_path / "home")
    assert [f.name for f in here.parent.iterdir()] == ["params.safetensors"]
    assert download(address) == out
    assert server.log == []


def test_examples_come_when_asked_for(server, download, tmp_path):
    download(ADDRESS)
    download(ADDRESS, "--examples")
    assert server.asked("GET") == [f"{REPO}/{SMALL}/examples.safetensors"]
    assert found(tmp_path / "home", "examples.safetensors")


def test_a_folder_of_ones_own(server, gemscope, download, tmp_path):
    to = tmp_path / "my files"
    out = download(ADDRESS, "--to", to)
    folder = to / "gemma-scope-2-1b-pt" / SMALL
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "params.safetensors"]
    assert f"gemscope eval '{folder}'\n" in out
    assert not found(tmp_path / "home")
    again = download(ADDRESS, "--to", to)
    assert (again, server.asked("GET")) == (out, [])
    # A file that is not the hub's is fetched anew.
    (folder / "params.safetensors").write_bytes(b"spoilt")
    download(ADDRESS, "--to", to)
    assert server.asked("GET") == [PARAMS]
    done = gemscope("info", folder, "--json", HF_HUB_OFFLINE="1")
    assert json.loads(done.stdout)["address"] == str(folder), done.stderr


def test_a_folder_of_ones_own_is_filled_from_the_cache(server, download, tmp_path):
    download(ADDRESS)
    download(ADDRESS, "--to", tmp_path / "to", HF_HUB_OFFLINE="1")
    assert server.log == []
    (cached,), (copied,) = found(tmp_path / "home"), found(tmp_path / "to")
    assert copied.read_bytes() == cached.read_bytes()
    assert not copied.is_symlink()
    assert len(list(copied.parent.iterdir())) == 2


def test_with_its_model(server, download, tmp_path):
    row = json.loads(download(ADDRESS, "--with-model", "--json"))
    wanted = {f"{MODEL}/{file.name}" for file in Path(miniature.MODEL).iterdir()}
    assert {name for name in server.asked() if name.startswith(MODEL)} == wanted
    assert row["model"] == MODEL
    assert row["model_bytes"] == sum(f.stat().st_size for f in Path(miniature.MODEL).iterdir())
    assert json.loads(download(ADDRESS, "--with-model", "--json", HF_HUB_OFFLINE="1")) == row
    # By this the other libraries find a model by its name alone.
    ref = tmp_path / "home/hub/models--google--gemma-3-1b-pt/refs/main"
    assert ref.read_text() == server.commit(MODEL)
    row = json.loads(download(ADDRESS, "--with-model", "--json", "--to", tmp_path / "to"))
    assert row["next"].endswith(f"{SMALL} --model {tmp_path / 'to' / 'gemma-3-1b-pt'}")
    assert server.log == []


def test_a_model_without_safetensors(server, refused, repos, tmp_path):
    server.repos[MODEL] = tmp_path / "bare"
    server.repos[MODEL].mkdir()
    (server.repos[MODEL] / "pytorch_model.bin").write_bytes(b"pickled")
    refused(ADDRESS, "--with-model", "--json", match=f"{MODEL} has no weights in safetensors")


def test_what_is_bundled_is_here_already(server, download):
    address = hub.catalog(release=hub.BUNDLED_RELEASE)[0].address
    assert "here already" in download(address, "--with-model")
    assert server.log == []


def test_an_interrupted_download_goes_on(server, refused, download, tmp_path):
    address, params = f"gemma-scope-2-1b-pt/{LARGE}", f"{REPO}/{LARGE}/params.safetensors"
    server.faults[params] = Fault("half")
    refused(address, match="came incomplete: run the command again and it goes on")
    assert not found(tmp_path)
    server.faults.clear()
    server.versions[REPO] = "2"
    download(address)
    (asked,) = [r.headers["range"] for r in server.log if r.elsewhere]
    assert int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) >= 10 * 2**20
    (here,) = found(tmp_path)
    assert here.read_bytes() == (server.repos[REPO] / LARGE / here.name).read_bytes()
    assert server.commit(REPO) in here.parts
    assert found(here.parent, "config.json")
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_part_in_a_folder_of_ones_own_is_gone_on_from(server, refused, download, tmp_path):
    whole = server.repos[REPO] / SMALL / "params.safetensors"
    folder = tmp_path / "to" / "gemma-scope-2-1b-pt" / SMALL
    part = folder / f".params.safetensors.{server.etag(whole)[:16]}.incomplete"
    folder.mkdir(parents=True)
    # What was spoilt on the disk is found out, and does not stay.
    part.write_bytes(bytes(100))
    refused(ADDRESS, "--to", tmp_path / "to", match="another content than the hub's hash of it")
    assert not part.exists()
    part.write_bytes(whole.read_bytes()[:100])
    download(ADDRESS, "--to", tmp_path / "to")
    assert [r.headers.get("range") for r in server.log if r.elsewhere] == ["bytes=100-"]
    assert (folder / whole.name).read_bytes() == whole.read_bytes()
    assert len(list(folder.iterdir())) == 2


def test_a_broken_connection_is_taken_up_again(server, download, tmp_path):
    server.faults[PARAMS] = Fault("half", times=1)
    download(ADDRESS)
    assert len(server.asked("GET")) == 3


def test_a_failure_that_passes_is_not_told(server, download):
    server.faults[CONFIG] = Fault("unavailable", times=1)
    download(ADDRESS)


@pytest.mark.parametrize("to", [False, True])
def test_wrong_content_is_refused_and_removed(server, refused, download, tmp_path, to):
    arguments = [ADDRESS, *(["--to", tmp_path / "to"] if to else [])]
    for key in (CONFIG, PARAMS):
        server.faults[key] = Fault("wrong")
        refused(*arguments, match="another content than the hub's hash of it, and was removed")
        assert not found(tmp_path, key.rsplit("/", 1)[-1])
        assert not list(tmp_path.rglob("*.incomplete"))
        server.faults.clear()
    download(*arguments)
    assert found(tmp_path)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("gated", rf"{REPO} is gated: .* accept its licence at \S+/{REPO}, and run the command"),
        ("gated to strangers", rf"gated: log in with `hf auth login` .* at \S+/{REPO}, and run"),
        ("private", rf"no repository {REPO}: check its name, .* log in with `hf auth login`"),
        ("no repository", rf"no repository {REPO}: check its name"),
        ("bad token", "does not know the token .*/settings/tokens, and log in"),
        ("forbidden", rf"does not let you read {REPO}"),
        ("busy", "asked too often and wants a pause: run the command again in 30 seconds"),
        ("broken", r"failure of its own \(500\) .*: run the command again in a while"),
        ("silent", "does not answer: .* run the command again to go on"),
        ("drop", "came incomplete|cannot be reached"),  # by the version of the client
        ("page", "is not the hub: look for a proxy or a log-in page"),
    ],
)
def test_failures_are_told_in_a_sentence(server, refused, tmp_path, kind, match):
    server.faults[PARAMS] = Fault(kind, after=30)
    refused(ADDRESS, match=match, **{"HF_HUB_ETAG_TIMEOUT": "1"} if kind == "silent" else {})
    assert not found(tmp_path)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("gated", rf"{MODEL} is gated: .* accept its licence at \S+/{MODEL}"),
        ("page", "is not the hub"),
        ("busy", "run the command again in a few minutes"),
    ],
)
def test_failures_of_the_model(server, refused, tmp_path, kind, match):
    server.faults[MODEL] = Fault(kind)
    refused(ADDRESS, "--with-model", "--json", match=match)
    assert not found(tmp_path, "model.safetensors")


@pytest.mark.parametrize("missing", ["params.safetensors", None])
def test_a_needed_file_that_is_missing_is_named(server, refused, repos, tmp_path, missing):
    root = server.repos[REPO] = tmp_path / "scope"
    root.mkdir()
    if missing:
        shutil.copytree(repos[REPO] / SMALL, root / SMALL)
        (root / SMALL / missing).unlink()
    refused(ADDRESS, match=f"the hub has no {SMALL}/params.safetensors in {REPO}")


def test_without_a_network(refused, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    refused(ADDRESS, HF_ENDPOINT=closed, match=r"cannot be reached \(Connection refused\)")
    refused(ADDRESS, HF_ENDPOINT="http://hub.invalid", match="http://hub.invalid cannot be reached")
    refused(ADDRESS, HF_ENDPOINT="hub", match="check HF_ENDPOINT")
    offline = "is not in the cache, and HF_HUB_OFFLINE is set: .*: gemscope download google/gemma"
    refused(ADDRESS, HF_HUB_OFFLINE="1", match=offline)
    refused(f"{OTHER}/a/b", HF_HUB_OFFLINE="1", match=f"{OTHER}/a/b is not in the cache")


def test_an_address_that_the_catalog_does_not_have(server, download, refused, tmp_path):
    out = download(f"{OTHER}/a/b")
    assert {name.rpartition("/")[2] for name in server.asked()} == {"config.json", PARAMS[-18:]}
    assert download(f"{OTHER}/a/b", HF_HUB_OFFLINE="1") == out
    assert server.log == []
    refused(f"{OTHER}/a", match=f"{OTHER}/a holds no dictionary .* its folders .* such as b, c$")
    download(f"{OTHER}/a/c")
    names = ["checkpoints/final.safetensors", "hyperparams.json"]
    assert sorted({*server.asked()}) == [f"{OTHER}/a/c/{name}" for name in names]
    download(f"{OTHER}/a/c", HF_HUB_OFFLINE="1")
    refused(f"{OTHER}/z", match=f"no folder z in {OTHER}")
    refused("someone/nothing/a", match="no repository someone/nothing")


def test_all_layers_come_though_some_are_there(server, download, refused, tmp_path):
    root = server.repos[OTHER] = tmp_path / "other"
    (root / "many").mkdir(parents=True)
    for layer in range(3):
        (root / "many" / f"params_layer_{layer}.safetensors").write_bytes(bytes(layer))
    server.faults[f"{OTHER}/many/params_layer_2.safetensors"] = Fault("wrong")
    (root / "many" / "params_layer_2.safetensors").write_bytes(b"weights")
    refused(f"{OTHER}/many", match="another content")
    server.faults.clear()
    download(f"{OTHER}/many")
    assert server.asked("GET") == [f"{OTHER}/many/params_layer_2.safetensors"]
    assert len(found(tmp_path / "home", "params_layer_*")) == 3


def test_links_in_a_folder_of_ones_own_are_not_followed(server, refused, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    for number, place in enumerate(["", "resid_post", SMALL, f"{SMALL}/params.safetensors"]):
        to = tmp_path / f"to{number}"
        link = to / "gemma-scope-2-1b-pt" / place
        link.parent.mkdir(parents=True)
        link.symlink_to(outside / "precious" if place.endswith("safetensors") else outside)
        refused(ADDRESS, "--to", to, match=f"{link} is a symbolic link")
    assert [f.name for f in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "mine"
    (tmp_path / "file").write_text("")
    refused(ADDRESS, "--to", tmp_path / "file", match="file is a file, and --to is a folder")


def test_a_token_goes_to_the_hub_alone_and_is_not_shown(server, gemscope, tmp_path):
    for way in ({"HF_TOKEN": "hf_secret"}, ["--token", "hf_secret"]):
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        more = way if isinstance(way, list) else []
        done = gemscope("download", ADDRESS, *more, **(way if isinstance(way, dict) else {}))
        assert done.returncode == 0
        sent = {r.elsewhere: r.headers.get("authorization") for r in server.log}
        assert sent == {False: "Bearer hf_secret", True: None}
        server.faults[REPO] = Fault("bad token")
        for file in (tmp_path / "home").rglob("params.safetensors"):
            file.unlink()
        failed = gemscope("download", ADDRESS, *more, **(way if isinstance(way, dict) else {}))
        assert failed.returncode == 2
        assert "hf_secret" not in done.stdout + done.stderr + failed.stdout + failed.stderr
        server.faults.clear()
    shutil.rmtree(tmp_path / "home")
    odd = gemscope("download", ADDRESS, "--token", "hf_sécret\n")
    assert re.fullmatch(r"gemscope: the token has characters that no token has.*\n", odd.stderr)
    assert server.log == []


def test_two_at_once_get_it_once(server, tmp_path):
    server.faults[PARAMS] = Fault("slow")
    command = [sys.executable, "-m", "gemscope", "download", ADDRESS]
    environment = server.environment(tmp_path / "home")
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0] and process.returncode for process in both] == [0, 0]
    assert server.asked("GET").count(PARAMS) == 1


def test_a_full_disk(server, download, tmp_path):
    main = "; from gemscope.cli import main; sys.exit(main())"
    full = "import os, sys; os.fsync = lambda _: (_ for _ in ()).throw(OSError(28, 'No space'))"
    done = python(server, tmp_path, full + main, "download", ADDRESS)
    assert done.returncode == 2
    assert re.fullmatch(r"gemscope: the disk of \S+ is full: make room, .*\n", done.stderr)
    small = "import shutil, sys; shutil.disk_usage = lambda _: type('', (), {'free': 10})"
    done = python(server, tmp_path, small + main, "download", ADDRESS, "--to", tmp_path / "to")
    assert done.returncode == 2
    assert re.fullmatch(r"gemscope: the disk of \S+ has 0.0 GB free, .*\n", done.stderr)
    assert not found(tmp_path)
    download(ADDRESS)


def test_a_terminal_is_told_how_much_is_to_come(server, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, "-m", "gemscope", "download", f"gemma-scope-2-1b-pt/{LARGE}"]
    environment = server.environment(tmp_path / "home", TERM="xterm")
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert shown.startswith(f"{REPO}: 2 file(s), 25.4 MB to come")
    assert "params.safetensors: 100%" in shown


@pytest.mark.parametrize("bad", ["../up", "a/../../b", "/etc", "a\\b", "a\nb", "C:b", ".", "a//b"])
def test_names_that_lead_elsewhere_are_refused(bad):
    for remote in (
        hub.Remote("owner/name", bad, ("params.npz",)),
        hub.Remote("owner/name", "folder", (bad,)),
        hub.Remote("owner/name", "folder", ("params.npz",), (bad,)),
        hub.Remote(f"owner/{bad}", "folder", ("params.npz",)),
    ):
        with pytest.raises(InputError, match="is not a name of a file on the hub"):
            hub.fetch(remote)
    with pytest.raises(InputError, match="is not an address of the hub"):
        hub.find(f"owner/name/{bad}")
