"""Fixtures every test may use: shared corpora, a tiny tokenizer, a tiny Llama; and no test reaches the network.

Not for helpers of one test file: those stay in that file.
"""

from __future__ import annotations

import os
import tempfile

# Set before torch is imported anywhere: the tests are many and small; one thread each is fastest and most repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tunelet-tests-")  # calibrations of plans

import socket
from pathlib import Path

import hypothesis
import pytest
import pytest_socket

# A ChatML template with a generation block, so that transformers itself can say which tokens are the assistant's.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "Turn on the light in the kitchen at 18:00, please.",
    "The bedroom fan is off. Set the heater in the living room to 21 degrees.",
    "오후 7시 15분에 침실 불을 30퍼센트로 해 주세요. 거실 선풍기가 켜져 있습니다.",
    "What is 12 + 30? It is 42. Natalia sold 48/2 = 24 clips in May.",
    "Once upon a time there was a little girl who liked to play in the garden with her dog.",
    "user system assistant tool What is the state of the door? The front door is locked.",
]


hypothesis.settings.register_profile("untimed", deadline=None)  # no test asserts a time: machines are shared
hypothesis.settings.load_profile("untimed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test reaches the network; unix sockets (asyncio) stay open. A server's test asks for `loopback`."""
    if item.get_closest_marker("enable_socket") or "socket_enabled" in getattr(item, "fixturenames", ()):
        return
    if "loopback" in getattr(item, "fixturenames", ()):
        pytest_socket.socket_allow_hosts(["127.0.0.1", "::1"], allow_unix_socket=True)
    else:
        pytest_socket.disable_socket(allow_unix_socket=True)


@pytest.fixture
def loopback() -> str:
    """For tests that serve on this machine: sockets to 127.0.0.1 are open, all others stay closed."""
    return "127.0.0.1"


def shared_root() -> Path | None:
    """The folder of shared corpora: `TUNELET_SHARED`, else ../shared/data beside the repository's root; else None."""
    named = os.environ.get("TUNELET_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared corpora, or a skip that says what is missing."""
    folder = shared_root()
    if folder is None:
        pytest.skip("the shared data is not here: set TUNELET_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 400 entries with SmolLM2's chat tokens, trained on the fly; pad is not eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
    )
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A saved model folder: a Llama of hidden 32 and 2 layers with random weights (seed 0) and the tiny tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_model_folder: Path):
    """The tiny Llama, freshly loaded in float32: a test may change its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


@pytest.fixture
def no_network_left() -> None:
    """Fails the test where a socket could be opened after all: used by the test of this rule itself."""
    with pytest.raises(pytest_socket.SocketBlockedError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
