#!/usr/bin/env bash
# N prefill servers, M decode servers and the proxy, on this machine. 1p1d.sh and 2p2d.sh call it:
#
#   examples/1p1d.sh                                     on the CPU, with a tiny model of random weights
#   examples/1p1d.sh --model Qwen/Qwen3-0.6B --gpus 0,1  on GPUs: one for each server, prefill first
#
#   --once       ask one question, print the answer and end, instead of serving until Ctrl-C
#   --port PORT  of the proxy (8000); the servers and daemons take the ports from PORT + 1 on
#   --logs DIR   where the servers' output goes (a new folder in /tmp)
#
# PYTHON is the Python that has vLLM and this package; left out, .deps/e2e is (and is filled, 5.3 GB, on the CPU). PD_BIN_DIR is
# where pd-sender and pd-receiver are; left out, they are built. The buffers are where the KV is: in GPU or in host memory.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }
usage() { sed -n '2,/^set -/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }

[[ ${1:-} =~ ^[1-9]$ && ${2:-} =~ ^[1-9]$ ]] || usage
prefills=$1 decodes=$2
shift 2
model='' gpus='' once='' port=8000 logs=''
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=${2:?} && shift 2 ;;
    --gpus) gpus=${2:?} && shift 2 ;;
    --port) port=${2:?} && shift 2 ;;
    --logs) logs=${2:?} && shift 2 ;;
    --once) once=yes && shift ;;
    *) usage ;;
  esac
done
IFS=, read -ra devices <<<"$gpus"
if [ -n "$gpus" ] && [ ${#devices[@]} -lt $((prefills + decodes)) ]; then
  say "--gpus names ${#devices[@]} devices, $((prefills + decodes)) servers need one each"; exit 2
fi
[ -z "$gpus" ] || [ -n "$model" ] || { say "--gpus needs a --model"; exit 2; }
[ -z "$gpus" ] || [ -n "${PYTHON:-}" ] || { say "--gpus needs PYTHON, a Python that has vLLM for GPUs: .deps/e2e has it for the CPU"; exit 2; }

if [ -z "${PYTHON:-}" ]; then
  "$top/scripts/setup-e2e"
  PYTHON=$top/.deps/e2e/venv/bin/python
  LD_LIBRARY_PATH=$(cat "$top/.deps/e2e/library_path")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  PYTHONPATH=$top/python${PYTHONPATH:+:$PYTHONPATH}
  export LD_LIBRARY_PATH PYTHONPATH
fi
if [ -z "${PD_BIN_DIR:-}" ]; then
  "$top/scripts/cargo" build --release --bins
  PD_BIN_DIR=$top/target/release
fi
export PD_BIN_DIR
if [ -z "${NIXL_LIB_DIR:-}" ] && [ -d "$top/.deps/nixl" ]; then
  export NIXL_LIB_DIR=$top/.deps/nixl
fi
# Each server sees its own GPU alone, and the local engine only those that it sees.
[ -z "$gpus" ] || [ -n "${NIXL_LIB_DIR:-}" ] || { say "between GPUs NIXL is needed: make setup, or set NIXL_LIB_DIR"; exit 2; }
[ -n "$logs" ] || logs=$(mktemp -d /tmp/pd-example-XXXXXX)
mkdir -p "$logs"

children=()
ended() {
  trap - EXIT INT TERM
  [ ${#children[@]} -eq 0 ] || kill "${children[@]}" 2>/dev/null || true
  wait
}
trap ended EXIT
trap 'exit 130' INT TERM

options=(--host 127.0.0.1 --served-model-name example)
if [ -z "$gpus" ]; then
  if [ -z "$model" ]; then
    model=$logs/tiny
    "$PYTHON" "$top/examples/make_tiny_model.py" "$model" 2>/dev/null
  fi
  options+=(--enforce-eager --distributed-executor-backend uni)
  options+=(--num-gpu-blocks-override 64 --max-model-len 6144)
  export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 VLLM_HOST_IP=127.0.0.1
  buffer=64MiB
else
  buffer=4GiB
fi
options+=(--model "$model")

next=$((port + 1))
# serve NAME ROLE OPTIONS: a server in the background; its URL is in $url.
serve() {
  local name=$1 role=$2 options_of_role=$3 device=()
  url=http://127.0.0.1:$next
  if [ -n "$gpus" ]; then
    device=(env "CUDA_VISIBLE_DEVICES=${devices[${#children[@]}]}")
  fi
  local transfer="{\"kv_connector\": \"PdConnector\", \"kv_connector_module_path\": \"pd_backend.vllm.connector\",
    \"kv_role\": \"$role\", \"kv_load_failure_policy\": \"recompute\",
    \"kv_connector_extra_config\": {\"model_name\": \"example\", $options_of_role}}"
  "${device[@]}" "$PYTHON" -m vllm.entrypoints.openai.api_server "${options[@]}" --port "$next" \
    --kv-transfer-config "$transfer" >"$logs/$name.log" 2>&1 &
  children+=($!)
  next=$((next + 1))
}
proxy=(--port "$port")
urls=()
for i in $(seq "$prefills"); do
  # Where decode asks for the KV: the same after a restart, because the proxy remembers it.
  rendezvous=$next next=$((next + 1))
  serve "prefill-$i" kv_producer "\"transfer_mode\": \"push\", \"rendezvous_port\": $rendezvous,
    \"set\": {\"pd_buffer_size\": \"$buffer\"}"
  proxy+=(--prefill "$url") urls+=("$url")
done
for i in $(seq "$decodes"); do
  serve "decode-$i" kv_consumer "\"set\": {\"pd_buffer_size\": \"$buffer\", \"pd_peer_host\": \"127.0.0.1\",
    \"pd_peer_init_port\": 0, \"pd_peer_alloc_port\": 0}"
  proxy+=(--decode "$url") urls+=("$url")
done
say "starting ${#urls[@]} vLLM servers, which takes a minute or more; their output is in $logs"

# answers URL: waits until it does, for ten minutes, or until a child has ended.
answers() {
  for _ in $(seq 600); do
    curl -sf -o /dev/null "$1/health" && return 0
    for child in "${children[@]}"; do
      kill -0 "$child" 2>/dev/null || { say "a server has ended; see $logs:"; tail -n 5 "$logs"/*.log >&2; exit 1; }
    done
    sleep 1
  done
  say "$1 does not answer; see $logs"; exit 1
}
for url in "${urls[@]}"; do answers "$url"; done
"$PYTHON" "$top/examples/proxy.py" "${proxy[@]}" >"$logs/proxy.log" 2>&1 &
children+=($!)
answers "http://127.0.0.1:$port"

say "serving at http://127.0.0.1:$port, model \"example\". For example:"
if [ -n "$gpus" ]; then
  prompt="San Francisco is a" also=''
else
  prompt=$(seq -s ' ' -f 't%g' 3 402) also=', "ignore_eos": true'
fi
body="{\"model\": \"example\", \"prompt\": \"$prompt\", \"max_tokens\": 16, \"temperature\": 0$also}"
say "  curl http://127.0.0.1:$port/v1/completions -H 'Content-Type: application/json' -d '$body'"
curl -sS -f "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' -d "$body"
echo
grep -h 'sent request=' "$logs"/prefill-*.log >&2 || { say "nothing was sent; see $logs"; exit 1; }
[ -n "$once" ] || { say "Ctrl-C ends it"; wait; }
