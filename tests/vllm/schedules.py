"""A scheduler in small, that does at random what vLLM's does for reasons.

Requests teacher-force known token streams, so what attention must say at each place is known whatever the schedule:
chunks of prompts beside decode, drafts of which some are rejected, prefix hits, preemption, aborts, pages used again.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

from msa_backend.kernels.batch import BLOCK_SIZE


class OutOfPages(Exception):
    """Another request must give up its own first."""


class Pages:
    """Pages that requests share by what they hold, and give back; those given back longest ago are used again first."""

    def __init__(self, count: int) -> None:
        self.users = [0] * count
        self.free = OrderedDict((page, None) for page in range(count))
        self.of_content: dict[bytes, int] = {}
        self.content: dict[int, bytes] = {}

    def new(self) -> int:
        if not self.free:
            raise OutOfPages
        page, _ = self.free.popitem(last=False)
        self.of_content.pop(self.content.pop(page, b""), None)
        self.users[page] = 1
        return page

    def hit(self, content: bytes) -> int | None:
        page = self.of_content.get(content)
        if page is not None:
            self.users[page] += 1
            self.free.pop(page, None)
        return page

    def filled(self, page: int, content: bytes) -> None:
        if content not in self.of_content and page not in self.content:
            self.of_content[content] = page
            self.content[page] = content

    def give_back(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page]:
                self.free[page] = None


@dataclass(eq=False)
class Request:
    """``tokens[:prompt]`` are given, the others are said one after the other.

    Attributes:
        stream: which of the known streams it follows.
        done: tokens whose keys and values are cached.
    """

    stream: int
    tokens: Tensor
    prompt: int
    done: int = 0
    pages: list[int] = field(default_factory=list)

    def content(self, page: int) -> bytes:
        return self.tokens[: (page + 1) * BLOCK_SIZE].numpy().tobytes()


@dataclass
class Row:
    """A request's part of a step.

    Attributes:
        tokens: that are computed, drafts among them.
        right: how many of them are the stream's.
        begin: where the first stands.
    """

    request: Request
    tokens: Tensor
    right: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)


class Scheduler:
    """
    Args:
        streams: ``[num_streams, length]`` int64, some beginning alike.
        drafts: most of a step.
    """

    def __init__(self, seed: int, streams: Tensor, num_pages: int, drafts: int, vocabulary: int) -> None:
        self.random = random.Random(seed)
        self.streams, self.drafts, self.vocabulary = streams, drafts, vocabulary
        self.pages = Pages(num_pages)
        self.running: list[Request] = []
        self.hits = self.preempted = self.rejected = 0

    def admit(self) -> None:
        stream = self.random.randrange(len(self.streams))
        length = self.random.randint(2, self.streams.shape[1])
        request = Request(stream, self.streams[stream, :length], self.random.randint(1, length))
        self._begin(request)
        self.running.append(request)

    def _begin(self, request: Request) -> None:
        """From the longest cached prefix that leaves a token of the prompt to compute."""
        request.pages = []
        for page in range((request.prompt - 1) // BLOCK_SIZE):
            hit = self.pages.hit(request.content(page))
            if hit is None:
                break
            request.pages.append(hit)
        request.done = len(request.pages) * BLOCK_SIZE
        self.hits += len(request.pages)

    def step(self) -> list[Row]:
        """Rows as vLLM orders them, those of a few tokens first; their pages are there."""
        rows = [self._row(request) for request in self.running if self.random.random() < 0.9]
        for row in rows:
            self._make_room(row)
        # Those that had to give up their pages to others after their own turn have none.
        rows = [row for row in rows if row.request.done == row.begin and len(row.request.pages) * BLOCK_SIZE >= row.end]
        return sorted(rows, key=lambda row: len(row.tokens) > 1 + self.drafts)

    def _row(self, request: Request) -> Row:
        left = request.prompt - request.done
        if left > 0:
            most = self.random.choice([3, 100, 700])
            count = self.random.randint(1, min(left, most))
            return Row(request, request.tokens[request.done : request.done + count], count, request.done)
        count = 1 + self.random.randint(0, min(self.drafts, len(request.tokens) - request.done - 1))
        right = self.random.randint(1, count)
        tokens = request.tokens[request.done : request.done + count].clone()
        tokens[right:] = (tokens[right:] + 1 + self.random.randrange(self.vocabulary - 1)) % self.vocabulary
        self.rejected += count - right
        return Row(request, tokens, right, request.done)

    def _make_room(self, row: Row) -> None:
        request = row.request
        while request.done == row.begin and len(request.pages) * BLOCK_SIZE < row.end:
            try:
                request.pages.append(self.pages.new())
            except OutOfPages:
                victim = self.random.choice([other for other in self.running if other.pages])
                self.pages.give_back(victim.pages)
                victim.pages, victim.done = [], 0
                self.preempted += 1
                if victim is request:
                    return

    def finish(self, rows: list[Row]) -> None:
        """After a step: what was right counts, full pages may be shared, some requests are over or given up."""
        for row in rows:
            request = row.request
            before, request.done = request.done, request.done + row.right
            for page in range(before // BLOCK_SIZE, request.done // BLOCK_SIZE):
                self.pages.filled(request.pages[page], request.content(page))
        for request in list(self.running):
            if request.done >= len(request.tokens) or self.random.random() < 0.03:
                self.pages.give_back(request.pages)
                self.running.remove(request)
            elif not request.pages and request.done == 0:
                self._begin(request)
