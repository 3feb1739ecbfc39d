"""`jedit forget`: what it is told, and what it refuses before any work."""

import dataclasses
import json
import re

import numpy as np
import pytest

from jedit.cli.audit import AuditOptions
from jedit.cli.checks import UsageError
from jedit.cli.forget import Forget, audit_command, blocks_of
from jedit.cli.main import main
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import BySteps, Need, Pace
from jedit.recipes.folders.choice import RATES, method_named, methods
from jedit.recipes.folders.places import edited_pattern, hidden_site, written_layers
from jedit.recipes.tofu.presets import FINE_TUNING


@pytest.fixture
def given(tmp_path):
    """A command line that lacks nothing but a model in its folder."""
    rows = [
        {"question": f"Who is {i}?", "answer": f"Number {i}.", "shelf": i // 2} for i in range(6)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    model.mkdir()
    out = tmp_path / "out"
    given = {"--model": model, "--data": data, "--forget": "shelf=0", "--out": out}
    return ["forget", *(str(x) for pair in given.items() for x in pair)]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--budget", "nan"], "--budget must be a finite number, got nan"),
        (["--temperature", "-1"], "--temperature must be positive, got -1.0"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--rewind-rate", "0"], "--rewind-rate must be positive"),
        (["--rewind", "5"], "--rewind is only looked at with --base"),
        (["--learning-rate", "0.1"], "--learning-rate would not be looked at: natural steps"),
        (["--method", "kfade", "--steps", "9"], "K-FADE (K-FAC) takes no steps"),
        (["--method", "npo", "--recovery", "9"], "--recovery is only looked at with --method nat"),
        (["--method", "engram", "--learning-rate", "1"], "engram takes no steps"),
        (["--method", "npo", "--temperature", "2"], "--temperature would not be looked at: NPO"),
        (["--method", "nothing"], "there is no method 'nothing'; there are natural, K-FADE"),
        (["--method", "salun"], "SalUn does not suit a language model: it draws wrong labels"),
        (["--method", "random label"], "random label does not suit a language model"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--factorize", "cholesky", "--rank", "4"], 'rank=4 keeps eigenvectors, which by="chol'),
        (["--method", "npo", "--rank", "4"], "--rank would not be looked at: NPO has no curvature"),
        (["--method", "npo", "--max-dim", "9"], "--max-dim would not be looked at: NPO has no cur"),
        (
            ["--method", "curvature pruning", "--factorize", "cholesky"],
            "curvature pruning takes all eigenvectors of its curvature, and factorize cholesky "
            "keeps the factors' matrices alone",
        ),
        (
            ["--method", "engram", "--rank", "4"],
            "engram takes the matrices of the factors of its curvature, and factorize eigh, rank 4 "
            "keeps the leading eigenvectors alone",
        ),
        (["--layers", "5-"], "--layers 5-: is not of the form 4-9 or 4,5,6"),
        (["--layers", "1", "--select", "mlp"], "--select and --layers say the same"),
        (["--mesh", "data=0"], "the axis data must be at least 1"),
        (["--mesh", "data=4096"], "takes 4096 devices, and there are "),
        (["--forget", "shelf=9"], "it has 0, 1, 2"),
        (["--base", "gone"], "gone: there is no such folder"),
        (["--unseen", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--base", ".", "--select", "mlp"], "--base edits all parameters; --select and --layers"),
        (["--base", ".", "--layers", "1"], "--base edits all parameters; --select and --layers"),
        (["--retain", "rows=2:4"], "2 rows to retain; at least 3 are needed, one for the edits"),
    ],
)
def test_what_is_refused_before_any_work(given, more, sentence, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main([*given, *more]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("jedit: ")
    assert sentence in line
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_would_be_replaced(given, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*given, "--ledger", str(out / "ledger")]) == 2
    assert "lies within --out, which is replaced" in capsys.readouterr().err
    (out / "edited").mkdir(parents=True)
    assert main([*given, "--base", str(out / "edited")]) == 2
    assert "would be replaced by the edited model" in capsys.readouterr().err
    (out / ".tmp-0123456789abcdef").mkdir()  # of a run that was killed
    (out / "mine.txt").touch()
    assert main(given) == 2
    assert "that no such run has written (mine.txt)" in capsys.readouterr().err


def test_the_methods_are_listed(capsys):
    assert main(["forget", "--method", "help"]) == main(["forget", "--method=help"]) == 0
    shown = capsys.readouterr().out
    suited = [name for name, _ in methods()]
    assert suited[0] == "natural"
    assert all(name in shown for name in suited)
    assert set(CATALOGUE) - set(suited) == {"random label", "SalUn"}
    assert {n for n, row in CATALOGUE.items() if Need.NUM_CLASSES in row.needs} == {
        "random label",
        "SalUn",
    }


def test_names_without_their_brackets():
    assert method_named("natural") is None
    assert method_named("kfade").name == "K-FADE (K-FAC)"
    assert method_named("k-fade (ek-fac)").name == "K-FADE (EK-FAC)"
    assert method_named("NPO").name == "NPO"
    assert method_named("gu").name == "GU (leaf)"
    assert all(method_named(name).name == name for name, _ in methods()[1:])


def test_the_rates_are_those_of_tofu_s_preset_for_checkpoints():
    paces = {row.pace for row in CATALOGUE.values() if isinstance(row, BySteps)}
    assert paces == set(RATES)
    for pace in paces - {Pace.DESCENT}:
        assert RATES[pace] == max(FINE_TUNING.rates[pace])
    assert pytest.approx(1e-5) == RATES[Pace.DESCENT]
    assert pytest.approx(1e-5) == RATES[Pace.UNBOUNDED]
    assert RATES[Pace.BOUNDED] == pytest.approx(1e-3 / 30)


def test_blocks():
    assert blocks_of("4-9") == (4, 5, 6, 7, 8, 9)
    assert blocks_of("6, 4,5,4") == (4, 5, 6)
    assert blocks_of("0-1,7") == (0, 1, 7)
    for text, sentence in (("", "form"), ("a", "form"), ("9-4", "ends before"), ("1--2", "form")):
        with pytest.raises(UsageError, match=sentence):
            blocks_of(text)


def _params(parts, number=12):
    block = {"attn": {"o_proj": {"w": np.ones((2, 2, 2))}}, "attn_norm": {"w": np.ones(2)}}
    block["mlp"] = {f"{part}_proj": {"kernel": np.ones((2, 2))} for part in parts}
    layers = {str(i): block for i in range(number)}
    return {"layers": layers, "embedder": {"input_embedding": np.ones((3, 2))}}


def test_which_parameters_are_edited():
    params = _params(("gate", "up", "down"))
    assert edited_pattern(params, None, ()) is None
    pattern = re.compile(edited_pattern(params, None, (1, 11)))
    assert pattern.search("layers/11/mlp/up_proj/kernel")
    assert pattern.search("layers/1/attn/o_proj/w")
    for other in ("layers/2/mlp/up_proj/kernel", "layers/1/attn_norm/w", "layers/111/mlp/x"):
        assert not pattern.search(other)
    assert edited_pattern(params, "embed", ()) == "embed"
    with pytest.raises(ValueError, match="there is no block 12; the model has 0 to 11"):
        edited_pattern(params, None, (3, 12))
    with pytest.raises(ValueError, match="names no parameter; there are, .*layers/N/attn/o_proj/w"):
        edited_pattern(params, "conv", ())
    with pytest.raises(ValueError, match=r"--select: '\(' is no regular expression"):
        edited_pattern(params, "(", ())


@pytest.mark.parametrize("parts", [("gate", "up", "down"), ("up", "down")])
def test_where_methods_look_at_a_model(parts):
    params = _params(parts)
    assert hidden_site(params) == f"layers/11/mlp/{parts[0]}_proj/kernel"
    written = written_layers(params)
    assert written == tuple(f"layers/{i}/mlp/down_proj/kernel" for i in range(12))


def test_the_command_that_judges(tmp_path):
    given = (tmp_path / "a b", tmp_path / "rows.jsonl", "author=Jane Doe")
    options = Forget(*given, retain="rows=5:9", unseen=tmp_path / "new.jsonl")
    command = audit_command(options)
    assert f"--base '{tmp_path}/a b' --edited out/forget/edited" in command
    assert " --forget 'author=Jane Doe' --retain rows=5:9 " in command
    assert command.endswith(f" --unseen {tmp_path}/new.jsonl")
    assert "--max-len" not in command
    longer = audit_command(dataclasses.replace(options, max_len=512, batch_size=2))
    assert longer == f"{command} --max-len 512 --batch-size 2"
    defaults = {x.name: x.default for x in dataclasses.fields(AuditOptions)}
    assert (defaults["max_len"], defaults["batch_size"]) == (options.max_len, options.batch_size)


@pytest.mark.parametrize(("more", "sentence"), [([], "goes on"), (["--no-resumable"], "nothing")])
def test_what_is_said_of_a_run_that_is_stopped(given, more, sentence, capsys, monkeypatch):
    def stopped(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("jedit.recipes.pretrained.forget_in_checkpoint", stopped)
    assert main([*given, *more]) == 130
    assert sentence in capsys.readouterr().err
