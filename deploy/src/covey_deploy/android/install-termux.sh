#!/bin/sh
# Installs covey's agent on an Android phone, in a Debian userland inside Termux. docs/android.md explains it.
#
#   sh install-termux.sh KIT DEVICE [RELEASE_KEY]
#
# KIT: a file of `covey bundle --target termux-debian-arm64`. DEVICE: the device's folder of `covey provision device`,
# with agent.toml in it. RELEASE_KEY: 64 hexadecimal digits; without it only damage of the kit is noticed.
# Again with a newer kit it upgrades. What DEVICE holds is secret: nothing of it is printed.
set -eu

NAME=covey                       # of the container
STATE=/var/lib/covey             # inside it, as in agent.toml
PAUSE_S=${COVEY_PAUSE_S:-15}     # before the agent is started again

fail() {
  echo "install-termux.sh: error: $1" >&2
  exit "${2:-3}"
}

[ $# -ge 2 ] || fail "give the kit and the device's folder" 2
kit=$1 device=$2 key=${3:-}
case "${PREFIX:-}" in
  */com.termux/files/usr) ;;
  *) fail "this is not Termux; on a computer or a Raspberry Pi the kit's own install.py is enough" ;;
esac
[ "$(uname -m)" = aarch64 ] || fail "this phone is $(uname -m); there are kits for aarch64 alone"
[ -f "$kit" ] || fail "there is no kit $kit" 2
[ -f "$device/agent.toml" ] || fail "$device holds no agent.toml" 2
python=$(tar -xOf "$kit" manifest.json | sed -n 's/^ *"python": "\([0-9.]*\)".*/\1/p')
case "$python" in
  3.11) suite=bookworm ;;
  3.13) suite=trixie ;;
  *) fail "the kit is for Python $python; make it with --target termux-debian-arm64" ;;
esac

# 1. what Termux lacks. termux-api is for [conditions]: it also needs the app Termux:API
for command in proot-distro termux-battery-status; do
  command -v "$command" >/dev/null || {
    echo "installing proot-distro and termux-api"
    pkg install -y proot-distro termux-api
    break
  }
done

# 2. a Debian of its own, so that nobody's other container is touched
inside() { proot-distro login "$NAME" -- "$@"; }
if ! inside true 2>/dev/null; then
  echo "installing a Debian $suite: about 150 MB"
  # proot-distro 5 takes images by name, 4 its own list
  proot-distro install --name "$NAME" "debian:$suite" 2>/dev/null ||
    proot-distro install --override-alias "$NAME" debian ||
    fail "proot-distro cannot install a Debian; is there a network?" 5
fi
if ! inside python3 -c 'import ssl, sqlite3' 2>/dev/null; then
  inside sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    python3 libstdc++6 ca-certificates >/dev/null' || fail "Debian's Python cannot be installed; is there a network?" 5
fi

# 3. the agent: the kit goes in by a pipe, so that no folder of the phone has to be shared with the container
inside sh -c 'umask 077; rm -rf /root/covey-kit; mkdir -p /root/covey-kit; cat >/root/covey-kit/some.kit' <"$kit"
inside sh -c 'cd /root/covey-kit && tar -xf some.kit install.py'
inside python3 /root/covey-kit/install.py /root/covey-kit/some.kit ${key:+--release-key "$key"}
inside rm -rf /root/covey-kit

# 4. what makes it this device
tar -C "$device" -cf - . | inside sh -c "umask 077; mkdir -p /etc/covey $STATE /var/lib/covey-data && tar -C /etc/covey -xf - \
  && chmod -R go= /etc/covey $STATE"

# 5. a start script, also for the app Termux:Boot. 2 and 3: a wrong configuration, which trying again does not mend
start="$HOME/.termux/boot/covey"
mkdir -p "$HOME/.termux/boot"
cat >"$start.new" <<START
#!$PREFIX/bin/sh
# written by covey's install-termux.sh: keeps the agent running. Its log is ~/covey.log
mkdir "\$HOME/.covey-runs" 2>/dev/null || {
  kill -0 "\$(cat "\$HOME/.covey-runs/pid" 2>/dev/null)" 2>/dev/null && exit 0   # it runs already
}
echo \$\$ >"\$HOME/.covey-runs/pid"
child=
ended() {
  [ -z "\$child" ] || { kill "\$child" 2>/dev/null && wait "\$child"; }
  rm -rf "\$HOME/.covey-runs"
  termux-wake-unlock 2>/dev/null
  exit "\$1"
}
trap 'ended 0' INT TERM
termux-wake-lock 2>/dev/null
while :; do
  [ "\$(wc -c 2>/dev/null <"\$HOME/covey.log" || echo 0)" -lt 1000000 ] || mv "\$HOME/covey.log" "\$HOME/covey.log.1"
  proot-distro login $NAME -- /usr/bin/env TERMUX_VERSION="\${TERMUX_VERSION:-unknown}" \\
    /opt/covey/bin/python -m covey_edge.launcher --state $STATE -- --config /etc/covey/agent.toml \\
    >>"\$HOME/covey.log" 2>&1 &
  child=\$!
  wait "\$child" && code=0 || code=\$?
  child=
  case \$code in 2 | 3) ended "\$code" ;; esac
  sleep $PAUSE_S
done
START
chmod 700 "$start.new"
mv "$start.new" "$start"

inside /opt/covey/bin/covey --version
cat <<END
start it now:        $start &
with every boot:     open the app Termux:Boot once
look at it:          proot-distro login $NAME -- /opt/covey/bin/covey agent status --config /etc/covey/agent.toml
the data belong to:  /var/lib/covey-data inside: proot-distro login $NAME
Android's settings, Apps, Termux, Battery: Unrestricted. Otherwise Android ends it (docs/android.md).
END
