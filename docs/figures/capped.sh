#!/bin/sh
# Decodes under a cap of memory, coel and llama.cpp in turn, three times. Needs root and a version 1 memory cgroup.
#
#   capped.sh COEL SLICES LLAMA_BENCH GGUF CAP_BYTES BUDGET_BYTES
#
# CAP_BYTES bounds each program, with the pages of files it maps; BUDGET_BYTES is what coel is told (--memory).
set -eu
coel=$1 slices=$2 llama_bench=$3 gguf=$4 cap=$5 budget=$6
group=/sys/fs/cgroup/memory/coel-capped
mkdir -p "$group"
echo "$cap" > "$group/memory.limit_in_bytes"
capped() { sh -c 'echo $$ > "$0/cgroup.procs" && exec "$@"' "$group" "$@"; }
for _ in 1 2 3; do
    # What is cached of the files belongs to whoever read them first.
    sync && echo 3 > /proc/sys/vm/drop_caches
    capped "$coel" bench --model "$slices" --precision q4 --memory "$budget" --prompt 64 --gen 64 --threads 2 --rounds 1 --json
    sync && echo 3 > /proc/sys/vm/drop_caches
    capped "$llama_bench" -m "$gguf" -lm mmap --repack 0 -t 2 -p 0 -n 64 -r 1 -o json
done
rmdir "$group"
