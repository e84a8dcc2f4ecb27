"""Tuned models' folders that were damaged at random: each opens, or is refused in one line.

FUZZ_CASES sets the number of cases, FUZZ_SEED the first one; a failure names its seed. Most cases
read the manifest and check the files it names; some are loaded and called, in a process of their own.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_cases import LIMIT_S, outcome, run_cases
from manifests import write_json
from tiny_library import write_library

from gpu_aware_tune.library import load
from gpu_aware_tune.library.checks import check_library, check_versions, check_weights
from gpu_aware_tune.library.manifest import read_manifest
from gpu_aware_tune.model.importer import random_inputs

LOADED_EVERY = int(
    os.environ.get("FUZZ_LOADED_EVERY", "25")
)  # one case of so many is loaded and called
TOO_DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    OSError,
    RecursionError,
)  # for another kind of damage

Damage = Callable[[Path, random.Random], None]

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 1.5, -0.5, 1e300, 1e308, 10**20, -(10**30), 2**63, float("nan"),
    float("inf"), "", "x", "main", "..", "../lib-1.so", "/dev/zero", "/etc/passwd", "lib-1.so", "\x1b[2J",
    "a\nb", "\x00", "\ud800", 300 * "n", [], [[]], {}, {"": {}}, [1, 2], ["x"], "llvm", "cuda", "float32",
    "cuda/NVIDIA H200/sm_90a", "green", 64 * "0",
]  # fmt: skip


# -- kinds of damage -------------------------------------------------------------------------------


def flip_bits(folder: Path, draw: random.Random) -> None:
    path = some_file(folder, draw)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 50))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(folder: Path, draw: random.Random) -> None:
    path = some_file(folder, draw)
    size = path.stat().st_size
    os.truncate(path, draw.choice((0, 1, size - 1, size + 1, draw.randrange(size))))


def insert(folder: Path, draw: random.Random) -> None:
    path = some_file(folder, draw)
    content = path.read_bytes()
    place = draw.randrange(len(content))
    strange = draw.choice(
        (b"\0", b"\xff\xfe", b"NaN", b"[[", b'{"a":' * 3000, 2000 * b"[", b" ", b"9" * 5000)
    )
    path.write_bytes(content[:place] + strange + content[place:])


def delete_fields(folder: Path, draw: random.Random) -> None:
    change_fields(folder, draw, lambda inner, key: inner.pop(key))


def retype_fields(folder: Path, draw: random.Random) -> None:
    def put(inner: Any, key: Any) -> None:
        inner[key] = copy.deepcopy(draw.choice(ODD))  # which a further change may go into

    change_fields(folder, draw, put)


def duplicate_fields(folder: Path, draw: random.Random) -> None:
    def double(inner: Any, key: Any) -> None:
        if isinstance(inner, list):
            inner.append(copy.deepcopy(inner[key]))
        else:
            inner[f"{key}{draw.choice(('', '2', ' '))}"] = copy.deepcopy(inner[key])

    change_fields(folder, draw, double)


def repeat_names(folder: Path, draw: random.Random) -> None:
    text = (folder / "manifest.json").read_text()
    lines = text.splitlines(keepends=True)
    number = draw.randrange(1, len(lines) - 1)
    lines.insert(draw.randrange(1, len(lines) - 1), lines[number])
    (folder / "manifest.json").write_text("".join(lines))


def swap_files(folder: Path, draw: random.Random) -> None:
    one, other = draw.sample(sorted(folder.iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def swap_names(folder: Path, draw: random.Random) -> None:
    """Libraries and weights take each other's entries, checksums included."""
    values = json.loads((folder / "manifest.json").read_text())
    entries = [*values["libraries"], values["weights"]]
    one, other = draw.sample(entries, 2)
    for name in ("file", "bytes", "sha256"):
        one[name], other[name] = other[name], one[name]
    write_json(folder, values)


def wrong_file(folder: Path, draw: random.Random) -> None:
    path = some_file(folder, draw)
    path.unlink()
    kind = draw.randrange(7)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind < 6:
        path.symlink_to(("/dev/zero", path.name, "nowhere", "/dev/tty")[kind - 2])


def wrong_permissions(folder: Path, draw: random.Random) -> None:
    """These mean nothing to root, for whom such a folder opens."""
    draw.choice([folder, *folder.iterdir()]).chmod(draw.choice((0o000, 0o111, 0o200, 0o444)))


def missing(folder: Path, draw: random.Random) -> None:
    if draw.randrange(4):
        some_file(folder, draw).unlink()
    else:
        shutil.rmtree(folder)
        if draw.randrange(2):
            folder.write_text("{}")


KINDS: tuple[Damage, ...] = (
    flip_bits, truncate, insert, delete_fields, retype_fields, retype_fields, retype_fields,
    duplicate_fields, repeat_names, swap_files, swap_names, wrong_file, wrong_permissions, missing,
)  # fmt: skip


def some_file(folder: Path, draw: random.Random) -> Path:
    """A file of the folder, the manifest more often than others."""
    files = sorted(folder.iterdir())
    return draw.choice([*files, folder / "manifest.json", folder / "manifest.json"])


def change_fields(folder: Path, draw: random.Random, change: Callable[[Any, Any], Any]) -> None:
    """Change fields wherever they are, in either format; mostly with a checksum that fits."""
    values = json.loads((folder / "manifest.json").read_text())
    values["format"] = draw.choice((1, 2, 2))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        change(*draw.choice(list(places(values))))
    if isinstance(values, dict) and draw.randrange(8):
        try:
            write_json(folder, values)
        except ValueError:  # a cycle cannot come about, a number that is too long can
            return
    else:
        (folder / "manifest.json").write_text(json.dumps(values))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every member of every object and list within a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


# -- the cases -------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """What `load` does before it maps a file."""
    manifest = read_manifest(folder)
    check_versions(folder, manifest)
    check_weights(folder, manifest)
    for units in manifest.units:
        check_library(folder, manifest, units)
    random_inputs(manifest.inputs, 0)
    json.dumps(manifest.as_dict())


def load_and_call(folder: Path) -> None:
    with load(folder, preload=True) as library:
        library(random_inputs(library.inputs, 0))
        repr(library)


def outcome_apart(function: Callable[[Path], None], folder: Path) -> str:
    """The same in a forked child, which may crash."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(4 * LIMIT_S))
        os.write(writing, outcome(function, folder).encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return text if code == 0 else f"ended with {code}: {text}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("fuzz"))[1]


def run_case(seed: int, sound: Path, scratch: Path) -> str:
    draw = random.Random(seed)
    folder = scratch / "case.tuned"
    shutil.copytree(sound, folder)
    try:
        for _ in range(draw.choice((1, 1, 1, 2))):
            if folder.is_dir() and all(path.is_file() for path in folder.iterdir()):
                with contextlib.suppress(*TOO_DAMAGED):
                    draw.choice(KINDS)(folder, draw)
        if seed % LOADED_EVERY == 0:
            return outcome_apart(load_and_call, folder)
        return outcome(check, folder)
    finally:
        if folder.is_dir():
            folder.chmod(0o700)
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)


def test_a_sound_folder_opens(sound: Path) -> None:
    assert outcome(check, sound) == "opened"
    assert outcome_apart(load_and_call, sound) == "opened"


def test_damaged_folders_open_or_are_refused_in_one_line(sound: Path, tmp_path: Path) -> None:
    run_cases(lambda seed: run_case(seed, sound, tmp_path))
