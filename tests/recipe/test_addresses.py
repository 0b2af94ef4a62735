"""Every way to write a server comes to one URL, and what is no server is refused in words that help."""

from __future__ import annotations

import pytest

from grpo_cli.recipe.addresses import server_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost", "http://localhost:8000"),
        ("node1:9000", "http://node1:9000"),
        ("node1:08000", "http://node1:8000"),
        ("node1:1", "http://node1:1"),
        ("node1:65535", "http://node1:65535"),
        ("gpu_node-1.cluster.local", "http://gpu_node-1.cluster.local:8000"),
        ("n", "http://n:8000"),
        ("10.0.0.5", "http://10.0.0.5:8000"),
        ("10.0.0.5:80", "http://10.0.0.5:80"),
        ("4090box", "http://4090box:8000"),
        ("http://node1", "http://node1:8000"),
        ("http://node1/", "http://node1:8000"),
        ("node1/", "http://node1:8000"),
        ("http://node1:80", "http://node1:80"),
        ("http://node1:9000/", "http://node1:9000"),
        ("HTTP://Node1.Example:9000", "http://node1.example:9000"),
        ("https://node1", "https://node1"),
        ("https://node1/", "https://node1"),
        ("https://node1:8443", "https://node1:8443"),
        ("::1", "http://[::1]:8000"),
        ("[::1]", "http://[::1]:8000"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("http://::1", "http://[::1]:8000"),
        ("http://[::1]:9000/", "http://[::1]:9000"),
        ("https://[FE80:0::1]", "https://[fe80::1]"),
        ("::1:8000", "http://[::1:8000]:8000"),  # a valid address, so a port needs brackets
    ],
)
def test_a_server_has_one_url(text: str, url: str) -> None:
    assert server_url(text) == url
    assert server_url(url) == url


@pytest.mark.parametrize(
    "name",
    [
        "ip-10-0-0-5",
        "IP-10-0-0-5",
        "ip-10-0-0-5.ec2.internal",
        "ip-10-0-0-5.eu-west-1.compute.internal",
    ],
)
@pytest.mark.parametrize(
    ("pattern", "url"),
    [
        ("{}", "http://10.0.0.5:8000"),
        ("{}:9000", "http://10.0.0.5:9000"),
        ("http://{}", "http://10.0.0.5:8000"),
        ("https://{}/", "https://10.0.0.5"),
        ("https://{}:9000", "https://10.0.0.5:9000"),
    ],
)
def test_a_name_that_spells_an_address_means_the_address(name: str, pattern: str, url: str) -> None:
    assert server_url(pattern.format(name)) == url


@pytest.mark.parametrize(
    "name",
    [
        "ip-10-0-0-256",
        "ip-999-0-0-5.ec2.internal",
        "ip-010-0-0-5",
        "ip-10-0-0",
        "ip-10-0-0-5-6",
        "ip-10-0-0-5.example.com",
        "ip-10-0-0-5.ec2",
        "my-ip-10-0-0-5",
        "ip-10-0-0-5a",
    ],
)
def test_other_names_that_look_like_addresses_stay_names(name: str) -> None:
    assert server_url(name) == f"http://{name}:8000"


def refusal(text: str) -> str:
    with pytest.raises(ValueError, match=r"^be HOST\[:PORT\] or a URL such as http://10\.0\.0\.5:8000") as caught:
        server_url(text)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " node1",
        "node1 ",
        "node1\n",
        "node1:9000\n",
        "node 1",
        "http:// node1",
        "http://",
        "https:///",
        "://node1",
        "//node1",
        "/",
        "node1//",
        "node1/v1",
        "http://node1/v1",
        "http://node1:9000/v1/",
        "http://node1\\v1",
        "ftp://node1",
        "tcp://node1:9000",
        "http://http://node1",
        "8000",
        "10.0.0",
        "10.0.0.256",
        "10.0.0.5.6",
        "[::1",
        "::1]",
        "[]",
        "[]:9000",
        "[node1]:9000",
        "[::1]9000",
        "[10.0.0.5]",
        "[[::1]]",
        "[fe80::1%eth0]",
        "fe80::1%25eth0",
        ":::1",
        "node1:8000:9000",
        "-node1",
        "node1-",
        ".node1",
        "node1..local",
        "nöde1",
        "node%31",
        "node1,node2",
        "n" * 64,
        ".".join(["n" * 63] * 4),
    ],
)
def test_what_is_no_server_is_refused_and_quoted(text: str) -> None:
    assert refusal(text).endswith(f":8000, not {text!r}")


@pytest.mark.parametrize("port", ["", "0", "00", "65536", "99999", "100000", "-1", "+1", "1e3", "80a", "８０００"])
@pytest.mark.parametrize("host", ["node1", "http://node1", "https://10.0.0.5", "[::1]"])
def test_a_port_has_a_range(host: str, port: str) -> None:
    text = f"{host}:{port}"
    assert refusal(text).endswith(f"with a port from 1 to 65535, not {text!r}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("http://ann:hunter2@node1", "user name or password"),
        ("ann:hunter2@node1:9000", "user name or password"),
        ("http://ann:hunter 2@node1", "user name or password"),
        ("ftp://:hunter2@node1:0", "user name or password"),
        ("http://node1?key=hunter2", "query or fragment"),
        ("http://node1:9000/?key=hunter2", "query or fragment"),
        ("node1:99999?key=hunter2", "query or fragment"),
        ("http://node1/#hunter2", "query or fragment"),
        ("http://ann@node1?key=hunter2", "user name or password"),
    ],
)
def test_a_part_that_may_be_a_password_is_refused_and_not_quoted(text: str, part: str) -> None:
    message = refusal(text)
    assert message.endswith(f"without a {part}")
    assert "hunter" not in message
