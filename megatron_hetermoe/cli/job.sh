# --------------------------------------------------------------------------------------- the same in every job
set -euo pipefail

# Rank 0 of the launcher is on the node that runs this script, and the others find it there.
MASTER_ADDR=$(hostname)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} PYTHONUNBUFFERED=1

srun=(srun --label --wait=120)   # seconds for the other ranks to say what they know of one that has ended
inside=()
case "$CONTAINER" in
    '') ;;
    pyxis:*) container=(--container-image="${CONTAINER#pyxis:}" --container-workdir="$PWD"
                        --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}") ;;
    apptainer:*) inside=(apptainer exec --nv --pwd "$PWD" --bind "$PWD${MOUNTS:+,$MOUNTS}" "${CONTAINER#apptainer:}") ;;
    *) echo "CONTAINER is $CONTAINER; it must be pyxis:IMAGE, apptainer:IMAGE or nothing" >&2; exit 2 ;;
esac

# The nodes that Slurm gave may be fewer than the last time, or more: their ranks get the plan nearest to the last one's.
tasks=()
plan=()
if [ "${#RANKS[@]}" -gt 0 ]; then
    there=()
    for component in "${!RANKS[@]}"; do
        nodes=SLURM_JOB_NUM_NODES_HET_GROUP_$component
        there+=($((${!nodes} * RANKS[component])))
    done
    plan=(--plan "$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID.plan.json")
    fit=$(srun --het-group=0 --nodes=1 --ntasks=1 ${container[@]+"${container[@]}"} ${inside[@]+"${inside[@]}"} \
        "${HETERMOE[@]}" elastic "${RECIPE[@]}" --resume --attention-ranks "${there[0]}" --expert-ranks "${there[1]}" \
        --out "${plan[1]}" --json ${CLUSTER[@]+"${CLUSTER[@]}"} -- ${FLAGS[@]+"${FLAGS[@]}"})
    echo "the nodes have ${there[0]} attention and ${there[1]} expert ranks: $fit"
    for component in 0 1; do
        role=$([ "$component" = 0 ] && echo attention || echo expert)
        count=$(sed -n "s/.*\"${role}_ranks\": \([0-9]*\).*/\1/p" <<< "$fit")
        tasks+=("--ntasks=$count --nodes=$(((count + RANKS[component] - 1) / RANKS[component]))")
    done
fi
rank=(${inside[@]+"${inside[@]}"} "${HETERMOE[@]}" rank "${RECIPE[@]}" --resume ${plan[@]+"${plan[@]}"} -- ${FLAGS[@]+"${FLAGS[@]}"}
      --exit-signal-handler --exit-signal SIGUSR1)

if [ "${#POOLS[@]}" -gt 1 ]; then
    # One step over all components: ranks are numbered through, and each knows its component's pool.
    for component in "${!POOLS[@]}"; do
        [ "$component" = 0 ] || srun+=(:)
        read -ra sizes <<< "${tasks[component]-}"
        srun+=(--het-group="$component" ${sizes[@]+"${sizes[@]}"} ${container[@]+"${container[@]}"}
               env HETERMOE_POOL="${POOLS[$component]}" "${rank[@]}")
    done
else
    # Slurm numbers by node; ranks put themselves in pool order by these patterns.
    HETERMOE_FEATURES=$(sinfo --noheader --Node --nodes "$SLURM_JOB_NODELIST" --format '%N:%f' | sort -u | tr '\n' ' ')
    export HETERMOE_FEATURES HETERMOE_POOLS="$PATTERNS"
    srun+=(${container[@]+"${container[@]}"} "${rank[@]}")
fi

# Before the time limit Slurm sends USR1 to this script. The ranks get it, save and end; then the job waits in the queue
# again, and goes on from there. So it does after a node has failed, from the last save.
cut=''
step=''
trap 'cut=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1
"${srun[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
code=0
wait "$step" || code=$?
if [ -n "$cut" ] && [ "$code" != 2 ]; then
    echo "the time is over, with exit code $code; the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
