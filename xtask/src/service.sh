#!/bin/bash
# What docs/SERVICE.md says of the units in dist/, step by step, within a container that xtask/src/service.rs boots with systemd.
# Ends with "all is well", or tells what is not and ends with 1.
disk=nbd+unix:///?socket=/run/urus/disk.sock
state=/var/lib/urus

fail() {
    echo "FAILED: $*"
    journalctl --no-pager --quiet --lines 60 --unit 'urus@*'
    exit 1
}

# The command succeeds; what it prints is shown if not.
must() {
    echo "+ $*"
    output=$(timeout 60 "$@" 2>&1) || fail "$* ended with $?: $output"
}

# Property $2 of unit $1 is $3.
is() {
    local value
    value=$(systemctl show --value --property "$2" "$1")
    [ "$value" = "$3" ] || fail "$2 of $1 is \"$value\", not \"$3\""
}

main_pid() {
    systemctl show --value --property MainPID "$1"
}

# Kills the server of unit $1; another takes its place within some seconds.
killed() {
    local before now
    before=$(main_pid "$1")
    echo "+ kill -9 $before"
    kill -9 "$before" || fail "$1 has no server"
    for _ in $(seq 100); do
        sleep 0.1
        now=$(main_pid "$1")
        if [ "$now" != "$before" ] && [ "$now" != 0 ] && systemctl --quiet is-active "$1"; then
            return
        fi
    done
    fail "$1 was not started again"
}

echo "== the units are understood and confined"
must systemd-analyze verify urus@disk.service urus@disk.socket
[ -z "$output" ] || fail "systemd-analyze verify: $output"
must urus create -f qcow2 $state/disk.qcow2 1G
# Exposure, in tenths: what is left is the network, the user and what is told in docs/SERVICE.md.
must systemd-analyze security --no-pager --threshold=25 urus@disk.service
echo "$output" | tail -n 1

echo "== the first connection starts the server, which says when it is ready"
must systemctl start urus@disk.socket
is urus@disk.socket SubState listening
is urus@disk.service ActiveState inactive
must nbdinfo --size "$disk"
[ "$output" = 1073741824 ] || fail "the disk has $output bytes"
is urus@disk.service ActiveState active
is urus@disk.service Type notify
is urus@disk.service StatusText "serving $state/disk.qcow2"
pid=$(main_pid urus@disk.service)
grep -qE '^CapEff:\s0+$' "/proc/$pid/status" || fail "the server has capabilities"
grep -qE '^Seccomp:\s2$' "/proc/$pid/status" || fail "nothing filters its system calls"
grep -qE '^NoNewPrivs:\s1$' "/proc/$pid/status" || fail "the server may get privileges"
must qemu-io -f raw -c 'write -P 7 1M 8M' -c flush "$disk"

echo "== stopped under load, it leaves a clean image"
upper=driver=raw,offset=512M,size=512M,file.driver=nbd,file.server.type=unix,file.server.path=/run/urus/disk.sock
timeout 60 qemu-img bench -w -c 10000000 -d 32 -s 4096 -S 69632 --image-opts $upper >/dev/null 2>&1 &
load=$!
sleep 2
kill -0 $load || fail "the load has ended by itself"
must systemctl stop urus@disk.socket urus@disk.service
wait $load && fail "the load did not notice the end"
is urus@disk.service Result success
is urus@disk.service ActiveState inactive
[ -e /run/urus/disk.sock ] && fail "the socket is left"
must qemu-img check $state/disk.qcow2
allocated=$(qemu-img map --output=json $state/disk.qcow2 | grep -c '"data": true')
[ "$allocated" -gt 1 ] || fail "the load has written nothing"

echo "== started anew, restarted, killed: the data is there"
must systemctl start urus@disk.socket
must qemu-io -f raw -r -c 'read -P 7 1M 8M' "$disk"
must systemctl restart urus@disk.service
must qemu-io -f raw -r -c 'read -P 7 1M 8M' "$disk"
must qemu-io -f raw -c 'write -P 9 32M 1M' -c flush "$disk"
killed urus@disk.service
must qemu-io -f raw -r -c 'read -P 7 1M 8M' -c 'read -P 9 32M 1M' "$disk"
must systemctl stop urus@disk.socket urus@disk.service
must qemu-img check $state/disk.qcow2

echo "== without the socket's unit; with options"
must urus create -f qcow2 $state/plain.qcow2 1G
must systemctl start urus@plain.service
beside=nbd+unix:///?socket=$state/plain.qcow2.nbd.sock
must nbdinfo --size "$beside"
killed urus@plain.service
must nbdinfo --size "$beside"
must systemctl stop urus@plain.service
disk=nbd+unix:///?socket=/run/urus/disk/nbd.sock
mkdir -p /etc/urus
echo 'URUS_OPTIONS=--cache none --num-queues 4 --nbd unix:/run/urus/disk/nbd.sock --control unix:/run/urus/disk/ctl.sock --metrics unix:/run/urus/disk/metrics.sock' >/etc/urus/disk.conf
must systemctl start urus@disk.service
must urus ctl stats /run/urus/disk/ctl.sock
must qemu-io -f raw -r -c 'read -P 7 1M 8M' "$disk"
# What a killed server leaves lying does not keep the next one from starting.
killed urus@disk.service
must urus ctl stats /run/urus/disk/ctl.sock
must qemu-io -f raw -r -c 'read -P 7 1M 8M' "$disk"
must systemctl stop urus@disk.service
is urus@disk.service Result success
must qemu-img check $state/disk.qcow2

echo "== as another user, by drop-ins"
must urus create -f qcow2 $state/own.qcow2 1G
mkdir -p /etc/systemd/system/urus@.service.d /etc/systemd/system/urus@.socket.d
printf '[Service]\nUser=daemon\n' >/etc/systemd/system/urus@.service.d/user.conf
printf '[Socket]\nSocketGroup=daemon\n' >/etc/systemd/system/urus@.socket.d/group.conf
must systemctl daemon-reload
must systemctl start urus@own.socket
[ "$(stat --format '%a %U:%G' /run/urus/own.sock)" = "660 root:daemon" ] || fail "the socket is for others"
must qemu-io -f raw -c 'write -P 5 0 1M' -c flush 'nbd+unix:///?socket=/run/urus/own.sock'
[ "$(stat --format %U "/proc/$(main_pid urus@own.service)")" = daemon ] || fail "the server is not the user's"
must systemctl stop urus@own.socket urus@own.service
must qemu-img check $state/own.qcow2

echo "== an image that is not there"
systemctl start urus@none.service 2>/dev/null && fail "it was served"
journalctl --no-pager --quiet --unit urus@none.service | grep -q "$state/none.qcow2: " || fail "the log does not name it"

echo "all is well"
