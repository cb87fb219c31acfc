"""Every way in for a file that somebody else may have made: a small whole one, and what reads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny_gguf import write_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from lablog import claims, model_list, profiles
from lablog.arianna.dialogues import load_dialogues
from lablog.commitment import qlora, sweep
from lablog.commitment.posterior import CommitmentSettings, VariationalCommitment
from lablog.files import repository
from lablog.models import gguf_import, llama2c, locate
from lablog.models.llama_cpp import Model
from lablog.record import Record
from lablog.text.bpe import GGUFTokenizer
from lablog.text.chat_tokenizer import tokenizer_of
from lablog.text.corpora import user_documents
from lablog.text.dialogues import load_settings
from lablog.text.packing import Stream, pack
from lablog.text.personas import CONVERSATION, PERSONA, read_personas
from lablog.text.pretrained import gguf_embedding
from lablog.text.tokenizer import Tokenizer, train_tokenizer
from torture.mutations import BINARY, TEXT, Mutation

WORDS = ["the heron stood in the reeds and waited", "Q: who are you?", "A: I am the one who asks"]


@dataclass(frozen=True)
class Reader:
    """A file is made by `make` in an empty folder, corrupted, and given to `read`.

    Errors that `read` may raise are ValueError, OSError and EngineError; their text names the file.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    mutations: tuple[Mutation, ...]


def _written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return make


def _copied(source: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copy(repository() / source, folder))


def _tokenizer(folder: Path) -> Path:
    return train_tokenizer(WORDS * 20, 300, folder / "tokenizer.model", add_prefix_space=True,
                           llama2c=True).path


def _llama(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = Tokenizer(_tokenizer(folder))
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=True, rms_norm_eps=1e-5)).save_pretrained(folder)
    return folder


def _llama2c(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = folder / "hf"
        made.mkdir()
        llama2c.from_hugging_face(_llama(made), folder / "model.bin", folder / "tokenizer.bin")
        return folder / name
    return make


def _gguf(folder: Path) -> Path:
    return write_tiny(folder / "tiny.gguf", size=600)


def _commitment(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        VariationalCommitment(CommitmentSettings(
            k=3, width=8, layers=(0, 1), strength=1.0)).save(folder, "0" * 64)
        return folder / name
    return make


def _packed(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pack(WORDS, Tokenizer(_tokenizer(folder)), folder / "packed", shard=16)
        return folder / "packed" / name
    return make


def _stream(path: Path) -> None:
    stream = Stream(path.parent, Tokenizer(path.parents[1] / "tokenizer.model"))
    stream.read(0, min(8, len(stream)))


def _chat_model(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        gguf_import.to_hugging_face(_gguf(folder), folder / "model")
        return folder / "model" / name
    return make


def _base(path: Path) -> None:
    folder = locate.hugging_face_folder(str(path.parent), path.parent)
    qlora.load_base(folder, "none", "f32")


def _profile(path: Path) -> None:
    profiles.declared_parameters = cache(profiles.declared_parameters)  # which do not change here
    profiles.load(str(path))


def _engine(path: Path) -> None:
    with Model(path):
        pass


PERSONAS = (f'"{PERSONA}","{CONVERSATION}"\n'
            '"I keep bees.","User 1: Hello\nUser 2: Hi, I keep bees."\n'
            '"I sail.","User 1: Hello\nUser 2: The wind is good."\n')
CHATS = "".join(json.dumps(chat) + "\n" for chat in (
    [{"role": "user", "content": "who are you?"}, {"role": "assistant", "content": "the one"}],
    [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because of rain"}]))
JOURNAL = "".join(json.dumps({"control": "fixed", "strength": 0.5 * i, "layers": "all", "seed": i,
                              "language": True, "kl": 0.1, "directions": ""}) + "\n"
                  for i in range(4))
SMALLEST = "book/records/laptop/06_arianna_finetune.json"
READERS = {reader.name: reader for reader in (
    Reader("record", _copied(SMALLEST), Record.read, TEXT),
    Reader("profile", _copied("notebooks/profiles/pretrained.yaml"), _profile, TEXT),
    Reader("dialogue settings", _copied("data/dialogues.yaml"), load_settings, TEXT),
    Reader("list of models", _copied("data/models.yaml"), model_list.listed, TEXT),
    Reader("claims", _copied("data/claims.csv"), claims.load_claims, TEXT),
    Reader("personas", _written("personas.csv", PERSONAS), read_personas, TEXT),
    Reader("dialogues", _written("dialogues.jsonl", CHATS), load_dialogues, TEXT),
    Reader("chats", _written("chats.jsonl", CHATS), user_documents, TEXT),
    Reader("text", _written("text.txt", "\n\n".join(WORDS)), user_documents, TEXT),
    Reader("sweep journal", _written("sweep.jsonl", JOURNAL), sweep.journalled, TEXT),
    Reader("llama2c model", _llama2c("model.bin"), llama2c.read_model, BINARY),
    Reader("llama2c tokenizer", _llama2c("tokenizer.bin"),
           lambda path: llama2c.read_tokenizer(path, 300), BINARY),
    Reader("SentencePiece model", _tokenizer, Tokenizer, BINARY),
    Reader("SentencePiece model to export", _tokenizer, llama2c.read_sentencepiece, BINARY),
    Reader("GGUF embedding", _gguf, gguf_embedding, BINARY),
    Reader("GGUF tokenizer", _gguf, GGUFTokenizer, BINARY),
    Reader("GGUF in llama.cpp", _gguf, _engine, BINARY),
    Reader("settings of a commitment", _commitment("commitment.json"),
           lambda path: VariationalCommitment.load(path.parent), TEXT),
    Reader("weights of a commitment", _commitment("commitment.safetensors"),
           lambda path: VariationalCommitment.load(path.parent), BINARY),
    Reader("manifest of packed text", _packed("manifest.json"), _stream, TEXT),
    Reader("shard of packed text", _packed("0001.u16"), _stream, BINARY),
    Reader("Hugging Face tokenizer", _chat_model("tokenizer.json"),
           lambda path: tokenizer_of(path.parent), TEXT),
    Reader("Hugging Face configuration", _chat_model("config.json"),
           _base, TEXT),
    Reader("Hugging Face weights", _chat_model("model.safetensors"),
           _base, BINARY),
)}
