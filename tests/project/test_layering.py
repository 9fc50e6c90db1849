"""The folders: what may depend on what, as docs/architecture.md says, and where tests are."""

import ast
import json
import shlex
import subprocess

import pytest

from cmake_build import configure, needs_cmake
from paths import OPERATOR, PACKAGE, TESTS

# A folder of the package -> the other folders that it may import from.  "" is the top.
MAY_IMPORT = {
    "": set(),
    "conversion": {""},
    "data_parallel": {"", "conversion"},
    "distributed": {"", "data_parallel"},
    "hooks": {"", "conversion", "data_parallel"},
}
# These join the folders together: what users import, and what happens when they do.
JOINTS = {"__init__.py", "startup.py", "estimator.py"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def folder_of(path):
    return str(path.relative_to(PACKAGE).parent).replace(".", "")


def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def imported_folders(path, tree):
    """Yield the folders of the package that a module imports from."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            parts = [*base, *(node.module or "").split(".")]
            for name in (alias.name for alias in node.names):
                target = PACKAGE.joinpath(*(part for part in [*parts, name] if part))
                yield parts[0] if target.is_dir() or (PACKAGE / parts[0]).is_dir() else ""
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            assert not any(name.startswith("gluon_syncbn") for name in names), path


def test_folders_of_the_package_import_in_one_direction():
    for path, tree in trees().items():
        folder = folder_of(path)
        if path.name in JOINTS and folder == "":
            continue
        others = {other for other in imported_folders(path, tree) if other != folder}
        assert others <= MAY_IMPORT[folder], path


def private_names(tree):
    """Yield the names of private attributes that a module uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.alias):
            name = node.name
        else:
            continue
        if name.startswith("_") and not name.startswith("__"):
            yield name


def own_names(tree):
    """Yield the names of a module's functions, classes, variables and attributes of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def test_one_file_knows_the_private_parts_of_mxnet():
    parsed = trees()
    ours = {name for path, tree in parsed.items() for name in own_names(tree)}
    for path, tree in parsed.items():
        theirs = set(private_names(tree)) - ours
        if path.name == "mxnet_private.py":
            assert {"_cached_graph", "_kwargs", "_deferred_init"} <= theirs  # the check finds them
        else:
            assert not theirs, path


def test_importing_a_module_has_no_effects():
    """Modules define things; ``startup.start`` alone changes the process (see there)."""
    harmless = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign
    for path, tree in trees().items():
        for node in tree.body[1:]:  # after the docstring
            if path.name != "__init__.py" or folder_of(path):
                assert isinstance(node, harmless), f"{path}:{node.lineno}"
                for decorator in getattr(node, "decorator_list", ()):
                    known = getattr(decorator, "attr", getattr(decorator, "id", None))
                    assert known == "contextmanager", f"{path}:{node.lineno}"


# Modules without a file of tests, and why.
UNTESTED = {
    "version": "one number; project/test_versions.py compares it with the other places",
    "startup": "importing the package runs it; without it, no test of the operators passes",
    "estimator": "the public name of data_parallel/estimator.py",
}


def test_every_module_has_a_file_of_tests_with_its_name():
    modules = {path.relative_to(PACKAGE) for path in MODULES if path.name != "__init__.py"}
    without = {
        str(module.with_suffix(""))
        for module in modules
        if not (TESTS / module.with_name(f"test_{module.name}")).exists()
    }
    assert without == UNTESTED.keys()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{file of src/operator: its compiler and include flags}, as CMake has them."""
    folder = tmp_path_factory.mktemp("build")
    done = configure(folder, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    assert done.returncode == 0, done.stderr
    entries = json.loads((folder / "compile_commands.json").read_text())
    found = {}
    for entry in entries:
        words = shlex.split(entry["command"])
        flags = [w for i, w in enumerate(words) if w.startswith("-I") or words[i - 1] == "-isystem"]
        flags = [f if f.startswith("-I") else f"-isystem{f}" for f in flags]
        found[entry["file"]] = [words[0], "-std=c++17", *flags]
    return found


@needs_cmake
@pytest.mark.parametrize(
    "source, header, allowed",
    [
        ("kernels/cpu/batch_norm_kernels.cc", "kernels/batch_norm_math.h", True),
        ("kernels/cpu/batch_norm_kernels.cc", "exchange/key_barrier.h", False),
        ("kernels/cpu/batch_norm_kernels.cc", "adapter/passes.h", False),
        ("kernels/cpu/batch_norm_kernels.cc", "mxnet/base.h", False),
        ("exchange/key_barrier.cc", "kernels/batch_norm_math.h", True),
        ("exchange/key_barrier.cc", "adapter/passes.h", False),
        ("exchange/key_barrier.cc", "mxnet/base.h", False),
        ("adapter/passes.cc", "exchange/key_barrier.h", True),
        ("adapter/passes.cc", "mxnet/base.h", True),
        ("library.cc", "adapter/passes.h", True),
        ("library.cc", "mxnet/base.h", False),
    ],
)
def test_the_build_finds_only_the_headers_that_a_folder_may_know(
    source, header, allowed, commands, tmp_path
):
    probe = tmp_path / "probe.cc"
    probe.write_text(f'#if !__has_include("{header}")\n#error missing\n#endif\n')
    command = [*commands[str(OPERATOR / source)], "-E", str(probe)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == allowed, done.stderr


def test_no_include_goes_around_the_folders():
    for path in OPERATOR.rglob("*.*"):
        assert '#include "../' not in path.read_text(encoding="utf-8"), path
