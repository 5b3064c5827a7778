"""`python -m jaxtune.chat RUN`: talk to a model; answers appear as they are made.

    python -m jaxtune.chat runs/mine
    echo "Name three colours." | python -m jaxtune.chat runs/mine

RUN is the output= folder of a run, a Hugging Face folder, a hub id or a PEFT adapter. On a terminal it is a
conversation: the model sees what was said before. From a pipe or a file, each line is answered, one after another, in
one conversation too. Lines that begin with a slash are for the program:

    /reset          forget the conversation
    /system TEXT    set the system message (nothing: remove it), and forget the conversation
    /help           show these lines
    /quit           end; so does the end of the input (Ctrl-D). Ctrl-C ends an answer
"""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from jaxtune import asking
from jaxtune.compat import prepare_environment

Message = dict[str, str]
MAX_NEW_TOKENS = 512


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished, 1 error, 2 usage."""
    parser = asking.make_parser("jaxtune.chat", __doc__ or "")
    parser.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    asking.add_sampling(parser, max_new_tokens=MAX_NEW_TOKENS, temperature=0.7, top_p=0.95)
    flags = parser.parse_args(words)
    try:
        sampling = asking.read_sampling(flags)
    except ValueError as error:
        return asking.fail(error, 2)
    prepare_environment()
    from jaxtune.answering import open_answerer  # only now: a mistake in a flag should not wait for jax

    try:
        answerer = open_answerer(
            flags.model, template=flags.template, base=flags.base, dtype=flags.dtype, batch=1, say=_note
        )
        room = min(sampling.max_new_tokens, answerer.opened.config.max_positions // 4)

        def answer(messages: Sequence[Message], turn: int) -> Iterator[str]:
            return answerer.stream(messages, sampling._replace(seed=(sampling.seed + turn) % 2**32))

        session = Session(answer, fits=lambda messages: answerer.fits(messages, room=room), system=flags.system)
        if sys.stdin.isatty():
            _note("ask away; /help shows the commands, /quit ends")
        talk(session, typed_lines() if sys.stdin.isatty() else sys.stdin)
    except ValueError as error:
        return asking.fail(error, 1)
    return 0


class Session:
    """A conversation as it grows."""

    def __init__(
        self,
        answer: Callable[[Sequence[Message], int], Iterator[str]],
        *,
        fits: Callable[[Sequence[Message]], bool],
        system: str | None = None,
    ) -> None:
        """Begins an empty conversation.

        Args:
            answer: (messages, number of the turn) -> pieces of the answer's text.
            fits: tells whether messages leave the model room for an answer.
        """
        self._answer, self._fits, self._system = answer, fits, system
        self.messages: list[Message] = []
        self._turn = 0

    @property
    def opening(self) -> list[Message]:
        """The system message, if there is one."""
        return [{"role": "system", "content": self._system}] if self._system else []

    def reset(self) -> None:
        """Forgets what was said; the system message stays."""
        self.messages = []

    def set_system(self, text: str) -> None:
        """Begins again under another system message, or under none."""
        self._system = text or None
        self.reset()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yields the pieces of the answer and remembers it, also when it is cut short.

        Raises:
            ValueError: this message alone is too long for the model, or the template refuses it; it is forgotten.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        while len(asked) > 1 and not self._fits([*self.opening, *asked]):
            asked = asked[2:]  # the oldest question with its answer
        said: list[str] = []
        pieces = self._answer([*self.opening, *asked], self._turn)
        self._turn += 1
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
            raise
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]


def talk(session: Session, lines: Iterable[str]) -> None:
    """Answers line after line until they end or one of them is /quit."""
    for line in lines:
        text = line.strip()
        if text.startswith("/"):
            if not _obey(session, text):
                return
        elif text:
            _answer_aloud(session, text)


def _answer_aloud(session: Session, text: str) -> None:
    before = len(session.messages)
    try:
        with contextlib.closing(session.ask(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        if len(session.messages) < before + 2:
            print()
            _note("the oldest turns no longer fit the model and were left out")
            return
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        _note(f"error: {error}")
        return
    print(flush=True)


def _obey(session: Session, text: str) -> bool:
    """Does what a slash line says; returns whether the conversation goes on."""
    command, _, rest = text.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        session.reset()
        _note("forgotten")
    elif command == "/system":
        session.set_system(rest.strip())
        _note("new system message" if rest.strip() else "no system message")
    else:
        if command != "/help":
            _note(f"found {command}, which is no command")
        _note((__doc__ or "").partition("program:\n\n")[2].rstrip())
    return True


def typed_lines() -> Iterator[str]:
    """Yields what is typed at a prompt, with the line editing of the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines once it is imported
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
