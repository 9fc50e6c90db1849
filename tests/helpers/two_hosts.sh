#!/bin/sh
# Run a command on one of two hosts with a cable between them, which are on this machine: network
# namespaces with names, addresses and a veth pair of their own.
#
#     unshare --net --mount --uts --pid --fork --mount-proc --kill-child two_hosts.sh mpirun ...
#
# host-a, where the command runs, has 192.0.2.1, and host-b 192.0.2.2.  mpirun reaches host-b through the
# agent that is written here in place of ssh.  Everything is gone when unshare is: its processes are in a
# namespace of their own, of which the first is this script.
set -e

# In a host's own namespaces.  /sys shows the network of whoever mounted it.
set_up='mount -t sysfs none /sys
  ip link set lo up
  ip addr add $address/24 dev eth0
  ip link set eth0 up'
carrier='[ "$(cat /sys/class/net/eth0/operstate)" = up ]'

hostname host-a
unshare --net --mount --uts sleep infinity &
on_b="nsenter --target=$! --net --mount --uts"
until [ "$($on_b readlink /proc/self/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
$on_b hostname host-b
ip link add name eth0 type veth peer name eth0 netns $!
address=192.0.2.1 sh -ec "$set_up"
address=192.0.2.2 $on_b sh -ec "$set_up"
until sh -c "$carrier" && $on_b sh -c "$carrier"; do sleep 0.01; done  # up to a second

agent=$(mktemp)
trap 'rm "$agent"' EXIT
cat > "$agent" << end
#!/bin/sh
# [OPTIONS] HOST COMMAND, as ssh has it.
until [ "\$1" = 192.0.2.2 ]; do shift; done
shift
exec $on_b sh -c "\$*"
end
chmod +x "$agent"
export PRTE_MCA_plm_ssh_agent="$agent" OMPI_MCA_plm_rsh_agent="$agent"  # Open MPI 5, 4
export HYDRA_LAUNCHER=ssh HYDRA_LAUNCHER_EXEC="$agent"                  # MPICH
export UCX_TLS=tcp  # UCX sees that it is one machine, and would use its memory

status=0
"$@" || status=$?
exit $status
