"""The keys that leave rows out on purpose: `data.quality`, `data.dedup`, `data.decontaminate`, `data.verdicts`."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from jaxtune.config_section import Fraction, Section

Words = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)] | None]
Score = Literal["clarity", "length_fit", "format_match", "non_refusal", "topic_relevance"]


class QualityConfig(Section):
    """Which conversations are left out for what they say; nothing is, unless a key is set. docs/data-quality.md."""

    min: Fraction | None = Field(None, description="least mean of the five scores, e.g. 0.6")
    min_scores: dict[Score, Fraction] = Field(
        default_factory=dict, description="least of single scores: {clarity: 0.6}"
    )
    drop: tuple[str, ...] = Field((), description="regular expressions; found in any turn, the conversation is dropped")
    instruction_words: Words | None = Field(None, description="[least, most] words of instructions; null: no bound")
    response_words: Words | None = Field(None, description="[least, most] words of answers; null: no bound")
    languages: tuple[str, ...] = Field((), description="ISO 639-1 codes of the languages kept, e.g. [en, fr]")
    max_harm: Fraction | None = Field(
        None, description="most of the crude score by a list of harmful words; 0 is strict"
    )
    custom: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:\w+$")] | None = Field(
        None, description="module:function that says of a conversation's messages whether it stays"
    )

    @field_validator("drop")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return patterns

    @field_validator("languages")
    @classmethod
    def _are_codes(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        for language in languages:
            if not re.fullmatch(r"[a-z]{2}|und", language):
                raise ValueError(f"found {language!r}; expected a code of two letters, e.g. en")
        return languages

    @field_validator("instruction_words", "response_words")
    @classmethod
    def _ordered(cls, bounds: Words | None) -> Words | None:
        if bounds is not None and bounds[1] is not None and bounds[1] < bounds[0]:
            raise ValueError(f"found {list(bounds)}; expected [least, most]")
        return bounds

    @property
    def is_set(self) -> bool:
        """Whether any conversation could be left out."""
        return self != QualityConfig()


class DecontaminateConfig(Section):
    """Benchmarks that must not be trained on."""

    paths: tuple[str, ...] = Field((), description="files whose texts no training row may share words with")
    ngram: Annotated[int, Field(ge=2)] = Field(13, description="words in a row that a row shares with a benchmark")


Dedup = Literal["keep", "exact", "near"]
