"""What a saved model folder holds beside its weights. The weights themselves: test_load.py, test_adapters.py."""

from __future__ import annotations

import pytest

from tunelet.models import load, save
from tunelet.models.device import Choice


def test_sampling_settings_without_their_switch_are_saved(tiny_model_folder, tiny_tokenizer, tmp_path):
    """As in Llama 2: a temperature and no do_sample, which transformers loads and refuses to save."""
    from transformers import GenerationConfig

    model = load.load_model(tiny_model_folder, Choice("cpu", "float32", 1))
    model.generation_config.temperature, model.generation_config.top_p = 0.6, 0.9
    with pytest.raises(ValueError, match=r"temperature|GenerationConfig"):
        model.generation_config.save_pretrained(tmp_path / "plain")
    save.save(model, tiny_tokenizer, tmp_path / "saved")
    kept = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.6, 0.9)
