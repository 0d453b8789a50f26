#!/usr/bin/env bash
# One prefill server, one decode server and the proxy on this machine: npmd.sh has the options.
exec "$(dirname "$0")/npmd.sh" 1 1 "$@"
