"""Acceptance yields the target's distribution, and the test that says so notices when a rule is wrong."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from specattn.acceptance import Verdict, verify
from specattn.errors import UsageError
from specattn.sampling import Stream, sample, uniform

SIGNIFICANCE = 1e-4
SEQUENCES = 60_000
GAMMA = 3
TOKENS = 4  # of the joint distribution

# Two Markov chains: row = previous token, column = next token.
TARGET = torch.tensor(
    [[0.40, 0.30, 0.20, 0.10], [0.10, 0.15, 0.50, 0.25], [0.30, 0.10, 0.25, 0.35], [0.25, 0.25, 0.10, 0.40]]
)
DRAFT = torch.tensor(
    [[0.25, 0.35, 0.10, 0.30], [0.30, 0.20, 0.30, 0.20], [0.20, 0.30, 0.30, 0.20], [0.10, 0.40, 0.20, 0.30]]
)

Verify = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Verdict]


def one_round(
    check: Verify, target: Tensor, draft: Tensor, last: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """Tokens ``[sequences, GAMMA + 1]`` that a round appends after ``last``, and how many of them count."""
    seeds = torch.arange(last.shape[0])
    counters = (number * GAMMA + torch.arange(GAMMA))[None]
    u_draft = uniform(seeds, counters, Stream.DRAFT)
    context, draft_probs = [last], []
    for step in range(GAMMA):
        draft_probs.append(draft[context[-1]])
        context.append(sample(draft_probs[-1], u_draft[:, step]))
    proposed = torch.stack(context[1:], 1)
    u_accept = uniform(seeds, counters, Stream.ACCEPT)
    u_next = uniform(seeds, counters[:, :1], Stream.NEXT)[:, 0]
    target_probs = target[torch.stack(context, 1)]
    verdict = check(proposed, torch.stack(draft_probs, 1), target_probs, u_accept, u_next)
    place = torch.arange(GAMMA + 1)
    spare = torch.cat([proposed, proposed[:, :1]], 1)
    tokens = torch.where(place == verdict.accepted[:, None], verdict.next_token[:, None], spare)
    return tokens, verdict.accepted + 1


def generate(check: Verify, target: Tensor, draft: Tensor) -> Tensor:
    """The first TOKENS tokens of many sequences that all start after token 0, by rounds of speculation."""
    written = torch.zeros(SEQUENCES, dtype=torch.int64)
    last = torch.zeros_like(written)
    text = torch.full((SEQUENCES, TOKENS + 1), -1)  # the last column takes what lies beyond
    for number in range(TOKENS):  # a round yields one token at least
        tokens, count = one_round(check, target, draft, last, number)
        for place in range(GAMMA + 1):
            column = torch.where(place < count, written + place, TOKENS).clamp(max=TOKENS)
            text.scatter_(1, column[:, None], tokens[:, place : place + 1])
        written = written + count
        last = tokens.gather(1, count[:, None] - 1)[:, 0]
    assert (written >= TOKENS).all()
    return text[:, :TOKENS]


def exact_joint(target: Tensor) -> Tensor:
    """Probability of every sequence of TOKENS tokens after token 0, flat."""
    joint = target[0].double()
    for _ in range(TOKENS - 1):
        joint = joint.unsqueeze(-1) * target.double()
    return joint.flatten()


def joint_p_value(check: Verify, target: Tensor = TARGET, draft: Tensor = DRAFT) -> float:
    """Chi-square test of the joint distribution that ``check`` yields against the target's own."""
    text = generate(check, target, draft)
    radix = target.shape[0] ** torch.arange(TOKENS - 1, -1, -1)
    counts = torch.bincount((text * radix).sum(-1), minlength=target.shape[0] ** TOKENS).double()
    expected = exact_joint(target) * SEQUENCES
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = (possible.sum() - 1).double()
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


@cache
def p_value_of(name: str) -> float:
    return joint_p_value({"verify": verify, **MUTATIONS}[name])


def test_the_joint_distribution_is_the_targets() -> None:
    assert exact_joint(TARGET).min() * SEQUENCES > 5  # each cell is well filled
    assert p_value_of("verify") > SIGNIFICANCE


def test_the_joint_distribution_with_impossible_tokens() -> None:
    """Zeros of the target, of the draft and of both."""
    target, draft = TARGET.clone(), DRAFT.clone()
    target[0] = torch.tensor([0.0, 0.5, 0.5, 0.0])
    draft[0] = torch.tensor([0.3, 0.0, 0.7, 0.0])
    draft[2] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert joint_p_value(verify, target, draft) > SIGNIFICANCE


def test_the_joint_distribution_of_equal_and_of_disjoint_models() -> None:
    assert joint_p_value(verify, TARGET, TARGET) > SIGNIFICANCE
    target = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 4)
    assert joint_p_value(verify, target, target.flip(-1)) > SIGNIFICANCE


# What acceptance could get wrong. Each rule below is the right one with one thing changed.


def naive(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    u_accept: Tensor,
    u_next: Tensor,
    *,
    threshold: Callable[[Tensor, Tensor], Tensor] = lambda p, q: p / q,
    correction: Callable[[Tensor, Tensor], Tensor] = lambda p, q: (p - q).clamp(min=0),
    bonus_row: int = GAMMA,
    same_uniform: bool = False,
) -> Verdict:
    """Acceptance token by token, written apart from the product's."""
    alive = torch.ones_like(u_next, dtype=torch.bool)
    accepted = torch.zeros_like(draft_tokens[:, 0])
    source = target_probs[:, bonus_row]
    for i in range(GAMMA):
        p, q = target_probs[:, i], draft_probs[:, i]
        token = draft_tokens[:, i : i + 1]
        accept = u_accept[:, i] < threshold(p.gather(1, token), q.gather(1, token))[:, 0]
        if same_uniform:
            u_next = torch.where(alive, u_accept[:, i], u_next)
        source = torch.where((alive & ~accept)[:, None], correction(p, q), source)
        alive = alive & accept
        accepted = accepted + alive
    return Verdict(accepted, sample(source, u_next))


def mutation(**change: object) -> Verify:
    return lambda *tensors: naive(*tensors, **change)


MUTATIONS: dict[str, Verify] = {
    "naive": naive,
    "accepts always": mutation(threshold=lambda p, q: torch.full_like(p, 2.0)),
    "accepts never": mutation(threshold=lambda p, q: torch.zeros_like(p)),
    "accepts with p": mutation(threshold=lambda p, q: p),
    "accepts with the inverse ratio": mutation(threshold=lambda p, q: q / p),
    "corrects from the target": mutation(correction=lambda p, q: p),
    "corrects from the draft": mutation(correction=lambda p, q: q),
    "corrects from the absolute difference": mutation(correction=lambda p, q: (p - q).abs()),
    "bonus from the row before": mutation(bonus_row=GAMMA - 1),
    "one uniform for both": mutation(same_uniform=True),
}


def test_the_naive_rule_is_right_and_the_same() -> None:
    """So that what its mutations show is due to the change alone."""
    assert p_value_of("naive") == p_value_of("verify")


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name != "naive"])
def test_a_wrong_rule_is_noticed(name: str) -> None:
    assert p_value_of(name) < SIGNIFICANCE


# Chosen cases


def greedy_case(draft: list[int], target: list[int], vocabulary: int = 7) -> Verdict:
    tokens = torch.tensor([draft])
    u = torch.full((1, len(draft)), 1 - 2**-24)
    rows = one_hot(torch.tensor([target]), vocabulary).float()
    return verify(tokens, one_hot(tokens, vocabulary).float(), rows, u, torch.tensor([0.9]))


@pytest.mark.parametrize(
    ("draft", "target", "accepted"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 5, 4], 2),
        ([1, 2, 3], [1, 6, 3, 4], 1),
        ([1, 2, 3], [0, 2, 3, 4], 0),
        ([5], [5, 0], 1),
        ([5], [0, 5], 0),
    ],
)
def test_greedy_takes_the_common_prefix_and_the_targets_next(
    draft: list[int], target: list[int], accepted: int
) -> None:
    verdict = greedy_case(draft, target)
    assert verdict.accepted.tolist() == [accepted]
    assert verdict.next_token.tolist() == [target[accepted]]


def random_round(batch: int, gamma: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    draft_probs = torch.randn(batch, gamma, vocabulary).softmax(-1)
    target_probs = torch.randn(batch, gamma + 1, vocabulary).softmax(-1)
    tokens = sample(draft_probs, torch.rand(batch, gamma))
    return tokens, draft_probs, target_probs, torch.rand(batch, gamma), torch.rand(batch)


def test_a_batch_accepts_different_lengths_and_each_as_if_alone() -> None:
    tensors = random_round(64, 4, 11)
    verdict = verify(*tensors)
    assert set(verdict.accepted.tolist()) == {0, 1, 2, 3, 4}
    for row in range(64):
        alone = verify(*(tensor[row : row + 1] for tensor in tensors))
        assert alone.accepted[0] == verdict.accepted[row]
        assert alone.next_token[0] == verdict.next_token[row]
    order = torch.randperm(64)
    shuffled = verify(*(tensor[order] for tensor in tensors))
    assert torch.equal(shuffled.accepted, verdict.accepted[order])
    assert torch.equal(shuffled.next_token, verdict.next_token[order])


def test_gamma_of_one() -> None:
    tokens, draft_probs, target_probs, u_accept, u_next = random_round(200, 1, 5)
    verdict = verify(tokens, draft_probs, target_probs, u_accept, u_next)
    p, q = target_probs[:, 0].gather(1, tokens), draft_probs[:, 0].gather(1, tokens)
    assert verdict.accepted.tolist() == (u_accept < p / q)[:, 0].long().tolist()
    assert set(verdict.accepted.tolist()) == {0, 1}


def test_a_token_that_the_target_excludes_is_never_accepted_nor_drawn() -> None:
    tokens, draft_probs, target_probs, _, u_next = random_round(100, 3, 6)
    target_probs[:, 1].scatter_(1, tokens[:, 1:2], 0.0)
    u_accept = torch.zeros(100, 3)
    verdict = verify(tokens, draft_probs, target_probs, u_accept, u_next)
    assert (verdict.accepted == 1).all()
    assert (verdict.next_token != tokens[:, 1]).all()


def test_a_correction_is_a_token_that_the_draft_underrates() -> None:
    tokens, draft_probs, target_probs, u_accept, u_next = random_round(500, 2, 9)
    verdict = verify(tokens, draft_probs, target_probs, u_accept, u_next)
    assert set(verdict.accepted.tolist()) == {0, 1, 2}
    for row in range(500):
        accepted, token = verdict.accepted[row], verdict.next_token[row]
        if accepted < 2:
            assert target_probs[row, accepted, token] > draft_probs[row, accepted, token]


def test_equal_distributions_accept_everything_at_the_largest_uniform() -> None:
    torch.manual_seed(0)
    probs = torch.randn(300, 4, 40).mul(5).softmax(-1)
    tokens = sample(probs[:, :3], torch.rand(300, 3))
    verdict = verify(tokens, probs[:, :3], probs, torch.full((300, 3), 1 - 2**-24), torch.rand(300))
    assert (verdict.accepted == 3).all()


def test_without_a_residual_the_targets_row_serves() -> None:
    """Rows that sum to less than one by rounding can reject although the draft covers all of the target."""
    draft = torch.tensor([[[0.5, 0.5, 0.0]]])
    target = torch.tensor([[[0.0, 0.4, 0.0], [1.0, 0.0, 0.0]]])
    verdict = verify(torch.tensor([[1]]), draft, target, torch.tensor([[0.9]]), torch.tensor([0.3]))
    assert verdict.accepted.item() == 0 and verdict.next_token.item() == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    tokens, draft_probs, target_probs, u_accept, u_next = random_round(2, 3, 5)
    with pytest.raises(UsageError, match="gamma = 3"):
        verify(tokens, draft_probs, target_probs[:, :3], u_accept, u_next)
    with pytest.raises(UsageError, match="gamma = 3"):
        verify(tokens, draft_probs[..., :4], target_probs, u_accept, u_next)
    with pytest.raises(UsageError, match="gamma = 0"):
        verify(tokens[:, :0], draft_probs[:, :0], target_probs[:, :1], u_accept[:, :0], u_next)


def test_nothing_is_asked_of_the_host() -> None:
    """Tensors of the meta device have no values: any read of one on the host raises."""
    probs = torch.rand(2, 4, 50, device="meta")
    tokens = torch.ones(2, 3, dtype=torch.int64, device="meta")
    verdict = verify(tokens, probs[:, :3], probs, probs[:, :3, 0], probs[:, 0, 0])
    assert verdict.accepted.is_meta and verdict.next_token.is_meta
