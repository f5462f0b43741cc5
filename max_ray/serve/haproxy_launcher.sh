#!/bin/sh
# HAProxy as haproxy_launcher.py starts it on a node of a cluster: Serve is given the path of this file.
exec "${HAPROXY_LAUNCHER_PYTHON:-python3}" -P "$(dirname "$0")/haproxy_launcher.py" --cluster "$@"
