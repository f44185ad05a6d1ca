"""The preference losses and their gradients beside TRL's own trainers, on the same weights and the same tokens.

Not for what TRL has no loss of (cdpo) and not for how a step is cut: test_preference_losses.py. Not for speed:
benchmarks/.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tunelet.data.branches import join
from tunelet.data.examples import Origin, Tokens
from tunelet.data.pack import make_batch
from tunelet.methods import Totals, losses
from tunelet.models import attention, head
from tunelet.recipe import MethodSection, Recipe
from tunelet.train import reference, step

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # TRL's own use of older names in transformers
    "ignore:You are importing from 'trl.experimental'",
)

VOCABULARY, END = 120, 1
TOLERANCE = 1e-5
# (prompt, chosen, rejected) in tokens, the end token among them
LENGTHS = ((7, 12, 5), (1, 3, 16), (12, 9, 9), (3, 2, 4), (20, 30, 21), (5, 1, 2))
EQUAL = ((4, 6, 6), (4, 6, 6), (4, 6, 6), (4, 6, 6))


def token_rows(lengths):
    """[(prompt, chosen, rejected)] token ids; every answer ends, and one pair begins with the same words."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for sizes in lengths:
        prompt, *two = (torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in sizes)
        out.append((prompt, *([*answer[:-1], END] for answer in two)))
    prompt, chosen, rejected = out[2]
    out[2] = (prompt, chosen, [*chosen[:3], *rejected[3:]])
    return out


def tokens(prompt, *answers, label=True):
    """A row with a branch for each answer."""
    parts = []
    for answer in answers:
        n = len(prompt) + len(answer)
        mask = (False,) * len(prompt) + (True,) * len(answer)
        parts.append(Tokens((*prompt, *answer), mask, ((0, n, "text"),), Origin("rows.jsonl", 1)))
    return replace(join(parts), label=label)


@pytest.fixture(scope="module")
def start():
    """A small Llama in plain transformers; weights large enough that it has opinions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(12.0 if weight.ndim > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def policy(start):
    """Has moved away from the start, and finds most answers likelier than it did: KTO's reference point is positive."""
    moved = copy.deepcopy(start)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(moved.parameters(), lr=0.05)
    for prompt, *answers in token_rows(LENGTHS) + token_rows(EQUAL):
        for answer in answers:
            ids = torch.tensor([[*prompt, *answer]])
            (moved(ids, labels=ids).loss / 10).backward()
    optimizer.step()
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.04 * torch.randn_like(weight))
    moved.zero_grad(set_to_none=True)
    return moved


@pytest.fixture(scope="module")
def tokenizer():
    """Token n is the word "tn": TRL takes text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": END, "<unk>": 2} | {f"t{n}": n for n in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(ids):
    return " ".join("<eos>" if n == END else f"t{n}" for n in ids)


def ours_on(model):
    """The same weights on our attention, where a pair's prompt is computed once."""
    from transformers import LlamaForCausalLM

    out = LlamaForCausalLM._from_config(
        copy.deepcopy(model.config), attn_implementation=attention.register(), dtype=torch.float32
    )
    out.load_state_dict(model.state_dict())
    assert head.packs(out)
    return out


def known(start, rows):
    """The rows with log-probabilities under the start, as a training computes them."""
    found = reference.compute(ours_on(start), rows, "cpu")
    return [replace(row, reference=tuple(of)) for row, of in zip(rows, found, strict=True)]


def gradients(model, loss):
    """{name: [weights] float64}; the model's own gradients stay empty."""
    loss.backward()
    out = {name: weight.grad.double() for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return out


def agree(ours, theirs):
    """(model, loss) each: the loss and the gradient of all weights, and of every weight for itself."""
    (our_model, our_loss), (their_model, their_loss) = ours, theirs
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=TOLERANCE)
    found, expected = gradients(our_model, our_loss), gradients(their_model, their_loss)
    size = torch.stack([x.norm() for x in expected.values()]).norm()
    apart = torch.stack([(found[name] - x).norm() for name, x in expected.items()]).norm()
    assert size > 1e-3 and apart / size < TOLERANCE
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 10 * TOLERANCE * x.norm(), name


@pytest.fixture
def made(tokenizer, tmp_path):
    """made(kind, columns, policy, reference, settings): TRL's trainer on copies, as a user makes it; one batch is all
    rows."""

    def make(kind, columns, policy, start=None, **settings):
        import trl
        from datasets import Dataset
        from trl.experimental import cpo, orpo

        where = {"ORPO": orpo, "CPO": cpo}.get(kind, trl)
        args = getattr(where, f"{kind}Config")(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            per_device_train_batch_size=len(columns["prompt"]),
            **settings,
        )
        return getattr(where, f"{kind}Trainer")(
            model=copy.deepcopy(policy),
            args=args,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            **({"ref_model": copy.deepcopy(start)} if start is not None else {}),
        )

    return make


def collated(trainer):
    """All rows in one batch, by the trainer's own collator."""
    return trainer.data_collator([trainer.train_dataset[n] for n in range(len(trainer.train_dataset))])


def padded(sequences):
    longest = max(map(len, sequences))
    return [[*ids, *[0] * (longest - len(ids))] for ids in sequences]


def pairs(rows):
    return {
        "prompt": [text(prompt) + " " for prompt, _, _ in rows],
        "chosen": [text(chosen) for _, chosen, _ in rows],
        "rejected": [text(rejected) for _, _, rejected in rows],
    }


DPO = {
    "sigmoid": {"beta": 0.3},
    "hinge": {"beta": 0.3},
    "ipo": {"beta": 0.3},
    "robust": {"beta": 0.3, "label_smoothing": 0.15},
    "sigmoid_norm": {"beta": 3.0},
}


@pytest.mark.parametrize("lengths", [LENGTHS, EQUAL], ids=["mixed", "equal"])
@pytest.mark.parametrize("kind", [*DPO, "rpo"])
def test_dpo(kind, lengths, made, policy, start):
    rows, settings = token_rows(lengths), DPO.get(kind, DPO["sigmoid"])
    if kind == "rpo":  # the SFT loss beside DPO's
        theirs = {**settings, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}
        method = MethodSection(name="dpo", rpo_alpha=0.7, **settings)
    else:
        theirs = {**settings, "loss_type": kind}
        method = MethodSection(name="dpo", loss_type=kind, **settings)
    trainer = made("DPO", pairs(rows), policy, start, **theirs)
    batch = collated(trainer)
    assert batch["input_ids"].tolist() == padded([p + c for p, c, _ in rows] + [p + r for p, _, r in rows])
    expected = trainer._compute_loss(trainer.model, batch, return_outputs=False)

    ours = known(start, [tokens(*row) for row in rows])
    model, totals = ours_on(policy), Totals.of(ours)
    found, told = losses()["dpo"](model, make_batch(ours), totals, method)
    agree((model, found), (trainer.model, expected))
    logged = trainer._metrics["train"]
    assert 0 < logged["rewards/accuracies"][0] < 1  # margins on both sides, some of them large
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert told[name] / totals.rows == pytest.approx(logged[name][0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("swapped", [False, True], ids=["above", "below"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.8)])
def test_kto(weights, swapped, made, policy, start):
    """Their batch is our step: the answers to other prompts that the reference point is taken from are theirs too.
    Swapped, the policy is the less sure of the two and the reference point 0."""
    rows = token_rows(LENGTHS)
    columns = {
        "prompt": [text(prompt) + " " for prompt, _, _ in rows],
        "completion": [text(answer) for _, answer, _ in rows],
        "label": [n % 3 > 0 for n in range(len(rows))],
    }
    policy, start = (start, policy) if swapped else (policy, start)
    settings = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    trainer = made("KTO", columns, policy, start, loss_type="kto", **settings)
    batch = collated(trainer)
    others = list(trainer.train_dataset["KL_completion_ids"])
    assert batch["input_ids"].tolist() == padded([prompt + answer for prompt, answer, _ in rows])
    assert others == [rows[n - 1][1] for n in range(len(rows))]
    expected = trainer._compute_loss(trainer.model, batch, return_outputs=False)

    ours = [
        tokens(prompt, answer, other, label=label)
        for (prompt, answer, _), other, label in zip(rows, others, columns["label"], strict=True)
    ]
    ours, model = known(start, ours), ours_on(policy)
    recipe = Recipe.model_validate({"method": {"name": "kto", **settings}, "train": {"batch_size": 4}})
    stepper = step.Stepper(model, None, recipe, "cpu")
    totals = stepper.with_kl(Totals.of(ours), [step.micro_batches(ours, recipe.train)])
    (kl,) = trainer._metrics["train"]["kl"]
    assert totals.kl == pytest.approx(kl, rel=TOLERANCE, abs=TOLERANCE) and (kl == 0 if swapped else kl > 0.5)
    found, told = stepper.loss_of(stepper.batch(ours), totals)
    agree((model, found), (trainer.model, expected))
    logged, good = trainer._metrics["train"], told["labels/chosen"]
    assert told["rewards/chosen"] / good == pytest.approx(logged["rewards/chosen"][0], rel=1e-4)
    assert told["rewards/rejected"] / (len(rows) - good) == pytest.approx(logged["rewards/rejected"][0], rel=1e-4)


def test_orpo_where_prompts_are_one_token(made, policy):
    """TRL counts the prompt's tokens in its likelihood; of a single token there is none to count."""
    rows = token_rows([(1, *rest) for _, *rest in LENGTHS])
    trainer = made("ORPO", pairs(rows), policy, beta=0.4)
    batch = collated(trainer)
    assert batch["chosen_input_ids"].tolist() == padded([prompt + chosen for prompt, chosen, _ in rows])
    expected, logged = trainer.get_batch_loss_metrics(trainer.model, batch)

    ours, model = [tokens(*row) for row in rows], ours_on(policy)
    totals = Totals.of(ours)
    found, told = losses()["orpo"](model, make_batch(ours), totals, MethodSection(name="orpo", beta=0.4))
    agree((model, found), (trainer.model, expected))
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "nll_loss"):
        assert told[name] / totals.rows == pytest.approx(logged[name], rel=1e-4)


@pytest.mark.parametrize("lengths", [LENGTHS, EQUAL], ids=["mixed", "equal"])
def test_orpo_odds(lengths, made, policy):
    """With longer prompts the parts that differ by design, the likelihoods, are taken away on both sides."""
    rows, beta = token_rows(lengths), 2.0
    trainer = made("ORPO", pairs(rows), policy, beta=beta)
    batch = collated(trainer)
    chosen, rejected, *_, nll = trainer.concatenated_forward(trainer.model, batch)
    expected = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    whole, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert whole.item() == pytest.approx((nll + expected).item(), rel=TOLERANCE)

    ours, model = [tokens(*row) for row in rows], ours_on(policy)
    batch, totals = make_batch(ours), Totals.of(ours)
    parts = [losses()["orpo"](model, batch, totals, MethodSection(name="orpo", beta=b))[0] for b in (beta, 0)]
    assert abs(parts[1].item() / nll.item() - 1) > 1e-3  # the prompt's likelihood is another
    agree((model, parts[0] - parts[1]), (trainer.model, expected))


@pytest.mark.parametrize("gamma", [0.0, 1.2])
@pytest.mark.parametrize("lengths", [LENGTHS, EQUAL], ids=["mixed", "equal"])
def test_simpo(lengths, gamma, made, policy):
    rows = token_rows(lengths)
    trainer = made("CPO", pairs(rows), policy, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=gamma)
    expected, logged = trainer.get_batch_loss_metrics(trainer.model, collated(trainer))

    ours, model = [tokens(*row) for row in rows], ours_on(policy)
    totals = Totals.of(ours)
    method = MethodSection(name="simpo", beta=2.0, simpo_gamma=gamma)
    found, told = losses()["simpo"](model, make_batch(ours), totals, method)
    agree((model, found), (trainer.model, expected))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert told[name] / totals.rows == pytest.approx(logged[name], rel=1e-4, abs=1e-4)
