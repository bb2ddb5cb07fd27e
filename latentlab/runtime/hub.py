"""Whether the Hugging Face Hub answers, by one short request: its libraries retry for minutes."""

from __future__ import annotations

TIMEOUT = 5.0  # seconds until a Hub that does not answer counts as unreachable


def hub_answers() -> bool:
    """Whether the Hub answers within TIMEOUT; True in offline mode, which fails fast by itself."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # no name, no route, refused, proxy, timeout: many types
        return False
    return True
