"""How much one reader may ask of the machine, as settings."""

from dataclasses import dataclass, fields

from gemscope.errors import InputError


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused, in a sentence, before any work is done."""

    characters: int = 20_000
    """Of a text that is read."""
    tokens: int = 1_024
    """Of the same text; less where the model's context is shorter."""
    new_tokens: int = 256
    """Of a continuation."""
    edits: int = 20
    """Features steered at once."""
    dictionaries: int = 8
    """Of one reading of a text."""
    compared: int = 20_000
    """Tokens of each text of a comparison."""
    results: int = 200
    """Of one search."""
    waiting: int = 64
    """Requests of model work that wait; one more is told to come back."""
    seconds: float = 120.0
    """Of model work for one request."""
    body: int = 262_144
    """Bytes of a request."""

    def __post_init__(self):
        for setting in fields(self):
            if getattr(self, setting.name) <= 0:
                raise InputError(f"a limit of {getattr(self, setting.name)} {setting.name} allows "
                                 "nothing; give a number above 0")  # fmt: skip

    def check_text(self, text: str) -> None:
        """Refuse a text that is longer than is read."""
        if len(text) > self.characters:
            raise InputError(
                f"the text has {len(text):,} characters, and {self.characters:,} are read at once; "
                "cut it"
            )
