"""Serves a model with vLLM or SGLang, asks it one question, and serves on until Ctrl-C.

    python tools/serve.py [--engine vllm|sglang] [--once] [--port 8000] MODEL [-- flags of the engine's server]

Standard library only; run with the Python of the environment that the engine is installed in.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
LOG = Path("build/serve.log")
QUESTION = "In one sentence: why is attention sparse?"
START_LIMIT = 600
STOP_LIMIT = 30
CHILDREN_STOP_LIMIT = 3
LOG_TAIL = 40

ENVIRONMENT = {
    # A server started in the repository root would take ./kernels for the package of that name.
    "PYTHONSAFEPATH": "1",
    "HF_HUB_OFFLINE": "1",
}
# A proxy that the environment names is for the world outside, not for this machine.
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServeError(Exception):
    """Shown to the user as it is."""


@dataclass(frozen=True)
class Engine:
    """How one engine's server is started.

    Attributes:
        title: how people call it.
        command: of the folder its environment keeps commands in: what starts it, before the name of the model.
        environment: what it needs beside `ENVIRONMENT`.
        flags: what MiniMax-M3's thoughts and tools need, see docs/calling-m3.md; those of the user follow.
    """

    title: str
    command: Callable[[Path], list[str]]
    environment: dict[str, str]
    flags: tuple[str, ...] = ()


ENGINES = {
    "vllm": Engine(
        "vLLM",
        lambda folder: [str(folder / "vllm"), "serve"],
        # GiB for the KV cache; vLLM's own default takes a share of all memory.
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        (
            *("--reasoning-parser", "msa_minimax_m3"),
            *("--tool-call-parser", "msa_minimax_m3", "--enable-auto-tool-choice"),
            *("--middleware", "msa_backend.vllm.thinking.ThinkingMode"),
            *("--middleware", "msa_backend.vllm.anthropic_errors.AnthropicErrors"),
            "--enable-prompt-tokens-details",
        ),
    ),
    "sglang": Engine(
        "SGLang",
        lambda folder: [str(folder / "python"), "-m", "sglang.launch_server", "--model-path"],
        # Without the first, SGLang looks for a GPU whatever --device says.
        {"SGLANG_USE_CPU_ENGINE": "1"},
    ),
}


def free_port(wanted: int) -> int:
    """The first free port from `wanted` on."""
    for port in range(wanted, min(wanted + 100, 65536)):
        with socket.socket() as probe:
            # As the server does, or a port that was in use a moment ago would look taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise ServeError(f"No free port from {wanted} on: choose another with PORT=.")


class Server:
    """An engine's server in a session of its own, so that it and its children can be stopped as one.

    Ctrl-C in the terminal then reaches only this script, which passes it on once.
    """

    def __init__(self, engine: Engine, model: str, port: int, flags: list[str]) -> None:
        self.url = f"http://{HOST}:{port}"
        self.name = Path(model).name
        LOG.parent.mkdir(exist_ok=True)
        command = [*engine.command(Path(sys.executable).parent), model]
        command += ["--host", HOST, "--port", str(port), "--served-model-name", self.name]
        with LOG.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *engine.flags, *flags],
                env={**ENVIRONMENT, **engine.environment, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check_alive(self) -> None:
        status = self.process.poll()
        if status is not None:
            tail = LOG.read_text(errors="replace").splitlines()[-LOG_TAIL:]
            raise ServeError("\n".join([*tail, f"The server ended with status {status}; its whole log is {LOG}."]))

    def wait_until_healthy(self) -> float:
        started = reported = time.monotonic()
        while not self._is_healthy():
            self.check_alive()
            now = time.monotonic()
            if now - started > START_LIMIT:
                raise ServeError(f"The server was not ready after {START_LIMIT} s; its log is {LOG}.")
            if now - reported >= 5:
                reported = now
                print(f"  {now - started:.0f} s", flush=True)
            time.sleep(0.3)
        return time.monotonic() - started

    def _is_healthy(self) -> bool:
        try:
            with HTTP.open(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False

    def stop(self) -> None:
        """First as Ctrl-C would; then, or at a second Ctrl-C, for good. Nothing of the session survives."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                self.process.wait(STOP_LIMIT)
            # The server's children end a moment after it, when they have cleaned up shared memory.
            ends = time.monotonic() + CHILDREN_STOP_LIMIT
            while self._signal_session(0) and time.monotonic() < ends:
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal_session(signal.SIGKILL)
            self.process.wait()

    def _signal_session(self, number: int) -> bool:
        """False when nobody is left to receive it."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


def ask(server: Server, question: str) -> Iterator[str]:
    """The pieces of the answer as they arrive."""
    body = {
        "model": server.name,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "max_tokens": 48,
        "temperature": 1.0,
        "seed": 0,
        "ignore_eos": True,  # random weights may end the answer before it begins
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    finished = None
    try:
        with HTTP.open(request, timeout=120) as stream:
            for line in stream:
                data = line.decode().removeprefix("data:").strip()
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ServeError(f"The server broke off the answer: {event['error']}")
                for choice in event["choices"]:
                    delta = choice["delta"]
                    yield delta.get("content") or delta.get("reasoning") or ""  # a random model may think
                    finished = choice["finish_reason"] or finished
    except urllib.error.HTTPError as error:
        raise ServeError(f"The server refused the question: {error}: {error.read().decode(errors='replace')}") from None
    except (OSError, http.client.HTTPException) as error:
        server.check_alive()
        raise ServeError(f"The connection broke off: {error}; the server's log is {LOG}.") from None
    if finished is None:
        raise ServeError(f"The answer stopped without an end; the server's log is {LOG}.")


def show_how_to_go_on(server: Server) -> None:
    body = json.dumps({"model": server.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    print(
        f"""
Ask more from another terminal, or use any OpenAI client with base URL {server.url}/v1:

  curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{body}'

The log is {LOG}. Ctrl-C stops the server.""",
        flush=True,
    )


def serve(engine: Engine, model: str, wanted_port: int, flags: list[str], once: bool) -> None:
    port = free_port(wanted_port)
    if port != wanted_port:
        print(f"Port {wanted_port} is taken; using {port}.")
    print(f"Starting {engine.title} with {model}; this takes about half a minute.", flush=True)
    server = Server(engine, model, port, flags)
    try:
        print(f"Ready after {server.wait_until_healthy():.0f} s.\n\n> {QUESTION}\n", flush=True)
        for piece in ask(server, QUESTION):
            print(piece, end="", flush=True)
        if model == "tiny-m3":
            print("\n\n(The weights of tiny-m3 are random: expect gibberish.)")
        if not once:
            show_how_to_go_on(server)
            while True:
                server.check_alive()
                time.sleep(0.5)
    finally:
        print("\nStopping the server ...", flush=True)
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("model")
    parser.add_argument("flags", nargs="*", help="flags of the engine's server, after --")
    options = parser.parse_args()

    # A closed terminal or a plain kill should stop the server as Ctrl-C does.
    for terminating in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(terminating, signal.default_int_handler)
    try:
        serve(ENGINES[options.engine], options.model, options.port, options.flags, options.once)
    except ServeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # Ctrl-C is how one ends a server, but not how a check ends well.
        return 130 if options.once else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
