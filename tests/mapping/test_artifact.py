"""The mapping file: what goes in comes out, and what is wrong is said."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from mapping_examples import DRAFT, TARGET, example_mapping
from safetensors import safe_open
from safetensors.torch import save_file

import specattn
from specattn.errors import UsageError
from specattn.mapping.artifact import Mapping

TENSORS = [field.name for field in fields(Mapping) if field.name != "metadata"]
SIGNALS = ["signal_weight", "signal_half_life"]

MIXTURES = ["heads_kv", "heads_query", "global_kv", "global_query"]


def rewrite(path: Path, *drop: str, **changed: object) -> None:
    """Write the file at ``path`` again with other metadata fields, or without some tensors."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name not in drop}  # noqa: SIM118
        header = file.metadata()
    metadata = {**json.loads(header["specattn-mapping"]), **changed}
    save_file(tensors, path, {"specattn-mapping": json.dumps(metadata)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mapping.safetensors"
    example_mapping().save(file)
    return file


def test_what_is_saved_is_loaded(path: Path) -> None:
    mapping, loaded = example_mapping(), Mapping.load(path)
    assert loaded.metadata == mapping.metadata
    for name in TENSORS:
        expected, found = getattr(mapping, name), getattr(loaded, name)
        assert found.dtype == expected.dtype
        # Half precision for the mixtures, and everything else as it was.
        rtol = 2**-10 if name in MIXTURES else 0
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-7 if rtol else 0)


@pytest.mark.parametrize("name", MIXTURES)
def test_loaded_weights_sum_to_one(path: Path, name: str) -> None:
    sums = getattr(Mapping.load(path), name).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)


def test_the_same_mapping_gives_the_same_bytes(path: Path) -> None:
    before = path.read_bytes()
    for _ in range(5):
        example_mapping().save(path)
        assert path.read_bytes() == before


def test_save_replaces_the_file_and_leaves_nothing_else(path: Path) -> None:
    path.write_bytes(b"older")
    example_mapping().save(path)
    assert Mapping.load(path).metadata.rounds == 128
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_save_makes_the_folder(tmp_path: Path) -> None:
    example_mapping().save(tmp_path / "new" / "folder" / "m.safetensors")
    assert Mapping.load(tmp_path / "new" / "folder" / "m.safetensors").metadata.tokens == 4096


def test_a_failed_save_says_so_and_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError, match=r"mapping\.safetensors: No space left"):
        example_mapping().save(path)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_an_impossible_place_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the mapping"):
        example_mapping().save(path / "below-a-file.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read.*absent\.safetensors.*specattn calibrate"):
        Mapping.load(tmp_path / "absent.safetensors")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="specattn calibrate"):
        Mapping.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"plain text, and nothing else", b"\xff" * 64])
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a mapping file"):
        Mapping.load(path)


def test_a_truncated_file_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UsageError, match="damaged"):
        Mapping.load(path)


def test_another_safetensors_file_is_refused(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UsageError, match="not a mapping file"):
        Mapping.load(path)


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_refused(path: Path, name: str) -> None:
    rewrite(path, name)
    with pytest.raises(UsageError, match=r"damaged|must have shape"):
        Mapping.load(path)


def test_version_1_has_no_weights_of_signals(path: Path) -> None:
    rewrite(path, *SIGNALS, version=1)
    loaded = Mapping.load(path).to("cpu")
    assert loaded.metadata.version == 1
    assert loaded.signal_weight is None and loaded.signal_half_life is None
    loaded.save(path)
    assert Mapping.load(path).signal_weight is None


def test_a_field_too_many_is_refused(path: Path) -> None:
    rewrite(path, surprise=1)
    with pytest.raises(UsageError, match="damaged"):
        Mapping.load(path)


def test_another_version_is_named(path: Path) -> None:
    rewrite(path, version=7, surprise=1)
    with pytest.raises(UsageError, match=r"version 7.*reads versions 1 and 2.*calibrate again"):
        Mapping.load(path)


def test_shapes_must_agree_with_the_geometry() -> None:
    with pytest.raises(UsageError, match=r"heads_kv must have shape \(5, 2, 6\), not \(5, 2, 5\)"):
        example_mapping(heads_kv=torch.zeros(5, 2, 5))
    with pytest.raises(UsageError, match="global_query"):
        example_mapping(global_query=torch.zeros(5, 4, 2))


def test_check_accepts_its_pair() -> None:
    mapping = example_mapping()
    assert mapping.check(TARGET, DRAFT) is None


@pytest.mark.parametrize(("target", "draft"), [(DRAFT, DRAFT), (TARGET, TARGET), (DRAFT, TARGET)])
def test_check_names_both_pairs_and_the_remedy(target: object, draft: object) -> None:
    with pytest.raises(UsageError) as refused:
        example_mapping().check(target, draft)
    message = str(refused.value)
    assert "target org/target-5L with draft org/draft-3L" in message
    assert f"of {target.num_hidden_layers} layers with draft a llama model" in message
    assert "specattn calibrate" in message


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    mapping = example_mapping().to("meta")
    assert {getattr(mapping, name).device.type for name in TENSORS} == {"meta"}
    assert mapping.metadata == example_mapping().metadata


def test_the_shipped_mapping_mixes_whole_groups() -> None:
    mapping = Mapping.load(Path(specattn.__file__).parent / "mapping" / "data" / "qwen2.5-coder.safetensors")
    groups = mapping.global_heads.unflatten(0, (-1, 7))  # query heads of a KV head of Qwen2.5-Coder-0.5B
    assert torch.equal(groups, groups[:, :1] // 7 * 7 + torch.arange(7))
    assert len(groups) * 4 <= mapping.metadata.geometry.draft_rows // 7, "a quarter of the draft's keys"
