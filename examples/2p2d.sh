#!/usr/bin/env bash
# Two prefill servers, two decode servers and the proxy on this machine: npmd.sh has the options.
exec "$(dirname "$0")/npmd.sh" 2 2 "$@"
