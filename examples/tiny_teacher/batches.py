"""Training batches of the small teacher: the corpus on the device, random windows, passkey rows.

Everything is drawn on the device, all rows at once, so that a step never waits for the host. The documents
are those of `hrwkv.data`; the passkey rows are its `PasskeyTask` as a template of ids. Left out: epochs
(windows are drawn with replacement), attention masks between the documents of one row.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hrwkv.data.documents import Document
from hrwkv.data.passkey import PasskeyTemplate

MAX_QUESTIONS = 3


@dataclass(frozen=True)
class Corpus:
    """One split on the device: tokens [N] int32, each document followed by its end; starts [M] int64."""

    tokens: Tensor
    starts: Tensor
    num_bytes: int


def tokenize(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, *, seed: int, device: str
) -> Corpus:
    """Tokenise in shuffled order, so that neighbours in a row are not files of one folder."""
    order = random.Random(seed).sample(documents, len(documents))
    texts = [document.text for document in order]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    flat = torch.cat([torch.tensor([*document, end], dtype=torch.int32) for document in ids])
    lengths = torch.tensor([len(document) + 1 for document in ids])
    starts = lengths.cumsum(0) - lengths
    return Corpus(flat.to(device), starts.to(device), sum(len(d.text.encode()) for d in documents))


class PasskeyRows:
    """Writes needle and questions over rows of text, all rows at once and without leaving the device."""

    def __init__(self, template: PasskeyTemplate, *, answer_weight: float, device: str) -> None:
        self.template = PasskeyTemplate(**{name: value.to(device) for name, value in vars(template).items()})
        self.needle_weights = torch.ones(len(template.needle), device=device)
        # The first mention cannot be predicted; the second is the shortest copy there is, so it teaches
        # copying.
        self.needle_weights[self.template.needle_slots[0]] = 0.0
        self.needle_weights[self.template.needle_slots[1]] = answer_weight
        self.question_weights = torch.ones(len(template.question), device=device)
        self.question_weights[self.template.question_slots] = answer_weight

    def write(self, rows: Tensor, weights: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return rows [R, C+1] and weights [R, C+1] with one needle and one to three questions in each."""
        template, (count, width), device = self.template, rows.shape, rows.device
        keys = template.digits[torch.randint(0, 10, (count, 5), device=device, generator=generator)]  # [R, 5]
        needle = template.needle.repeat(count, 1)
        needle[:, template.needle_slots.flatten()] = keys.repeat(1, 2)
        question = template.question.repeat(count, 1)
        question[:, template.question_slots] = keys
        needle_at, question_at = self._places(count, width=width, device=device, generator=generator)
        # Questions that are not asked are written behind the row and cut off again.
        pad = (0, question.shape[1])
        rows, weights = F.pad(rows, pad), F.pad(weights, pad)
        pieces = [(needle_at, needle, self.needle_weights)]
        pieces += [(at, question, self.question_weights) for at in question_at.unbind(1)]
        for at, ids, piece_weights in pieces:
            columns = at[:, None] + torch.arange(ids.shape[1], device=device)
            rows.scatter_(1, columns, ids)
            weights.scatter_(1, columns, piece_weights.expand(count, -1))
        return rows[:, :width], weights[:, :width]

    def _places(
        self, count: int, *, width: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return where needles [R] and questions [R, 3] start; an unused question starts at `width`."""
        needle_size, question_size = len(self.template.needle), len(self.template.question)
        free = width - needle_size - MAX_QUESTIONS * question_size
        if free < 0:
            raise ValueError(
                f"--context {width - 1} is too short for passkey rows: expected at least {width - 1 - free}"
            )

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        # Squared: early needles are more frequent, since only they have distant questions.
        needle_at = (uniform(count).square() * (free + 1)).long().clamp(max=free)
        place = uniform(count, MAX_QUESTIONS)
        # A quarter of the rows ask at the very end, so that the longest distances occur.
        place[:, -1] = (place[:, -1] * 4 / 3).clamp(max=1.0)
        rest = (free - needle_at)[:, None]  # [R, 1]
        gaps = (place.sort(dim=1).values * (rest + 1)).long().minimum(rest)
        slots = torch.arange(MAX_QUESTIONS, device=device)
        question_at = (needle_at + needle_size)[:, None] + gaps + slots * question_size
        asked = torch.randint(1, MAX_QUESTIONS + 1, (count, 1), device=device, generator=generator)
        # The last places are the ones that are kept: they hold the longest distances.
        return needle_at, torch.where(slots >= MAX_QUESTIONS - asked, question_at, width)


class Batches:
    """Endless training batches from a corpus on the device."""

    def __init__(
        self,
        corpus: Corpus,
        passkey: PasskeyRows,
        *,
        rows: int,
        context: int,
        share: float,
        document_starts: float,
        seed: int,
    ) -> None:
        if len(corpus.tokens) <= context + 1:
            raise ValueError(
                f"the train split has {len(corpus.tokens)} tokens, a row needs {context + 1}: give more text"
            )
        self.corpus, self.passkey, self.rows, self.context = corpus, passkey, rows, context
        self.num_passkey, self.document_starts = round(rows * share), document_starts
        self.generator = torch.Generator(corpus.tokens.device).manual_seed(seed)
        self.last_start = len(corpus.tokens) - context - 1

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids [B, C] int64, labels [B, C] int64 and the weights [B, C] fp32 of the labels."""
        device = self.corpus.tokens.device
        random_start = torch.randint(
            0, self.last_start + 1, (self.rows,), device=device, generator=self.generator
        )
        document = torch.randint(
            0, len(self.corpus.starts), (self.rows,), device=device, generator=self.generator
        )
        at_start = torch.rand(self.rows, device=device, generator=self.generator) < self.document_starts
        start = torch.where(at_start, self.corpus.starts[document].clamp(max=self.last_start), random_start)
        ids = self.corpus.tokens[start[:, None] + torch.arange(self.context + 1, device=device)].long()
        weights = torch.ones(ids.shape, device=device)
        if self.num_passkey:
            count = self.num_passkey
            keyed = self.passkey.write(ids[:count], weights[:count], generator=self.generator)
            ids, weights = torch.cat([keyed[0], ids[count:]]), torch.cat([keyed[1], weights[count:]])
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()
