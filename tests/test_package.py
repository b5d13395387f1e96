"""The package as it is installed and imported."""

import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import specattn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "specattn"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder))
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_import_does_no_heavy_work() -> None:
    heavy = ("torch", "transformers", "numpy", "matplotlib", "gguf", "triton")
    loaded = run("-c", f"import sys, specattn; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_listing_names_imports_nothing() -> None:
    listed = run("-c", "import sys, specattn; print('torch' in sys.modules, *dir(specattn))").split()
    assert listed[0] == "False"
    assert set(specattn.__all__) < set(listed[1:])


@pytest.mark.parametrize("name", specattn.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(specattn, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__, f"{name} has no docstring"


def test_every_public_name_has_one_home() -> None:
    assert specattn.__all__ == sorted(specattn._HOME)
    assert len(specattn._HOME) == sum(map(len, specattn._MODULES.values()))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        _ = specattn.attend


def test_version_is_that_of_the_installed_package() -> None:
    assert specattn.__version__ == importlib.metadata.version("specattn")


def test_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    files = {f"specattn/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert "specattn/py.typed" in files
    assert files <= set(wheel.namelist())


def test_wheel_names_its_licence_and_extras(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"gguf", "models", "small-models", "plot", "dev"} <= set(metadata.get_all("Provides-Extra"))
    licence = wheel.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
