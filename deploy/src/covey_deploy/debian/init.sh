#!/bin/sh
# The first program of the machine: loads the modules of the disk, waits for the root file system, and makes way for systemd.
export PATH=/bin
busybox mount -t devtmpfs none /dev
busybox mount -t proc none /proc
busybox mount -t sysfs none /sys

while read -r name; do
  busybox insmod "/modules/$name" || echo "covey: the kernel does not take $name"
done < /modules.list

label= rest=
for word in $(busybox cat /proc/cmdline); do
  case "$word" in
    root=LABEL=*) label=${word#root=LABEL=} ;;
    panic=*) rest=${word#panic=} ;;
  esac
done

# Disks come when they come: 60 s and no more, so that who looks at the console sees why.
waited=0
while device=$(busybox findfs "LABEL=$label" 2>/dev/null); [ -z "$device" ]; do
  if [ "$waited" -ge 600 ]; then
    echo "covey: no file system is called $label"
    busybox sleep "${rest:-10}"
    busybox reboot -f
  fi
  busybox usleep 100000
  waited=$((waited + 1))
done

# read-only: systemd checks it, then makes it writable
busybox mount -t ext4 -o ro "$device" /root || { echo "covey: cannot mount $device"; busybox sleep 10; busybox reboot -f; }
busybox umount /sys
busybox umount /proc
busybox mount -o move /dev /root/dev
exec busybox switch_root /root /sbin/init
