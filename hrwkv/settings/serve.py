"""What a server listens on, whom it lets in, and how much it takes from one request."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hrwkv.settings.checks import require


@dataclass(frozen=True)
class ServeSettings:
    """Address, access and limits of ``hrwkv serve``; what the engine does is in EngineSettings."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to the network, which wants API keys."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    model_name: str | None = None
    """Name that clients ask for; left out, the directory's name."""
    api_key_file: Path | None = None
    """File with one API key a line; blank lines and lines that begin with # are left out."""
    api_key_env: str | None = None
    """Name of an environment variable that holds an API key."""
    tls_certificate: Path | None = None
    """PEM file of the certificate (chain); with it and --tls-key the server speaks HTTPS only."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may ask this server, like https://chat.example.org; none by default."""
    max_body_bytes: int = 4 * 2**20
    """Bytes of a request's body; a larger one is refused with 413."""
    max_prompt_tokens: int | None = None
    """Tokens of one prompt; left out, what the model's longest context holds."""
    max_choices: int = 128
    """Answers of one request: its prompts times n."""
    request_seconds: float = 600.0
    """Time of a request, waiting included; then its answer ends as it is, with finish_reason abort."""
    shutdown_seconds: float = 30.0
    """Time that running requests get after SIGTERM or Ctrl-C before they are cut off."""
    allow_priority: bool = False
    """Let requests set ``priority``: a lower number goes first."""
    generation_defaults: bool = True
    """Take temperature, top_p, top_k and repetition_penalty from the model's generation_config.json where a
    request gives none; otherwise OpenAI's (all 1 or off)."""
    log_prompts: bool = False
    """Write prompts to the log."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no server can have."""
        require(bool(self.host), "host", self.host, "an address like 127.0.0.1")
        require(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
        require(self.model_name != "", "model_name", self.model_name, "a name, or left out")
        require(self.api_key_env != "", "api_key_env", self.api_key_env, "a variable's name, or left out")
        pair = {"tls_certificate": self.tls_certificate, "tls_key": self.tls_key}
        for name, other in (pair, reversed(pair)):
            alone = pair[name] is None and pair[other] is not None
            require(not alone, name, None, f"a PEM file as for {other}, or neither of them")
        for origin in self.cors_origins:
            # Compared letter by letter with what browsers send, which has no path.
            good = re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin)
            require(good is not None, "cors_origins", origin, "like https://chat.example.org, without a path")
        for name in ("max_body_bytes", "max_choices"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        limit = self.max_prompt_tokens
        require(limit is None or limit >= 1, "max_prompt_tokens", limit, "at least 1, or left out")
        seconds = self.request_seconds
        require(0 < seconds < float("inf"), "request_seconds", seconds, "more than 0")
        seconds = self.shutdown_seconds
        require(0 <= seconds < float("inf"), "shutdown_seconds", seconds, "0 or more")
