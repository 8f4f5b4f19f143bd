import logging
import socket
import threading

import pytest

from fracture.errors import UsageError
from fracture.registry.webhook import check_url, post_to_webhook
from tests.web_hook import Hook


def test_a_message_is_posted_as_json(hook: Hook):
    assert post_to_webhook(hook.url, {"event": "promoted", "version": 3}) is None
    assert hook.accepted == [{"event": "promoted", "version": 3}]


def test_a_failed_post_is_tried_again(hook: Hook):
    hook.codes, waits = [503, 429], []
    assert post_to_webhook(hook.url, {"event": "failed"}, waits.append) is None
    assert (len(hook.accepted), waits) == (1, [1.0, 5.0])


def test_an_unreachable_hook_is_reported_without_the_secret(hook: Hook, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    hook.codes = [500, 500, 500]
    assert post_to_webhook(hook.url, {}, lambda seconds: None) == "127.0.0.1 answers 500"
    hook.codes = [404]
    assert post_to_webhook(hook.url, {}, lambda seconds: pytest.fail("tried again")) == "127.0.0.1 answers 404"
    hook.server_close()
    reason = post_to_webhook(hook.url, {}, lambda seconds: None)
    assert reason.startswith("127.0.0.1 does not answer (")
    assert reason.endswith("Connection refused)")
    assert "secret" not in reason + caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/y",
        "hooks.example.org/x",
        "https://",
        "file:///etc/passwd",
        "https://x/a b",
        "http://x:y/z",
        "https://x/é",
    ],
)
def test_an_invalid_address_is_refused_without_showing_it(url: str):
    with pytest.raises(
        UsageError, match=r"--notify, of \d+ characters, is not the address of a web hook: it must"
    ) as caught:
        check_url(url)
    assert url not in str(caught.value) or url == "https://"
    check_url("https://hooks.example.org/x")


def test_a_server_that_does_not_speak_http_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(3):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"hello\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        reason = post_to_webhook(f"http://127.0.0.1:{server.getsockname()[1]}/secret", {}, lambda seconds: None)
        thread.join()
    assert reason == "127.0.0.1 does not answer as a web server does (BadStatusLine)"


def test_an_impossible_host_name_is_reported_without_the_secret():
    reason = post_to_webhook("http://example..org/secret", {}, lambda seconds: None)
    assert reason.startswith("example..org does not answer (")
    assert "secret" not in reason
