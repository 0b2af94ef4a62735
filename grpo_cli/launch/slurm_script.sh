#!/usr/bin/env bash
# @TITLE@
#
# @USAGE@
#
# The last SERVE_NODES nodes run `grpo serve`, one server each; all others train together. At the time limit, training
# writes a checkpoint and the job goes back into the queue, to go on from there. docs/slurm.md says more. This file is
# made from grpo_cli/launch/slurm_script.sh.
@OPTIONS@
set -euo pipefail

# Each of these can be set in the environment that sbatch is called in.
[[ -n ${RECIPE:-} ]] || MODEL=${MODEL:-@MODEL@} # trained and served; goes with RECIPE
MODEL=${MODEL:-}
RECIPE=${RECIPE:-@RECIPE@}
RUN_DIR=${RUN_DIR:-@RUN_DIR@} # on a file system that every node sees
SERVE_NODES=${SERVE_NODES:-@SERVE_NODES@}
TP=${TP:-@TP@} # GPUs of a server that share the model; auto: as many as can
PORT=${PORT:-8000}
TRAIN_ARGS=${TRAIN_ARGS:-} # more words for grpo train, such as: --set train.max_steps=10
SERVE_ARGS=${SERVE_ARGS:-} # and for grpo serve
RESUME=${RESUME:-} # 1 goes on from the last checkpoint in RUN_DIR; a requeued job always does
START_TIMEOUT_S=${START_TIMEOUT_S:-3600} # longest wait for the servers
SERVER_TIMEOUT_S=${SERVER_TIMEOUT_S:-@SERVER_TIMEOUT_S@} # longest that training waits for a server; wins over the recipe
STOP_TIMEOUT_S=${STOP_TIMEOUT_S:-$((SERVER_TIMEOUT_S + 900))} # that, and a checkpoint: a terabyte at more than 1 GB/s
GRPO=${GRPO:-@GRPO@}
train_args=(@TRAIN_WORDS@)
serve_args=(@SERVE_WORDS@)

say() { echo "[$(date '+%F %T')] $*"; }
fail() {
  say "$1"
  exit "${2:-1}"
}
yaml() { # a string as --set takes it
  local quote="'"
  echo "'${1//$quote/$quote$quote}'"
}
join() { local IFS=,; echo "$*"; } # srun takes a list of nodes with commas only
running() { kill -0 "$1" 2>/dev/null; }
pause() { sleep 1 & wait "$!" || true; } # a signal's trap runs at once in `wait`, but only after a plain `sleep`

command -v "$GRPO" >/dev/null || fail "there is no command $GRPO here; activate its environment before sbatch" 2
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
mapfile -t nodes <<<"$hosts"
num_train=$((${#nodes[@]} - SERVE_NODES))
((num_train >= 1)) || fail "SERVE_NODES=$SERVE_NODES leaves none of the ${#nodes[@]} nodes to train on" 2
((SERVE_NODES == 0)) || [[ -n $MODEL ]] || fail "with RECIPE, set MODEL to its model.name: the servers load it" 2
train_nodes=("${nodes[@]:0:num_train}")
serve_nodes=("${nodes[@]:num_train}")
read -ra words <<<"$TRAIN_ARGS"
train_args+=("${words[@]}")
read -ra words <<<"$SERVE_ARGS"
serve_args+=("${words[@]}")
key_file=$RUN_DIR/server-key # the servers make it, with mode 0600
logs=$RUN_DIR/slurm-$SLURM_JOB_ID
mkdir -p "$logs"
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)); training on ${train_nodes[*]};" \
  "servers on ${serve_nodes[*]:-no node}; logs in $logs"

# --- stopping

stop_reason=""
trap 'stop_reason="${stop_reason:-SIGUSR1: the time limit is near}"' USR1

servers_run() {
  local pid
  for pid in "${server_pids[@]}"; do running "$pid" || return 1; done
}

stop_servers() { # in good order where they can; whatever is left ends with the job
  local id name pid deadline=$((SECONDS + 30))
  # SIGTERM to srun would end its tasks at once, so it goes to the steps; their numbers are not known beforehand.
  # Slurm 22.05 sends a signal and then says "Invalid job id" of a step that has only some of the job's nodes.
  while read -r id name; do
    if [[ $name == serve ]]; then scancel --signal=TERM "$id" 2>/dev/null || true; fi
  done < <(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j')
  for pid in "${server_pids[@]}"; do
    while running "$pid" && ((SECONDS < deadline)); do pause; done
  done
}

last_checkpoint() {
  local found=("$RUN_DIR"/checkpoint-*)
  echo "${found[-1]}"
}

# --- the servers

server_pids=()
for node in "${serve_nodes[@]}"; do
  srun --job-name=serve --export=ALL --nodes=1 --ntasks=1 --nodelist="$node" --cpu-bind=none \
    --output="$logs/serve-%N.log" --open-mode=append \
    "$GRPO" serve --model "$MODEL" --tp "$TP" --host 0.0.0.0 --port "$PORT" --api-key-file "$key_file" \
    "${serve_args[@]}" &
  server_pids+=("$!")
  train_args+=(--server "$node:$PORT")
done

healthy() { # NODE: its server answers, and knows the key, which stays out of the list of processes
  [[ -s $key_file ]] && curl --silent --fail --noproxy '*' --max-time 5 --output /dev/null \
    --header @<(printf 'Authorization: Bearer %s' "$(<"$key_file")") "http://$1:$PORT/v1/grpo/info"
}

for node in "${serve_nodes[@]}"; do
  until healthy "$node"; do
    reason=""
    servers_run || reason="a server ended before all were ready; its log is one of $logs/serve-*.log"
    [[ -z $stop_reason ]] || reason="$stop_reason, and the servers are not ready; raise --time"
    ((SECONDS < START_TIMEOUT_S)) || reason="the server on $node was not ready after $START_TIMEOUT_S s"
    if [[ -n $reason ]]; then
      stop_servers
      fail "$reason"
    fi
    pause
  done
  say "the server on $node is ready"
done

# --- training, one task on each node

# Slurm ends the whole step as soon as one task fails, rather than let the others wait for it. Nodes that stop with a
# checkpoint (75) do so one after another, so to Slurm that must not look like a failure: the code goes to a file.
export OUTCOME=$logs/outcome
rm -f "$OUTCOME"
# shellcheck disable=SC2016  # expanded in the task, whose rank and exit code it is
task='
  trap : USR1 TERM
  "$@" && exit
  code=$?
  (set -C; echo "$code" >"$OUTCOME") 2>/dev/null # the first one counts
  ((code == 75)) || exit "$code"
'

if [[ -n $RESUME || ${SLURM_RESTART_COUNT:-0} -gt 0 ]]; then train_args+=(--resume); fi
if [[ -n $MODEL ]]; then train_args+=(--set "model.name=$(yaml "$MODEL")"); fi
if ((${#serve_nodes[@]})); then
  train_args+=(--set "generation.server.api_key_file=$(yaml "$key_file")")
  train_args+=(--set "generation.server.timeout_s=$SERVER_TIMEOUT_S")
fi
checkpoint_before=$(last_checkpoint)
srun --job-name=train --export=ALL --nodes="$num_train" --ntasks="$num_train" --ntasks-per-node=1 \
  --nodelist="$(join "${train_nodes[@]}")" --cpu-bind=none --kill-on-bad-exit=1 \
  --output="$logs/train-%N.log" --open-mode=append \
  bash -c "$task" task "$GRPO" train "$RECIPE" --set "train.output_dir=$(yaml "$RUN_DIR")" "${train_args[@]}" &
train_pid=$!

# --- until one side ends (polled: before bash 5.1, `wait -n` cannot say which one it was)

asked=""
while running "$train_pid"; do
  servers_run || stop_reason=${stop_reason:-a server ended, its log is one of $logs/serve-*.log}
  if [[ -n $stop_reason && -z $asked ]]; then # once: a second signal would end training without a checkpoint
    say "$stop_reason; asking training for a checkpoint"
    kill -USR1 "$train_pid" || true # srun hands it to every process of the step
    asked=$SECONDS
  elif [[ -n $asked ]] && ((SECONDS - asked > STOP_TIMEOUT_S)); then
    fail "training did not stop within $STOP_TIMEOUT_S s"
  fi
  pause
done
code=0
wait "$train_pid" || code=$?
if [[ -s $OUTCOME ]]; then
  first=$(<"$OUTCOME")
  if ((code == 0 || first != 75)); then code=$first; fi # srun's own code is that of the tasks it ended
fi
if ((code == 0)); then say "training is done"; else say "training ended with code $code; $logs/train-*.log say why"; fi
stop_servers

if ((code == 75)); then
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
  if [[ $state != RUNNING ]]; then
    say "not requeued: the job is $state"
  elif [[ $(last_checkpoint) == "$checkpoint_before" ]]; then
    say "not requeued: no step was completed since the start, so the next one would end no better"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "requeued; it goes on from $(last_checkpoint)"
  else
    say "not requeued; to go on, submit it again with RESUME=1 RUN_DIR=$RUN_DIR"
  fi
fi
exit "$code"
