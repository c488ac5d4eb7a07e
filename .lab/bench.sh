#!/bin/bash
bash .lab/install.sh /tmp/lab > /tmp/install.log 2>&1 || { tail /tmp/install.log; exit 1; }
rm -rf /tmp/lab/site/transformer_engine* 
export PYTHONPATH=/tmp/lab/site:$PWD PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore LD_PRELOAD=/tmp/lab/libnccl.so.2
exec python3 scripts/bench/compare.py "$@"
