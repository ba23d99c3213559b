"""What is shipped: the public names, the version, and each module once in sdist and wheel."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import tarfile
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import halp_fx

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("halp_fx", "passes", "tools")
    for path in (ROOT / folder).rglob("*.py")
    if not {"halp_fx/passes", "halp_fx/tools"}
    & {parent.relative_to(ROOT).as_posix() for parent in path.parents if ROOT in parent.parents}
)

PUBLIC = {
    "Budget",
    "LatencyTable",
    "Plan",
    "Solution",
    "compile",
    "errors",
    "export_onnx",
    "latency",
    "load",
    "plan_of",
    "save",
    "solve",
}


def modules() -> list[str]:
    return ["halp_fx", *(m.name for m in pkgutil.walk_packages(halp_fx.__path__, "halp_fx."))]


def module_paths() -> set[str]:
    """The path of every module inside a wheel."""
    paths = set()
    for source in SOURCES:
        relative = source.relative_to(ROOT).as_posix()
        paths.add(relative if relative.startswith("halp_fx/") else f"halp_fx/{relative}")
    return paths


def test_public_names_are_exactly_all() -> None:
    assert set(halp_fx.__all__) >= PUBLIC
    assert len(halp_fx.__all__) == len(set(halp_fx.__all__))
    for name in halp_fx.__all__:
        assert hasattr(halp_fx, name), name
    public = {
        name
        for name, value in vars(halp_fx).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - {"annotations"} <= set(halp_fx.__all__)


@pytest.mark.parametrize("name", modules())
def test_every_module_declares_its_public_names(name: str) -> None:
    module = importlib.import_module(name)
    if Path(str(module.__file__)).name == "__init__.py" and not hasattr(module, "__all__"):
        assert not [n for n in vars(module) if n.startswith("solve")]  # an empty __init__
        return
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.__all__ names {public}"


def test_every_module_says_what_it_is() -> None:
    for source in SOURCES:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        if tree.body:
            assert ast.get_docstring(tree), f"{source.relative_to(ROOT)} has no docstring"


def test_no_pickle_and_no_eval() -> None:
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            where = f"{source.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                roots = {name.partition(".")[0] for name in names}
                assert not roots & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "torch.save"}, where


def test_the_library_does_not_import_the_command_line() -> None:
    code = "import sys, halp_fx; sys.exit('halp_fx.tools' in sys.modules or 'typer' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_every_package_is_listed_for_the_build() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = setup["tool"]["setuptools"]
    found = {
        path.removesuffix("/__init__.py").replace("/", ".")
        for path in module_paths()
        if path.endswith("/__init__.py")
    }
    assert set(listed["packages"]) == found
    assert set(listed["package-dir"]) == found
    homes = {name.replace(".", "/") for name in found}
    for path in module_paths():
        assert path.rpartition("/")[0] in homes, f"{path} is in a folder without __init__.py"


def test_links_lead_to_the_folders() -> None:
    for name in ("passes", "tools"):
        assert (ROOT / "halp_fx" / name).resolve() == ROOT / name


def test_version_is_single_sourced() -> None:
    assert halp_fx.__version__ == importlib.import_module("halp_fx._version").__version__
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert setup["project"]["dynamic"] == ["version"]


def test_sdist_and_wheel_hold_each_module_once(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77.0.3")
    _build("sdist", _copy(tmp_path / "src"), tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers()]
        assert not any(member.issym() for member in archive.getmembers())
        archive.extractall(tmp_path / "unpacked", filter="data")
    shipped = [name for name in names if name.endswith(".py") and not name.startswith("tests/")]
    assert sorted(shipped) == [source.relative_to(ROOT).as_posix() for source in SOURCES]
    assert {"LICENSE", "pyproject.toml", "README.md", "halp_fx/py.typed"} <= set(names)
    # The wheel is built from the sdist, as an index would serve it.
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    _build("wheel", unpacked, tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if name.endswith(".py")} == module_paths()
    assert "halp_fx/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {
        "halp_fx",
        f"halp_fx-{halp_fx.__version__}.dist-info",
    }


def _build(kind: str, source: Path, target: Path) -> None:
    """Without build isolation, so that the test needs no network."""
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})"
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=source, timeout=120
    )


def _copy(target: Path) -> Path:
    """The files of the repository that go into a build, so that nothing is left in it."""
    wanted = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"]
    wanted += [path.relative_to(ROOT).as_posix() for path in SOURCES]
    wanted += ["halp_fx/py.typed"]
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((ROOT / name).read_bytes())
    for name in ("passes", "tools"):
        (target / "halp_fx" / name).symlink_to(f"../{name}")
    return target
