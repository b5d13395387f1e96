"""What the package offers under its own name, and that it costs nothing until it is used."""

import subprocess
import sys

import pytest

import specattn.mapping
from specattn.mapping.artifact import Mapping, MappingMetadata


def test_names_are_those_of_the_modules() -> None:
    assert specattn.mapping.Mapping is Mapping
    assert specattn.mapping.MappingMetadata is MappingMetadata
    assert set(specattn.mapping.__all__) <= set(dir(specattn.mapping))


def test_the_public_calibrate_is_the_function_whatever_was_imported_before() -> None:
    code = "import specattn.mapping.calibrate, specattn; specattn.calibrate.__code__"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"specattn\.mapping.*'absent'"):
        _ = specattn.mapping.absent


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, specattn.mapping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
