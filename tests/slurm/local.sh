#!/usr/bin/env bash
# tests/slurm/local.sh start DIR [NODES] | stop DIR
# A real SLURM of several nodes on one host, for the tests: munged, slurmctld, and a slurmd for each of n1..nN, all in DIR.
# Root, no systemd, no cgroups. start prints the line to evaluate: eval "$(tests/slurm/local.sh start /tmp/slurm 2)".
# SLURM_LOCAL_PORT: the first of N + 1 free ports; two clusters on one host need two DIRs and two such ranges.
set -euo pipefail
cmd=${1:?start|stop} dir=${2:?dir} nodes=${3:-2} port=${SLURM_LOCAL_PORT:-25000}
hosts="# lcm-local-slurm"

case $cmd in
stop)
  [ -f "$dir/slurm.conf" ] || exit 0
  SLURM_CONF=$dir/slurm.conf timeout 10 scancel --state=RUNNING --state=PENDING --user=root 2>/dev/null || true
  pids=$(cat "$dir"/run/*.pid 2>/dev/null || true)
  for sign in TERM KILL; do
    for pid in $pids; do kill -$sign "$pid" 2>/dev/null || true; done
    for _ in $(seq 50); do
      alive=
      for pid in $pids; do ! kill -0 "$pid" 2>/dev/null || alive=1; done
      [ -n "$alive" ] || break
      sleep 0.1
    done
  done
  flock /etc/hosts sh -c 'sed "/$1\$/d" /etc/hosts > "$2" && cat "$2" > /etc/hosts' sh "$hosts $(echo "$dir" | tr / .)" "$dir/hosts" # a mount point stays one
  exit ;;
start) ;;
*) echo "unknown: $cmd" >&2; exit 2 ;;
esac

mkdir -p "$dir"/{log,run,state,munge}
dir=$(cd "$dir" && pwd) host=$(hostname -s)
chmod 0755 "$dir" "$dir/run" && chmod 0700 "$dir/munge"
(umask 077 && head -c 1024 /dev/urandom > "$dir/munge/key")
ln -sf /dev/null "$dir/run/gpu0" && ln -sf /dev/zero "$dir/run/gpu1" # a node's two pretended GPUs must be devices
: > "$dir/gres.conf"
for i in $(seq "$nodes"); do
  mkdir -p "$dir/spool/n$i" # slurmd -N does not make it
  echo "NodeName=n$i Name=gpu File=$dir/run/gpu[0-1]" >> "$dir/gres.conf"
  flock /etc/hosts sh -c 'echo "$1" >> /etc/hosts' sh "127.0.0.1 n$i $hosts $(echo "$dir" | tr / .)" # the rendezvous is at the first node's name
done
# cred_expire: what a requeued job waits for (120 s by default). SlurmdTimeout: how soon a lost node is noticed.
cat > "$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$((port - 24999))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=${SLURM_LOCAL_KILL_WAIT:-30}
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=15
MessageTimeout=10
GresTypes=gpu
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=8 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
export SLURM_CONF=$dir/slurm.conf
munged --force --key-file="$dir/munge/key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
  --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
slurmctld -c -i -f "$SLURM_CONF"
for i in $(seq "$nodes"); do slurmd -N "n$i" -f "$SLURM_CONF"; done
for _ in $(seq 100); do
  [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" != "$nodes" ] || { echo "export SLURM_CONF=$SLURM_CONF"; exit; }
  sleep 0.3
done
echo "the nodes did not come up, see $dir/log" >&2
exit 1
