"""A server that really looks facts up in what it is sent, as well as it is told to."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fake:
    """
    Attributes:
        sees: the share of a prompt, from its end, that it looks at.
        forgets: whether it looks at nothing the second time.
        failures: statuses of the next requests, before it answers.
        dies_after: answers, after which each request is a 400.
    """

    limit: int | None = 20_000
    sees: float = 1.0
    forgets: bool = False
    failures: list[int] = field(default_factory=list)
    dies_after: int | None = None
    asked: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    words: dict[str, int] = field(default_factory=dict)

    def tokenize(self, text: str) -> list[int]:
        return [self.words.setdefault(word, len(self.words)) for word in re.findall(r"\s?\w+|\s?[^\w\s]|\s", text)]

    def text(self, tokens: list[int]) -> str:
        by_id = {number: word for word, number in self.words.items()}
        return "".join(by_id[token] for token in tokens)

    def answer(self, prompt: str) -> str:
        again, seen = prompt in self.asked, prompt[int(len(prompt) * (1 - self.sees)) :]
        self.asked.append(prompt)
        if self.forgets and again:
            return "I do not know."
        notes, _, question = seen.rpartition("Question:")
        if captains := re.search(r"The captains are ([\w, ]+)\.", question):
            absent = set(re.split(", | and ", captains[1])) - set(re.findall(r"Captain (\w+) reported\.", notes))
            return f"It was Captain {min(absent)}."
        facts = dict(re.findall(r"The access code of ([\w ]+?) is (\d+)\.", notes))
        facts |= {
            f"the courier of {a}": facts.get(b, "")
            for a, b in re.findall(r"courier of ([\w ]+?) is ([\w ]+?)\.", notes)
        }
        found = [
            code for name, code in facts.items() if name in question and (name[0] == "t" or "courier" not in question)
        ]
        return "It is " + " and ".join(f"{code[:1]},{code[1:4]},{code[4:]}" for code in found if code)


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            card = {"id": "fake"} | ({"max_model_len": fake.limit} if fake.limit else {})
            self._say(200, {"data": [card]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if fake.failures:
                return self._say(fake.failures.pop(0), {"error": "not now"})
            if self.path == "/tokenize":
                return self._say(200, {"tokens": fake.tokenize(body["prompt"])})
            if fake.dies_after is not None and len(fake.asked) >= fake.dies_after:
                return self._say(400, {"error": "broken"})
            chat = "chat" in self.path
            if not chat:
                fake.ids.append(body["prompt"])
            prompt = body["messages"][0]["content"] if chat else fake.text(body["prompt"])
            cached = len(fake.tokenize(prompt)) if prompt in fake.asked else 0
            text = fake.answer(prompt).replace(",", "" if not chat else ",")
            choice = {"message": {"content": text}} if chat else {"text": text}
            usage = {"prompt_tokens": len(fake.tokenize(prompt)), "prompt_tokens_details": {"cached_tokens": cached}}
            return self._say(200, {"choices": [choice], "usage": usage})

        def _say(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
