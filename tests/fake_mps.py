"""Stands for NVIDIA's Multi-Process Service and nvidia-smi where there is no GPU: programs that note how they are called."""

from __future__ import annotations

from pathlib import Path

from megatron_hetermoe.runtime.seen_gpu import SeenGpu

GPU = SeenGpu("NVIDIA H200", "GPU-0123", (9, 0), 132, (2, 30, 7), "/lib/libnccl.so.2")

# A daemon as the real one, in so far as it has a file in its folder, goes on by itself, and ends when a second call says so.
_CONTROL = """#!/bin/sh
calls={calls}
folder=$CUDA_MPS_PIPE_DIRECTORY
case "$1" in
-d)
    echo "start $folder gpu=$CUDA_VISIBLE_DEVICES" >> "$calls"
    echo "a line of the service" >> "$CUDA_MPS_LOG_DIRECTORY/control.log"
    [ -z "$FAKE_MPS_FAILS" ] || {{ echo "An instance of this daemon is already running"; exit 1; }}
    setsid "$0" serve < /dev/null > /dev/null 2>&1 &
    while [ ! -e "$folder/control" ]; do sleep 0.02; done ;;
serve)
    echo $$ > "$folder/control.new"
    mv "$folder/control.new" "$folder/control"
    while [ -e "$folder/control" ]; do sleep 0.05; done ;;
*)
    read -r line
    alive=0
    for pid in $(cat "$calls.ranks" 2> /dev/null); do ! kill -0 "$pid" 2> /dev/null || alive=$((alive + 1)); done
    echo "$line $folder ranks=$alive" >> "$calls"
    [ -n "$FAKE_MPS_DEAF" ] || rm "$folder/control" ;;
esac
"""
_SMI = """#!/bin/sh
echo "{mode}, {mig}"
"""


def install(folder: Path, mode: str = "Default", mig: str = "Disabled") -> Path:
    """Writes both programs into ``folder``; returns the file with the service's calls. A rank that appends its pid to the
    file of that name with ``.ranks`` is counted when the service is told to quit."""
    folder.mkdir(exist_ok=True)
    calls = folder / "calls"
    for name, text in (("nvidia-cuda-mps-control", _CONTROL.format(calls=calls)),
                       ("nvidia-smi", _SMI.format(mode=mode, mig=mig))):
        program = folder / name
        program.write_text(text)
        program.chmod(0o755)
    return calls
