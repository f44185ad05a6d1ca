"""The test-suite's own promises: sockets are blocked, and the tiny fixtures work."""

from __future__ import annotations

import socket

import pytest
import pytest_socket


def test_sockets_are_blocked(no_network_left):
    with pytest.raises(pytest_socket.SocketBlockedError):
        socket.create_connection(("127.0.0.1", 9))


def test_unix_sockets_stay_open():
    left, right = socket.socketpair()
    left.close()
    right.close()


def test_tiny_model_and_tokenizer_agree(tiny_model, tiny_tokenizer):
    import torch

    ids = tiny_tokenizer("Turn on the light in the kitchen", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tiny_model(ids).logits.shape == (1, ids.shape[1], len(tiny_tokenizer))
    assert tiny_tokenizer.pad_token_id != tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(tiny_tokenizer("저녁 7시 반").input_ids) == "저녁 7시 반"
