"""Which conversations `data.quality` leaves out, and why; the same for training and for the audit."""

import functools
import hashlib
import importlib.metadata
import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np

from jaxtune.config_quality import QualityConfig
from jaxtune.data.layouts.row_functions import load_function
from jaxtune.data.quality.exchanges import Exchange, exchanges
from jaxtune.data.quality.languages import UNDETERMINED, languages, spoken
from jaxtune.data.quality.scores import harm, score_conversation
from jaxtune.data.quality.words import words
from jaxtune.data.records import Conversation, RowError
from jaxtune.data.row_values import kind

CUSTOM = "quality.custom"
_RULES = ("exchanges", "word_lists", "words", "scores", "languages", "filters")


class Filters:
    """The filters of a configuration; worker processes get a copy.

    Raises ValueError where the custom function cannot be imported. `key` names everything that decides: the keys, the
    source of these rules and of the custom function's module, and the language model's version.
    """

    def __init__(self, config: QualityConfig) -> None:
        self.config = config
        if config.custom is not None:
            load_function(config.custom, CUSTOM)
        self.key = _key(config)

    def reason(self, conversation: Conversation) -> str | None:
        """Why the conversation is left out, in words to count by; None where it stays.

        Filters are asked in the order of their cost, and the first that refuses is told. Raises RowError when the
        custom function fails or answers neither true, false nor a text.
        """
        for asked in (self._pattern, self._length, self._harm, self._score, self._language, self._custom):
            reason = asked(conversation)
            if reason is not None:
                return reason
        return None

    def _pattern(self, conversation: Conversation) -> str | None:
        for pattern in self.config.drop:
            search = _compiled(pattern).search
            if any(search(message.content) for message in conversation.messages):
                return f"quality.drop {pattern!r}"
        return None

    def _length(self, conversation: Conversation) -> str | None:
        for key, bounds, of in (
            ("quality.instruction_words", self.config.instruction_words, _instruction),
            ("quality.response_words", self.config.response_words, _response),
        ):
            if bounds is not None:
                least, most = bounds
                for exchange in exchanges(conversation):
                    count = words(of(exchange)).number
                    if count < least or (most is not None and count > most):
                        return key
        return None

    def _harm(self, conversation: Conversation) -> str | None:
        most = self.config.max_harm
        if most is not None and harm(*(words(message.content) for message in conversation.messages)) > most:
            return "quality.max_harm"
        return None

    def _score(self, conversation: Conversation) -> str | None:
        if self.config.min is None and not self.config.min_scores:
            return None
        scores = score_conversation(conversation)
        if scores is None:
            return None
        for name, least in self.config.min_scores.items():
            if getattr(scores, name) < least - _ROUNDING:
                return f"quality.min_scores.{name}"
        return "quality.min" if self.config.min is not None and scores.mean < self.config.min - _ROUNDING else None

    def _language(self, conversation: Conversation) -> str | None:
        if not self.config.languages:
            return None
        (language,) = languages([spoken(conversation)])
        # Of a label or a number no language can be told; it is in all of them.
        return None if language in (*self.config.languages, UNDETERMINED) else f"quality.languages ({language})"

    def _custom(self, conversation: Conversation) -> str | None:
        name = self.config.custom
        if name is None:
            return None
        said = [{"role": message.role, "content": message.content} for message in conversation.messages]
        try:
            answer = load_function(name, CUSTOM)(said)
        except Exception as error:
            raise RowError(
                "quality.custom failed", f"{CUSTOM} {name} raised {type(error).__name__}: {error}"
            ) from error
        if isinstance(answer, bool | np.bool_):
            return None if answer else CUSTOM
        if isinstance(answer, str):
            return f"{CUSTOM} ({answer})" if answer else CUSTOM
        raise RowError(
            "quality.custom failed",
            f"{CUSTOM} {name} gave {kind(answer)}; expected true to keep the row, false or a reason to leave it out",
        )


_ROUNDING = 1e-9  # 0.2 * 3 is not 0.6


def _instruction(exchange: Exchange) -> str:
    return exchange.instruction


def _response(exchange: Exchange) -> str:
    return exchange.response


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _key(config: QualityConfig) -> str:
    said = [config.model_dump_json(), rules_digest(_RULES)]
    if config.languages:
        said.append(importlib.metadata.version("py3langid"))
    if config.custom is not None:
        said.append(_source_digest(config.custom))
    return hashlib.blake2b("\0".join(said).encode(), digest_size=16).hexdigest()


def rules_digest(names: Sequence[str]) -> str:
    """A hash of the source of some modules of this package: what was decided under other rules is not found again."""
    folder = pathlib.Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _source_digest(name: str) -> str:
    """A hash of the file that the function's module was read from; of its `__version__` where there is none."""
    module = sys.modules[name.partition(":")[0]]
    file = vars(module).get("__file__")
    if file is None or not pathlib.Path(file).is_file():
        return str(vars(module).get("__version__", ""))
    return hashlib.blake2b(pathlib.Path(file).read_bytes(), digest_size=16).hexdigest()
