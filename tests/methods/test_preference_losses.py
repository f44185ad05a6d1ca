"""The preference losses are their formulas, written down once more in float64; how a step is cut changes nothing.

Not for how they compare with TRL's (test_parity.py) and not for exact log-probabilities (models/test_sequences.py).
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tunelet.data.branches import join
from tunelet.data.examples import Origin, Tokens
from tunelet.data.pack import make_batch
from tunelet.methods import Totals, dpo, kto, losses, orpo, pairs, simpo
from tunelet.models import attention, head
from tunelet.recipe import MethodSection, Recipe
from tunelet.train import reference, step

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "cdpo", "robust", "sigmoid_norm")
METHODS = {
    **{kind: MethodSection(name="dpo", loss_type=kind, beta=0.3, label_smoothing=0.1) for kind in LOSS_TYPES},
    "rpo": MethodSection(name="dpo", beta=0.3, rpo_alpha=0.7),
    "orpo": MethodSection(name="orpo", beta=0.6),
    "simpo": MethodSection(name="simpo", beta=2.0, simpo_gamma=0.8),
    "kto": MethodSection(name="kto", beta=0.3, desirable_weight=1.4, undesirable_weight=0.6),
}
KL = 0.37
# (prompt, first answer, second answer) in tokens
LENGTHS = ((1, 5, 9), (4, 12, 3), (9, 1, 1), (2, 7, 7), (30, 20, 31), (6, 3, 14))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def formula(method, chosen, rejected, reference_chosen, reference_rejected, n_chosen, n_rejected):
    """[pairs] float64: the papers' formulas of DPO, without rpo_alpha."""
    beta, e = method.beta, method.label_smoothing
    won, lost = chosen - reference_chosen, rejected - reference_rejected
    if method.loss_type == "sigmoid":
        return -torch.log(sigmoid(beta * won - beta * lost))
    if method.loss_type == "hinge":
        return (1 - beta * (won - lost)).clamp(min=0)
    if method.loss_type == "ipo":
        return (won / n_chosen - lost / n_rejected - 0.5 / beta) ** 2
    if method.loss_type == "sigmoid_norm":
        return -torch.log(sigmoid(beta / n_chosen * won - beta / n_rejected * lost))
    right, wrong = torch.log(sigmoid(beta * (won - lost))), torch.log(sigmoid(beta * (lost - won)))
    if method.loss_type == "cdpo":
        return -(1 - e) * right - e * wrong
    return (-(1 - e) * right + e * wrong) / (1 - 2 * e)


def log_odds(chosen, rejected):
    """[pairs] float64 log of the odds ratio, straight from the probabilities."""
    p, q = torch.exp(chosen), torch.exp(rejected)
    return torch.log(p / (1 - p) / (q / (1 - q)))


def verdicts(method, rewards, good, kl):
    """[rows] float64: KTO's losses by the paper's value function, lambda - v."""
    value = torch.where(good, sigmoid(method.beta * (rewards - kl)), sigmoid(method.beta * (kl - rewards)))
    weight = torch.where(good, method.desirable_weight, method.undesirable_weight)
    return weight - weight * value


def normal(*size, seed=0, scale=1.0, mean=0.0):
    """fp32 numbers that float64 holds exactly."""
    return mean + scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def agree(ours, written, *numbers):
    """Values and gradients of two functions of fp32 numbers, the second of them computed in float64."""
    single = [x.clone().requires_grad_() for x in numbers]
    double = [x.double().requires_grad_() for x in numbers]
    found, expected = ours(*single), written(*double)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert any(float(x.abs().max()) > 1e-3 for x in torch.autograd.grad(expected.sum(), double, retain_graph=True))
    for a, b in zip(torch.autograd.grad(found.sum(), single), torch.autograd.grad(expected.sum(), double), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.05, 0.8])
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_dpo_of_numbers(kind, beta):
    method = MethodSection(name="dpo", loss_type=kind, beta=beta, label_smoothing=0.2)
    before, moved = normal(2, 100, seed=1, scale=30, mean=-80), normal(2, 100, seed=2, scale=8)
    counts = torch.randint(1, 40, (2, 100), generator=torch.Generator().manual_seed(3)).float()

    def ours(chosen, rejected):
        return dpo.losses(pairs.Pairs(chosen, rejected, *before, *counts), method)

    def written(chosen, rejected):
        return formula(method, chosen, rejected, *before.double(), *counts.double())

    agree(ours, written, *(before + moved))


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_dpo_stays_finite_far_from_the_start(kind):
    """In fp32 the sigmoid of such margins is 0 or 1: a log of it would be infinite and its gradient nan."""
    method = MethodSection(name="dpo", loss_type=kind, beta=0.5, label_smoothing=0.1)
    chosen = torch.tensor([-1e4, 1e4, -300.0, 300.0], requires_grad=True)
    zeros, ones = torch.zeros(4), torch.ones(4)
    out = dpo.losses(pairs.Pairs(chosen, zeros, zeros, zeros, ones, ones), method)
    (slope,) = torch.autograd.grad(out.sum(), chosen)
    assert out.isfinite().all() and slope.isfinite().all()
    assert slope[0] < 0 and slope[2] < 0


def test_odds_ratio_of_numbers():
    """Answers from hopeless to nearly certain; float64 is good for 1 - p of 1e-4 and more to eleven digits."""
    span = -torch.logspace(2, -4, 60)
    chosen, rejected = span[torch.randperm(60, generator=torch.Generator().manual_seed(1))], span
    single = [x.clone().requires_grad_() for x in (chosen, rejected)]
    double = [x.double().requires_grad_() for x in (chosen, rejected)]
    found, expected = orpo.log_odds_ratio(*single), log_odds(*double)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found.sum(), single), torch.autograd.grad(expected.sum(), double), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


def test_odds_of_a_certain_answer_are_finite():
    """log-probabilities of 0 and -1e-8 happen: an answer of a few tokens that was learned by heart."""
    certain = torch.tensor([0.0, -1e-8, -3.0, -4.0], requires_grad=True)
    other = torch.tensor([-2.0, -2.0, 0.0, -1e-8], requires_grad=True)
    ratio = orpo.log_odds_ratio(certain, other)
    slopes = torch.autograd.grad(-torch.nn.functional.logsigmoid(ratio).sum(), (certain, other))
    assert ratio.isfinite().all() and (ratio[:2] > 10).all() and (ratio[2:] < -10).all()
    assert all(slope.isfinite().all() for slope in slopes)


def test_simpo_of_numbers():
    method = METHODS["simpo"]

    def written(chosen, rejected):
        return -torch.log(sigmoid(method.beta * chosen - method.beta * rejected - method.simpo_gamma))

    chosen, rejected = normal(2, 100, seed=4, scale=2, mean=-3)
    agree(lambda *both: simpo.losses(*both, method), written, chosen, rejected)


@pytest.mark.parametrize("kl", [0.0, 2.5])
def test_kto_of_numbers(kl):
    method = METHODS["kto"]
    good = torch.arange(100) % 3 > 0
    rewards = normal(100, seed=5, scale=8)
    agree(lambda r: kto.losses(r, good, kl, method), lambda r: verdicts(method, r, good, kl), rewards)
    far = kto.losses(torch.tensor([-1e4, 1e4]), torch.tensor([True, True]), kl, method)
    assert far.tolist() == pytest.approx([method.desirable_weight, 0.0])


# --- through a model


def written_out(method, totals, rows, answers):
    """The loss of whole rows. answers: for each row [(log-probability, targets) of each sequence]."""
    first, second = (torch.stack([row[i][0] for row in answers]) for i in (0, 1))
    n_first, n_second = (torch.tensor([row[i][1] for row in answers]) for i in (0, 1))
    before = torch.tensor([row.reference for row in rows], dtype=torch.float64)
    if method.name == "kto":
        good = torch.tensor([row.label for row in rows])
        return verdicts(method, first - before[:, 0], good, totals.kl).mean()
    nll = -first.sum() / n_first.sum()
    if method.name == "orpo":
        odds = log_odds(first / n_first, second / n_second)
        return nll - method.beta * torch.log(sigmoid(odds)).mean()
    if method.name == "simpo":
        margin = method.beta * (first / n_first - second / n_second) - method.simpo_gamma
        return -torch.log(sigmoid(margin)).mean()
    each = formula(method, first, second, before[:, 0], before[:, 1], n_first, n_second)
    return each.mean() + method.rpo_alpha * nll


def answers_of(model, rows):
    """Each sequence alone through plain transformers."""
    out = []
    for row in rows:
        own = []
        for part in (row.only(0), row.only(1)):
            logp = model(torch.tensor([part.ids])).logits[0].double().log_softmax(-1)
            at = [i for i in range(1, len(part.ids)) if part.mask[i]]
            own.append((sum(logp[i - 1, part.ids[i]] for i in at), len(at)))
        out.append(own)
    return out


@pytest.fixture
def start(tiny_model_folder):
    """The tiny Llama on our attention, with weights large enough that its predictions differ."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, dtype=torch.float32, attn_implementation=attention.register()
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0 if weight.ndim > 1 else 1.0)
    assert head.packs(model)
    return model


@pytest.fixture
def policy(start):
    """A model that has moved away from the start."""
    torch.manual_seed(7)
    moved = copy.deepcopy(start)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.04 * torch.randn_like(weight))
    return moved


@pytest.fixture
def rows(start):
    """Pairs, or answers with a verdict: each row with two answers and what the start thought of them."""
    generator = torch.Generator().manual_seed(2)
    out = []
    for number, lengths in enumerate(LENGTHS):
        prompt, *two = (torch.randint(4, 400, (n,), generator=generator).tolist() for n in lengths)
        parts = []
        for answer in two:
            n = len(prompt) + len(answer)
            mask = (False,) * len(prompt) + (True,) * len(answer)
            parts.append(Tokens((*prompt, *answer), mask, ((0, n, "text"),), Origin("rows.jsonl", number + 1)))
        out.append(replace(join(parts), label=number % 3 > 0))
    found = reference.compute(start, out, "cpu")
    return [replace(row, reference=tuple(of)) for row, of in zip(out, found, strict=True)]


def batch_of(method, rows):
    return make_batch([row.only(0) for row in rows] if method.name == "kto" else rows)


def gradient(model):
    """[weights] float64, taken out of the model."""
    out = torch.cat([weight.grad.double().reshape(-1) for weight in model.parameters()])
    model.zero_grad(set_to_none=True)
    return out


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_the_formula(name, policy, rows):
    method, totals = METHODS[name], replace(Totals.of(rows), kl=KL)
    plain = copy.deepcopy(policy)
    plain.set_attn_implementation("eager")
    expected = written_out(method, totals, rows, answers_of(plain, rows))
    expected.backward()
    found, _ = losses()[method.name](policy, batch_of(method, rows), totals, method)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert distance(gradient(policy), gradient(plain)) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_add_up(name, policy, rows):
    """Loss, gradient and what the log shows: shares of a step's unequal parts sum to those of the step in one."""
    method, totals = METHODS[name], replace(Totals.of(rows), kl=KL)
    whole, told = losses()[method.name](policy, batch_of(method, rows), totals, method)
    whole.backward()
    expected, added, said = gradient(policy), 0.0, Counter()
    for a, b in itertools.pairwise((0, 1, 4, 6)):
        part, of_part = losses()[method.name](policy, batch_of(method, rows[a:b]), totals, method)
        part.backward()
        added += part.item()
        said.update(of_part)
    assert added == pytest.approx(whole.item(), rel=1e-6)
    assert distance(gradient(policy), expected) < 1e-5
    assert dict(said) == pytest.approx(told, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "kto"])
def test_the_reference_matters(name, policy, rows):
    method, totals = METHODS[name], replace(Totals.of(rows), kl=KL)
    found, _ = losses()[method.name](policy, batch_of(method, rows), totals, method)
    other = [replace(row, reference=(row.reference[0] - 3, row.reference[1])) for row in rows]
    changed, _ = losses()[method.name](policy, batch_of(method, other), totals, method)
    assert abs((changed - found).item()) > 1e-2


def test_wrong_rows_are_refused(policy, rows):
    single = [rows[0].only(0), *rows[1:]]
    with pytest.raises(ValueError, match="chosen and a rejected"):
        dpo.loss(policy, make_batch(single), Totals.of(single), METHODS["sigmoid"])
    bare = [replace(row, reference=()) for row in rows]
    with pytest.raises(ValueError, match="reference"):
        dpo.loss(policy, make_batch(bare), Totals.of(bare), METHODS["sigmoid"])
    found, _ = simpo.loss(policy, make_batch(bare), Totals.of(bare), METHODS["simpo"])
    assert found.isfinite()


# --- beta


def pulls(name, beta):
    """([n] margins between the answers, rewards without beta; [n] how hard each loss pulls the better answer up
    there)."""
    margins = torch.linspace(0, 100, 50001, requires_grad=True)
    zeros, ones = torch.zeros_like(margins), torch.ones_like(margins)
    method = METHODS[name].model_copy(update={"beta": beta, "simpo_gamma": 0.0})
    if method.name == "dpo":
        out = dpo.losses(pairs.Pairs(margins, zeros, zeros, zeros, ones, ones), method)
    elif method.name == "simpo":
        out = simpo.losses(margins, zeros, method)
    else:
        out = kto.losses(margins, ones.bool(), 0.0, method)
    return margins.detach(), -torch.autograd.grad(out.sum(), margins)[0]


@pytest.mark.parametrize("name", [*LOSS_TYPES, "simpo", "kto"])
def test_a_larger_beta_is_satisfied_by_a_smaller_margin(name):
    """beta divides: the margin at which the pull has fallen to half of that at the start is a constant over beta. With
    beta the wrong way round a larger one would go on pulling to a larger margin."""
    reached = {}
    for beta in (0.1, 0.5):
        margins, pull = pulls(name, beta)
        assert pull[0] > 0
        below = pull <= pull[0] / 2
        assert below.any() and not below[0]
        reached[beta] = float(margins[below.int().argmax()])
    assert reached[0.5] == pytest.approx(reached[0.1] / 5, abs=0.005)


def test_where_dpo_comes_to_rest():
    """The margins of least loss, from the papers: ipo 1 / (2 beta), cdpo log((1 - e) / e) / beta, hinge 1 / beta."""
    e = METHODS["cdpo"].label_smoothing
    for name, constant in {"ipo": 0.5, "cdpo": torch.tensor((1 - e) / e).log().item(), "hinge": 1.0}.items():
        for beta in (0.1, 0.5):
            margins, pull = pulls(name, beta)
            rest = float(margins[(pull <= 0).int().argmax()])
            assert rest == pytest.approx(constant / beta, abs=0.005), (name, beta)


def test_once_the_margin_is_there_a_larger_beta_pulls_less():
    for name in ("sigmoid", "sigmoid_norm", "simpo", "kto"):
        (margins, weak), (_, strong) = pulls(name, 0.1), pulls(name, 0.5)
        there = margins > 20
        assert (strong[there] < weak[there]).all(), name
        assert strong[0] > weak[0], name


def test_the_odds_ratio_weighs_as_much_as_beta_says(policy, rows):
    batch, totals = make_batch(rows), Totals.of(rows)
    found = {b: orpo.loss(policy, batch, totals, MethodSection(name="orpo", beta=b))[0].item() for b in (0, 1, 3)}
    assert found[1] - found[0] > 0.1
    assert found[3] - found[0] == pytest.approx(3 * (found[1] - found[0]), rel=1e-4)


# --- KTO's reference point


def kto_recipe(**train):
    method = {"name": "kto", "beta": 0.3}
    return Recipe.model_validate({"method": method, "train": {"learning_rate": 1e-3, "schedule": "constant", **train}})


CUTS = ({"batch_size": 6}, {"batch_size": 1}, {"batch_size": 4}, {"batch_size": 5, "tokens_per_batch": 40})


def excess(model, rows):
    """Mean over rows of log pi - log pi_ref of the second answer, which was given to another prompt."""
    answers = answers_of(model, rows)
    return torch.stack([two[1][0] - row.reference[1] for two, row in zip(answers, rows, strict=True)]).mean().item()


def test_the_reference_point_is_the_mean_over_the_whole_step(policy, rows):
    plain = copy.deepcopy(policy)
    plain.set_attn_implementation("eager")
    shift = 0.5 - excess(plain, rows)
    rows = [replace(row, reference=(row.reference[0], row.reference[1] - shift)) for row in rows]
    sizes = set()
    for cut in CUTS:
        made = kto_recipe(**cut)
        divided = [step.micro_batches(rows, made.train)]
        totals = step.Stepper(policy, None, made, "cpu").with_kl(Totals.of(rows), divided)
        assert totals.kl == pytest.approx(0.5, abs=1e-4)
        sizes.add(tuple(len(part) for part in divided[0]))
    assert len(sizes) == len(CUTS)


def test_a_reference_point_below_zero_is_zero(policy, rows):
    """Not that of each part of the step: one part is far above."""
    rows = [replace(row, reference=(row.reference[0], row.reference[1] + 50)) for row in rows]
    rows[0] = replace(rows[0], reference=(rows[0].reference[0], rows[0].reference[1] - 100))
    for cut in CUTS:
        made = kto_recipe(**cut)
        divided = [step.micro_batches(rows, made.train)]
        assert step.Stepper(policy, None, made, "cpu").with_kl(Totals.of(rows), divided).kl == 0.0


def test_a_step_of_kto_does_not_depend_on_how_it_is_cut(policy, rows):
    rows = [replace(row, reference=(row.reference[0], row.reference[1] - 2)) for row in rows]
    before = torch.cat([weight.detach().reshape(-1) for weight in policy.parameters()])
    done, weights = [], []
    for cut in CUTS:
        made, model = kto_recipe(**cut), copy.deepcopy(policy)
        stepper = step.Stepper(model, step.optimizer_for(model, made.train), made, "cpu")
        done.append(stepper(rows, 0, 10))
        weights.append(torch.cat([weight.detach().reshape(-1) for weight in model.parameters()]))
    first = done[0]
    assert first.told["kl"] > 0.1
    for other, moved in zip(done[1:], weights[1:], strict=True):
        assert other.loss == pytest.approx(first.loss, rel=1e-5)
        assert other.norm == pytest.approx(first.norm, rel=1e-5)
        assert other.told == pytest.approx(first.told, rel=1e-5)
        assert distance(moved - before, weights[0] - before) < 1e-3  # AdamW's first step makes a sign of each gradient
