#!/usr/bin/env bash
# Starts a Slurm cluster of five nodes on this machine. Each node has a network, a host name, a /dev/shm and eight GPUs
# of its own; the GPUs are counted and handed out, but they are copies of /dev/null. Needs root.
#
#     R=/tmp/slurm ./up.sh; export SLURM_CONF=/tmp/slurm/etc/slurm.conf; ...; R=/tmp/slurm ./down.sh
#
# R must be a folder that the user munge may enter: it is replaced.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
R=${R:?set R to the folder for the state of the cluster}
NODES=5 NET=10.77.0
controller=$(hostname -s)

"$here/down.sh"
rm -rf "$R"
mkdir -p "$R"/{etc,state,log,pid,munge,dev}
chmod 755 "$R" "$R/munge"

head -c 1024 /dev/urandom >"$R/munge/key"
chmod 600 "$R/munge/key"
chown -R munge:munge "$R/munge"
runuser -u munge -- /usr/sbin/munged --key-file="$R/munge/key" --socket="$R/munge/socket" \
  --pid-file="$R/munge/munged.pid" --log-file="$R/munge/log" --seed-file="$R/munge/seed"

for gpu in {0..7}; do mknod -m 666 "$R/dev/nvidia$gpu" c 1 3; done # Slurm wants device nodes

ip link add slemu0 type bridge
ip addr add "$NET.1/24" dev slemu0
ip link set slemu0 up
{
  echo "127.0.0.1 localhost"
  echo "$NET.1 $controller"
  for i in $(seq $NODES); do echo "$NET.$((10 + i)) node$i"; done
} >"$R/etc/hosts"
for i in $(seq $NODES); do
  ip netns add "slemu-$i"
  ip link add "slemu-$i" type veth peer name eth0 netns "slemu-$i"
  ip link set "slemu-$i" master slemu0 up
  ip -n "slemu-$i" link set lo up
  ip -n "slemu-$i" addr add "$NET.$((10 + i))/24" dev eth0
  ip -n "slemu-$i" link set eth0 up
done

# cred_expire keeps the pause before a requeued job starts again at seconds.
cat >"$R/etc/slurm.conf" <<CONF
ClusterName=emulated
SlurmctldHost=$controller($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$R/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile=$R/pid/slurmctld.pid
SlurmctldLogFile=$R/log/slurmctld.log
StateSaveLocation=$R/state
SlurmdPidFile=$R/pid/slurmd.%n.pid
SlurmdLogFile=$R/log/slurmd.%n.log
SlurmdSpoolDir=$R/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
EnforcePartLimits=ALL
MpiDefault=none
ReturnToService=2
SlurmdTimeout=60
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-$NODES] NodeAddr=$NET.[11-$((10 + NODES))] CPUs=64 RealMemory=100000 Gres=gpu:8 State=UNKNOWN
PartitionName=debug Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE State=UP
CONF
echo "NodeName=node[1-$NODES] Name=gpu File=$R/dev/nvidia[0-7]" >"$R/etc/gres.conf"
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$R/etc/cgroup.conf"

export SLURM_CONF=$R/etc/slurm.conf
slurmctld -c -f "$SLURM_CONF"
for i in $(seq $NODES); do
  mkdir -p "$R/spool/node$i"
  # ip netns exec gives it mounts of its own, too. Without its own /dev/shm, nodes would pass weights through memory.
  ip netns exec "slemu-$i" unshare --uts bash -c "hostname node$i
    mount --bind '$R/etc/hosts' /etc/hosts
    mount -t tmpfs -o size=2g tmpfs /dev/shm
    exec slurmd -c -N node$i -f '$SLURM_CONF'"
done
for _ in {1..60}; do
  if [[ $(sinfo --noheader --states=idle --format=%D 2>/dev/null) == "$NODES" ]]; then exit 0; fi
  sleep 0.5
done
echo "the nodes did not become idle:" >&2
sinfo --Node >&2
tail -n 5 "$R"/log/* >&2
exit 1
