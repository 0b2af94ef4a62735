"""What users write for a rollout server, as the one URL that clients use. No I/O: no name is looked up."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address

DEFAULT_PORT = 8000

FORM = "be HOST[:PORT] or a URL such as http://10.0.0.5:8000"

_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_ADDRESS_IN_NAME = re.compile(
    r"ip-([0-9]+)-([0-9]+)-([0-9]+)-([0-9]+)(?:\.(?:ec2|[a-z0-9-]+\.compute)\.internal)?"
)
"""How AWS, and Slurm on it, name the machine at a private IPv4 address."""


def server_url(text: str) -> str:
    """The base URL of a server, in one spelling and without a slash at its end.

    A host without a port gets DEFAULT_PORT, except under https, which keeps its own. A name such as
    `ip-10-0-0-5.ec2.internal` becomes the address it spells, which is reachable without AWS's name server.

    Raises ValueError with the end of a sentence, for "<setting> must ...", if the text is no such server. The
    message does not quote text that may hold a password.
    """
    # First of all, since these parts may hold passwords and what follows quotes the text.
    if "@" in text:
        raise ValueError(f"{FORM}, without a user name or password")
    if "?" in text or "#" in text:
        raise ValueError(f"{FORM}, without a query or fragment")
    wrong = ValueError(f"{FORM}, not {text!r}")
    scheme, separator, rest = text.partition("://")
    scheme, rest = (scheme.lower(), rest) if separator else ("http", text)
    if scheme not in ("http", "https"):
        raise wrong
    rest = rest.removesuffix("/").lower()
    if re.search(r"[\s/]", rest):  # before the port is looked at, which a path would seem to be part of
        raise wrong
    host, port = _split_port(rest)
    if port is not None and not (re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise ValueError(f"{FORM}, with a port from 1 to 65535, not {text!r}")
    try:
        address = _written_host(host)
    except ValueError:
        raise wrong from None
    if port is None:
        return f"{scheme}://{address}" + (f":{DEFAULT_PORT}" if scheme == "http" else "")
    return f"{scheme}://{address}:{int(port)}"


def _split_port(text: str) -> tuple[str, str | None]:
    """Host and port of HOST[:PORT]. Several colons without brackets are an IPv6 address, which has no port."""
    if text.startswith("["):
        host, _, after = text.partition("]")
        # Anything but a colon after the bracket stays with the host, where it is refused.
        return (host + "]", after[1:]) if after.startswith(":") else (text, None)
    host, colon, port = text.partition(":")
    return (host, port) if colon and ":" not in port else (text, None)


def _written_host(host: str) -> str:
    """A host as a URL spells it. Raises ValueError if it is none."""
    if ":" in host:
        inside = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if "%" in inside:
            raise ValueError("clients disagree on how a URL spells an IPv6 zone")
        return f"[{IPv6Address(inside)}]"
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise ValueError("no host name")
    if host.rpartition(".")[2].isdigit():  # no name ends in a number: it is an address, or a port without a host
        return str(IPv4Address(host))
    if match := _ADDRESS_IN_NAME.fullmatch(host):
        try:
            return str(IPv4Address(".".join(match.groups())))
        except ValueError:
            return host  # such as ip-10-0-0-999: somebody's own way of naming machines
    return host
