"""Where the command runs: no home, a closed cache, a compiler that hangs, other programs that end it, any terminal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from cli.conftest import SCRIPT, Outcome
from sfumato.cli.main import main

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such users, modes or signals")
# Even root is asked for permission then.
POWERLESS = """
import ctypes
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""
# As in a container with a user that no list of users knows.
HOMELESS = """
import os, pwd
def unknown(number):
    raise KeyError(number)
pwd.getpwuid = unknown
for name in ("HOME", "SFUMATO_CACHE", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
"""
NO_HOME = "note: no cache is used, because there is no home folder; set SFUMATO_CACHE to a folder of your own"


def drawing(model: Path, *more: str) -> list[object]:
    return ["generate", "horse", "--model", model, "--steps", "1", "-o", "x.png", *more]


def notes(outcome: Outcome) -> list[str]:
    return [line for line in outcome.succeeded().err.splitlines() if line.startswith("note: ")]


# ---- caches ---------------------------------------------------------------------------------------------------------


@posix
def test_a_user_without_a_home(sfumato_each, model, tmp_path):
    drawn, plan, shown, doctor, missing = sfumato_each(
        [
            drawing(model),
            ["plan", "x", "--model", model],
            ["show", model],
            ["doctor", "--json"],
            ["show", "owner/name"],
        ],
        cwd=tmp_path,
        before=HOMELESS
        + "from sfumato.runtime import speeds; speeds.SCALE, speeds.LEAST_SECONDS = {'cpu': 4}, 0.002\n",
    )
    assert notes(drawn).count(NO_HOME) == 1
    assert (tmp_path / "x.png").is_file()
    for outcome in (plan, shown, doctor):
        outcome.succeeded()
    assert doctor.json["facts"]["speeds"]
    missing.failed(1, "'owner/name' is not completely in the local cache")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@posix
def test_a_cache_in_the_home_of_nobody(sfumato_each, model, tmp_path):
    (drawn,) = sfumato_each([drawing(model)], cwd=tmp_path, env={"SFUMATO_CACHE": "~nobody-of-this-name/x"})
    assert notes(drawn).count(NO_HOME) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="root may look everywhere")
@pytest.mark.parametrize("closed", [".", "kernels", "speeds"])
def test_a_cache_that_is_closed(sfumato_each, model, tmp_path, closed):
    cache = tmp_path / "cache"
    for name in ("kernels", "speeds"):
        (cache / name).mkdir(parents=True)
    (cache / closed).chmod(0)
    before = POWERLESS if sys.platform == "linux" else ""
    commands = [["plan", "x", "--model", model], drawing(model), ["show", model]]
    plan, drawn, shown = sfumato_each(commands, cwd=tmp_path, env={"SFUMATO_CACHE": str(cache)}, before=before)
    (cache / closed).chmod(0o700)
    said = [line for outcome in (plan, drawn) for line in notes(outcome) if "cache" in line]
    assert said == [f"note: the cache in {cache} cannot be used (Permission denied); set SFUMATO_CACHE to a folder of your own"]  # fmt: skip
    assert notes(shown) == []


def test_a_damaged_cache_stops_nothing(sfumato_each, model, tmp_path):
    cache = tmp_path / "cache"
    code = "from sfumato.runtime.speeds import kept_name; from sfumato.runtime.facts import read_facts; print(kept_name(read_facts()))"
    name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (cache / name).parent.mkdir(parents=True)
    (cache / name).write_text('{"a":' * 100_000)
    env = {"SFUMATO_CACHE": str(cache)}
    first, second = sfumato_each([["plan", "x", "--model", model]] * 2, cwd=tmp_path, env=env)
    assert notes(first) == [f"note: {cache / name} was damaged and is recreated"]
    assert notes(second) == []


@posix
def test_kernels_are_built_once_and_a_compiler_that_hangs_is_not_waited_for_again(sfumato_each, model, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    fake = tmp_path / "slow-cc"
    fake.write_text("#!/bin/sh\nsleep 300\n")
    fake.chmod(0o755)
    env = {"SFUMATO_CACHE": str(tmp_path / "cache"), "CC": str(fake)}
    before = "from sfumato.kernels import build; build.SECONDS, build.QUICK_SECONDS = 0.5, 0.2\n"
    for text in (f"{fake} could not build the fast kernels: it did not finish within 0.5 s", "to try again"):
        began = time.monotonic()
        (drawn,) = sfumato_each([drawing(model)], cwd=tmp_path, env=env, before=before)
        assert time.monotonic() - began < 60
        (slower,) = [line for line in notes(drawn) if "running without the fast kernels" in line]
        assert text in slower
    env.pop("CC")
    (drawn,) = sfumato_each([drawing(model)], cwd=tmp_path, env=env)
    assert any(line.startswith("note: building the ") for line in notes(drawn))


# ---- being ended ----------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("number", "code", "times"), [("SIGTERM", 143, 1), ("SIGTERM", 143, 2), ("SIGHUP", 129, 1)])
def test_a_request_to_end_is_met_as_ctrl_c_is(environment, model, tmp_path, number, code, times):
    command = [SCRIPT, *drawing(model, "--steps", "900", "--scheduler", "ddim", "--preview-every", "1")]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under `nohup`
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "x.preview.png").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        for _ in range(times):
            process.send_signal(getattr(signal, number))
        out, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    assert (out, err.splitlines()[-1]) == ("", "sfumato: interrupted; no unfinished files were left behind")
    assert err.count("sfumato:") == 1
    assert list(tmp_path.iterdir()) == []


@posix
def test_what_a_user_has_set_aside_stays_set_aside(environment, tmp_path):
    """`nohup` has a process ignore that its terminal goes."""
    code = "import signal; from sfumato.cli.main import main\ntry:\n    main()\nfinally:\n    print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "True"


# ---- names ----------------------------------------------------------------------------------------------------------


def test_several_at_once_lose_nothing(environment, model, tmp_path):
    (tmp_path / "x.png").write_text("the user's")
    command = [SCRIPT, *map(str, drawing(model, "--count", "2", "--preview-every", "1", "--steps", "2"))]
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    taken = [name for process in processes for name in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0] * 3
    assert len(set(taken)) == 6
    assert (tmp_path / "x.png").read_text() == "the user's"
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", *taken}
    for name in taken:
        with Image.open(tmp_path / name) as image:
            image.load()


def test_a_preview_never_takes_a_name_of_the_users(sfumato_each, model, tmp_path):
    (tmp_path / "x.preview.png").write_text("the user's")
    (drawn,) = sfumato_each([drawing(model, "--steps", "3", "--preview-every", "1")], cwd=tmp_path)
    drawn.succeeded()
    assert (tmp_path / "x.preview.png").read_text() == "the user's"
    assert {path.name for path in tmp_path.iterdir()} == {"x.preview.png", "x.png"}


LONG = "y" * 300


def test_paths_that_cannot_be(sfumato_each, tmp_path):
    cases = [
        (["generate", "x", "-o", "~nobody-of-this-name/x.png"], 2, "starts with a home folder that does not exist"),
        (["generate", "x", "--model", "~nobody-of-this-name/x"], 2, "starts with a home folder that does not exist"),
        (["generate", "x", "--image", "~nobody-of-this-name/x.png"], 2, "starts with a home folder"),
        (["plan", "x", "--facts", "~nobody-of-this-name/x.json"], 2, "starts with a home folder"),
        (["doctor", "--save-facts", "~nobody-of-this-name/x.json"], 2, "starts with a home folder"),
        (["bench", "--json", "~nobody-of-this-name/x.json"], 2, "starts with a home folder"),
        (["coreml", "generate", "x", "-i", "~nobody-of-this-name/x"], 2, "starts with a home folder"),
        (["coreml", "verify", "~nobody-of-this-name/x"], 2, "starts with a home folder"),
        (["generate", "x", "-o", f"{LONG}.png"], 1, "too long; choose a shorter one"),
        (["generate", "x", "-o", f"new/{'y' * 250}.png"], 1, "too long; choose a shorter one"),
        (["generate", "x", "-o", f"{LONG}/x.png"], 1, "too long; choose a shorter one"),
        (["generate", "x", "--model", LONG], 1, "there is no folder"),
        (["generate", "x", "--image", LONG], 2, "there is no image"),
        (["show", LONG], 1, "there is no folder"),
        (["doctor", "--save-facts", LONG], 1, "too long; choose a shorter one"),
        (["coreml", "generate", "x", "-i", LONG], 1, "there is no folder"),
        (["coreml", "verify", LONG], 1, "there is no folder"),
        (["doctor", "--save-facts", "/"], 1, "/ is a folder; give the name of a file in it"),
        (["doctor", "--save-facts", "."], 1, ". is a folder; give the name of a file in it"),
        (["bench", "--json", "/"], 1, "/ is a folder"),
        (["bench", "--plot", "folder.svg"], 1, "folder.svg is a folder"),
    ]
    (tmp_path / "folder.svg").mkdir()
    for outcome, (words, code, text) in zip(sfumato_each([words for words, *_ in cases], cwd=tmp_path), cases, strict=True):  # fmt: skip
        outcome.failed(code, text)
        assert len(outcome.err) < 700, words
    assert {path.name for path in tmp_path.iterdir()} == {"folder.svg"}


@posix
@pytest.mark.parametrize("words", [["show"], ["generate", "x"], ["doctor"], ["schedulers"], ["coreml", "convert"]])
def test_a_folder_that_is_gone(environment, tmp_path, words):
    line = 'mkdir gone && cd gone && rmdir ../gone && exec "$0" "$@"'
    done = subprocess.run(["sh", "-c", line, SCRIPT, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    Outcome(done.returncode, done.stdout, done.stderr).failed(
        1, "the current folder has been deleted; change to another"
    )


# ---- what terminals are sent ----------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\nsfumato: all is well\rx\u202e\u2028\ud800"


def test_words_of_files_do_nothing_to_a_terminal(sfumato_each, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    commands, kinds = [], ("class", "name", "huge", "markup")
    for kind in kinds:
        copy = Path(shutil.copytree(folder, tmp_path / kind))
        entry = {"class": HOSTILE, "huge": "y" * 1_000_000, "markup": "[/red][bold]:smile:[link=x]"}
        changed = index | {"scheduler": ["diffusers", entry.get(kind, "PNDMScheduler")]}
        if kind == "name":
            changed |= {HOSTILE: ["diffusers", "PNDMScheduler"], "[/bold]": ["[/bold]", "[/bold]"]}
        (copy / "model_index.json").write_text(json.dumps(changed))
        commands += [["show", copy], ["show", copy, "--json"], ["generate", "x", "--model", copy, "--steps", "1"]]
    for outcome, words in zip(sfumato_each(commands, cwd=tmp_path), commands, strict=True):
        assert "unexpected" not in outcome.err, (words, outcome.err[:500])
        for line in outcome.err.splitlines():
            assert len(line) < 700
            assert line.startswith(("sfumato: ", "note: ", "seed "))
        shown = outcome.err + outcome.out
        assert [char for char in shown if not char.isprintable() and char != "\n"] == [], words
        if outcome.code:
            assert len(outcome.err.splitlines()) == 1


@posix
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_terminal_can_show_it(environment, model, tmp_path, encoding):
    env = environment | {"PYTHONIOENCODING": encoding}
    env.pop("PYTHONUTF8")
    for words in (["show", model], ["show", "é\u4e2d\U0001f600"]):
        done = subprocess.run([SCRIPT, *map(str, words)], cwd=tmp_path, env=env, capture_output=True, check=False)
        err = done.stderr.decode(encoding)
        assert "unexpected" not in err
        assert done.returncode == (0 if model in words else 1), err
        done.stdout.decode(encoding)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--version"], ["schedulers"], ["schedulers", "--json"]])
def test_a_full_disk_for_what_is_printed(environment, tmp_path, words, unbuffered):
    line = 'exec "$0" "$@" > /dev/full'
    env = environment | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["sh", "-c", line, SCRIPT, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)  # fmt: skip
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    outcome.failed(1, "standard output cannot be written (No space left on device); send it elsewhere")


@posix
@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed(environment, model, tmp_path, closing):
    command = ["sh", "-c", f'exec "$0" "$@" {closing}', SCRIPT, *map(str, drawing(model, "--json"))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "unexpected" not in done.stderr
    with Image.open(tmp_path / "x.png") as image:
        image.load()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_compiled_code_reports_as_an_error_of_its_own(monkeypatch, capsys, number):
    """As safetensors does if a signal arrives while it makes a tensor."""

    def app(obj):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr("sfumato.cli.main.app", app)
    names = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {each: signal.getsignal(each) for each in names}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == "sfumato: interrupted; no unfinished files were left behind\n"
