"""Somebody else's files: damaged ones are named, hostile ones refused, and nothing is run."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jedit
from jedit.checkpoint import DamagedError, Ledger
from jedit.checkpoint.sealed import MAX_BYTES
from jedit.edits import Edit, LowRank
from tests.checkpoint.trees import PLAIN, make_curvature, numbers


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """An edit, a curvature and a ledger, undamaged."""
    folder = tmp_path_factory.mktemp("originals")
    thin = LowRank(numbers(1, 3, 2), numbers(1, 2, 2), PLAIN)
    edit = Edit({"a/kernel": thin, "b": numbers(40)})
    jedit.save_edit(edit, folder / "edit")
    jedit.save_curvature(make_curvature(), folder / "curvature")
    ledger = Ledger.create(folder / "ledger", {"b": numbers(40)})
    ledger.record(Edit({"b": numbers(40, seed=1)}), request=["x"], method="m")
    ledger.revert(1)
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    """Copies of them, to be spoilt."""
    return shutil.copytree(originals, tmp_path / "copies")


def reseal(folder, change=lambda _: None, listed=True):
    """Writes a manifest that fits itself and, if listed, the files: what a hostile writer would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if listed:
        manifest["files"] = {
            str(path.relative_to(folder)): [
                path.stat().st_size,
                hashlib.sha256(path.read_bytes()).hexdigest(),
            ]
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "manifest.json"
        }
    change(manifest)
    del manifest["seal"]
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    manifest["seal"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def refused(folder, sentence, load=jedit.load_edit):
    with pytest.raises(DamagedError, match=sentence) as caught:
        load(folder)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_the_helper_itself_changes_nothing(folder):
    before = (folder / "edit/manifest.json").read_bytes()
    reseal(folder / "edit")
    assert (folder / "edit/manifest.json").read_bytes() == before


def test_every_file_cut_or_with_one_bit_flipped_is_named(folder):
    files = [path for path in sorted((folder / "edit").rglob("*")) if path.is_file()]
    assert len(files) == 4
    for path in files:
        raw = path.read_bytes()
        for spoilt in (raw[:-1], raw + b"\0", b"", _flipped(raw)):
            if spoilt != raw:
                path.write_bytes(spoilt)
                assert str(path) in refused(folder / "edit", ": ")
        path.unlink()
        assert str(path) in refused(folder / "edit", "is missing|No such file")
        path.write_bytes(raw)


def _flipped(raw):
    place = len(raw) // 2
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :] if raw else b""


def test_every_bit_of_a_manifest_counts(folder):
    path = folder / "ledger/entries/000002/manifest.json"
    raw = path.read_bytes()
    for place in range(0, len(raw), 31):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << place % 8)]) + raw[place + 1 :])
        with pytest.raises(DamagedError, match="000002/manifest.json"):
            Ledger(folder / "ledger").verify()


@pytest.mark.parametrize(
    "name",
    [
        "../edit/arrays/0",
        "/etc/passwd",
        "arrays/../../x",
        "arrays//x",
        "./x",
        "a\\..\\x",
        "",
    ],
)
def test_no_name_leaves_the_folder(folder, name):
    def add(manifest):
        manifest["files"][name] = [1, "0" * 64]

    reseal(folder / "edit", add)
    refused(folder / "edit", "leaves the folder|no file's plain name")


@pytest.mark.parametrize("what", ["file", "folder", "manifest"])
def test_links_are_refused(folder, what):
    edit = folder / "edit"
    name = {"file": "arrays/0", "folder": "arrays", "manifest": "manifest.json"}[what]
    shutil.move(edit / name, folder / "aside")
    (edit / name).symlink_to(folder / "aside")
    assert str(edit / name) in refused(edit, "is a link")


def test_what_is_no_plain_file_is_refused(folder):
    os.mkfifo(folder / "edit/arrays/pipe")
    refused(folder / "edit", "arrays/pipe: is no plain file")
    (folder / "edit/arrays/pipe").unlink()
    (folder / "edit/manifest.json").unlink()
    os.mkfifo(folder / "edit/manifest.json")
    refused(folder / "edit", "manifest.json: is no plain file")


def test_a_ledger_of_links_is_refused(folder):
    entry = folder / "ledger/entries/000001"
    shutil.move(entry, folder / "aside")
    entry.symlink_to(folder / "aside")
    with pytest.raises(DamagedError, match="000001: is no folder"):
        Ledger(folder / "ledger").verify()
    shutil.move(folder / "ledger/entries", folder / "entries")
    (folder / "ledger/entries").symlink_to(folder / "entries")
    with pytest.raises(DamagedError, match="is no ledger, it has no folder entries"):
        Ledger(folder / "ledger")


def test_a_lock_or_a_secret_that_is_a_link_is_refused(folder):
    victim = folder / "victim"
    victim.write_bytes(b"x" * 32)
    (folder / "ledger/lock").unlink()
    (folder / "ledger/lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        Ledger(folder / "ledger").revert(1)
    (folder / "ledger/secret").unlink()
    (folder / "ledger/secret").symlink_to(victim)
    with pytest.raises(DamagedError, match="secret: cannot be read .is a link"):
        Ledger(folder / "ledger").verify()
    assert victim.read_bytes() == b"x" * 32


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "nested 100000 deep"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested 33 deep"),
        (" " * (MAX_BYTES + 1), "bytes, at most"),
        ('{"kind": 1, "kind": 2}', "a field stands twice"),
        ('{"kind": NaN}', "NaN is no number"),
        ('{"kind": ' + "9" * 5000 + "}", "no JSON of this form"),
        ('"' + "\\" * 9, "no JSON of this form"),
        ("[]", "must be an object"),
        ("\ud800", "no JSON of this form"),
        ("{}", "lacks the fields"),
    ],
)
def test_json_that_is_no_manifest(folder, text, sentence):
    path = folder / "edit/manifest.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert str(path) in refused(folder / "edit", sentence)


def test_a_manifest_written_in_another_way_is_refused(folder):
    path = folder / "edit/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    refused(folder / "edit", "its seal is not that of its contents")


WEIGHT = ("content", "blocks", 0, 1, "low rank", "weight")
DENSE = ("content", "blocks", 1, 1)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("format",), "jedit 1", "format 'jedit 1'"),
        (("kind",), "curvature", "of a 'curvature', not of a 'edit'"),
        (("files",), [], "must be objects"),
        (("files", "arrays/0"), [1.0, "0" * 64], "its size and its SHA-256"),
        (("files", "arrays/0"), ["1", None], "its size and its SHA-256"),
        (("code",), "import os", "unknown fields"),
        (("content", "class"), "os.system", "unknown fields"),
        (("content", "blocks"), {}, "no names, each once"),
        (("content", "blocks", 0, 0), "b", "no names, each once"),
        (("content", "blocks", 0, 0), "", "no names, each once"),
        (("content", "blocks", 0, 0), "c", "make no Weight"),
        ((*DENSE,), {"os.system": "true"}, "is a 'os.system'; known are"),
        ((*DENSE, "dense"), "x" * 10_000, "an array's dtype and shape"),
        ((*DENSE, "dense", "dtype"), "object", "an array's dtype and shape"),
        ((*DENSE, "dense", "dtype"), ["float32"], "an array's dtype and shape"),
        ((*DENSE, "dense", "shape"), [True], "an array's dtype and shape"),
        ((*DENSE, "dense", "shape"), [-1], "an array's dtype and shape"),
        ((*DENSE, "dense", "shape"), [10**30], "an array's dtype and shape"),
        ((*DENSE, "dense", "shape"), [41], "its shape and dtype take 164"),
        ((*DENSE, "dense", "dtype"), "int8", "its shape and dtype take 40"),
        ((*WEIGHT, "path"), 1, "is no weight"),
        ((*WEIGHT, "layers"), 0, "is no weight"),
        ((*WEIGHT, "d_in"), 2.0, "is no weight"),
        ((*WEIGHT, "is_stacked"), 0, "is no weight"),
        ((*WEIGHT, "shape"), [2, 2], "relayouts do not fit"),
        ((*WEIGHT, "ops"), [["eval", "1"]], "is no relayout"),
        ((*WEIGHT, "ops"), [["transpose", [5, 0]]], "relayouts do not fit"),
        ((*WEIGHT, "ops"), [["reshape", [6]]] * 65, "are no relayouts"),
        ((*WEIGHT, "ops"), [["layer", 0]] * 60, "relayouts do not fit"),
        ((*WEIGHT, "module"), "os", "unknown fields"),
    ],
)
def test_contents_of_another_form(folder, place, value, sentence):
    def change(manifest):
        inner = manifest
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value

    reseal(folder / "edit", change, listed=False)
    refused(folder / "edit", sentence)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("blocks", 1, 1, "kronecker", "input"), "none", "there is no factor 'none'"),
        (("blocks", 1, 1, "kronecker", "input"), "out", "another side than 3"),
        (("blocks", 0, 1), {"full": {}}, "known are 'diagonal' and 'kronecker'"),
        (("blocks", 2, 1, "diagonal", "values", "shape"), [1, 2, 5], "no values of a"),
        (("blocks", 0, 1, "kronecker", "output"), "out", r"b\|w.*out has 1 layers, its weight 2"),
        (("blocks", 1, 1, "kronecker", "corrected", "shape"), [2, 3, 2], "no values of a"),
        (("blocks", 2, 1, "diagonal", "values", "shape"), [5, 5, 2], "no values of a"),
        (("factors", 0, 1, "basis"), None, "make no factor"),
        (("factors", 0, 1, "by"), "inverse", "by is 'inverse', but .* factor 'eigenbasis'"),
        (("factors", 2, 1, "by"), "cholesky", "by is 'cholesky', but .* factor 'diagonal'"),
        (("num_outputs",), 7, "an array's dtype and shape"),
    ],
)
def test_curvatures_of_another_form(folder, place, value, sentence):
    def change(manifest):
        inner = manifest["content"]
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value

    reseal(folder / "curvature", change, listed=False)
    refused(folder / "curvature", sentence, jedit.load_curvature)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (("matrix", None, None), "by is 'eigh', but .* factor 'undecomposed'"),
        ((None, [1, 3, 0], [1, 1]), "make no factor"),
    ],
)
def test_factors_of_another_form(folder, arrays, sentence):
    """Without eigenvectors by that which finds them; and none of the leading eigenvectors."""

    def change(manifest):
        factor = manifest["content"]["factors"][0][1]
        for name, shape in zip(("matrix", "basis", "eigenvalues"), arrays, strict=True):
            if shape is None:
                factor[name] = None
            elif shape != name:
                factor[name]["shape"] = shape

    reseal(folder / "curvature", change, listed=False)
    refused(folder / "curvature", sentence, jedit.load_curvature)


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_of_its_size", [False, True])
def test_a_pickle_in_place_of_an_array_is_not_run(folder, is_of_its_size):
    pickled = pickle.dumps(Trap(folder / "sprung"))
    size = len(pickled) if is_of_its_size else 8
    jedit.save_edit(Edit({"b": jnp.zeros(size, jnp.uint8)}), folder / "one")
    (folder / "one/arrays/0").write_bytes(pickled)
    reseal(folder / "one")
    if is_of_its_size:  # numbers like any others
        assert bytes(jedit.load_edit(folder / "one").blocks["b"]) == pickled
    else:
        refused(folder / "one", f"has {len(pickled)} bytes, its shape and dtype take 8")
    assert not (folder / "sprung").exists()
    pickle.loads((folder / "one/arrays/0").read_bytes())
    assert (folder / "sprung").exists()  # the trap works


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/code.py", "x.pkl", "0.npy", "00", "3", "-1"])
def test_files_that_are_of_no_array_are_refused(folder, name):
    path = folder / "edit/arrays" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    refused(folder / "edit", "is not among the files")
    reseal(folder / "edit")
    assert str(path) in refused(folder / "edit", "is no file of an array")


@pytest.mark.parametrize(
    ("field", "value", "takes"),
    [
        ("shape", [41], 164),
        ("shape", [39], 156),
        ("shape", [2**39], 2**41),  # refused before there is memory for it
        ("shape", [], 4),
        ("dtype", "float64", 320),
        ("dtype", "bool", 40),
    ],
)
def test_arrays_of_another_size_are_refused(folder, field, value, takes):
    reseal(folder / "edit", lambda m: m["content"]["blocks"][1][1]["dense"].update({field: value}))
    message = refused(folder / "edit", f"has 160 bytes, its shape and dtype take {takes}")
    assert str(folder / "edit/arrays/2") in message


@pytest.mark.parametrize("cut", [True, False])
def test_an_array_that_is_cut_or_gone_is_refused(folder, cut):
    path = folder / "edit/arrays/2"
    path.write_bytes(path.read_bytes()[:-4]) if cut else path.unlink()
    reseal(folder / "edit")
    sentence = "has 156 bytes, its shape and dtype take 160" if cut else "is missing"
    assert str(path) in refused(folder / "edit", sentence)


def test_truth_values_are_true_or_false_whatever_their_bytes(folder):
    jedit.save_edit(Edit({"b": jnp.zeros(3, bool)}), folder / "one")
    (folder / "one/arrays/0").write_bytes(bytes([0, 1, 170]))
    reseal(folder / "one")
    read = np.asarray(jedit.load_edit(folder / "one").blocks["b"])
    assert read.view(np.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"number": 1.0}, "is no record"),
        ({"action": "exec"}, "is no record"),
        ({"target": "1"}, "is no record"),
        ({"target": 7}, "reverts 7, which is no edit"),
        ({"request": ["Ana"]}, "is no record"),
        ({"settings": []}, "is no record"),
        ({"hook": "os.system"}, "unknown fields"),
        ({"base": "0" * 64}, "is of another base"),
    ],
)
def test_records_of_another_form(folder, fields, sentence):
    """The last record, whose change no other record shows, and without a secret to check by."""
    reseal(folder / "ledger/entries/000002", lambda m: m["content"].update(fields), listed=False)
    (folder / "ledger/secret").unlink()
    manifest = json.loads((folder / "ledger/entries/000002/manifest.json").read_text())
    head = {"count": 2, "seal": manifest["seal"], "code": "0" * 64}
    (folder / "ledger/head.json").write_text(json.dumps(head))
    with pytest.raises(DamagedError, match=sentence):
        Ledger(folder / "ledger").verify()
