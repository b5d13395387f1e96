"""The studies behind docs/results.md: ``studies.py STUDY --data DIR --label MACHINE``, or ``--print`` for its commands.

Commands run one after the other, each in its own process. A document that is there is not made again, so a study that
was interrupted goes on. DIR holds ``books/``, ``code/`` and ``prompts/``; docs/reproduce.md says what is in them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIR = ("--pair", "qwen2.5-coder")
TEXTS = ("books/dragon-s-blood_10321", "books/travels-in-morocco-vol-2_10356", "code/cpython_archives")
CALIBRATION = {
    "both": ("books/the-hampstead-mystery_10082", "code/cpython_asyncio"),
    "books": ("books/the-hampstead-mystery_10082", "books/young-lives_10922"),
    "code": ("code/cpython_asyncio", "code/cpython_types"),
}
BOOKS = (
    "a-compilation-of-the-messages-and-papers-of-the-presidents-s_10895",
    "a-flock-of-girls-and-boys_10433",
    "a-golden-book-of-venice_10455",
    "a-lie-never-justifiable_10591",
    "a-political-diary-1828-1830-volume-ii_10693",
    "a-publisher-and-his-friends-memoir-and-correspondence-of-joh_10884",
    "a-selection-from-the-discourses-of-epictetus-with-the-enchei_10661",
    "algonquin-indian-tales_10891",
    "amiel-s-journal_8545",
    "beacon-lights-of-history-volume-i_10477",
    "beneath-the-banner_10024",
    "cleopatra_10992",
    "dragon-s-blood_10321",
    "english-housewifery-exemplified-in-above-four-hundred-and-fi_10072",
    "impressions-of-theophrastus-such_10762",
    "norwegian-life_10543",
    "oriental-literature-the-literature-of-arabia_10121",
    "reminiscences-of-pioneer-days-in-st-paul_10146",
    "sea-power-and-other-studies_10694",
    "the-bravo_10363",
    "the-double-traitor_10534",
    "the-life-of-napoleon-bonaparte-vol-i-of-iv_24360",
    "the-truth-about-woman_29981",
    "travels-in-morocco-vol-2_10356",
)
"""PG-19 books; none of them is one that a mapping is calibrated on."""
STARTING_POINT = "specattn:p=0.8:tail=0.05:a=0.03:power=0.8:dense_layers=0:every_row=true"
"""What README.md says to start from."""


@dataclass(frozen=True)
class Command:
    """One process. What it prints last, or writes to ``{out}``, is its document.

    Attributes:
        name: of the document.
        words: after the interpreter; ``{data}`` and ``{work}`` stand for folders, ``{out}`` for the document.
        keep: whether the document is a result; otherwise it goes to the folder of work, as mappings do.
    """

    name: str
    words: tuple[str, ...]
    keep: bool = True


def specattn(name: str, *words: object, keep: bool = True) -> Command:
    """A ``specattn`` command with ``--json``."""
    return Command(name, ("-m", "specattn", *map(str, words), "--json"), keep)


def texts(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in ("--text", f"{{data}}/{name}.txt")]


def sweep(template: str, values: Sequence[float]) -> str:
    return ",".join(template.format(value) for value in values)


def fidelity(name: str, context: int, methods: Sequence[str], *words: object, rows: int = 255) -> Command:
    sizes = ("--context", context, "--rows", rows, "--methods", ",".join(methods))
    models = () if "--target" in words else PAIR
    return specattn(f"fidelity_{context}_{name}", "eval", "fidelity", *texts(TEXTS), *sizes, *models, *words)


def calibrate(name: str, kind: str, tokens: int, *words: object) -> Command:
    models = () if "--target" in words else PAIR
    file = ("--out", f"{{work}}/{name}.safetensors", "--force")
    sizes = ("--tokens", tokens)
    return specattn(name, "calibrate", *texts(CALIBRATION[kind]), *sizes, *file, *models, *words, keep=False)


def mapping(name: str) -> tuple[str, str]:
    return "--mapping", f"{{work}}/{name}.safetensors"


def paper() -> Iterator[Command]:
    """The paper's table: 2,048 tokens, the first tenth dense, 24 books."""
    methods = [
        "dense",
        "streaming:budget=0.15,streaming:budget=0.25",
        "quest:budget=0.1,quest:budget=0.25",
        sweep("specattn-paper:p={}", (0.8, 0.9, 0.95, 0.97, 0.99)),
        sweep("specattn:p={}", (0.7, 0.8, 0.9, 0.95)),
        "specattn:p=0.8:dense_layers=0:every_row=true",
        "specattn:p=0.8:tail=0.05",
    ]
    books = texts([f"books/{book}" for book in BOOKS])
    yield specattn(
        "perplexity_2048_books", "eval", "perplexity", *books, "--methods", ",".join(methods), *PAIR
    )


def contexts() -> Iterator[Command]:
    """Fidelity at 8,192, 16,384 and 32,768 tokens."""
    methods = [
        "dense",
        sweep("specattn:p={}:dense_layers=0", (0.8, 0.9, 0.95)),
        sweep("specattn-paper:p={}", (0.9, 0.95)),
        sweep("quest:budget={}", (0.05, 0.1, 0.2)),
        "streaming:budget=0.1,twilight:base=specattn:p=0.9,twilight:base=(specattn:p=0.9):p=0.9",
        "specattn:p=0.8:tail=0.05:dense_layers=0,oracle:p=0.9",
    ]
    for context in (8192, 16384, 32768):
        yield fidelity("contexts", context, methods)


def similarity() -> Iterator[Command]:
    """Layer maps by three measures of similarity, beside the head mixtures of the same calibration."""
    for metric in ("kl", "js", "recall"):
        made = f"mapping_{metric}"
        yield calibrate(made, "both", 4096, "--metric", metric)
        methods = [
            sweep("specattn-paper:p={}", (0.9, 0.95)),
            sweep("specattn:map=layer:p={}", (0.8, 0.9, 0.95)),
        ]
        if metric == "kl":
            methods += [
                sweep(f"specattn:map={kind}:p={{}}", (0.8, 0.9, 0.95)) for kind in ("heads", "global")
            ]
        yield fidelity(f"map_{metric}", 8192, methods, *mapping(made))


def gamma() -> Iterator[Command]:
    """Draft lengths; the rows are whole rounds of each."""
    methods = ["specattn:p=0.8", "specattn:p=0.9", "specattn-paper:p=0.95", "specattn:p=0.9:aggregate=union"]
    for length, rows in ((2, 255), (4, 255), (6, 252), (8, 252)):
        yield fidelity(f"gamma_{length}", 8192, methods, "--gamma", length, rows=rows)


def calibration() -> Iterator[Command]:
    """What a mapping is calibrated on, and on how much."""
    methods = ["specattn:p=0.8", "specattn:p=0.9", "specattn:p=0.9:map=global"]
    for kind, tokens in (("both", 1024), ("both", 4096), ("both", 16384), ("books", 16384), ("code", 16384)):
        made = f"mapping_{kind}_{tokens}"
        yield calibrate(made, kind, tokens)
        yield fidelity(f"calibrated_{kind}_{tokens}", 8192, methods, *mapping(made))


def drafts() -> Iterator[Command]:
    """Other drafts: the target itself, the first 12 layers of the 0.5B, the 0.5B in three bits. Sizes for a CPU."""
    large, small = "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"
    for name, change in (("12_layers", ("--layers", "12")), ("3_bits", ("--bits", "3"))):
        words = (str(ROOT / "benchmarks" / "make_draft.py"), small, *change, "--out", f"{{work}}/{name}")
        yield Command(f"draft_{name}", words, keep=False)
    pairs = {
        "self": (large, large),
        "small_self": (small, small),
        "half_billion": (large, small),
        "12_layers": (large, "{work}/12_layers"),
        "3_bits": (large, "{work}/3_bits"),
    }
    methods = "specattn:p=0.8,specattn:p=0.9,specattn-paper:p=0.95"
    for name, (target, draft) in pairs.items():
        models = ("--target", target, "--draft", draft, "--device", "cpu", "--dtype", "bfloat16")
        made = f"mapping_draft_{name}"
        yield calibrate(made, "both", 2048, "--rounds", 64, *models)
        words = ("--context", 2048, "--rows", 80, "--methods", methods, *models, *mapping(made))
        read = texts((TEXTS[0], TEXTS[2]))
        yield specattn(f"fidelity_2048_draft_{name}", "eval", "fidelity", *read, *words)


def small() -> Iterator[Command]:
    """Two small models, each its own draft, in float32: the sizes for a CPU."""
    methods = "dense,streaming:budget=0.2,specattn-paper:p=0.95,specattn:p=0.8,specattn:p=0.9"
    for name, model in (("smollm2", "smollm2-135m"), ("gemma3", "gemma3-270m")):
        models = ("--target", model, "--draft", model, "--device", "cpu", "--dtype", "float32")
        made = f"mapping_{name}"
        learned = texts(("books/amiel-s-journal_8545", "code/cpython_types"))
        file = ("--tokens", 2048, "--rounds", 64, "--out", f"{{work}}/{made}.safetensors", "--force")
        yield specattn(made, "calibrate", *learned, *file, *models, keep=False)
        words = (*texts(TEXTS[:2]), *mapping(made), "--methods", methods, *models)
        yield specattn(f"perplexity_2048_{name}", "eval", "perplexity", *words)


def tasks() -> Iterator[Command]:
    """Answers that are scored."""
    p80, p90 = (f"specattn:p={p}:dense_layers=0:every_row=true" for p in (0.8, 0.9))
    whole = f"{STARTING_POINT}:dense_below=1024"
    others = ["specattn-paper:p=0.95", "quest:budget=0.1", "streaming:budget=0.1"]
    lengths = [word for length in (4096, 8192, 16384, 32768) for word in ("--length", length)]
    retrieval = ["dense", STARTING_POINT, p90, *others]
    code, numbers = "{data}/prompts/humaneval.jsonl", "{data}/prompts/gsm8k_random200.jsonl"
    asked: dict[str, tuple[Sequence[object], int, Sequence[str]]] = {
        "passkey_32768": (("passkey", *lengths, "--samples", 10, "--chat"), 4, retrieval),
        "ruler_16384": (
            ("ruler", "--length", 16384, "--samples", 5, "--chat"),
            8,
            [*retrieval, "snapkv:budget=0.1"],
        ),
        "humaneval": (
            ("humaneval", "--data", code, "--chat"),
            32,
            ["dense", STARTING_POINT, p80, p90, whole],
        ),
        "gsm8k": (("gsm8k", "--data", numbers), 32, ["dense", STARTING_POINT, p90, whole]),
    }
    for name, (words, batch, methods) in asked.items():
        run = ("--run", f"{{work}}/run_{name}", "--methods", ",".join(methods), "--batch", batch)
        yield specattn(f"task_{name}", "eval", *words, *run, *PAIR)


def frontier() -> Iterator[Command]:
    """What the extensions of ``specattn`` give at 8,192 and 32,768 tokens."""
    flat = ":a=0.03:power=0.8"
    extensions = {
        "": (0.8, 0.9),
        ":tail=0.05": (0.8,),
        ":every_row=true": (0.8, 0.9),
        ":tail=0.05:every_row=true": (0.7, 0.8),
        f":tail=0.05{flat}:every_row=true": (0.7, 0.8),
        ":signals=both:every_row=true": (0.8,),
        ":centroids=64:every_row=true": (0.8, 0.9),
        ":map=global": (0.9,),
        ":map=global:every_row=true": (0.9,),
    }
    methods = [sweep(f"specattn:p={{}}{more}:dense_layers=0", ps) for more, ps in extensions.items()]
    rates = {
        "": (0.2, 0.3),
        ":every_row=true": (0.1, 0.2, 0.3, 0.5),
        ":every_row=true:aggregate=rms": (0.3,),
        ":every_row=true:signals=both": (0.2,),
    }
    methods += [sweep(f"specattn:rate={{}}{flat}{more}:dense_layers=0", rs) for more, rs in rates.items()]
    methods += ["specattn-paper:p=0.95", "oracle:p=0.9:dense_layers=0"]
    for context in (8192, 32768):
        yield fidelity("extensions", context, methods)


def tails() -> Iterator[Command]:
    """Seeds and sizes of the tail at 32,768 tokens, and rounds of three rows with the mapping's global heads."""
    every, flat = ":dense_layers=0:every_row=true", ":a=0.03:power=0.8"
    sizes = [(0.8, 0.04), (0.75, 0.05), (0.75, 0.06), (0.7, 0.07), (0.8, 0.08), (0.8, 0.1)]
    sizes += [(0.75, 0.1), (0.7, 0.1), (0.85, 0.05), (0.85, 0.07)]
    point = "specattn:p=0.8:tail=0.05:a=0.03"
    methods = [f"{point}:power=0.8:seed={seed}{every}" for seed in (1, 2)]
    methods += [f"specattn:p={p}:tail={tail}{flat}{every}" for p, tail in sizes]
    methods += [f"{point}:power=0.7{every}", f"{point}:power=0.8:signals=both{every}"]
    methods += [f"{point}:power=0.8:aggregate=rms{every}", f"specattn:rate=0.4{flat}{every}"]
    yield fidelity("tails", 32768, methods)
    few = "specattn:map=global:dense_layers=0:"
    kinds = ["p=0.9", "p=0.85", "p=0.8", f"p=0.8:tail=0.05{flat}", f"rate=0.2{flat}", f"rate=0.3{flat}"]
    yield fidelity("gamma_2", 32768, [few + kind for kind in kinds], "--gamma", 2)


def copied() -> Iterator[Command]:
    """What a sparse draft costs along texts, as they are and copied; on a CPU."""
    script = str(ROOT / "examples" / "fast_fidelity.py")
    base = "specattn:map=global:dense_layers=0:p=0.9"
    drafts = (
        "",
        ":draft_p=0.95",
        ":draft_p=0.8",
        ":draft_p=0.95:every_row=true",
        ":draft_p=0.8:every_row=true",
    )
    methods = ("--methods", ",".join(base + draft for draft in drafts), "--device", "cpu")
    named = (*texts((TEXTS[0], TEXTS[2])), *PAIR, *methods, "--rounds", "22", "--out", "{out}")
    yield Command("fast_fidelity_4096", (script, *named, "--context", "4096"))
    yield Command("fast_fidelity_copied", (script, *named, "--context", "2560", "--copied", "512", "2048"))


def echoes() -> Iterator[Command]:
    """What echoes bring: in evaluations, and to the fast path's rounds with and without a sparse draft."""
    flat, few = "specattn:dense_layers=0:a=0.03:power=0.8", "specattn:map=global:dense_layers=0"
    sizes = ("p=0.75:tail=0.06", "p=0.7:tail=0.07", "p=0.8:tail=0.1")
    methods = [f"{flat}:{size}:every_row=true:echo=4" for size in sizes]
    methods += [f"{flat}:p=0.75:tail=0.06:echo=4", sweep(f"{few}:p={{}}:echo=4", (0.9, 0.8)), f"{few}:p=0.9"]
    yield fidelity("echo", 32768, methods)
    script = str(ROOT / "examples" / "fast_fidelity.py")
    named = (script, *texts((TEXTS[0], TEXTS[2])), *PAIR, "--out", "{out}")
    drafts = (":draft_p=0.8:echo=4", ":draft_p=0.95:echo=4", ":echo=4")
    short = (*named, "--methods", ",".join(f"{few}:p=0.9{draft}" for draft in drafts))
    short = (*short, "--rounds", "22", "--device", "cpu")
    yield Command("fast_fidelity_4096_echo", (*short, "--context", "4096"))
    yield Command("fast_fidelity_copied_echo", (*short, "--context", "2560", "--copied", "512", "2048"))
    settings = ("p=0.9", "p=0.9:draft_p=0.8:echo=4", "p=0.9:draft_p=0.95", "p=0.9:draft_p=0.8")
    settings += ("p=0.95:draft_p=0.8:echo=4", "p=0.85:draft_p=0.8:echo=4", "p=0.9:echo=4")
    settings += ("p=0.85:draft_p=0.9:echo=4", "p=0.825:draft_p=0.8:echo=4", "p=0.9:draft_p=0.9:echo=4")
    long = (*named, "--methods", ",".join(f"{few}:{setting}" for setting in settings))
    long = (*long, "--context", "31744", "--rounds", "24", "--skip", "3")
    yield Command("fast_fidelity_32768", long)
    yield Command("fast_fidelity_32768_greedy", (*long, "--greedy"))


def lossless() -> Iterator[Command]:
    """Dense reads a token in lossless decoding: of prompts of many lengths, and of long ones."""
    script = str(ROOT / "examples" / "lossless_reads.py")
    methods = f"{STARTING_POINT},specattn:p=0.9:dense_layers=0:every_row=true"
    ways = ("--methods", methods, "--alone", "self:p=0.9", "--max-new-tokens", "96")
    # Prompt, answer and what is run ahead stay within the models' 32,768 tokens.
    for name, prompts, least, most, batch in (
        ("reads", 20, 2048, 16384, 4),
        ("16384", 6, 16384, 16384, 3),
        ("32768", 6, 32256, 32256, 3),
    ):
        sizes = ("--prompts", prompts, "--least", least, "--most", most, "--batch", batch)
        words = (script, *texts(TEXTS), *PAIR, *map(str, sizes), *ways, "--out", "{out}")
        yield Command(f"lossless_{name}", words)
    exact = ("--methods", STARTING_POINT, "--max-new-tokens", "64", "--dtype", "float32")
    yield Command("lossless_reads_float32", (script, *texts(TEXTS), *PAIR, *exact, "--out", "{out}"))


def verified() -> Iterator[Command]:
    """How often verified mode misses its tolerance."""
    script = str(ROOT / "examples" / "verified_rate.py")
    for context in (8192, 32768):
        sizes = ("--context", str(context), "--rows", "60", "--p", "0.8", "--eps", "0.05", "0.1", "0.2")
        words = (script, *texts(TEXTS), *PAIR, *sizes, "--out", "{out}")
        yield Command(f"verified_{context}_p80", words)


STUDIES: dict[str, Callable[[], Iterator[Command]]] = {
    study.__name__: study
    for study in (
        paper,
        contexts,
        similarity,
        gamma,
        calibration,
        drafts,
        small,
        tasks,
        frontier,
        tails,
        copied,
        echoes,
        lossless,
        verified,
    )
}


@dataclass(frozen=True)
class Places:
    """Folders, and the end of the results' names."""

    data: Path
    work: Path
    results: Path
    label: str

    def document(self, command: Command) -> Path:
        """Where the command's document goes."""
        if command.keep:
            return self.results / f"{command.name}_{self.label}.json"
        return self.work / f"{command.name}.json"

    def words(self, command: Command) -> list[str]:
        """The command after the interpreter, with the folders in place."""
        words = list(command.words)
        named = {"{data}": self.data, "{work}": self.work, "{out}": self.document(command)}
        for name, place in named.items():
            words = [word.replace(name, str(place)) for word in words]
        return words


def run(command: Command, places: Places) -> None:
    """Run a command unless its document is there.

    Raises:
        subprocess.CalledProcessError: if the command fails; there is no document then.
    """
    out = places.document(command)
    if out.exists():
        return
    words = [sys.executable, *places.words(command)]
    sys.stderr.write(f"{shlex.join(words)}\n")
    printed = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    if "{out}" not in command.words:
        document = json.loads(printed.splitlines()[-1]) if printed else {}
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study, or print its commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the texts and prompts")
    parser.add_argument("--label", default="local", help="of the machine: the end of the results' names")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, default=Path("work"), help="for mappings, drafts and task runs")
    parser.add_argument("--print", action="store_true", help="only say what would run")
    asked = parser.parse_args(arguments)
    places = Places(asked.data, asked.work, asked.results, asked.label)
    commands = list(STUDIES[asked.study]())
    if asked.print:
        sys.stdout.writelines(f"{shlex.join(['python', *places.words(command)])}\n" for command in commands)
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    for command in commands:
        run(command, places)


if __name__ == "__main__":
    main()
