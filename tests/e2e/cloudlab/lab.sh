#!/usr/bin/env bash
# A real Slurm cluster on one Debian machine, which an unpatched SkyPilot rents from as from any cloud.
#   login node  this host: slurmctld, munged, and an sshd on 127.0.0.1:$SSH_PORT (user $CUSER, key only)
#   node        a slurmd in its own network, host-name, process and mount namespace with its own address:
#               "the instance vanished" is a SIGKILL to the node's init and the removal of its link
# usage: lab.sh check | up | down | purge | status | node_up NAME | node_kill NAME | sky_home DIR
# down leaves no process, interface, namespace or user, and no file but the package cache; purge takes that too.
set -euo pipefail
BASE=${LAB_DIR:-/var/tmp/slm-cloudlab}
NODES=${NODES:-"n1 n2"}
GPU=${GPU:-H100}
SSH_PORT=${SSH_PORT:-2222}
PROXY_PORT=${PROXY_PORT:-3128}
CUSER=${CUSER:-slmlab}
CLUSTER=${CLUSTER:-slmcloud}
CPUS=${CPUS:-16}        # told to Slurm; nothing checks them
MEM=${MEM:-131072}
SKY_VERSION=${SKY_VERSION:-0.14.1}
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
BR=slmbr0 NET=10.77.0
R=$BASE/cluster ETC=$R/etc CACHE=$BASE/cache
TOOLS="slurmctld slurmd munged sshd ssh rsync ip unshare nc socat curl pgrep ps"
export SLURM_CONF=$ETC/slurm.conf PATH=$PATH:/usr/sbin:/sbin

node_ip(){ local i=11 n; for n in $NODES; do [ "$n" = "$1" ] && { echo $NET.$i; return; }; i=$((i+1)); done; return 1; }

# Says in one line why this machine cannot be a lab.
check(){
  [ "$(uname -s)" = Linux ] || { echo "it runs on Linux only"; return 3; }
  [ "$(id -u)" = 0 ] || { echo "it needs root (namespaces, a bridge, a second user)"; return 3; }
  case $BASE/ in /tmp/*|/root/*|/home/*) echo "LAB_DIR $BASE: nodes mount a /tmp of their own and run as another user; use /var/tmp"; return 3;; esac
  unshare --uts --pid --mount --net --fork true 2>/dev/null || { echo "namespaces are not permitted here (CAP_SYS_ADMIN)"; return 3; }
  have_tools || command -v apt-get >/dev/null || { echo "Debian's slurm-wlm is missing and there is no apt-get"; return 3; }
  [ -x /usr/bin/python3 ] || { echo "/usr/bin/python3 is missing"; return 3; }
}

have_tools(){ local t; for t in $TOOLS; do command -v $t >/dev/null || return 1; done; }

apt_install(){
  have_tools && return
  local policy=/usr/sbin/policy-rc.d made=
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' > $policy; chmod +x $policy; made=1; }  # no daemon starts by itself
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      slurm-wlm munge openssh-server openssh-client rsync iproute2 procps curl netcat-openbsd socat; } >/dev/null
  [ -z "$made" ] || rm -f $policy
}

# What pip of this machine is told, so that nodes look for packages at the same places.
pip_setting(){ "$PYTHON" -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | tail -n 1; }

write_profile(){
  local links index extra cert; links=$(pip_setting find-links); index=$(pip_setting index-url)
  extra=$(pip_setting extra-index-url); cert=$(pip_setting cert)
  {
    # sky runs every remote command under `bash --login`, which resets PATH: shims go in ~/.profile
    echo "export PATH=$R/shims:\$PATH SLM_BASE=$BASE SLURM_CONF=$ETC/slurm.conf PIP_PROXY=http://$NET.1:$PROXY_PORT"
    [ -z "$links" ] || echo "export PIP_FIND_LINKS='$links' UV_FIND_LINKS='${links// /,}'"
    [ -z "$index" ] || echo "export PIP_INDEX_URL='$index' UV_DEFAULT_INDEX='$index'"
    [ -z "$extra" ] || echo "export PIP_EXTRA_INDEX_URL='$extra'"
    [ -z "$cert" ] || echo "export PIP_CERT='$cert' SSL_CERT_FILE='$cert'"
  } > $R/home/.profile
  chmod 600 $R/home/.profile; chown $CUSER: $R/home/.profile
}

write_conf(){
  id $CUSER >/dev/null 2>&1 || useradd --system --no-create-home --home-dir $R/home --shell /bin/bash $CUSER
  usermod -d $R/home $CUSER 2>/dev/null || true
  usermod -p '*' $CUSER   # not locked: sshd without PAM refuses '!' accounts
  mkdir -p $ETC $R/{run,log,state,spool,munge,jobcomp,shims,home} $CACHE; chmod 755 $BASE $R $CACHE
  rm -f $R/home/.bash_profile; chown $CUSER: $R/home; chmod 755 $R/home
  write_profile
  [ -s $R/munge/munge.key ] || dd if=/dev/urandom of=$R/munge/munge.key bs=1024 count=1 status=none
  chown -R munge: $R/munge; chmod 755 $R/munge; chmod 400 $R/munge/munge.key
  local nodelines="" n nl; nl=$(echo $NODES | tr ' ' ',')
  for n in $NODES; do nodelines+="NodeName=$n NodeHostname=$n NodeAddr=$(node_ip $n) CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPU:1 State=UNKNOWN"$'\n'; done
  cat > $ETC/slurm.conf <<CONF
ClusterName=$CLUSTER
SlurmctldHost=$(hostname)($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$R/munge/munge.sock
CredType=cred/munge
SlurmctldPort=26817
SlurmdPort=26818
SlurmctldPidFile=$R/run/slurmctld.pid
SlurmdPidFile=$R/run/slurmd.%n.pid
StateSaveLocation=$R/state
SlurmdSpoolDir=$R/spool/%n
SlurmctldLogFile=$R/log/slurmctld.log
SlurmdLogFile=$R/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
TCPTimeout=3
MessageTimeout=10
KillWait=3
MinJobAge=300
InactiveLimit=0
SchedulerParameters=sched_interval=2,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$R/jobcomp/jobcomp.log
$nodelines
# a job that arrives in "reclaim" cancels spot jobs at once: Slurm's own preemption
PartitionName=spot     Nodes=$nl Default=YES MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=CANCEL GraceTime=0 State=UP
PartitionName=ondemand Nodes=$nl Default=NO  MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=OFF State=UP
PartitionName=reclaim  Nodes=$nl Default=NO  MaxTime=1-00:00:00 PriorityTier=9 PreemptMode=OFF State=UP
CONF
  # A GPU here is an empty file: gres/gpu wants one per device, and only the cgroup plugins would open it.
  mkdir -p $R/dev; : > $R/dev/gpu0
  for n in $NODES; do echo "NodeName=$n Name=gpu Type=$GPU File=$R/dev/gpu0"; done > $ETC/gres.conf
  # slurmd 22.05 always loads a cgroup plugin; v1 does nothing as long as no cgroup task or proctrack plugin is set
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > $ETC/cgroup.conf
  { echo "127.0.0.1 localhost"; echo "$NET.1 $(hostname) login"; for n in $NODES; do echo "$(node_ip $n) $n"; done; } > $ETC/hosts
  # nobody answers names beyond those: refused at once, where a silent server would cost seconds each time
  printf 'nameserver 127.0.0.1\noptions timeout:1 attempts:1\n' > $ETC/resolv.conf
  [ -f $ETC/ssh_host_ed25519 ] || ssh-keygen -q -t ed25519 -N '' -f $ETC/ssh_host_ed25519
  [ -f $ETC/id_ed25519 ] || ssh-keygen -q -t ed25519 -N '' -f $ETC/id_ed25519
  install -o $CUSER -g $CUSER -m 600 $ETC/id_ed25519.pub $ETC/authorized_keys
  cat > $ETC/sshd_config <<CONF
Port $SSH_PORT
ListenAddress 127.0.0.1
HostKey $ETC/ssh_host_ed25519
PidFile $R/run/sshd.pid
AuthorizedKeysFile $ETC/authorized_keys
PasswordAuthentication no
UsePAM no
StrictModes no
PermitRootLogin no
MaxSessions 200
MaxStartups 200
UseDNS no
SetEnv SLURM_CONF=$ETC/slurm.conf SLM_BASE=$BASE PATH=$R/shims:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
CONF
  mkdir -p /run/sshd
  write_shims
}

write_shims(){
  # SkyPilot's node bootstrap is `curl https://astral.sh/uv/install.sh | UV_INSTALL_DIR=... sh`; nodes reach no network
  cat > $R/shims/curl <<'SH'
#!/bin/bash
for a in "$@"; do
  if [ "$a" = "https://astral.sh/uv/install.sh" ]; then
    echo 'mkdir -p "$UV_INSTALL_DIR" && cp "$SLM_BASE/cluster/shims/uv" "$UV_INSTALL_DIR/uv"'
    exit 0
  fi
done
exec /usr/bin/curl "$@"
SH
  # uv as it comes, but for: python 3.10 (a download) is the system's own; packages are linked from a cache on the same
  # mount (SkyPilot's own lie in the node's /tmp); an install is tried from the cache alone first, and goes to the
  # registry through the proxy only if that fails
  cat > $R/shims/uv <<SH
#!/bin/bash
args=(); prev=; cache=$CACHE/uv
case "\${VIRTUAL_ENV:-} \${SKY_RUNTIME_DIR:-} \$*" in *$R/home/warm*) cache=$CACHE/uv-sky;; */tmp/*) [ -d /tmp/uv-cache ] && cache=/tmp/uv-cache;; esac
for a in "\$@"; do
  [ "\$prev" = --python ] && [ "\$a" = 3.10 ] && a=/usr/bin/python3
  args+=("\$a"); prev=\$a
done
[ "\$cache" = /tmp/uv-cache ] && case "\${VIRTUAL_ENV:-} \$*" in *$R/home/*) cache=$CACHE/uv;; esac
export UV_CACHE_DIR=\$cache UV_LINK_MODE=hardlink UV_PYTHON_DOWNLOADS=never
export SSL_CERT_FILE=\${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
if [ "\${1:-}" = pip ]; then
  said=\$(mktemp); UV_OFFLINE=1 $CACHE/uv-real "\${args[@]}" 2>"\$said" && { cat "\$said" >&2; rm -f "\$said"; exit 0; }
  rm -f "\$said"
fi
export HTTPS_PROXY=http://$NET.1:$PROXY_PORT HTTP_PROXY=http://$NET.1:$PROXY_PORT
exec $CACHE/uv-real "\${args[@]}"
SH
  chmod 755 $R/shims/*
}

get_uv(){
  [ -x $CACHE/uv-real ] && return
  local dl; dl=$(mktemp -d)
  "$PYTHON" -m pip download -q uv --no-deps -d $dl
  "$PYTHON" - $dl $CACHE <<'PY'
import glob, os, sys, zipfile
wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + "/uv-*.whl")[0])
name = next(one for one in wheel.namelist() if one.endswith("/scripts/uv"))
path = sys.argv[2] + "/uv-real"
open(path + ".part", "wb").write(wheel.read(name))
os.chmod(path + ".part", 0o755)
os.rename(path + ".part", path)
PY
  rm -rf $dl
}

# Fill uv's cache once with what SkyPilot installs on nodes, so that a node's start needs no network.
warm_uv(){
  mkdir -p $CACHE/uv $CACHE/uv-sky; chown -R $CUSER: $CACHE/uv $CACHE/uv-sky
  [ -f $CACHE/uv-sky/.warm ] && return
  runuser -u $CUSER -- env HOME=$R/home bash --login -ec "
    cd; $R/shims/uv venv -q --seed $R/home/warm --python 3.10
    VIRTUAL_ENV=$R/home/warm $R/shims/uv pip install -q 'skypilot[slurm,remote]==$SKY_VERSION'
    rm -rf $R/home/warm; touch $CACHE/uv-sky/.warm"
}

# A pid file is believed only while that process looks like ours: pids are used again.
alive(){ [ -s "$1" ] && { tr "\0" " " < "/proc/$(cat "$1")/cmdline"; } 2>/dev/null | grep -q -- "$2"; }
end(){ alive "$1" "$2" || { rm -f "$1"; return 0; }; local p; p=$(cat "$1"); kill ${3:-} $p 2>/dev/null || true
  for _ in $(seq 50); do alive "$1" "$2" || break; sleep .1; done; kill -9 $p 2>/dev/null || true; rm -f "$1"; }

node_up(){
  local n=$1 ip; ip=$(node_ip $n)
  alive $R/run/$n.init "slurmd -D -N $n" && { echo "$n is up"; return; }
  ip netns del slm-$n 2>/dev/null || true; ip link del slmv-$n 2>/dev/null || true
  ip netns add slm-$n
  ip link add slmv-$n type veth peer name eth0 netns slm-$n
  ip link set slmv-$n master $BR up
  ip -n slm-$n link set lo up
  ip -n slm-$n addr add $ip/24 dev eth0
  ip -n slm-$n link set eth0 up
  ip -n slm-$n route add default via $NET.1
  mkdir -p $R/spool/$n $R/tmp-$n
  [ -d $R/tmp-$n/uv-cache ] || cp -al $CACHE/uv-sky $R/tmp-$n/uv-cache
  setsid ip netns exec slm-$n unshare --uts --pid --mount --fork --mount-proc --kill-child bash -c "
     hostname $n; mount --bind $ETC/hosts /etc/hosts; mount --bind $ETC/resolv.conf /etc/resolv.conf
     chmod 1777 $R/tmp-$n; mount --bind $R/tmp-$n /tmp
     export PATH=$R/shims:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin SLM_BASE=$BASE
     slurmd -D -N $n -f $ETC/slurm.conf & wait" </dev/null >$R/log/$n.out 2>&1 9>&- &
  local u=$! p=  # setsid and `ip netns exec` exec in place: $u is unshare, and its only child the node's init
  for _ in $(seq 50); do p=$(pgrep -P $u || true); [ -n "$p" ] && break; sleep .1; done
  [ -n "$p" ] || { echo "$n did not start; see $R/log/$n.out" >&2; return 1; }
  echo $p > $R/run/$n.init
  echo "$n up: init pid $p ip $ip"
}

# The instance vanishes: every process on it dies by SIGKILL, its link and its disk are gone.
node_kill(){
  local n=$1
  end $R/run/$n.init "slurmd -D -N $n" -9
  ip netns del slm-$n 2>/dev/null || true; ip link del slmv-$n 2>/dev/null || true
  local gone=$R/gone-$n-$RANDOM$RANDOM; mv $R/tmp-$n $gone 2>/dev/null && { setsid rm -rf $gone </dev/null >/dev/null 2>&1 9>&- & }
  echo "$n killed"
}

up(){
  check || return $?
  mkdir -p $BASE; apt_install; write_conf; get_uv
  ip link show $BR >/dev/null 2>&1 || { ip link add $BR type bridge; ip addr add $NET.1/24 dev $BR; ip link set $BR up; }
  if ! alive $R/run/proxy.pid proxy.py; then
    setsid /usr/bin/python3 $HERE/proxy.py $NET.1 $PROXY_PORT </dev/null >$R/log/proxy.log 2>&1 9>&- & echo $! > $R/run/proxy.pid
  fi
  for _ in $(seq 50); do nc -z $NET.1 $PROXY_PORT 2>/dev/null && break; sleep .1; done
  warm_uv
  alive $R/munge/munged.pid munged || runuser -u munge -- munged --force --key-file=$R/munge/munge.key \
    --socket=$R/munge/munge.sock --pid-file=$R/munge/munged.pid --log-file=$R/munge/munged.log --seed-file=$R/munge/munged.seed
  alive $R/run/sshd.pid sshd || /usr/sbin/sshd -f $ETC/sshd_config -E $R/log/sshd.log
  alive $R/run/slurmctld.pid slurmctld || slurmctld -c -f $ETC/slurm.conf
  local n; for n in $NODES; do node_up $n; done
  for _ in $(seq 120); do [ "$(sinfo -h -p spot -N -o %t 2>/dev/null | sort -u)" = idle ] && { sinfo -N -o "%N %P %t %c %m %G"; return; }; sleep .5; done
  echo "the nodes did not become idle:" >&2; sinfo -N >&2; return 1
}

down(){
  local n f; for n in $NODES; do node_kill $n; done
  [ -f $R/run/sshd.pid ] && alive $R/run/sshd.pid sshd && pkill -9 -P "$(cat $R/run/sshd.pid)" 2>/dev/null || true
  end $R/run/sshd.pid sshd; end $R/run/slurmctld.pid slurmctld; end $R/munge/munged.pid munged; end $R/run/proxy.pid proxy.py
  if id $CUSER >/dev/null 2>&1; then
    for _ in $(seq 50); do   # the lab's own user: all its processes are ours
      ps -o stat= -u $CUSER | grep -qv '^Z' || break; pkill -9 -u $CUSER || true; sleep .1
    done
    userdel -f $CUSER 2>/dev/null || true
  fi
  ip link del $BR 2>/dev/null || true
  for _ in $(seq 50); do rm -rf $R 2>/dev/null && break; sleep .1; done   # a killed node's disk may still be going
}

purge(){ down; rm -rf $BASE; }

# A HOME for SkyPilot's client and local API server: the ssh entry, the prices, and the catalog files that it would fetch.
sky_home(){
  local h=$1; mkdir -p $h/.slurm $h/.sky/catalogs/v8/common; chmod 600 $ETC/id_ed25519
  printf 'Host %s\n  HostName 127.0.0.1\n  Port %s\n  User %s\n  IdentityFile %s\n  IdentitiesOnly yes\n' $CLUSTER $SSH_PORT $CUSER $ETC/id_ed25519 > $h/.slurm/config
  cat > $h/.sky/config.yaml <<CONF
slurm:
  allowed_clusters: [$CLUSTER]
  provision_timeout: ${PROVISION_TIMEOUT:-30}
  cluster_configs:
    $CLUSTER:
      partition_configs:
        spot:     {pricing: {accelerators: {$GPU: 1.10}}}
        ondemand: {pricing: {accelerators: {$GPU: 2.99}}}
CONF
  printf "AcceleratorName,Clouds\n$GPU,\"['AWS', 'GCP', 'Lambda', 'RunPod']\"\n" > $h/.sky/catalogs/v8/common/accelerators.csv
  printf 'GPU,MemoryGB,Manufacturer\n%s,80,nvidia\n' $GPU > $h/.sky/catalogs/v8/common/metadata.csv
  echo "export HOME=$h SLURM_CONF=$SLURM_CONF SKYPILOT_DISABLE_USAGE_COLLECTION=1"
}

status(){ sinfo -N; squeue; }
cmd=${1:-status}; shift || true
case $cmd in check|up|down|purge|status|node_up|node_kill|sky_home) $cmd "$@";; *) echo "no such command: $cmd" >&2; exit 2;; esac
