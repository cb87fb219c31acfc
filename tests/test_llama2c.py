"""llama2.c import against an evaluation of its own: float64, NumPy, Meta's interleaved rotary."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from lablog.models import llama2c, locate
from lablog.models.llama_cpp import Context, Model, generate_tokens

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260K.bin"
TOKENS = 160  # at least 128 are compared
Pieces = list[tuple[bytes, float]]


@dataclass
class Reference:
    """A llama2.c model, read from the format's description alone and evaluated in float64."""

    shape: tuple[int, ...]
    weights: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> "Reference":
        """Read a file in the order of llama2.c's export.py (legacy_export)."""
        data = path.read_bytes()
        width, hidden, layers, heads, kv_heads, vocabulary, window = struct.unpack("<7i", data[:28])
        shared, vocabulary = vocabulary > 0, abs(vocabulary)
        numbers = np.frombuffer(data, "<f4", offset=28).astype(np.float64)
        kv = width // heads * kv_heads
        order = [
            ("embedding", (vocabulary, width)), ("norm1", (layers, width)),
            ("q", (layers, width, width)), ("k", (layers, kv, width)), ("v", (layers, kv, width)),
            ("o", (layers, width, width)), ("norm2", (layers, width)),
            ("gate", (layers, hidden, width)), ("down", (layers, width, hidden)),
            ("up", (layers, hidden, width)), ("norm3", (width,)),
            ("cos", (window, width // heads // 2)), ("sin", (window, width // heads // 2)),
        ]
        order += [] if shared else [("classifier", (vocabulary, width))]
        weights, start = {}, 0
        for name, shape in order:
            weights[name] = numbers[start : start + np.prod(shape)].reshape(shape)
            start += int(np.prod(shape))
        assert start == len(numbers)
        weights.setdefault("classifier", weights["embedding"])
        return cls((width, hidden, layers, heads, kv_heads, vocabulary, window), weights)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Float64 logits [tokens, vocabulary]."""
        width, _, layers, heads, kv_heads, _, _ = self.shape
        w, size, count = self.weights, width // heads, len(tokens)
        x = w["embedding"][tokens]

        def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

        frequency = 10000.0 ** (-np.arange(0, size, 2) / size)
        turn = np.exp(1j * np.arange(count)[:, None] * frequency)[:, None, :]

        def rotate(x: np.ndarray) -> np.ndarray:  # neighbours are real and imaginary part
            turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
            return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

        future = np.triu(np.full((count, count), -np.inf), 1)
        for i in range(layers):
            h = norm(x, w["norm1"][i])
            q = rotate((h @ w["q"][i].T).reshape(count, heads, size))
            k = rotate((h @ w["k"][i].T).reshape(count, kv_heads, size))
            v = (h @ w["v"][i].T).reshape(count, kv_heads, size)
            heard = []
            for head in range(heads):
                group = head * kv_heads // heads
                scores = q[:, head] @ k[:, group].T / np.sqrt(size) + future
                p = np.exp(scores - scores.max(-1, keepdims=True))
                heard.append(p / p.sum(-1, keepdims=True) @ v[:, group])
            x = x + np.concatenate(heard, -1) @ w["o"][i].T
            h = norm(x, w["norm2"][i])
            gate = h @ w["gate"][i].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"][i].T)) @ w["down"][i].T
        return norm(x, w["norm3"]) @ w["classifier"].T

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The `count` most probable next tokens, one after the other."""
        every = list(tokens)
        for _ in range(count):
            every.append(int(self.logits(every)[-1].argmax()))
        return every[len(tokens) :]


def write_model(path: Path, tied: bool, kv_heads: int, seed: int) -> Path:
    """A random model in llama2.c's version 0."""
    width, hidden, layers, heads, vocabulary, window = 48, 80, 2, 6, 300, 256
    rng, kv = np.random.default_rng(seed), width // heads * kv_heads
    # Small embeddings: otherwise a tied model repeats its last token for ever.
    numbers = [0.1 * rng.normal(size=(vocabulary, width))]
    numbers.append(1 + 0.3 * rng.normal(size=(layers, width)))
    for rows, columns in ((width, width), (kv, width), (kv, width), (width, width)):
        numbers.append(rng.normal(size=(layers, rows, columns)) * 1.5 / np.sqrt(columns))
    numbers.append(1 + 0.3 * rng.normal(size=(layers, width)))
    for rows, columns in ((hidden, width), (width, hidden), (hidden, width)):
        numbers.append(rng.normal(size=(layers, rows, columns)) * 1.5 / np.sqrt(columns))
    numbers.append(1 + 0.3 * rng.normal(size=width))
    # run.c ignores the tables of cosines and sines; so must the import.
    numbers += [np.full((window, width // heads // 2), 7.0)] * 2
    numbers += [] if tied else [rng.normal(size=(vocabulary, width))]
    header = struct.pack("<7i", width, hidden, layers, heads, kv_heads,
                         vocabulary if tied else -vocabulary, window)
    path.write_bytes(header + b"".join(n.astype("<f4").tobytes() for n in numbers))
    return path


def write_tokenizer(path: Path) -> Path:
    """300 pieces: the special ones, bytes, letters, and a few merges with scores."""
    letters = [letter.encode() for letter in " abcdefghijklmnopqrstuvwxyz.é"]
    merges = [b"th", b"the", b" the", b" t", b"he", b"in", b"ing", b" a", b"er", b"re", b"an"]
    merges.append(b"on")
    pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{i:02X}>".encode(), 0.0) for i in range(256)]
    pieces += [(piece, -float(i)) for i, piece in enumerate(merges)]
    pieces += [(piece, -1e6 - i) for i, piece in enumerate(letters)]
    assert len(pieces) == 300
    return write_pieces(path, pieces)


def write_pieces(path: Path, pieces: Pieces) -> Path:
    longest = max(len(piece) for piece, _ in pieces)
    path.write_bytes(struct.pack("<i", longest) + b"".join(
        struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces
    ))
    return path


def read_pieces(path: Path) -> Pieces:
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + size], score))
        at += 8 + size
    return pieces


def encode(pieces: Pieces, text: str) -> list[int]:
    """run.c's encode: letters or bytes, then the best-scored merge again and again."""
    ids = {piece: index for index, (piece, _) in reversed(list(enumerate(pieces)))}
    tokens = []
    for letter in " " + text:
        whole = ids.get(letter.encode())
        tokens += [whole] if whole is not None else [byte + 3 for byte in letter.encode()]
    while True:
        merges = [
            (pieces[ids[both]][1], -i, ids[both])
            for i in range(len(tokens) - 1)
            if (both := pieces[tokens[i]][0] + pieces[tokens[i + 1]][0]) in ids
        ]
        if not merges:
            return tokens
        _, place, token = max(merges)
        tokens[-place : -place + 2] = [token]


@pytest.fixture(scope="module", params=[(True, 6), (False, 2), (True, 1)],
                ids=["tied", "untied-grouped", "tied-one-kv-head"])
def random_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with its tokenizer beside it."""
    tied, kv_heads = request.param
    folder = tmp_path_factory.mktemp("llama2c")
    write_tokenizer(folder / "tokenizer.bin")
    return write_model(folder / "model.bin", tied, kv_heads, seed=kv_heads)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where conversions go: each model is converted once."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def stories() -> Path:
    if not STORIES.is_file():
        pytest.skip("shared/data/stories260K.bin is not beside this clone")
    return STORIES


def compare_hugging_face(model: Path, folder: Path, tokens: list[int]) -> None:
    expected = Reference.read(model).logits(tokens)
    imported = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found = imported(torch.tensor([tokens])).logits[0].numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4


def compare_greedy(model: Path, gguf: Path, prompt: list[int]) -> list[int]:
    expected = Reference.read(model).greedy(prompt, TOKENS)
    with Model(gguf) as engine, Context(engine, window=256, cache_type="f32") as context:
        written = generate_tokens(context, context.decode({0: prompt}), TOKENS)[0]
    assert written == expected
    return written


def test_hugging_face_logits_are_those_of_the_format(random_model: Path, artifacts: Path):
    tokens = np.random.default_rng(0).integers(0, 300, size=100).tolist()
    folder = locate.hugging_face_folder(str(random_model), artifacts)
    compare_hugging_face(random_model, folder, tokens)
    assert locate.hugging_face_folder(str(random_model), artifacts) == folder  # converted once


def test_greedy_tokens_in_llama_cpp_are_those_of_the_format(random_model: Path, artifacts: Path):
    written = compare_greedy(random_model, locate.gguf_file(str(random_model), artifacts), [1, 270])
    assert len(set(written)) > 10  # a loop of few tokens would prove little


def test_stories_compute_the_same_in_hugging_face_and_llama_cpp(stories: Path, artifacts: Path):
    pieces = read_pieces(stories.with_name("tok512.bin"))
    gguf = locate.gguf_file(str(stories), artifacts)
    prompt = [1, *encode(pieces, "Once upon a time, Lily")]
    compare_hugging_face(stories, locate.hugging_face_folder(str(stories), artifacts), prompt)
    written = compare_greedy(stories, gguf, prompt)
    text = b"".join(
        bytes([token - 3]) if 3 <= token < 259 else pieces[token][0] for token in written
    ).decode()
    with Model(gguf) as engine:
        assert engine.detokenize(written).strip() == text.strip()
        assert engine.bos == 1
        for sample in ("Once upon a time", " She  said: \"Hi!\"\nThen\tça, 猫.", "", "x" * 40):
            assert engine.tokenize(sample) == (encode(pieces, sample) if sample else []), sample
    assert "Lily" in text


def test_tokens_of_a_random_tokenizer_are_those_of_run_c(random_model: Path, artifacts: Path):
    pieces = read_pieces(random_model.with_name("tokenizer.bin"))
    with Model(locate.gguf_file(str(random_model), artifacts)) as engine:
        assert engine.vocabulary == 300
        for sample in ("then in the other ring", "theé ∑ THE", "aaa  the\n", "anthe ertheon"):
            assert engine.tokenize(sample) == encode(pieces, sample), sample
            assert engine.detokenize(engine.tokenize(sample)).removeprefix(" ") == sample


def test_a_tokenizer_of_the_older_layout_is_the_same_tokenizer(tiny: Path):
    """llama2.c once wrote a byte token as that byte, as a Latin-1 character in UTF-8."""
    path = tiny.with_name("tokenizer.bin")
    pieces = read_pieces(path)
    write_pieces(path, [(chr(i - 3).encode() if 3 <= i < 259 else piece, score)
                        for i, (piece, score) in enumerate(pieces)])
    older = llama2c.read_tokenizer(path, len(pieces))
    assert [piece for piece, _ in older] != [piece for piece, _ in pieces]
    assert llama2c.sentencepiece_model(older) == llama2c.sentencepiece_model(pieces)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer.bin")
    return write_model(tmp_path / "model.bin", True, 2, seed=0)


def refused(path: Path, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        locate.gguf_file(str(path), path.parent / "artifacts")
    left = list((path.parent / "artifacts").glob("[!.]*"))
    assert not left
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 27, 28, 1000, -4, -1])
def test_a_truncated_file_is_refused(tiny: Path, size: int):
    tiny.write_bytes(tiny.read_bytes()[:size])
    message = refused(tiny)
    assert f"{tiny} has {tiny.stat().st_size} bytes" in message
    assert ("truncated, copy it again" in message) == (tiny.stat().st_size >= 28)


def test_a_longer_file_is_refused(tiny: Path):
    tiny.write_bytes(tiny.read_bytes() + b"\0" * 4)
    assert "not a version-0 file" in refused(tiny)


@pytest.mark.parametrize(("place", "value"), [
    (0, 0), (0, -48), (0, 47), (1, 0), (2, 1 << 30), (3, 5), (4, 4), (5, 0), (6, -1),
    (0, 0x616B3432),  # the magic number of version 1
])
def test_a_wrong_header_is_refused(tiny: Path, place: int, value: int):
    data = bytearray(tiny.read_bytes())
    struct.pack_into("<i", data, 4 * place, value)
    tiny.write_bytes(data)
    assert "is no llama2.c version-0 model: its header reads" in refused(tiny)


def test_another_format_is_refused(tiny: Path):
    tiny.write_bytes(b"GGUF" + b"\3\0\0\0" * 100)
    assert "is no llama2.c version-0 model" in refused(tiny)


@pytest.mark.parametrize("count", [299, 301])
def test_the_tokenizer_of_another_model_is_refused(tiny: Path, count: int):
    path = tiny.with_name("tokenizer.bin")
    pieces = read_pieces(path)
    write_pieces(path, [*pieces, (b"zz", -50.0)][:count])
    message = refused(tiny)
    assert f"{path} holds {count} whole pieces; the model has a vocabulary of 300" in message


@pytest.mark.parametrize("size", [0, 4, 9, 500, -1])
def test_a_truncated_tokenizer_is_refused(tiny: Path, size: int):
    path = tiny.with_name("tokenizer.bin")
    path.write_bytes(path.read_bytes()[:size])
    assert "truncated, or the tokenizer of another model" in refused(tiny)


def test_a_missing_tokenizer_is_named(tiny: Path):
    tiny.with_name("tokenizer.bin").unlink()
    message = refused(tiny, FileNotFoundError)
    assert f"no tokenizer beside {tiny}: expected tok300.bin or tokenizer.bin" in message


def test_the_tokenizer_of_that_size_is_preferred(tiny: Path):
    assert llama2c.find_tokenizer(tiny, 300).name == "tokenizer.bin"
    write_tokenizer(tiny.with_name("tok300.bin"))
    assert llama2c.find_tokenizer(tiny, 300).name == "tok300.bin"


def test_another_tokenizer_gives_another_folder(tiny: Path, tmp_path: Path):
    artifacts = tmp_path / "artifacts"
    first = locate.hugging_face_folder(str(tiny), artifacts)
    pieces = read_pieces(tiny.with_name("tokenizer.bin"))
    pieces[-1] = (b"q!", pieces[-1][1])
    write_pieces(tiny.with_name("tokenizer.bin"), pieces)
    assert locate.hugging_face_folder(str(tiny), artifacts) != first
