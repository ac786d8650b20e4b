#!/usr/bin/env bash
# Put Apptainer on Debian 12, for the tests marked `container`. Debian has it in sid only, built against a newer libc than
# Debian 12's: its two programs are given a private copy of that libc, and nothing else of the system changes.
set -euo pipefail
[ "$(id -u)" -eq 0 ] || { echo "$0: needs root" >&2; exit 2; }

# Builds of a root that may not raise its limits run in a user namespace, which needs subordinate ids.
for file in /etc/subuid /etc/subgid; do grep -qs '^root:' "$file" || echo root:100000:65536 >> "$file"; done
if command -v apptainer >/dev/null; then apptainer --version; exit 0; fi

apt-get update -qq
apt-get install -y -qq --no-install-recommends patchelf squashfs-tools uidmap debootstrap libseccomp2 libsqlite3-0 \
  ca-certificates squashfuse fuse-overlayfs fakeroot >/dev/null
# shellcheck disable=SC2016  # apt-get's own variable
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 '/debian/$')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{state/lists/partial,cache/archives/partial,parts}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" > "$work/sources.list"
apt_sid() {  # apt-get that sees sid and leaves the system's own lists alone
  apt-get -o Dir::State="$work/state" -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache="$work/cache" \
    -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts="$work/parts" -o APT::Sandbox::User=root \
    -o Acquire::Languages=none "$@"
}
cd "$work"
apt_sid update -qq
apt_sid download -qq apptainer/sid libc6/sid
dpkg-deb -R apptainer_*.deb package
dpkg -x libc6_*.deb libc

private=/usr/lib/x86_64-linux-gnu/apptainer/glibc
mkdir -p "package$private"
for library in ld-linux-x86-64.so.2 libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 libresolv.so.2; do
  cp -L "libc/usr/lib/x86_64-linux-gnu/$library" "package$private/"
done
for program in package/usr/bin/apptainer package/usr/lib/x86_64-linux-gnu/apptainer/bin/starter; do
  patchelf --set-interpreter "$private/ld-linux-x86-64.so.2" \
    --force-rpath --set-rpath "$private:/usr/lib/x86_64-linux-gnu" "$program"
done
sed -i -E 's/^Depends:.*/Depends: ca-certificates, squashfs-tools, uidmap, libseccomp2, libsqlite3-0/
  s/^(Version: .*)/\1+private.libc/; /^(Recommends|Built-Using|Static-Built-Using):/d' package/DEBIAN/control
(cd package && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | xargs -0 md5sum > DEBIAN/md5sums)
dpkg-deb --root-owner-group -b package apptainer.deb >/dev/null
dpkg -i apptainer.deb >/dev/null
apptainer --version
