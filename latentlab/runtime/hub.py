"""Whether the Hugging Face Hub is reachable, by one short request: its libraries retry for long."""

from __future__ import annotations

TIMEOUT = 5.0  # seconds until a Hub that does not answer counts as unreachable


def hub_answers() -> bool:
    """True if the Hub answers within TIMEOUT, or if HF_HUB_OFFLINE is set, which fails fast."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # no DNS, no route, refused, proxy, timeout: the type depends on the HTTP library
        return False
    return True
