"""Talk to a run's result, word by word as it comes, and hear the base model on the same words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atoll.data.answers import ChatFormat, ends_of
from atoll.data.media import MODALITIES, Medium, Unusable, placed_media
from atoll.errors import AtollError
from atoll.local.judges import Judge
from atoll.outcome import Outcome
from atoll.parts import make, spec
from atoll.result import Result

if TYPE_CHECKING:
    from torch import Tensor

Write = Callable[[str], None]
HELP = "/base switches between the tuned and the base model, /new forgets the conversation, /quit ends"
MEDIA = " and ".join(f"/{name} FILE" for name in MODALITIES) + " go with the next question"


class Attached(NamedTuple):
    """A medium of the conversation, and what its encoder takes of it: its file may go."""

    medium: Medium
    inputs: Tensor


@dataclass
class Chat:
    """A conversation. The most likely token each time, unless `temperature` is above 0: the same words, the same answer."""

    result: Result
    max_tokens: int = 200
    temperature: float = 0.0
    base: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    media: list[Attached] = field(default_factory=list)
    """Of the conversation so far, in its order."""
    waiting: list[Attached] = field(default_factory=list)
    """That go with the next question."""

    @property
    def help(self) -> str:
        """What may be typed beside questions."""
        return f"{HELP}; {MEDIA}" if self.result.processor else HELP

    @property
    def raw(self) -> bool:
        """Whether the model continues texts, rather than answers turns."""
        objective = spec(self.result.outcome.recipe.finetune.objective, "finetune.objective").use.replace("_", "-")
        return objective == "causal-lm" or not self.result.tokenizer.chat_template

    def answer(self, prompt: str, write: Write) -> str:
        """The answer to `prompt`, handed to `write` piece by piece; it becomes part of the conversation."""
        question = self._placed(prompt)
        if self.raw:
            answer = self._generate(question["content"], self.waiting, write)
        else:
            asked, media = [*self.messages, question], [*self.media, *self.waiting]
            answer = self._generate(ChatFormat(self.result.tokenizer).render(asked, prompt=True), media, write)
            self.messages = [*asked, {"role": "assistant", "content": without_places(answer)}]
            self.media = media
        self.waiting = []
        return answer

    def _placed(self, prompt: str) -> dict[str, Any]:
        """The question, with a place for what waits. Raises AtollError for one with more places than media."""
        asked = {"role": "user", "content": prompt}
        if self.result.processor is None:
            return asked
        try:
            return placed_media([asked], [one.medium for one in self.waiting])[0]
        except Unusable as reason:
            raise AtollError(
                "this cannot be asked", found=str(reason), allowed="a place for each picture or sound that goes with it",
                remedy="attach it: --image FILE or --audio FILE, in a conversation /image FILE or /audio FILE before it; "
                "or leave out the word in angle brackets",
            ) from reason  # fmt: skip

    def attach(self, modality: str, path: Path) -> None:
        """Lets a picture or a sound go with the next question. Raises AtollError for one that cannot be used."""
        processor = self.result.processor
        senses = processor.senses if processor else {}
        if processor is None or modality not in senses:
            raise AtollError(
                f"this model takes no {modality}", found=str(path), allowed=", ".join(["text", *senses]),
                remedy="a run of the recipe `multimodal` has a model that does",
            )  # fmt: skip
        try:
            if not path.is_file():
                raise Unusable(f"{modality} that is not there")
            medium = Medium(modality, path)
            self.waiting.append(Attached(medium, processor.inputs(medium)))
        except Unusable as reason:
            raise AtollError("this cannot be used", where=str(path), found=str(reason)) from reason

    def _generate(self, text: str, media: Sequence[Attached], write: Write) -> str:
        import torch

        tokenizer, model = self.result.tokenizer, self.result.model
        device = next(model.parameters()).device
        inputs = {name: x.to(device) for name, x in self._inputs(text, media).items()}
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        self.result.use(self.base)
        pieces: list[str] = []

        def hear(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        with torch.no_grad():
            model.generate(  # type: ignore[operator]
                **inputs, **sampling,
                max_new_tokens=self.max_tokens, eos_token_id=self._ends(), pad_token_id=tokenizer.pad_token_id or 0,
                streamer=_streamer(tokenizer, hear),
            )  # fmt: skip
        return "".join(pieces)

    def _inputs(self, text: str, media: Sequence[Attached]) -> dict[str, Any]:
        """What the model takes of a text and its media."""
        import torch

        take: Any = self.result.processor or self.result.tokenizer
        found = take(text, return_tensors="pt", add_special_tokens=self.raw, return_token_type_ids=False)
        by_modality = {name: [one.inputs for one in media if one.medium.modality == name] for name in MODALITIES}
        return {**found, **{f"{name}_inputs": torch.stack(some) for name, some in by_modality.items() if some}}

    def _ends(self) -> list[int] | None:
        """The tokens that end an answer."""
        tokenizer = self.result.tokenizer
        ends = [tokenizer.eos_token_id] if self.raw else ends_of(tokenizer)
        return [one for one in ends if one is not None] or None

    def command(self, line: str) -> str:
        """Does what a line that starts with / says, and tells what it has done."""
        if line == "/base":
            self.base = not self.base
            return f"now the {'base' if self.base else 'tuned'} model answers"
        if line == "/new":
            self.messages, self.media, self.waiting = [], [], []
            return "forgotten"
        word, _, path = line.partition(" ")
        if word.removeprefix("/") in MODALITIES and path:
            try:
                self.attach(word.removeprefix("/"), Path(path.strip()).expanduser())
            except AtollError as error:
                return str(error)
            return f"{self.waiting[-1].medium.path} goes with the next question"
        return self.help


def refuse_judge(asked: Outcome) -> None:
    """A judge scores answers, and was not taught to give any. Raises AtollError."""
    written = asked.recipe.finetune.objective
    if isinstance(make("objective", written, "finetune.objective"), Judge):
        name = asked.folder.name
        raise AtollError(
            "this model judges answers and gives none", where=name, found=f"objective {spec(written, 'objective')}",
            allowed="a run that learned to answer",
            remedy=f"let another run learn from its choices, with `judge: {name}`, and talk to that one",
        )  # fmt: skip


def without_places(text: str) -> str:
    """An answer as the conversation keeps it: words that would be places for media are no longer."""
    for one in MODALITIES.values():
        text = text.replace(one.placeholder, one.placeholder.strip("<>"))
    return text


def _streamer(tokenizer: Any, hear: Write) -> Any:
    """A transformers streamer that hands finished pieces of text to `hear`."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                hear(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def converse(chat: Chat, lines: Iterable[str], write: Write, tell: Write) -> None:
    """A conversation over `lines`: answers go to `write`, remarks to `tell`. Ends with the lines or at /quit."""
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if line.startswith("/"):
            tell(chat.command(line))
        elif line:
            try:
                chat.answer(line, write)
                write("\n")
            except AtollError as error:
                tell(str(error))
