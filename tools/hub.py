"""Why the Hugging Face hub cannot be reached.

Errors of its client in words that name what to change.
"""

import os
import sys

from huggingface_hub.errors import HfHubHTTPError

# HTTPError of the client's library: requests, httpx or httpx2
NetworkError = HfHubHTTPError.__bases__[0]
CLIENT = sys.modules[NetworkError.__module__.split(".")[0]]
InvalidURL = getattr(CLIENT, "InvalidURL", NetworkError)
# ImportError: of a package that a proxy needs
ERRORS = HfHubHTTPError, NetworkError, InvalidURL, ImportError
PROXIES = "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"


def proxies(start=""):
    """Names of the environment's proxy variables whose values begin so.

    The values may hold passwords.
    """
    names = [form for name in PROXIES for form in (name, name.lower())]
    return [
        name
        for name in names
        if os.environ.get(name) and os.environ[name].lower().startswith(start)
    ]


def explain(error):
    """One of ERRORS -> a sentence for the user.

    An ImportError that no proxy explains is raised again.
    """
    if isinstance(error, ImportError):
        if not (names := proxies("socks")):
            raise error
        name = names[0]
        return (
            f"{name} names a SOCKS proxy, for which a package is missing: pip install socksio, or"
            f" unset {name}"
        )
    if isinstance(error, HfHubHTTPError):  # the hub has answered
        return str(error)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    names = proxies()
    through = f" through the proxy of {names[0]}" if names else ""
    return f"{endpoint} cannot be reached{through}: {error}"
