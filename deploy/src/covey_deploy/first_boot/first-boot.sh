#!/bin/sh
# The first boot of a card that `covey flash` made (docs/flashing.md): from the FAT boot partition to a running agent.
#
#   first-boot.sh BOOT            does the work; BOOT is where the boot partition is mounted, such as /boot/firmware
#   first-boot.sh BOOT --service  only puts covey-first-boot.service in its place, which does the work at this boot
#                                 or the next, and again at every boot until it is done
#
# Every step can be cut off anywhere (power) and run again. What must be kept is synced before what it came from is
# wiped. Needs no network. Says what it does on standard output and in BOOT/covey/first-boot.log, which any computer
# with a card reader can show; neither holds a secret.
set -eu
umask 022 # what is secret is made private where it is written
export PATH="$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

UNIT="covey-first-boot.service"
STATE=/var/lib/covey-first-boot # what is done already; removed by nobody, so that a later look explains the device
CONFIG=/etc/covey
PREFIX=/opt/covey
NETWORKS=/etc/NetworkManager/system-connections

say() {
  echo "covey first boot: $*"
  echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $*" >>"$covey/first-boot.log" || true
}

is_done() { [ -e "$STATE/$1" ]; }

mark() { # durable only after all before it
  sync
  : >"$STATE/$1"
  sync
}

setting() { # NAME: its value in covey/settings, empty where it is not set
  sed -n "s/^$1=//p" "$covey/settings"
}

take() { # FROM TO OWNER: a private copy that is whole or not there; FROM stays
  install -m 600 -o "$3" -g "$3" "$1" "$2.part"
  sync
  mv "$2.part" "$2"
}

wipe() { # files of the FAT partition: overwritten in place, then removed
  for wiped in "$@"; do
    [ -f "$wiped" ] || continue
    shred -n 0 -z "$wiped"
    sync
    rm -f "$wiped"
  done
}

install_service() {
  cp "$covey/$UNIT" "/etc/systemd/system/$UNIT.part"
  chmod 644 "/etc/systemd/system/$UNIT.part"
  mv "/etc/systemd/system/$UNIT.part" "/etc/systemd/system/$UNIT"
  systemctl enable "$UNIT" 2>/dev/null
  systemctl daemon-reload || true
  sync
}

name_host() {
  name=$(setting hostname)
  [ -n "$name" ] || return 0
  echo "$name" >/etc/hostname.part
  mv /etc/hostname.part /etc/hostname
  hostname "$name" 2>/dev/null || true
  grep -v '^127\.0\.1\.1[[:space:]]' /etc/hosts >/etc/hosts.part || true
  printf '127.0.1.1\t%s\n' "$name" >>/etc/hosts.part
  mv /etc/hosts.part /etc/hosts
}

make_user() {
  mkdir -p /etc/sysusers.d
  chmod 755 /etc/sysusers.d
  # systemd-sysusers and not useradd: it leaves no lock file behind where the power is cut
  printf '%s\n' 'u covey - "covey agent" /var/lib/covey' >/etc/sysusers.d/covey.conf
  if getent group video >/dev/null; then # a Raspberry Pi's throttling is read as a member of it
    echo 'm covey video' >>/etc/sysusers.d/covey.conf
  fi
  chmod 644 /etc/sysusers.d/covey.conf
  systemd-sysusers /etc/sysusers.d/covey.conf
}

take_identity() {
  mkdir -p "$CONFIG"
  chmod 700 "$CONFIG"
  chown covey:covey "$CONFIG"
  for file in "$covey"/device/*; do
    take "$file" "$CONFIG/${file##*/}" covey
  done
}

take_data() {
  path=$(setting data_path)
  [ -n "$path" ] || return 0
  folder=${path%/*}
  if [ ! -d "$folder" ]; then # one that is there already is somebody else's: it stays as it is
    install -d -m 750 -o covey -g covey "$folder.part"
    mv "$folder.part" "$folder"
  fi
  for file in "$covey"/data/*; do
    if [ -f "$file" ]; then take "$file" "$path" covey; fi
  done
}

take_wifi() {
  [ -f "$covey/wifi.nmconnection" ] || return 0
  mkdir -p "$NETWORKS"
  chmod 700 "$NETWORKS"
  take "$covey/wifi.nmconnection" "$NETWORKS/covey-wifi.nmconnection" root
}

switch_wifi_on() { # Raspberry Pi OS blocks the radio until a country is set, which cmdline.txt does
  [ -e "$NETWORKS/covey-wifi.nmconnection" ] || return 0
  if command -v rfkill >/dev/null; then rfkill unblock wifi || true; fi
  for file in /var/lib/systemd/rfkill/*:wlan; do
    if [ -f "$file" ]; then echo 0 >"$file"; fi
  done
  if command -v nmcli >/dev/null; then
    nmcli --wait 10 radio wifi on >/dev/null 2>&1 || true
    nmcli --wait 10 connection reload >/dev/null 2>&1 || true
  fi
}

install_kit() {
  key=$(setting release_key)
  if ! python3 "$covey/kit/install.py" --prefix "$PREFIX" ${key:+--release-key "$key"} >"$STATE/install.log" 2>&1; then
    tail -n 5 "$STATE/install.log" | while read -r line; do say "install.py: $line"; done
    return 1
  fi
}

run_agent() {
  "$PREFIX/bin/covey" agent unit --config "$CONFIG/agent.toml" --install >"$STATE/unit.log" 2>&1 || {
    tail -n 5 "$STATE/unit.log" | while read -r line; do say "covey agent unit: $line"; done
    return 1
  }
  systemctl enable covey-agent.service 2>/dev/null
}

clear_card() { # the script last: while it is there, the service runs again
  rm -rf "$covey/kit" "$covey/device" "$covey/data"
  rm -f "$covey/settings" "$covey/$UNIT"
  sync
  rm -f "$covey/first-boot.sh"
  sync
  systemctl disable "$UNIT" 2>/dev/null || true
  rm -f "/etc/systemd/system/$UNIT"
  sync
}

step="putting its service in place"
# shellcheck disable=SC2317 # called by the trap
told() {
  code=$?
  if [ "$code" -ne 0 ]; then
    say "failed at: $step (exit code $code); it is tried again, at the latest at the next boot"
    sync
  fi
}

work() {
  mkdir -p "$STATE"
  if ! is_done finished; then
    if ! is_done identity; then
      step="taking the device's identity"
      say "$step"
      name_host
      make_user
      take_identity
      take_data
      take_wifi
      mark identity
    fi
    step="wiping secrets from the boot partition"
    wipe "$covey"/device/* "$covey"/data/* "$covey/wifi.nmconnection"
    switch_wifi_on
    if ! is_done installed; then
      step="installing the agent in $PREFIX"
      say "$step"
      install_kit
      mark installed
    fi
    step="making the agent's service"
    say "$step"
    run_agent
    mark finished
    say "done: covey-agent.service runs at every boot"
  fi
  step="clearing the boot partition"
  clear_card
  step="starting the agent"
  systemctl start --no-block covey-agent.service || say "the agent starts at the next boot"
}

main() {
  boot=${1:?"usage: first-boot.sh BOOT [--service]"}
  covey=$boot/covey
  trap told EXIT
  case "${2:-}" in
    --service) install_service ;;
    "") work ;;
    *) echo "first-boot.sh: $2 is not known; usage: first-boot.sh BOOT [--service]" >&2; exit 2 ;;
  esac
}

main "$@"
exit 0 # the shell reads no further in a file that is gone
