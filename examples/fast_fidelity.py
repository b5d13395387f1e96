"""How far the fast path's own rounds stray along a text, those of sparse drafts included.

``python examples/fast_fidelity.py --text book.txt --context 4096 --methods specattn:map=global:p=0.9:draft_p=0.8``
feeds rounds the text's own tokens as proposals and compares each row's distribution with that of a dense pass.
``specattn eval fidelity`` does so with rounds whose draft reads all; what a sparse draft (``draft_p``) leaves out
is seen here. The draft remembers from round to round, as in decoding. On a CPU rounds are made of references.

``--copied N AT`` lets the text go on from token AT with its own tokens from the N-th on, once more: heads that copy are
then at work. ``--greedy`` lets it go on with the target's own choice at every place, as greedy decoding does, which may
repeat itself where the text does not. ``by_row`` is the KL of the first, second and so on row of a round; the first
``--skip`` rounds do not count, since a sparse draft's first round reads everything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import load_pair, save
from torch import Tensor

from specattn.attention import DenseAttend, attached
from specattn.benchmarks.setting import FastPair, Setting, check_fast
from specattn.environment import environment
from specattn.evaluation.documents import load_documents
from specattn.fast.requests import RoundInputs
from specattn.fast.round import FastRound
from specattn.mapping.artifact import Mapping
from specattn.mapping.resolve import resolve_mapping
from specattn.pairs import Pair
from specattn.runner import ModelRunner
from specattn.sampling import Stream
from specattn.selection.registry import parse_method, split_methods

Texts = Sequence[list[int]]


class ForcedRound(FastRound):
    """A round whose draft proposes what it is told to.

    Attributes:
        proposals: int64 ``[batch, gamma]``.
    """

    proposals: Tensor

    def _choose(
        self, inputs: RoundInputs, logits: Tensor, stream: Stream, draw: int
    ) -> tuple[Tensor, Tensor]:
        return self.proposals[:, draw : draw + 1], logits[..., :0]


def tokens_of(asked: argparse.Namespace) -> int:
    """Tokens of each text: its context, all rounds, and one more."""
    return int(asked.context + asked.rounds * (asked.gamma + 1) + 1)


def cut(pair: Pair, asked: argparse.Namespace) -> list[list[int]]:
    """The tokens of each text, :func:`tokens_of` of them; with ``--greedy`` those that are not the target's choice."""
    length = asked.context + 1 if asked.greedy else tokens_of(asked)
    first, own = asked.copied or (0, length)
    if length - own > own - first:
        raise SystemExit(f"--copied {first} {own} leaves {own - first:,} tokens to copy of {length - own:,}")
    texts = [document.tokens for document in load_documents(asked.text, pair.tokenizer, own)]
    return [text + text[first : first + length - own] for text in texts]


def dense_rows(pair: Pair, text: Sequence[int], context: int, vocab: int) -> Tensor:
    """Log-probabilities ``[rows, vocab]`` of a dense pass over the tokens from ``context`` on, but the last."""
    runner = ModelRunner(pair.target, tokens=len(text), slots=1)
    slot = runner.cache.allocate(len(text))
    runner.prefill(slot, text[:context])
    fed = list(text[context:-1])
    step = runner.step([slot], [context], len(fed), DenseAttend(), metered=False)
    logits = runner.forward(step, torch.tensor([fed], device=runner.device), len(fed))[0]
    return logits[:, :vocab].float().log_softmax(-1)


def read(setting: Setting, texts: Texts) -> Setting:
    """``setting`` with the beginnings of the texts in its caches. What rounds write behind them is written again."""
    with attached(*setting.pair.models):
        for runner in setting.runners:
            for slot, text in enumerate(texts):
                runner.prefill(slot, text[: setting.context])
    return setting


def continued(setting: Setting, texts: Texts, tokens: int) -> list[list[int]]:
    """The texts, one token longer than what is in the caches, and behind them the target's choices up to ``tokens``."""
    round = setting.round("plain")
    setting.place(round, [(setting.context, text[-2], text[-1]) for text in texts])
    chosen = [round.run()[:, 0].tolist() for _ in range(tokens - len(texts[0]))]
    return [[*text, *more] for text, more in zip(texts, zip(*chosen, strict=True), strict=True)]


def follow(
    setting: Setting, texts: Texts, dense: Sequence[Tensor], asked: argparse.Namespace
) -> dict[str, Any]:
    """One method along all texts: KL and agreement of each row, and reads."""
    rows, device = asked.gamma + 1, setting.target.runner.device
    round = setting.round("sparse", kind=ForcedRound)
    assert isinstance(round, ForcedRound)
    divergences, agreement = [], []
    before = setting.reads()
    for number in range(asked.rounds):
        at = asked.context + number * rows
        setting.place(round, [(at, text[at - 1], text[at]) for text in texts])
        inputs = round.requests.inputs(round.slots, round.sampling)
        round.proposals = torch.tensor([text[at + 1 : at + rows] for text in texts], device=device)
        proposal = round.propose(inputs)
        assert proposal is not None
        logits = round.target_logits(inputs, torch.cat([inputs.recent[:, 1:], proposal.tokens], 1))
        found = logits[..., : setting.pair.vocab_size].float().log_softmax(-1)
        exact = torch.stack([part[number * rows : (number + 1) * rows] for part in dense])
        divergences.append((exact.exp() * (exact - found)).sum(-1))
        agreement.append(exact.argmax(-1) == found.argmax(-1))
    read, full, draft = (after - b for after, b in zip(setting.reads(), before, strict=True))
    kl, same = torch.stack(divergences[asked.skip :], 1), torch.stack(agreement[asked.skip :], 1)
    return {
        "method": setting.pair.method.spec(),
        "kl": kl.mean((1, 2)).tolist(),
        "by_row": kl.mean((0, 1)).tolist(),
        "largest_kl": float(kl.max()),
        "top1_agreement": same.float().mean((1, 2)).tolist(),
        "kv_read_fraction": read / full,
        "draft_read_fraction": draft / full,
    }


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Follow the texts with each method, and print a line for each."""
    asked = parser().parse_args(arguments)
    if not 0 <= asked.skip < asked.rounds:
        raise SystemExit(f"--skip {asked.skip} leaves none of {asked.rounds} rounds; give fewer")
    if asked.greedy and asked.copied:
        raise SystemExit("a text goes on with its own tokens or with the target's: give --copied or --greedy")
    pair = load_pair(asked)
    methods = [check_fast(pair.models, parse_method(name)) for name in split_methods(asked.methods)]
    mapping = resolve_mapping(pair, methods[0], Mapping.load(asked.mapping) if asked.mapping else None)
    assert mapping is not None and pair.draft is not None
    texts, length = cut(pair, asked), tokens_of(asked)
    fast = FastPair.of("pair", pair.target, pair.draft, mapping.to(pair.device), methods[0], length + 64)
    room = length - asked.context + 16
    setting = read(Setting(fast, len(texts), asked.context, asked.gamma, room), texts)
    if asked.greedy:
        texts = continued(setting, texts, length)
    with attached(pair.target):
        dense = [dense_rows(pair, text, asked.context, pair.vocab_size) for text in texts]
    rows: list[dict[str, Any]] = []
    report = {
        "command": "fast_fidelity",
        "pair": pair.name,
        **{name: getattr(asked, name) for name in ("context", "rounds", "skip", "gamma", "copied", "greedy")},
        "texts": [Path(path).stem for path in asked.text],
        "results": rows,
        "complete": False,
        "environment": environment(pair.device, pair.dtype),
    }
    for number, method in enumerate(methods, 1):
        own = replace(fast, method=method)
        if setting.pair.method.draft_stores != method.draft_stores:
            setting = read(Setting(own, len(texts), asked.context, asked.gamma, room), texts)
        setting.pair = own
        rows.append(follow(setting, texts, dense, asked))
        report["complete"] = number == len(methods)
        print(json.dumps(rows[-1]), flush=True)
        save(report, asked.out)
    return report


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = measuring.parser(__doc__)
    result.add_argument("--context", type=int, default=4096, help="tokens before the first round")
    result.add_argument("--rounds", type=int, default=24)
    result.add_argument("--skip", type=int, default=2, help="first rounds that do not count")
    result.add_argument("--gamma", type=int, default=2)
    result.add_argument(
        "--copied",
        type=int,
        nargs=2,
        metavar=("N", "AT"),
        help="from token AT on, the text from token N on again",
    )
    result.add_argument(
        "--greedy",
        action="store_true",
        help="behind the context, the text's next token and then the target's own choices",
    )
    result.add_argument("--methods", default="specattn:map=global:dense_layers=0:p=0.9:draft_p=0.95")
    return result


if __name__ == "__main__":
    main()
