"""The losses of the methods are their formulas."""

from __future__ import annotations

import pytest
import torch

from tunelet.data.examples import Origin, Tokens
from tunelet.data.pack import make_batch
from tunelet.methods import Totals, losses
from tunelet.recipe import MethodSection


@pytest.mark.parametrize("method", ["pretrain", "sft"])
def test_mean_negative_log_likelihood_of_the_targets(method, tiny_model):
    ids, mask = (5, 9, 30, 31, 2), (False, False, True, True, True)
    batch = make_batch([Tokens(ids, mask, ((0, 5, "text"),), Origin("t", 1))])
    logits = tiny_model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -(logits[1, 30] + logits[2, 31] + logits[3, 2]) / 3
    found = losses()[method](tiny_model, batch, Totals(1, 3, 3), MethodSection())[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    quarter = losses()[method](tiny_model, batch, Totals(4, 12, 12), MethodSection())[0]
    torch.testing.assert_close(quarter * 4, expected, atol=1e-6, rtol=1e-6)
