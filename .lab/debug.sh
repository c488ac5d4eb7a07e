#!/bin/bash
# debug.sh NAME LIMIT FLAGS...: 4 ranks, prints tails
name=$1; limit=$2; shift 2
mkdir -p /tmp/dbg
port=$((29700 + RANDOM % 200))
for r in 0 1 2 3; do
  RANK=$r WORLD_SIZE=4 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port GPU_RANK_SECONDS=$limit \
   python3 tests/gpu/gpu_rank.py /tmp/dbg/$name --hetermoe --hetermoe-attention-ranks 2 --hetermoe-expert-ranks 2 "$@" > /tmp/dbg/$name.$r.log 2>&1 &
done
wait
echo "=== $name"; 
for r in 0 1 2 3; do echo "--- rank $r"; grep -c '"kind": "step"' /tmp/dbg/$name.$r; grep -v "^$" /tmp/dbg/$name.$r.log | grep -A60 "Thread 0x\|Timeout\|Error" | grep -v "site-packages/\(_pytest\)" | head -${LINES_MAX:-45}; tail -2 /tmp/dbg/$name.$r.log | cut -c1-300; done
