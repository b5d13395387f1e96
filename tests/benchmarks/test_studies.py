"""The studies' commands: each parses, finds the mapping that it needs, and has a document of its own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from scripts import load_script
from tiny import tiny_model, tiny_tokenizer

import specattn
from specattn.cli.app import app
from specattn.cli.options import parse_methods

ROOT = Path(__file__).parents[2]


studies, make_draft = load_script("benchmarks/studies.py"), load_script("benchmarks/make_draft.py")
COMMANDS = [(name, command) for name, study in studies.STUDIES.items() for command in study()]


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a ``specattn`` command."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    assert not context.args
    return dict(context.params)


@pytest.mark.parametrize(
    ("study", "command"), COMMANDS, ids=[f"{name}-{command.name}" for name, command in COMMANDS]
)
def test_commands_parse(study: str, command: Any) -> None:
    places = studies.Places(Path("data"), Path("work"), Path("results"), "here")
    words = places.words(command)
    assert not any("{data}" in word or "{work}" in word or "{out}" in word for word in words)
    if words[:2] == ["-m", "specattn"]:
        options = parsed(words[2:])
        assert options["json"]
        assert "methods" not in options or parse_methods(options["methods"])
    else:
        assert Path(words[0]).is_file()


def test_scripts_take_their_options() -> None:
    parsers = {
        "lossless_reads": lambda words: load_script("examples/lossless_reads.py").parser().parse_args(words),
        "fast_fidelity": lambda words: load_script("examples/fast_fidelity.py").parser().parse_args(words),
        "verified_rate": lambda words: load_script("examples/verified_rate.py").arguments(words),
    }
    seen = Counter()
    for _, command in COMMANDS:
        name = Path(command.words[0]).stem
        if name in parsers:
            assert parsers[name](list(command.words[1:])).out == "{out}"
            seen[name] += 1
    assert seen == {"fast_fidelity": 6, "lossless_reads": 4, "verified_rate": 2}


def test_documents_have_names_of_their_own_and_mappings_are_made_before() -> None:
    names = Counter(command.name for _, command in COMMANDS if command.keep)
    assert max(names.values()) == 1
    made: set[str] = set()
    for _, command in COMMANDS:
        words = list(command.words)
        if "calibrate" in words:
            made.add(words[words.index("--out") + 1])
        if "--mapping" in words:
            assert words[words.index("--mapping") + 1] in made


@pytest.mark.parametrize("name", ["passkey_32768", "ruler_16384", "humaneval", "gsm8k"])
def test_task_studies_are_those_of_the_results(name: str) -> None:
    """The same options and methods as in the documents, so that the command makes them again."""
    document = json.loads((ROOT / "benchmarks" / "results" / f"task_{name}_h200.json").read_text())
    (command,) = [command for _, command in COMMANDS if command.name == f"task_{name}"]
    words = [word.replace("{data}", "data").replace("{work}", "work") for word in command.words[2:]]
    given, config = parsed(words), document["config"]
    methods = {method.spec() for method in parse_methods(given["methods"])}
    assert methods == set(document["methods"])
    assert str(given["run"]) == document["run"] and given["chat"] == config["chat"]
    asked = {"length": "length", "samples_each": "samples", "data": "data"}
    for option, parameter in asked.items():
        if option in config["options"]:
            value = given[parameter]
            assert (value if isinstance(value, list | int) else str(value)) == config["options"][option]


def test_no_text_is_evaluated_that_a_mapping_is_calibrated_on() -> None:
    learned = {name for names in studies.CALIBRATION.values() for name in names}
    assert learned.isdisjoint(studies.TEXTS) and len(set(studies.BOOKS)) == 24
    assert learned.isdisjoint(f"books/{book}" for book in studies.BOOKS)


def test_a_document_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    places = studies.Places(tmp_path, tmp_path, tmp_path, "here")
    command = studies.Command("one", ("-c", "import json; print('text'); print(json.dumps({'a': 1}))"))
    studies.run(command, places)
    document = tmp_path / "one_here.json"
    assert json.loads(document.read_text()) == {"a": 1}
    document.write_text("kept")
    studies.run(command, places)
    assert document.read_text() == "kept"


def test_a_draft_of_fewer_layers_and_bits(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden=64)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    wanted = ["--layers", "2", "--bits", "3", "--out", str(tmp_path / "draft")]
    make_draft.main([str(tmp_path / "model"), *wanted])
    pair = specattn.load_pair(
        target=tmp_path / "model", draft=tmp_path / "draft", device="cpu", dtype="float32"
    )
    assert pair.draft is not None and pair.draft.config.num_hidden_layers == 2
    ours, theirs = (each.model.layers[0].mlp.up_proj.weight for each in (model, pair.draft))
    steps = theirs[0, : make_draft.GROUP].unique()
    assert 2 < len(steps) <= 7
    assert 0.01 < ((ours - theirs).norm() / ours.norm()).item() < 0.3
    assert torch.equal(
        model.model.embed_tokens.weight.bfloat16().float(), pair.draft.model.embed_tokens.weight
    )
