#!/bin/bash
@@DIRECTIVES@@
#
# Made from launch/slurm/job.sh by
#   @@COMMAND@@

set -euo pipefail

# -- what this job runs

@@SETTINGS@@

# -- where it stands

: "${SLURM_JOB_ID:?this script is for sbatch}"
restart=${SLURM_RESTART_COUNT:-0}
state="$run/slurm"
statuses="$state/statuses-$SLURM_JOB_ID-$restart"    # one empty file for each exit status that a task ended with
retries="$state/retries"                             # failures in a row without a newer checkpoint
hopeless="$state/hopeless-${SLURM_ARRAY_JOB_ID:-}"    # tells the later elements of a chain

say() { printf '%s  job %s, start %s: %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$restart" "$*"; }

finished() {
    [[ -f "$run/finished" && $(<"$run/finished") =~ \"step\":\ *([0-9]+) ]] && (( BASH_REMATCH[1] >= steps ))
}

newest_step() {
    local path newest=-1
    for path in "$run"/checkpoints/step_*; do
        if [[ $path =~ /step_([0-9]+)$ ]] && (( 10#${BASH_REMATCH[1]} > newest )); then
            newest=$((10#${BASH_REMATCH[1]}))
        fi
    done
    echo "$newest"
}

give_up() {    # STATUS REASON
    say "$2; giving up with status $1"
    if $chain; then echo "$1" > "$hopeless"; fi
    exit "$1"
}

cd "$work"
if finished; then
    say "all $steps steps are done"
    exit 0
fi
if $chain && [[ -f "$hopeless" && $(<"$hopeless") =~ ^[0-9]+$ ]]; then
    say "an earlier element of this array has given up"
    exit "${BASH_REMATCH[0]}"
fi
mkdir -p "$statuses"
rm -f "$run/stop"
before=$(newest_step)

# -- the tasks

# what the submitting shell may have exported would pass for a launcher's word
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT DS_ACCELERATOR "${!ACCELERATE_@}" "${!FSDP_@}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
: "${MASTER_ADDR:?scontrol names no host for this job}"
MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7 * restart) % 20000))    # below the ports that the kernel hands out
environment=("MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=$MASTER_PORT" "${environment[@]}")

@@STEP@@
say "nodes: ${hosts//$'\n'/ }"
say "command:$(printf ' %q' "${step[@]}")"

ask_to_stop() {
    interrupted=true
    say "asked to stop: the run saves and ends"
    touch "$run/stop" || say "$run/stop cannot be written"
}
trap ask_to_stop TERM @@SIGNAL@@

"${step[@]}" &
interrupted=true
while $interrupted; do       # a trapped signal ends `wait` early
    interrupted=false
    status=0
    wait $! || status=$?
done
trap - TERM @@SIGNAL@@
rm -f "$run/stop"

# -- how it ended: 0 done, 2 never again, 75 saved and to be continued, anything else a failure

if (( status == 0 )) || finished; then
    rm -rf "$statuses" "$retries"
    say "done"
    exit 0
fi
for path in "$statuses"/*; do      # srun's own is 137 where it ended a slower task, an agent's is always 1
    if [[ $path =~ /([0-9]+)$ ]] && (( BASH_REMATCH[1] < 128 )); then status=${BASH_REMATCH[1]}; fi
done
for code in 75 2; do
    if [[ -e "$statuses/$code" ]]; then status=$code; fi
done
rm -rf "$statuses"
if (( status == 2 )); then
    give_up 2 "what the run was given is wrong (the task's log says what)"
fi

after=$(newest_step)
count=0
if (( after <= before )) && [[ -f "$retries" && $(<"$retries") =~ ^[0-9]{1,9}$ ]]; then
    count=$((10#${BASH_REMATCH[0]}))
fi
if (( status != 75 || after <= before )); then
    count=$((count + 1))
fi
echo "$count" > "$retries"
say "ended with status $status; newest checkpoint: step $before at the start, $after now; failures in a row: $count"
if (( count > budget )); then
    give_up "$status" "more than $budget failures without a newer checkpoint"
fi

if $chain; then
    say "the next element of the array goes on"
    exit "$status"
fi
# of an array the last element carries the id of the whole
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
if [[ $(scontrol show job "$job") == *JobState=RUNNING* ]]; then
    say "requeue"
    scontrol requeue "$job" || say "SLURM does not requeue this job: submit it again to go on"
else
    say "SLURM is ending this job itself (cancelled, out of time, pre-empted): not requeued from here"
fi
exit "$status"
