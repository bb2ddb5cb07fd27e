"""Is the Hugging Face Hub there? One short request, because its libraries spend half a minute and more on retries."""

from __future__ import annotations

TIMEOUT = 5.0  # seconds until a Hub that does not answer counts as unreachable


def hub_answers() -> bool:
    """True if the Hub answers within TIMEOUT, or if HF_HUB_OFFLINE is set: offline mode fails fast by itself."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # no name, no route, refused, proxy, timeout: the session's library decides the type
        return False
    return True
