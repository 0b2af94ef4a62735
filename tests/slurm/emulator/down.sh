#!/usr/bin/env bash
# Ends the cluster that up.sh started with the same R, whatever is left of it.
set -uo pipefail
R=${R:?set R to the folder of the cluster}
if [[ -d $R/pid ]]; then
  pids=$(cat "$R"/pid/*.pid "$R/munge/munged.pid" 2>/dev/null)
  # What a job left behind on an emulated node, which is known by its network.
  for netns in slemu-{1..5}; do pids+=" $(ip netns pids "$netns" 2>/dev/null | tr '\n' ' ')"; done
  for pid in $pids; do kill "$pid" 2>/dev/null; done
  for _ in {1..20}; do
    alive=0
    for pid in $pids; do kill -0 "$pid" 2>/dev/null && alive=1; done
    ((alive)) || break
    sleep 0.1
  done
  for pid in $pids; do kill -KILL "$pid" 2>/dev/null; done
fi
for i in {1..5}; do
  ip netns del "slemu-$i" 2>/dev/null
  ip link del "slemu-$i" 2>/dev/null
done
ip link del slemu0 2>/dev/null
exit 0
