"""Supervised fine-tuning: the mean negative log-likelihood of the answers' tokens, given what comes before them.

L = -1/N sum over answer tokens of log p(y_t | x, y_<t); Ouyang et al. (arXiv:2203.02155), section 3.5. Which tokens are
answers is decided by the renderer's mask (data/render.py), not here; so the formula is that of pretraining over fewer
targets.
"""

from __future__ import annotations

from tunelet.methods.pretrain import loss

__all__ = ["loss"]
