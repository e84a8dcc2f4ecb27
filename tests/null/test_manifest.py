"""The manifest of a tuned model's folder: what is written is read, what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import change, read_json, some_manifest, write_json, write_some

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library import json_fields, manifest
from gpu_aware_tune.library.manifest import (
    LibraryEntry,
    OutputError,
    ShareFacts,
    TaskFacts,
    Verification,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_some(tmp_path / "net.tuned", tasks=(TaskFacts("conv", "1", 2, 3, 1e-3, "search"),))
    return tmp_path / "net.tuned"


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(folder)
    text = str(caught.value)
    assert "\n" not in text and text.isprintable()
    assert len(text) < 400
    return text


def full() -> manifest.Manifest:
    output = OutputError("scores", 1e-6, 1e-4)
    verification = Verification("ONNX Runtime", ("normal", "zeros"), (output,), "as the oracle")
    share = ShareFacts(
        2, 50, "50 %: 2 cores", {"kind": "llvm", "mcpu": "znver4"}, 2e-3, 1e-3, 1e-6, 0.02,
        verification,
    )  # fmt: skip
    return dataclasses.replace(
        some_manifest(
            "a \x1b[31mname\ud800", tasks=(TaskFacts("conv", "1", 2, 3, 1e-3, "search"),)
        ),
        backend="cores",
        seed=-1,
        objective="share",
        shares=(share,),
        created="2026-11-29T02:29:03+00:00",
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, full())
    assert read_manifest(tmp_path) == full()
    assert read_json(tmp_path)["shares"][0]["verification"]["draws"] == ["normal", "zeros"]
    assert list(read_json(tmp_path))[:2] == ["format", "model"]
    assert {"libraries", "weights", "checksum"} <= set(read_json(tmp_path))


def test_what_json_does_not_have_is_left_out(tmp_path: Path) -> None:
    """An export at the end of a long run does not fail because of a latency that is NaN."""
    share = ShareFacts(2, tuned_s=math.nan, max_error=math.inf)
    write_manifest(tmp_path, dataclasses.replace(some_manifest(), shares=(share,)))
    assert "NaN" not in (tmp_path / "manifest.json").read_text()
    assert read_manifest(tmp_path).shares == (ShareFacts(2),)


def test_a_change_is_noticed_and_white_space_is_none(folder: Path) -> None:
    values = read_json(folder)
    (folder / "manifest.json").write_text(json.dumps(values, indent=4, sort_keys=True))
    assert read_manifest(folder).model.name == "net"
    values["tasks"][0]["weight"] = 4
    (folder / "manifest.json").write_text(json.dumps(values))
    assert "does not have its checksum" in refused(folder)
    del values["checksum"]
    (folder / "manifest.json").write_text(json.dumps(values))
    assert "(checksum is missing)" in refused(folder)


def test_folders_of_format_1_open(folder: Path) -> None:
    values = read_json(folder)
    kept = ("model", "inputs", "outputs", "libraries", "weights", "versions")
    old = {"format": 1, **{name: values[name] for name in kept}}
    del old["libraries"][0]["entry"]
    write_json(folder, old)
    found = read_manifest(folder)
    assert (found.format, found.libraries[0].entry, found.device) == (1, "main", "llvm")
    assert (found.shares, found.tasks, found.created, found.seed) == ((), (), None, None)


def test_a_later_format_says_what_to_do(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 3, "libraries": "elsewhere"}')
    assert "has format 3, this version reads up to 2: update it" in refused(folder)


def test_the_libraries_are_in_the_order_of_their_units(folder: Path) -> None:
    entries = [LibraryEntry(n, f"lib-{n}.so", 1, 64 * "0", f"main_{n}") for n in (8, 2, 4)]
    write_manifest(folder, dataclasses.replace(some_manifest(), libraries=tuple(entries)))
    found = read_manifest(folder)
    assert found.units == [2, 4, 8]
    assert found.library(4).entry == "main_4"


DAMAGE: list[tuple[dict[str, Any], str | None]] = [
    ({"format": True}, "format is true, not a whole number"),
    ({"format": 0}, "format is 0, not from 1 to"),
    ({"format": None}, "format is null, not a whole number"),
    ({"model": "net"}, "model is 'net', not an object"),
    ({"model": {"name": "net"}}, "model.hash is missing"),
    ({"libraries": {}}, "libraries is an object, not a list"),
    ({"libraries": []}, "libraries is empty"),
    ({"libraries": [3]}, "libraries[0] is 3, not an object"),
    ({"libraries.0.units": "x"}, "libraries[0].units is 'x', not a whole number"),
    ({"libraries.0.units": 2.0}, "libraries[0].units is 2.0, not a whole number"),
    ({"libraries.0.units": -1}, "libraries[0].units is -1, not from 1 to 1000000"),
    ({"libraries.0.bytes": 10**40}, "libraries[0].bytes is 1000"),
    ({"libraries.0.sha256": 64 * "g"}, "not a SHA-256 in hexadecimal"),
    ({"libraries.0.entry": "main; x"}, "libraries[0].entry is 'main; x', not a function's name"),
    ({"weights.file": "../w"}, "weights.file is '../w', not a plain file name"),
    ({"weights.file": "/etc/passwd"}, "not a plain file name"),
    ({"weights.file": ".."}, "not a plain file name"),
    ({"weights.file": ".w"}, "not a plain file name"),
    ({"weights.file": "w\n"}, "not one line of printable text"),
    ({"weights.file": ""}, "not one line of printable text"),
    ({"weights.file": ["w"]}, "weights.file is a list, not a text"),
    ({"inputs.0.shape": [1, "3"]}, "inputs[0].shape[1] is '3', not a whole number"),
    ({"inputs.0.shape": [1, True]}, "inputs[0].shape[1] is true, not a whole number"),
    ({"inputs.0.shape": [-2]}, "inputs[0].shape[0] is -2"),
    ({"inputs.0.shape": [-1]}, "inputs[0].shape[0] is -1, not a whole number from 0 to"),
    ({"outputs.0.shape": [-1]}, None),
    ({"outputs.0.shape": [-2]}, "outputs[0].shape[0] is -2, not a whole number from -1 to"),
    ({"inputs.0.shape": [65536, 65536]}, "of at most 2147483647 elements"),
    ({"inputs.0.dtype": "float31"}, "inputs[0].dtype is 'float31', not the name of a type"),
    ({"versions": {}}, "versions.tvm is missing"),
    ({"versions": {"tvm": 1}}, "versions.tvm is 1, not a text"),
    ({"versions": {"tvm": "1\x1b[2J"}}, "not one line of printable text"),
    ({"device": 3}, "device is 3, not a text"),
    ({"seed": 0.5}, "seed is 0.5, not a whole number"),
    ({"shares": [{"units": 2, "tuned_s": -1e-3}]}, "shares[0].tuned_s is -0.001, not from 0 to"),
    ({"shares": [{"units": 2, "percent": 101}]}, "shares[0].percent is 101, not from 0 to 100"),
    ({"shares": [{"units": 2, "target": "llvm"}]}, "shares[0].target is 'llvm', not an object"),
    ({"shares": [{"units": 2, "target": {"mcpu": "-x"}}]}, None),
    ({"shares": [{"units": 2, "target": {"mcpu": "a b"}}]}, "not a processor's name"),
    ({"tasks": [{"name": "a", "hash": "b", "units": 2, "weight": 0}]}, "tasks[0].weight is 0"),
    ({"tasks": 7}, "tasks is 7, not a list"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), DAMAGE, ids=lambda value: str(value)[:50])
def test_a_damaged_field_is_named(folder: Path, changes: dict[str, Any], text: str | None) -> None:
    values = read_json(folder)
    for path, value in changes.items():
        *way, last = (int(part) if part.isdecimal() else part for part in path.split("."))
        inner: Any = values
        for part in way:
            inner = inner[part]
        inner[last] = value
    write_json(folder, values)
    if text is None:
        read_manifest(folder)
    else:
        told = refused(folder)
        assert text in told
        assert told.endswith("): tune again")


def test_names_are_single(folder: Path) -> None:
    values = read_json(folder)
    change(folder, libraries=2 * values["libraries"])
    assert "libraries has '2' twice" in refused(folder)
    change(folder, libraries=values["libraries"], inputs=2 * values["inputs"])
    assert "inputs has 'image' twice" in refused(folder)


NO_JSON: list[tuple[bytes, str]] = [
    (b"", "Expecting value"),
    (b"\xff\xfe", "codec can't decode"),
    (b"[]", "it is a list, not an object"),
    (b"null", "it is null"),
    (b'{"format": 1, "format": 1}', "'format' is there twice"),
    (b'{"format": NaN}', "NaN is no number of JSON"),
    (b'{"format": 1, "seed": 1e999}', "model is missing"),
    (b'{"format": 2, "checksum": "x", "seed": 1e999}', "a number in it is too large"),
    (b'{"format": ' + 5000 * b"1" + b"}", "4300 digits"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (100_000 * b"[", "nested too deeply"),
]


@pytest.mark.parametrize(("text", "told"), NO_JSON, ids=lambda value: str(value)[:30])
def test_what_is_no_manifest(folder: Path, text: bytes, told: str) -> None:
    (folder / "manifest.json").write_bytes(text)
    assert told in refused(folder)


def test_a_manifest_has_a_largest_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (folder / "manifest.json").read_bytes()
    monkeypatch.setattr(manifest, "LARGEST_BYTES", len(content))
    read_manifest(folder)
    (folder / "manifest.json").write_bytes(content + b" ")
    assert f"larger than {len(content)} bytes" in refused(folder)


def test_only_regular_files_are_read(folder: Path) -> None:
    """None of these may be waited for."""
    path, aside = folder / "manifest.json", folder.parent / "aside.json"
    path.rename(aside)
    path.symlink_to(aside)
    assert read_manifest(folder).model.name == "net"
    odd: list[Callable[[], None]] = [
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to(aside.parent),
    ]
    for make in odd:
        path.unlink()
        make()
        told: list[str] = []
        reader = threading.Thread(target=lambda told=told: told.append(refused(folder)))
        reader.daemon = True
        reader.start()
        reader.join(5)
        assert told and "cannot be read" in told[0]
    path.unlink()
    path.symlink_to("nowhere")
    assert "has no manifest.json" in refused(folder)


def test_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path / "file" / "in"):
        assert "is no folder: give the folder that `tune MODEL` wrote" in refused(path)
    (tmp_path / "empty").mkdir()
    assert "is no tuned model: it has no manifest.json" in refused(tmp_path / "empty")


def test_a_folder_moved_away_by_a_killed_export_is_put_back(folder: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder.rename(folder.with_name(f".{folder.name}.{os.getppid()}.old"))
    assert "is no folder" in refused(folder), "the export may still be at work"
    folder.with_name(f".{folder.name}.{os.getppid()}.old").rename(
        folder.with_name(f".{folder.name}.{dead.pid}.old")
    )
    assert read_manifest(folder).model.name == "net"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_fields_show_values_in_short() -> None:
    fields = json_fields.parse_object(b'{"a": "' + 1000 * b"x" + b'", "b c": 1}')
    assert len(str(fields.wrong("a", "short"))) < 60
    assert str(fields.wrong("b c", "a text")) == "'b c' is 1, not a text"
