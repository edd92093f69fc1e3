"""``corewise serve`` says where a browser finds its page."""

from pathlib import Path

import pytest

from corewise.cli.serve import _page
from corewise.serving.host import Options


@pytest.mark.parametrize(
    ("options", "url"),
    [
        (Options(), "http://127.0.0.1:8000"),
        (Options(http=("0.0.0.0", 0)), "http://127.0.0.1:8000"),
        (Options(http=("::", 0)), "http://[::1]:8000"),
        (Options(http=("example.org", 443), certificate=Path("cert"), key=Path("key")), "https://example.org:8000"),
        (Options(tokens=("secret",)), ""),
    ],
)
def test_the_page_has_the_port_that_the_server_got(options: Options, url: str) -> None:
    assert _page(options, 8000) == url


def test_a_unix_socket_and_no_http_have_no_page() -> None:
    assert _page(Options(http=Path("/run/http.sock")), Path("/run/http.sock")) == ""
    assert _page(Options(http=None), None) == ""
