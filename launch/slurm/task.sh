#!/bin/bash
# Runs one task of a job:  task.sh STATUSES STOP SIGNAL COMMAND...
#
# Leaves the command's exit status as a file's name in the folder STATUSES: srun reports only the highest of all tasks,
# and 137 for those it ends because another was first; torchrun reports 1 for everything.
# SIGNAL and SIGTERM reach the command by themselves. Until it has handlers of its own they would end it, so it starts
# with them ignored, and the file STOP tells it later.
set -uo pipefail

statuses=$1 stop=$2 signal=$3
shift 3

ask_to_stop() {
    interrupted=true
    [[ ${RANK:-${SLURM_PROCID:-0}} != 0 ]] || touch "$stop"
}
trap ask_to_stop TERM "$signal"

(trap '' TERM "$signal"; exec "$@") &
child=$!
interrupted=true
while $interrupted; do       # a trapped signal ends `wait` early
    interrupted=false
    wait "$child"
    status=$?
done
(( status == 0 )) || touch "$statuses/$status"
exit "$status"
