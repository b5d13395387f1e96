"""The plot of a mapping: a picture is written, and what it shows is what the mapping says."""

import sys
from pathlib import Path

import pytest
import torch
from mapping_examples import example_mapping
from matplotlib.figure import Figure

from specattn.errors import UsageError
from specattn.mapping.plot import plot_mapping


def drawn(path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that ``plot_mapping`` saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_mapping(example_mapping(), path)
    return figures[0]


def test_writes_a_png(tmp_path: Path) -> None:
    plot_mapping(example_mapping(), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_shows_the_similarity_with_the_layer_map_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = drawn(tmp_path / "map.png", monkeypatch).axes[0]
    shown = torch.as_tensor(axes.images[0].get_array().data)
    torch.testing.assert_close(shown, example_mapping().similarity)
    for line in axes.lines:
        assert list(line.get_xdata()) == [0, 0, 1, 2, 2]
        assert list(line.get_ydata()) == [0, 1, 2, 3, 4]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("draft layer", "target layer")


def test_shows_the_mixtures_weight_by_draft_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(tmp_path / "map.png", monkeypatch).axes[1]
    shown = torch.as_tensor(axes.images[0].get_array().data)
    torch.testing.assert_close(shown.sum(-1), torch.ones(5))
    expected = example_mapping().heads_kv[3, :, 2:4].sum(-1).mean()
    torch.testing.assert_close(shown[3, 1], expected)


def test_the_title_names_the_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(tmp_path / "map.png", monkeypatch)
    assert figure.get_suptitle() == "Target target-5L, draft draft-3L"


@pytest.mark.parametrize("name", ["map.unknown", "absent/map.png"])
def test_a_place_or_format_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot write the plot to .*{name}"):
        plot_mapping(example_mapping(), tmp_path / name)


def test_says_how_to_install_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install \"specattn\[plot\]\""):
        plot_mapping(example_mapping(), tmp_path / "map.png")


def test_the_module_imports_without_matplotlib() -> None:
    import subprocess

    command = "import sys, specattn.mapping.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
