#!/bin/bash
# A training run on a Cloud TPU slice: creates the slice, installs this checkout on its hosts, starts the run there in
# tmux, and with --retry does all of that again when the slice is preempted; the run then goes on from its checkpoint.
#
#   launch/tpu_pod.sh run NAME --zone=ZONE --type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot --retry \
#       -- --config=gpt_small --workdir=gs://bucket/runs/gpt_small
#
# Commands:
#   run      create, install, start, and wait for the end of the run; exits with its code
#   create   the slice, trying again until there is one
#   install  this checkout and its packages on every host
#   start    the run, in tmux on every host, where launch/supervise.py starts it again after a crash
#   attach   shows host 0 (--worker=N another one); Ctrl-B d leaves the run alone
#   status   the state of the slice, and how the run ended on host 0
#   stop     SIGTERM to the run, which saves and ends with 75
#   delete   the slice, and its queued resource
#
# Options, before --; what follows are the flags of llm-jax train:
#   --zone=ZONE        (required)
#   --type=TYPE        such as v5litepod-16   (create)
#   --version=VERSION  software of the hosts, such as v2-alpha-tpuv5-lite   (create)
#   --spot             cheaper, may be preempted   (create)
#   --queued           as a queued resource, which waits for its turn at Google instead of here   (create)
#   --setup=COMMAND    run on every host before the installation, such as a mount   (install)
#   --env=NAME=VALUE   an environment variable of the run, may be repeated   (start)
#   --retry            create the slice again when it is gone   (run)
#   --tries=N          slices that may be lost (default: 100)   (run --retry)
#   --worker=N         (attach)
set -euo pipefail

POLL=${LLM_JAX_POLL:-30}  # seconds between two looks, and before the second try to create; doubled up to 20 times that
FINAL='INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|unrecognized arguments|argument --|not have an active account'
GONE=200  # what wait_for_end returns if the slice is gone; a run ends with at most 192

say() { echo "$(date +%T) $*" >&2; }
fail() { echo "error: $*" >&2; exit 78; }

[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 78; }
command=$1 name=$2
shift 2
zone='' type='' version='' spot='' queued='' setup=true retry='' tries=100 worker=0 variables='' options=()
while [ $# -gt 0 ]; do
  [ "$1" = -- ] || options+=("$1")
  case $1 in
    --) shift; break ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=--spot ;;
    --queued) queued=yes ;;
    --setup=*) setup=${1#*=} ;;
    --env=*=*) variables+="export $(printf '%q' "${1#--env=}")"$'\n' ;;
    --retry) retry=yes ;;
    --tries=*) tries=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    *) fail "$1 is no option; flags of the run follow after --" ;;
  esac
  shift
done
[ -n "$zone" ] || fail "--zone is required"

tpus() { gcloud compute tpus "$1" "$2" --zone="$zone" --quiet "${@:3}"; }
on_hosts() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }  # --worker=all: on all at once
slice() { tpus tpu-vm describe "$name" --format='value(state)' 2> /dev/null || true; }  # '': there is none
request() { tpus queued-resources describe "$name" --format='value(state.state)' 2> /dev/null || true; }

create() {
  [ -n "$type" ] && [ -n "$version" ] || fail "--type and --version are required"
  local pause=$POLL said state
  while true; do
    state=$(slice)
    case $state in
      READY) say "$name is ready"; return ;;
      PREEMPTED | TERMINATED) say "$name: $state, so it is made anew"; delete ;;
      STOPPED | HIDDEN) fail "$name: $state; start or delete it" ;;
      ?*) say "$name: $state"; sleep "$POLL" ;;
      '')
        if [ -n "$queued" ]; then
          state=$(request)
          case $state in
            FAILED | SUSPENDED) say "the request for $name: $state, so it is made anew"; delete; continue ;;
            ?*) say "the request for $name: $state"; sleep "$POLL"; continue ;;
          esac
          said=$(tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
            --runtime-version="$version" $spot 2>&1) && continue
        else
          said=$(tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" $spot 2>&1) && continue
        fi
        echo "$said" >&2
        if grep -qE "$FINAL" <<< "$said"; then exit 78; fi
        say "not created; again in $pause s"
        sleep "$pause"
        pause=$((pause * 2 < 20 * POLL ? pause * 2 : 20 * POLL))
        ;;
    esac
  done
}

delete() {
  if [ -n "$(request)" ]; then
    tpus queued-resources delete "$name" --force >&2
  elif [ -n "$(slice)" ]; then
    tpus tpu-vm delete "$name" >&2
  fi
}

install() {
  local root archive
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  archive=$(mktemp -d)/llm_jax.tgz
  say "copying $root and installing"
  # What git knows, and new files that it does not ignore.
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar -C "$root" --null --ignore-failed-read -T - -czf "$archive"
  tpus tpu-vm scp "$archive" "$name:" --worker=all
  rm -r "$(dirname "$archive")"
  # The hosts' own Python may be too old; uv brings one.
  on_hosts all "set -e
$setup
mkdir -p llm_jax && tar -xzf llm_jax.tgz -C llm_jax
command -v tmux > /dev/null || sudo apt-get install -qy tmux
[ -x ~/.local/bin/uv ] || python3 -m pip install --quiet --user uv
cd llm_jax
[ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python --require-hashes -r requirements-tpu.lock
~/.local/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable ."
}

# The run is a script on the host, so that its arguments are quoted once, by printf %q.
start() {
  local flags workdir=''
  flags=$(printf '%q ' "$@")
  for flag in "$@"; do
    case $flag in --workdir=*://*) ;; --workdir=*) workdir="--workdir=$(printf '%q' "${flag#*=}")" ;; esac
  done
  on_hosts all "if tmux has-session -t llm_jax 2> /dev/null; then echo 'a run is active here' >&2; exit 75; fi
rm -f llm_jax.code
cat > llm_jax.sh <<'LLM_JAX_SCRIPT'
cd ~/llm_jax
${variables}bash -c 'echo \$\$ > ~/llm_jax.pid; exec \"\$@\"' bash .venv/bin/python launch/supervise.py $workdir \
  --log=\$HOME/supervise.jsonl -- .venv/bin/python -m llm_jax.main --distributed $flags 2>&1 | tee -a ~/llm_jax.log
echo \${PIPESTATUS[0]} > ~/llm_jax.code
LLM_JAX_SCRIPT
tmux new-session -d -s llm_jax 'bash ~/llm_jax.sh'"
  say "started; launch/tpu_pod.sh attach $name --zone=$zone shows it"
}

ended() { on_hosts 0 'cat llm_jax.code 2> /dev/null || true' 2> /dev/null | tail -n 1; }

# Waits until the run has ended by itself, and returns its code; or GONE.
wait_for_end() {
  local code state
  while true; do
    sleep "$POLL"
    code=$(ended || true)
    if [[ $code =~ ^[0-9]+$ ]]; then return "$code"; fi
    state=$(slice)
    if [ "$state" != READY ]; then
      say "$name: ${state:-gone}"
      return $GONE
    fi
  done
}

# Another call of this script, so that an error ends it.
own() { bash "$0" "$1" "$name" "${options[@]}" -- "${@:2}"; }

run() {
  local slices=1 failures=0 code
  while [ "$slices" -le "$tries" ]; do
    create
    code=0
    if on_hosts 0 'tmux has-session -t llm_jax' 2> /dev/null; then
      say "the run is active on $name"
    elif ! { own install && own start "$@"; }; then
      code=$GONE
      if [ "$(slice)" = READY ]; then
        failures=$((failures + 1))
        [ $failures -lt 3 ] || { say "it cannot be installed or started there"; exit 1; }
        sleep "$POLL"
        continue
      fi
    fi
    [ $code -ne 0 ] || wait_for_end || code=$?
    # The other codes are final: on the hosts launch/supervise.py has tried again where that is of use.
    if [ $code -ne $GONE ]; then
      say "the run ended with $code"
      exit $code
    fi
    [ -n "$retry" ] || { say "the slice is gone; the same command goes on with the run"; exit 76; }
    slices=$((slices + 1)) failures=0
  done
  say "$tries slices are gone"
  exit 76
}

# shellcheck disable=SC2016  # commands in single quotes are for the hosts' shells
case $command in
  run) run "$@" ;;
  create) create ;;
  install) install ;;
  start) start "$@" ;;
  attach) tpus tpu-vm ssh "$name" --worker="$worker" -- -t 'tmux attach -t llm_jax || tail -n 100 llm_jax.log' ;;
  status)
    echo "slice: $(slice); request: $(request)"
    on_hosts 0 'if [ -f llm_jax.code ]; then echo "ended with $(cat llm_jax.code)"; else tail -n 3 llm_jax.log; fi'
    ;;
  # To every host, as the supervisors of the others would start the run again.
  stop) on_hosts all 'kill -TERM "$(cat llm_jax.pid)"' ;;
  delete) delete ;;
  *) fail "$command is no command" ;;
esac
