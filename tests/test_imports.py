"""Data flows one way: this holds the table of who may import whom, and the size of files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

# Everybody may import core; it imports nothing.
CORE = "core"
# These may import everything, and nobody imports them but the ones named with them.
TOPS = {"cli": {"__main__"}, "recipes": {"cli"}, "__main__": set()}
TABLE = {
    "core": set(),
    "tracing": set(),
    "curvature": {"tracing"},
    "geometry": {"tracing", "curvature"},
    "edits": {"tracing", "curvature"},
    "steering": {"tracing", "curvature", "edits", "models"},
    "objectives": set(),
    "transforms": {"tracing", "curvature", "geometry"},
    "training": {"objectives", "edits"},
    "methods": {
        *("tracing", "curvature", "geometry", "edits", "objectives", "transforms", "training"),
        "steering",
    },
    "requests": {
        *("tracing", "curvature", "geometry", "edits", "objectives", "transforms", "training"),
        *("methods", "attacks"),
    },
    "metrics": {"tracing", "objectives", "training"},
    "attacks": {"objectives", "training"},
    "checkpoint": {"tracing", "curvature", "edits"},
    "models": {"tracing"},
    "data": set(),
    "report": {"metrics"},
}

# What `import jedit` leaves for those who need it: each takes a tenth of a second or more.
LATE = (
    *("flax", "qwix", "orbax", "safetensors", "tokenizers", "transformers", "tunix", "torch"),
    *("scipy", "sklearn", "matplotlib", "pandas", "IPython", "treescope"),
)


def module_name(path, source_root):
    """The dotted name of a file, and whether it is a package's `__init__`."""
    parts = path.relative_to(source_root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


def imported_modules(name, source, *, is_package=False):
    """Yields (line, dotted name) of all a module imports, wherever in it, relative ones too."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(name, source, *, is_package=False):
    """The imports of one module that the table forbids, one sentence each."""
    parts = name.split(".")
    row = parts[1] if len(parts) > 1 else None
    found = []
    if parts[0] == "jedit" and row is not None and row not in TABLE and row not in TOPS:
        found.append(f"{name} has no row in the import table of {Path(__file__).name}")
    for line, target in imported_modules(name, source, is_package=is_package):
        root, *rest = target.split(".")
        if root != "jedit":
            continue
        to = rest[0] if rest else None
        allowed = True
        if parts[0] == "jedit_kernels":
            allowed = False
        elif to in TOPS:
            allowed = row == to or row in TOPS[to]
        elif row is None or row in TOPS or to == CORE:
            allowed = True
        elif to == row:
            # A method never imports another; what two share is a private module beside them.
            # The catalogue's rows name them all.
            is_method = row == "methods" and not is_package and len(parts) > 3
            is_method = is_method and parts[2] != "rows"
            allowed = not is_method or rest[1:3] == parts[2:4] or _is_shared(rest[1:])
        else:
            # `from jedit import solve` names no folder: it would go round the table.
            allowed = to in TABLE.get(row, set())
        if not allowed:
            found.append(f"{name}, line {line}: may not import {target}")
    return found


def _is_shared(rest):
    """Whether a module below `jedit.methods` is private, or the targets that two methods share."""
    return any(part.startswith("_") for part in rest) or rest[:2] == ["associations", "targets"]


def too_long(name, source):
    """A sentence for a file that should have been split, else nothing."""
    num_lines = len(source.splitlines())
    return [f"{name}: {num_lines} lines, at most {MAX_LINES}"] if num_lines > MAX_LINES else []


def library_files():
    """Yields (path, dotted name, whether it is a package) of both import packages."""
    for source_root, package in ((ROOT, "jedit"), (ROOT / "kernels", "jedit_kernels")):
        for path in sorted((source_root / package).rglob("*.py")):
            yield path, *module_name(path, source_root)


def test_imports_go_along_the_arrows():
    files = list(library_files())
    assert len(files) > 10
    found = [
        sentence
        for path, name, is_package in files
        for sentence in violations(name, path.read_text(), is_package=is_package)
    ]
    assert not found, "\n".join(found)


def defined_names(source):
    """What a module makes itself, or has through the door to the kernels."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (x for target in targets for x in ast.walk(target))
            found |= {x.id for x in names if isinstance(x, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module == "jedit_kernels":
            found |= {alias.name for alias in node.names}
    return found


def borrowed(name, source, homes):
    """The names that one module takes from another which did not make them, a sentence each.

    Args:
        name: of the module.
        source: its text.
        homes: what each module of the library defines; packages are not among them.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module not in homes:
            continue
        for alias in node.names:
            if alias.name not in homes[node.module]:
                found.append(
                    f"{name}, line {node.lineno}: {node.module} does not define {alias.name}"
                )
    return found


def foreign(name, source):
    """What a package's `__init__` hands on that its own modules did not make, a sentence each."""
    return [
        f"{name}, line {line}: hands on {target}, which is another room's"
        for line, target in imported_modules(name, source, is_package=True)
        if target.split(".")[0] == "jedit" and not f"{target}.".startswith(f"{name}.")
    ]


def test_names_come_from_the_room_that_defines_them():
    files = list(library_files())
    homes = {
        name: defined_names(path.read_text()) for path, name, is_package in files if not is_package
    }
    tests = [(path, str(path.relative_to(ROOT))) for path in sorted(ROOT.glob("tests/**/*.py"))]
    found = [
        sentence
        for path, name in [*((path, name) for path, name, _ in files), *tests]
        for sentence in borrowed(name, path.read_text(), homes)
    ]
    for path, name, is_package in files:
        found += foreign(name, path.read_text()) if is_package else []
    assert not found, "\n".join(found)


def test_a_borrowed_name_is_found():
    homes = {"jedit.core.batch": defined_names("from x import Weight\nclass Batch: ...\nN = 1")}
    taken = "from jedit.core.batch import Batch, N"
    assert borrowed("jedit.data.text", taken, homes) == []
    assert len(borrowed("jedit.data.text", f"{taken}, Weight", homes)) == 1
    assert foreign("jedit.edits", "from jedit.edits.edit import Edit") == []
    assert len(foreign("jedit.edits", "from jedit.core.batch import Batch")) == 1


def test_importing_jedit_leaves_slow_packages_alone():
    code = "import sys, jedit; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jax" in done.stdout.split()
    assert not set(LATE) & set(done.stdout.split())


def test_kernels_have_one_door():
    doors = {
        name
        for path, name, is_package in library_files()
        if name.split(".")[0] == "jedit"
        for _, target in imported_modules(name, path.read_text(), is_package=is_package)
        if target.split(".")[0] == "jedit_kernels"
    }
    assert len(doors) <= 1, doors


def test_files_are_short():
    folders = ("jedit", "kernels", "tests")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [s for path in paths for s in too_long(path.relative_to(ROOT), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("jedit.tracing.sites", "from jedit.curvature import kfac"),
        ("jedit.tracing.sites", "import jedit.models.gpt"),
        ("jedit.tracing.sites", "def f():\n    from ..models import gpt"),
        ("jedit.tracing.sites", "import importlib\nimportlib.import_module('jedit.data')"),
        ("jedit.curvature.kfac", "from jedit.methods.curvature.kfade import kfade"),
        ("jedit.curvature.kfac", "from jedit import find_sites"),
        ("jedit.curvature.kfac", "import jedit"),
        ("jedit.objectives.npo", "from jedit.metrics import loss"),
        ("jedit.metrics.loss", "from jedit.edits import Edit"),
        ("jedit.methods.curvature.kfade", "from jedit.methods.trained.rosu import rosu"),
        ("jedit.methods.trained.gu", "from . import rosu"),
        ("jedit.methods.trained.gu", "from jedit.methods import kfade"),
        ("jedit.methods.trained.gu", "from jedit.requests import batch_unlearn"),
        ("jedit.models.gpt", "from ..data import authors"),
        ("jedit.report", "from jedit.recipes.scenes import digits"),
        ("jedit.recipes.scenes.digits", "from jedit.cli.main import main"),
        ("jedit.core.batch", "from jedit.edits import Edit"),
        ("jedit.training.loop", "from jedit.methods import kfade"),
        ("jedit.nameless", ""),
        ("jedit_kernels.moment", "from jedit.core.batch import Batch"),
    ],
)
def test_a_planted_violation_is_found(name, source):
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source", "is_package"),
    [
        ("jedit", "from jedit.methods import kfade\nfrom jedit.edits import Edit", True),
        (
            "jedit.curvature.kfac",
            "from jedit.tracing import capture\nfrom .kron import x",
            False,
        ),
        ("jedit.objectives.npo", "from jedit.core.batch import Batch\nimport jax", False),
        ("jedit.methods", "from jedit.methods.trained.gu import gu\nfrom . import trained", True),
        ("jedit.methods.curvature.kfade", "from jedit.methods._search import search", False),
        (
            "jedit.methods.associations.rome",
            "from jedit.methods.associations._write import x",
            False,
        ),
        ("jedit.cli.main", "from jedit.recipes.scenes import digits\nimport jedit", False),
        ("jedit.recipes.scenes.digits", "from jedit.report import page\nimport jedit", False),
    ],
)
def test_what_is_allowed_is_not_found(name, source, is_package):
    assert violations(name, source, is_package=is_package) == []


def test_the_top_of_the_package_imports_no_command_line():
    assert len(violations("jedit", "from jedit.cli.main import main", is_package=True)) == 1
    assert len(violations("jedit", "from . import recipes", is_package=True)) == 1


def test_a_planted_long_file_is_found():
    assert too_long("x", "x = 1\n" * MAX_LINES) == []
    assert too_long("x", "x = 1\n" * (MAX_LINES + 1)) == ["x: 501 lines, at most 500"]
