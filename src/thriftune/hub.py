"""Is the Hugging Face hub there? Asked once and quickly, before a library that would retry for most of a minute."""

from __future__ import annotations

import os
import threading

from thriftune.errors import InputError

ANSWER_WITHIN_S = 2.5


def hub_is_offline() -> bool:
    """HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) asks for the cache only."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def hub_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def ensure_hub_reachable(what: str, error: type[InputError] = InputError) -> None:
    """Return when the hub answers, or when HF_HUB_OFFLINE asks for the cache only; raise `error` within 3 s otherwise.

    `what` completes "... is not a local file or folder, and the hub cannot be reached": "the data set 'org/name'".
    HF_ENDPOINT and the usual proxy variables are respected. Resolving a name may hang, so a thread does it.
    """
    if hub_is_offline():
        return
    reason = _why_unreachable(hub_endpoint(), ANSWER_WITHIN_S)
    if reason is not None:
        raise error(
            given=f"{what} is not here, and the hub cannot be reached: {hub_endpoint()} ({reason})",
            allowed="a local file or folder, or a name on the hub while the hub can be reached",
            do="give a local path, connect to the network (HF_ENDPOINT and HTTPS_PROXY are respected), or set "
            "HF_HUB_OFFLINE=1 to use what is in the cache",
        )


def _why_unreachable(url: str, answer_within_s: float) -> str | None:
    """None when something answers at `url` in time, else the reason in words."""
    outcome: list[str | None] = []

    def ask() -> None:
        outcome.append(_ask(url, answer_within_s))

    thread = threading.Thread(target=ask, name="is-the-hub-there", daemon=True)
    thread.start()
    thread.join(answer_within_s)
    return outcome[0] if outcome else f"no answer within {answer_within_s:g} s"


def _ask(url: str, timeout_s: float) -> str | None:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return None  # the hub itself answered, with whatever status
    except urllib.error.URLError as problem:
        # A certificate that Python's own store does not know still means that somebody answered.
        return None if "CERTIFICATE_VERIFY_FAILED" in str(problem.reason) else str(problem.reason)
    except (OSError, ValueError) as problem:
        return str(problem) or type(problem).__name__
    return None
